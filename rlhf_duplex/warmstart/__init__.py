"""Warm start: preference optimisation offline (DPO-LN and its relatives) on pairs of dialogues, through TRL."""
