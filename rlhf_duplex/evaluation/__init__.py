"""Evaluation: metrics of each axis with their intervals, and the held-out suite."""
