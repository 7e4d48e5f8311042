"""A function of no arguments as a CUDA graph: one launch on the host instead of a thousand."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

Result = TypeVar("Result")


# One for each device and for all graphs. Of high priority: PyTorch deals streams of one priority out in turns, 32 of
# them, and another thread's must never be the one that is being recorded.
_recording: dict[torch.device, torch.cuda.Stream] = {}


def shared_pool(device: torch.device) -> Any:
    """Memory for graphs that never run at the same time and leave nothing for one another; None on a CPU."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


class Graphed(Generic[Result]):
    """Calls a function, on a GPU by replaying what its first call recorded.

    Moshi's own `CUDAGraphed` records with all threads held to the rules of recording; here only the recording thread
    is, since another one decodes audio meanwhile. On a CPU the function is called as it is.

    Args:
        function: reads and writes tensors that stay where they are, waits for nothing, and does the same when it is
            called twice in a row (the first recording is preceded by a call, in which libraries make their work
            spaces). Its result is overwritten by the next call.
        device: that it computes on.
        pool: of memory, from `shared_pool`, that several functions use in turn.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device, pool: Any = None) -> None:
        self._function, self._device, self._pool = function, device, pool
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Result | None = None

    def __call__(self) -> Result:
        if self._device.type != "cuda":
            return self._function()
        if self._graph is None:
            with torch.cuda.device(self._device):
                if self._device not in _recording:
                    _recording[self._device] = torch.cuda.Stream(priority=-1)
                side = _recording[self._device]
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    self._function()
                torch.cuda.current_stream().wait_stream(side)
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, self._pool, side, capture_error_mode="thread_local"):
                    self._result = self._function()
        self._graph.replay()
        return self._result  # type: ignore[return-value]
