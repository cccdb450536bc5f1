"""Changes of costs and acceptance during a simulated session."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Shift:
    """A change of costs and acceptance from round `at` of a session on.

    Args:
        at: number of the round.
        cost: factor on the seconds of plans with at least `from_steps` steps.
        from_steps: see `cost`.
        log_odds: added to the log-odds of acceptance.

    Raises:
        ValueError: a number out of range.
    """

    at: int
    cost: float = 1.0
    from_steps: int = 1
    log_odds: float = 0.0

    def __post_init__(self) -> None:
        if self.at < 0 or self.from_steps < 0 or not 0.0 < self.cost < math.inf or not math.isfinite(self.log_odds):
            raise ValueError(f"a shift needs at, from_steps >= 0, a cost above 0 and finite log_odds, but got {self}")


def cost_factor(shifts: Sequence[Shift], rounds: Ints | int, num_steps: Ints | int) -> NDArray[np.float64]:
    """Return the factor on the seconds of plans with `num_steps` steps after `rounds` rounds; arrays broadcast."""
    factor = np.ones(())
    for shift in shifts:
        hit = np.logical_and(np.greater_equal(rounds, shift.at), np.greater_equal(num_steps, shift.from_steps))
        factor = factor * np.where(hit, shift.cost, 1.0)
    return factor


def log_odds_change(shifts: Sequence[Shift], rounds: Ints | int) -> NDArray[np.float64]:
    """Return the change of the log-odds after `rounds` rounds."""
    return sum((np.where(np.greater_equal(rounds, shift.at), shift.log_odds, 0.0) for shift in shifts), np.zeros(()))


def parse_shifts(text: str) -> tuple[Shift, ...]:
    """Read shifts from text such as 'at=1200,cost=1.3,from_steps=3;at=1800,log_odds=-0.5'.

    Raises:
        ValueError: another form, or a number out of range.
    """
    shifts = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        numbers = dict(re.findall(r"\b(at|cost|from_steps|log_odds)=(-?[0-9.]+)", part))
        if "at" not in numbers or len(numbers) != part.count("="):
            raise ValueError(f"a shift is written 'at=1200,cost=1.3,from_steps=3,log_odds=-0.5', but got {part!r}")
        at, steps = int(numbers["at"]), int(numbers.get("from_steps", 1))
        shifts.append(Shift(at, float(numbers.get("cost", 1.0)), steps, float(numbers.get("log_odds", 0.0))))
    return tuple(shifts)
