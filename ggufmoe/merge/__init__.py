"""Recipes become merged models: recipe, router, forward pass."""
