"""Recipes: whole jobs, each readable from top to bottom."""
