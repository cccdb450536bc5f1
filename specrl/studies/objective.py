"""What a study's trial comes to.

Every trial of a study measures the same blocks: the same prompts against plain decoding live, the same luck in
simulation. What a block came to is told as soon as it is known, so that a trial can be given up half-way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from specrl.core.statistics import Interval, mean_interval

OnBlock = Callable[[int, float], None]  # a block's number, and what it came to; what it raises ends the trial


class NotReached(Exception):
    """A level that the study waits for was not reached within the trial's budget."""


@dataclass(slots=True)
class Measured:
    """What a trial came to.

    Attributes:
        values: by name; all that its kind of trial knows.
        intervals: 95 %, of those that are known block by block.
        blocks: by name, [n] each: logs of speedups, otherwise as they are.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    blocks: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, samples: list[float]) -> None:
        """Take the blocks of a name and their mean, of speedups the geometric one."""
        log = name == "speedup"
        found = mean_interval(samples, rng=np.random.default_rng(0))
        ends = [found.value, found.low, found.high]
        with np.errstate(over="ignore"):
            value, low, high = np.exp(ends).tolist() if log else ends
        self.values[name], self.intervals[name], self.blocks[name] = value, Interval(value, low, high), samples
