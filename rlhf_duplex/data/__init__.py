"""From recordings and conversations to training data: segments and preference pairs."""
