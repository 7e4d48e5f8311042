"""The policy: bundles, the codec, sampling, and Moshi acting and being evaluated."""

import os

import torch

# Moshi compiles small functions (norms, gates, rotary embeddings) for each new shape. On a CPU that takes minutes,
# needs a C compiler, and gains nothing at the nano model's sizes. On a GPU frames are CUDA graphs, which gain nothing
# either, and one thread must not compile while another one plays (Dynamo's flags are the process') or records a graph
# (tuning kernels synchronises the device). Moshi reads this when it is first imported.
os.environ.setdefault("NO_TORCH_COMPILE", "1")
# On Hopper PyTorch prefers cuDNN's attention, which makes a plan for each new shape, half a second each, and is not
# sound in CUDA graphs and behind masks (pytorch 167101, 169849). Flash and memory-efficient kernels take its place.
torch.backends.cuda.enable_cudnn_sdp(False)
