"""Does memory grow from update to update?"""

import ctypes
import gc
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console

from envs.segments import read_manifest, write_manifest
from rlhf_duplex.config import load_config
from rlhf_duplex.inputs import NANO_DATA, load_inputs
from rlhf_duplex.run_folder import prepare_run_dir
from rlhf_duplex.trainer import Trainer


def peak_memory_mb(device: torch.device) -> float:
    """The most that this process has held so far: on the GPU where there is one, else resident in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def memory_mb(device: torch.device) -> float:
    """What this process holds now, without what its allocator keeps for later (tens of MB that come and go)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss / 2**20


def growth(updates: int, device: torch.device, advance: Callable[[float], None]) -> dict[str, float | list[float]]:
    """Small updates of nano, rollouts and all, on the shortest held-out segment of each axis.

    Args:
        updates: how many.
        device: of the policy.
        advance: called after each.

    Returns:
        `mb`: what the process held after each; `mb_per_update`: the slope of its second half (least squares).
    """
    segments = read_manifest(NANO_DATA / "heldout" / "segments.jsonl")
    axes = sorted({segment.axis for segment in segments})
    shortest = [min((s for s in segments if s.axis == axis), key=lambda s: s.duration) for axis in axes]
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "segments.jsonl"
        write_manifest(manifest, shortest)
        config = load_config(
            None,
            [
                f"run_dir={folder}/run",
                f"segments={manifest}",
                f"device={device}",
                f"trainer.updates={updates}",
                "trainer.groups=2",
                "trainer.group_size=2",
                "trainer.minibatch=4",
                "trainer.microbatch=2",
                "optimiser.learning_rate=1e-5",
                "context.probability=0",
            ],
        )
        trainer = Trainer(config, load_inputs(config), prepare_run_dir(config), Console(quiet=True))
        held = []
        for _ in range(updates):
            trainer.step()
            held.append(memory_mb(device))
            advance(1)
    half = np.array(held[len(held) // 2 :])
    slope = float(np.polyfit(np.arange(len(half)), half, 1)[0]) if len(half) > 1 else 0.0
    return {"mb": held, "mb_per_update": slope}
