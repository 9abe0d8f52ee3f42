"""Decisions: controllers and what they see."""
