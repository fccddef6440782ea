"""Fitting: recipes, data, caches, search, evaluation."""
