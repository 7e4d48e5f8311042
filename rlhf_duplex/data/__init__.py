"""From recordings and logs to training data: segments and preference pairs."""
