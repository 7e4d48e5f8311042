"""Recipes that produce something: models, runs, benchmarks."""
