"""Work on the cores of a CPU: independent parts side by side, each operation on one core.

An operation of a small model takes a tenth of a millisecond. OpenMP's threads wait for one another after each, which
gains little on a quiet machine and costs tenfold on a shared one. Parts that need nothing of each other (dialogues to
decode, microbatches) do not wait, stay in their own core's cache, and give the same result on any number of cores.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


def cores() -> int:
    """Cores that this process may use; `OMP_NUM_THREADS` lowers it, as it does for PyTorch's operations."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(available, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else available


@contextmanager
def one_core_operations(device: torch.device) -> Iterator[None]:
    """On a CPU, each operation on one core while this lasts."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def map_on_cores(function: Callable[[Part], Result], parts: Iterable[Part], device: torch.device) -> Iterator[Result]:
    """The function's results in the order of the parts; on a CPU, parts side by side on its cores."""
    parts = list(parts)
    if device.type != "cpu" or cores() == 1 or len(parts) < 2:
        with one_core_operations(device):
            yield from map(function, parts)
        return
    with one_core_operations(device), ThreadPoolExecutor(min(cores(), len(parts))) as pool:
        yield from pool.map(function, parts)
