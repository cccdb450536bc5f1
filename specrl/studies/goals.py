"""The goals of a study and the measurements of a trial: the values that pass between a study and its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

import numpy as np

from specrl.core.plan import parse_plans
from specrl.core.statistics import Interval, mean_interval

BY_BLOCK = ("speedup", "accept_length", "share", "end", "regret")  # objectives that are measured block by block
LEVELS = {"accept_length": "requests_to_accept_length", "speedup": "seconds_to_speedup"}  # level: objective


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
    """

    requests: int = 400
    batch_sizes: tuple[int, ...] = (1, 4)
    blocks: int = 12
    plan: str | None = None
    rounds: int = 1200
    seeds: int = 6

    def __post_init__(self) -> None:
        if min(self.requests, self.rounds, *self.batch_sizes) < 1 or min(self.blocks, self.seeds) < 2:
            raise ValueError(
                "budget must have requests, rounds and batch_sizes of at least 1, blocks and seeds of at least 2, but "
                f"got {asdict(self)}"
            )
        if self.plan is not None:
            parse_plans(self.plan)


class Goals(Protocol):
    """The settings of a study that its trials use."""

    @property
    def objectives(self) -> tuple[str, ...]:
        """Names of the values to optimise."""
        ...

    @property
    def levels(self) -> Mapping[str, float]:
        """Levels that objectives wait for, by quantity."""
        ...

    @property
    def constraints(self) -> Mapping[str, float]:
        """Greatest allowed values by name."""
        ...

    @property
    def budget(self) -> Budget:
        """The size of one trial."""
        ...


OnBlock = Callable[[int, float], None]


class NotReached(Exception):
    """The trial did not reach a level that an objective of the study waits for."""


@dataclass(slots=True)
class Measured:
    """The measurements of a trial.

    Every trial of a study measures the same blocks: live, the same prompts in turns with plain decoding; in simulation,
    the same random numbers. Trials are therefore compared block by block.

    Attributes:
        values: by name, in the units of `docs/guides/studies.md`.
        intervals: 95 %, of the values that are measured in blocks.
        blocks: [n] each, of the same values; logarithms of speedups, other values as they are.
    """

    values: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    blocks: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, samples: list[float]) -> None:
        """Add a value that is measured in blocks: the mean of `samples`, or the geometric mean of speedups."""
        mean = mean_interval(samples, rng=np.random.default_rng(0))
        if name == "speedup":
            with np.errstate(over="ignore"):
                mean = Interval(*np.exp([mean.value, mean.low, mean.high]).tolist())
        self.values[name], self.intervals[name], self.blocks[name] = mean.value, mean, samples
