"""Blueprints: what a seed can be."""
