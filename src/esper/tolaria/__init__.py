"""Execution: tasks, data, population training, evaluation, contributions."""
