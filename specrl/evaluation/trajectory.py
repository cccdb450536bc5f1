"""The rounds of one chooser, and the expected seconds of plans. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from specrl.core.interfaces import Session
from specrl.core.plain_cost import PlainEstimate
from specrl.core.plan import PLAIN, Plan
from specrl.core.rollout import Step
from specrl.core.round import Round

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_NEWEST = 0.1  # weight of the newest plain round in the moving average


class PlainSeconds:
    """Seconds of a plain step by batch size (a `specrl.core.rollout.Baseline`).

    Args:
        seconds: batch size -> seconds; may be empty if `add` is called.
    """

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        self._seconds = dict(seconds or {})

    def add(self, done: Round) -> None:
        """Add a round of plain decoding to the moving average of its batch size."""
        before = self._seconds.get(done.batch_size, done.seconds)
        self._seconds[done.batch_size] = before + _NEWEST * (done.seconds - before)

    def update(self, session: Session, context: float) -> None:
        """Do nothing: plain decoding is not measured between the rounds of choosers."""

    def estimate(self, batch_size: int, context: float) -> PlainEstimate:
        """Return the seconds of a plain step at this batch size, at any context."""
        return PlainEstimate(self._seconds[batch_size], 0.0, 1)


@dataclass(frozen=True)
class Trajectory:
    """R rounds of one chooser.

    Attributes:
        batch_sizes: [R] int64.
        choices: [R] int64, index of the plan; -1 in plain decoding.
        tokens: [R] int64, committed and kept, of all requests.
        seconds: [R] float64.
        counted: [R] bool; False for rounds that only warm up the caches after another session's turn.
    """

    batch_sizes: Ints
    choices: Ints
    tokens: Ints
    seconds: Floats
    counted: NDArray[np.bool_]

    @staticmethod
    def of(steps: Sequence[Step], plans: Sequence[Plan], counted: Sequence[bool] | None = None) -> Trajectory:
        """Return the trajectory of a rollout's steps; None: all are counted."""
        index = {plan: i for i, plan in enumerate(plans)}
        rounds = [step.round for step in steps]
        return Trajectory(
            np.array([done.batch_size for done in rounds]),
            np.array([index.get(done.plan, -1) for done in rounds]),
            np.array([int(done.tokens.sum()) for done in rounds]),
            np.array([done.seconds for done in rounds]),
            np.ones(len(rounds), dtype=np.bool_) if counted is None else np.array(counted),
        )

    def __len__(self) -> int:
        return len(self.seconds)

    def __getitem__(self, part: slice) -> Trajectory:
        return Trajectory(*(getattr(self, field.name)[part] for field in fields(self)))

    def at(self, batch_size: int) -> NDArray[np.bool_]:
        """Return which rounds are counted and at this batch size: [R] bool."""
        return self.counted & (self.batch_sizes == batch_size)

    def step_seconds(self) -> dict[int, float]:
        """Return the mean seconds of a counted round by batch size; this is t0 if decoding is plain."""
        sizes = np.unique(self.batch_sizes[self.counted]).tolist()
        return {size: float(self.seconds[self.at(size)].mean()) for size in sizes}

    def block_speedups(self, plain: Trajectory, rounds: int) -> Floats:
        """Return the speedup Σ N · t0(B) / B ÷ Σ Δt of each block of `rounds` rounds: [blocks] float64.

        t0 is from the same block of plain decoding.
        """
        speedups = []
        for begin in range(0, len(self), rounds):
            block, plain_block = (t[begin : begin + rounds] for t in (self, plain))
            t0 = plain_block.step_seconds()
            plain_s = sum(block.tokens[block.at(size)].sum() * step_s / size for size, step_s in t0.items())
            speedups.append(plain_s / block.seconds[block.counted].sum())
        return np.array(speedups)


@dataclass(frozen=True)
class PlanSeconds:
    """Mean seconds of every plan in R rows: rounds, or batch sizes. Choices are indices of plans, one for each row.

    Attributes:
        plain_s: [R, plans] seconds that plain decoding takes for the tokens of one round, E[N] · t0(B) / B.
        round_s: [R, plans] seconds of the round, T(B, plan).
    """

    plain_s: Floats
    round_s: Floats

    def __getitem__(self, rows: slice | Ints) -> PlanSeconds:
        return PlanSeconds(self.plain_s[rows], self.round_s[rows])

    @property
    def speedups(self) -> Floats:
        """Speedup of every plan in each row: [R, plans] float64."""
        return self.plain_s / self.round_s

    def best_table(self) -> Ints:
        """Return the best plan of each row: [R] int64."""
        return self.speedups.argmax(1)

    def best_plan(self) -> Ints:
        """Return the plan that is best over all rows, repeated for each row: [R] int64."""
        return np.full(len(self.plain_s), (self.plain_s.sum(0) / self.round_s.sum(0)).argmax())

    def speedup(self, choices: Ints) -> float:
        """Return the speedup of the choices over all rows."""
        rows = np.arange(len(choices))
        return float(self.plain_s[rows, choices].sum() / self.round_s[rows, choices].sum())

    def share(self, choices: Ints) -> float:
        """Return the seconds that the best plan of each row needs for the same tokens, over those of the choices."""
        rows = np.arange(len(choices))
        best_s = self.plain_s[rows, choices] / self.speedups.max(1)
        return float(best_s.sum() / self.round_s[rows, choices].sum())

    def regret(self, choices: Ints) -> Floats:
        """Return the cumulative regret in rounds, Σ 1 - v / v*, of speedup v and the best speedup v*: [R] float64."""
        chosen = self.speedups[np.arange(len(choices)), choices]
        return np.asarray((1.0 - chosen / self.speedups.max(1)).cumsum())


def plan_seconds(trajectories: Mapping[str, Trajectory], plans: Sequence[Plan], sizes: Sequence[int]) -> PlanSeconds:
    """Return [sizes, plans] from the trajectories of the plans, by their names, and of plain decoding."""
    t0 = trajectories[PLAIN].step_seconds()
    plain_s, round_s = np.empty((2, len(sizes), len(plans)))
    for j, plan in enumerate(plans):
        trajectory = trajectories[str(plan)]
        for i, size in enumerate(sizes):
            rounds = trajectory.at(size)
            plain_s[i, j] = trajectory.tokens[rounds].mean() * t0[size] / size
            round_s[i, j] = trajectory.seconds[rounds].mean()
    return PlanSeconds(plain_s, round_s)
