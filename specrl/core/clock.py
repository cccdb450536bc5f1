"""Clocks: all time in specrl is read through one of these."""

from __future__ import annotations

import time
from typing import Protocol

from specrl.core.checks import require


class Clock(Protocol):
    """Seconds on a monotonic axis of arbitrary origin."""

    def now(self) -> float:
        """Seconds now, after all work given to the device so far is done."""


class WallClock:
    """The machine's monotonic clock, read after the device has finished its queue.

    Args:
        device: 'cpu' (nothing to wait for) or a CUDA device, synchronised before every reading.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._cuda = str(device).startswith("cuda")

    def now(self) -> float:
        """Seconds of `time.perf_counter`, device-synchronised."""
        if self._cuda:
            import torch

            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class VirtualClock:
    """A clock that moves only in `advance`: deterministic time for simulation and tests."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Let `seconds` (not negative) pass."""
        require(seconds >= 0.0, "seconds", "at least 0", seconds)
        self._now_s += seconds
