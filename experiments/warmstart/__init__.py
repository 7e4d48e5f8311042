"""The warm start's experiments: losses side by side, and RL with and without a warm start."""
