"""Ablations that were run, and how they compare with the papers."""
