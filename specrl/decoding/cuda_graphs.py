"""Functions of fixed shapes, captured once as CUDA graphs and replayed; on a CPU they are simply called."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")
_WARM_UPS = 2  # before a capture: libraries choose their kernels and take their workspaces


class Graphs:
    """CUDA graphs by key, the least recently used given up first.

    A function is captured as it is: it reads and writes memory that stays where it is, moves nothing between host and
    device and waits for nothing. It may run again with the same inputs and come to the same, for a capture runs it.
    What it returns lies in the pool that all graphs share, and holds until another graph replays. So what one graph
    leaves for another, it copies to memory from outside.

    Args:
        device: of everything; only on a CUDA device is anything captured.
        most: graphs kept.
        pool: memory to share with the graphs of others (`torch.cuda.graph_pool_handle`); None: its own.
    """

    def __init__(self, device: str, *, most: int = 256, pool: Any = None) -> None:
        if most < 1:
            raise ValueError(f"most must be at least 1 graph, but got {most}")
        self.captures = str(device).startswith("cuda")
        self._device, self._most, self._pool = device, most, pool
        self._held: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return not self.captures or key in self._held

    def capture(self, key: Hashable, function: Callable[[], object]) -> None:
        """Run `function` and hold it as a graph, unless that is done; nothing on a CPU. Not for a timed window."""
        if key in self:
            return
        with torch.cuda.device(self._device):
            side, ours = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(ours)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    function()
            ours.wait_stream(side)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            while len(self._held) >= self._most:
                self._held.popitem(last=False)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # a learner may go on
                out = function()
            self._held[key] = graph, out
            graph.replay()  # a capture computes nothing: what the next function reads is there from here on

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """What `function` returns: by its graph where one is held, else by calling it."""
        if key not in self._held:
            return function()
        graph, out = self._held[key]
        self._held.move_to_end(key)
        graph.replay()
        return out

    def clear(self) -> None:
        """Let go of every graph and its memory."""
        self._held.clear()
