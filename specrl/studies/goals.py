"""The budget of a trial and its measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from specrl.core.checks import require
from specrl.core.plan import parse_plans
from specrl.core.statistics import Interval, mean_interval

BY_BLOCK = ("speedup", "accept_length", "share", "end", "regret")  # objectives that are measured block by block
LEVELS = {"accept_length": "requests_to_accept_length", "speedup": "seconds_to_speedup"}  # level: objective

OnBlock = Callable[[int, float], None]  # called with the number and the value of a block of the first objective


@dataclass(frozen=True)
class Budget:
    """Requests, rounds and blocks of one trial.

    Args:
        requests: live: requests to serve and learn from.
        batch_sizes: live: at which the result is measured against plain decoding, on held-out prompts.
        blocks: live: paired blocks measured at each batch size.
        plan: live: the plan to measure; by default the one chosen for each batch size while serving.
        rounds: simulated: rounds of each simulation.
        seeds: simulated: simulations on each profile, with the same random numbers in every trial.

    Raises:
        ValueError: a number out of range, or no plan.
    """

    requests: int = 400
    batch_sizes: tuple[int, ...] = (1, 4)
    blocks: int = 12
    plan: str | None = None
    rounds: int = 1200
    seeds: int = 6

    def __post_init__(self) -> None:
        for name, minimum in {"requests": 1, "rounds": 1, "blocks": 2, "seeds": 2}.items():
            require(getattr(self, name) >= minimum, f"budget.{name}", f"at least {minimum}", getattr(self, name))
        require(min(self.batch_sizes) >= 1, "budget.batch_sizes", "at least 1", self.batch_sizes)
        if self.plan is not None:
            parse_plans(self.plan)


class NotReached(Exception):
    """The trial did not reach a level that an objective of the study waits for."""


@dataclass(slots=True)
class Measured:
    """The measurements of a trial.

    Attributes:
        values: by name, in the units of `docs/guides/studies.md`.
        intervals: 95 %, of the values that are measured in blocks.
        blocks: [n] each, of the same values; logarithms of speedups, other values as they are.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    blocks: dict[str, list[float]] = field(default_factory=dict)


def measure_blocks(blocks: Iterable[Mapping[str, float]], objective: str, on_block: OnBlock | None) -> Measured:
    """Measure values block by block.

    Every trial of a study measures the same blocks: live, the same prompts in turns with plain decoding; in simulation,
    the same random numbers. Trials are therefore compared block by block.

    Args:
        blocks: values by name, with the logarithm of a speedup.
        objective: name of the value that `on_block` gets.
        on_block: called after each block.

    Returns:
        The mean of each value over the blocks, or the geometric mean of speedups.
    """
    measured = Measured()
    for number, block in enumerate(blocks):
        for name, value in block.items():
            measured.blocks.setdefault(name, []).append(value)
        if on_block is not None and objective in block:
            on_block(number, block[objective])
    for name, samples in measured.blocks.items():
        mean = mean_interval(samples, rng=np.random.default_rng(0))
        if name == "speedup":
            with np.errstate(over="ignore"):
                mean = Interval(*np.exp([mean.value, mean.low, mean.high]).tolist())
        measured.values[name], measured.intervals[name] = mean.value, mean
    return measured
