"""A clock for what must not count: a test makes it long, so that no slow machine can be taken for it."""

from __future__ import annotations

from specrl.core.clock import WallClock


class Ahead:
    """The wall clock, put forward by as many seconds as a test says."""

    def __init__(self) -> None:
        self._wall, self._ahead_s = WallClock(), 0.0

    def now(self) -> float:
        return self._wall.now() + self._ahead_s

    def advance(self, seconds: float) -> None:
        self._ahead_s += seconds
