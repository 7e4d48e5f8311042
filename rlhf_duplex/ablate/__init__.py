"""Ablations: what varies, the trials that this makes, running them, the table and what it says."""
