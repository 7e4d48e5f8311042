"""Who does the work of a run: in the process itself, or rollout workers and learners on Ray."""
