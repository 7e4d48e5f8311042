"""The policy: bundles, the codec, sampling, and Moshi acting and being evaluated."""

import os

import torch

if not torch.cuda.is_available():
    # Moshi compiles small functions (norms, gates, rotary embeddings) for each new shape. On a CPU that takes minutes,
    # needs a C compiler, and gains nothing at the nano model's sizes. It reads this when it is first imported.
    os.environ.setdefault("NO_TORCH_COMPILE", "1")
