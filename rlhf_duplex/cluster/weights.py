"""A collective broadcast of the learner's weights to the rollout workers, in a process group of its own."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


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
