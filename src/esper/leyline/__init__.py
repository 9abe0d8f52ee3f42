"""Contracts: stages, transitions, actions, sites, slot tensors, configuration. Imports nothing of ours."""
