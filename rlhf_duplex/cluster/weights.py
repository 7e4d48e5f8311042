"""A collective broadcast of the learner's weights to the rollout workers, in a process group of its own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def _failures_raise() -> Iterator[None]:
    """NCCL groups that are made meanwhile tell of a lost member where they are waited for, as gloo's do.

    By default `wait` does not wait, and a watchdog ends the whole process, the learner with its unsaved updates. Groups
    that overlap with computation (FSDP's) stay as they are: PyTorch reads the variable when a group is made.
    """
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


class Broadcast:
    """One sender (rank 0) and those who receive; NCCL between GPUs, gloo between CPUs.

    It stands beside the learners' own group, so that the workers can come and go: whoever is there meets anew.

    Args:
        rank, world: 0 sends.
        address: `host:port` on which rank 0 keeps the store that they meet at.
        device: of the weights.
        timeout: seconds that one waits for the others.
    """

    def __init__(self, rank: int, world: int, address: str, device: str, timeout: float) -> None:
        host, _, port = address.rpartition(":")
        limit = timedelta(seconds=timeout)
        self.device = torch.device(device)
        self._store = dist.TCPStore(host, int(port), world, rank == 0, limit)  # lives as long as the group
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            with _failures_raise():
                self._group: Any = dist.ProcessGroupNCCL(self._store, rank, world, options)
        else:
            self._group = dist.ProcessGroupGloo(self._store, rank, world, limit)

    def send(self, value: torch.Tensor) -> None:
        """Give a tensor to all others."""
        self._run(value.to(self.device).contiguous())

    def receive(self, into: torch.Tensor) -> None:
        """Take the sender's tensor, of the same shape and type."""
        value = torch.empty_like(into, device=self.device)
        self._run(value)
        with torch.no_grad():
            into.copy_(value)

    def _run(self, value: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([value], options).wait()
