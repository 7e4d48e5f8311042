"""PPO beside GRPO and its family on nano, at equal seconds of audio."""
