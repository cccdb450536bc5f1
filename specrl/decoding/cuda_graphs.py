"""Functions of fixed shapes, captured once as CUDA graphs and replayed; on a CPU they are simply called."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_WARM_UPS = 2  # runs before a capture, in which libraries choose kernels and allocate workspaces


class Graphs:
    """CUDA graphs by key; the least recently used one is dropped first.

    A captured function must read and write static memory only, must not synchronise or copy from or to the host, and
    must be idempotent, because capturing runs it. Its result is in memory that all graphs share, and is valid until
    another graph replays. Values that another graph reads must be copied to memory allocated outside.

    Args:
        device: device of all tensors; functions are captured on CUDA devices only.
        max_graphs: the largest number of graphs, at least 1.
        pool: memory shared with other graphs (`torch.cuda.graph_pool_handle`); None: separate memory.
    """

    def __init__(self, device: str, *, max_graphs: int = 256, pool: Any = None) -> None:
        self.captures = str(device).startswith("cuda")
        self._device, self._max_graphs, self._pool = device, max_graphs, pool
        self._held: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return not self.captures or key in self._held

    def capture(self, key: Hashable, function: Callable[[], object]) -> None:
        """Run `function` and store it as a graph, unless there is one; slow. Does nothing on a CPU."""
        if key in self:
            return
        with torch.cuda.device(self._device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function()
            current.wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            while len(self._held) >= self._max_graphs:
                self._held.popitem(last=False)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # other threads may run
                out = function()
            self._held[key] = graph, out
            graph.replay()  # a capture computes nothing, but the next function reads the results

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """Return the result of `function`, by replaying its graph if there is one."""
        if key not in self._held:
            return function()
        graph, out = self._held[key]
        self._held.move_to_end(key)
        graph.replay()
        return out

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._held.clear()
