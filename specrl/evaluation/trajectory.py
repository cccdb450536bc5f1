"""The rounds of one chooser, and the values of plans that are estimated from them. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan
from specrl.core.rollout import Step

PLAIN = "plain"  # the trajectory of plain decoding
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
        """The trajectory of a rollout's steps."""
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
        return Trajectory(
            self.batch_sizes[part], self.choices[part], self.tokens[part], self.seconds[part], self.counted[part]
        )

    def at(self, batch_size: int) -> NDArray[np.bool_]:
        """[R] bool: the counted rounds at a batch size."""
        return self.counted & (self.batch_sizes == batch_size)

    def step_seconds(self) -> dict[int, float]:
        """Mean seconds of a counted round by batch size; of plain decoding, t0."""
        sizes = np.unique(self.batch_sizes[self.counted]).tolist()
        return {size: float(self.seconds[self.at(size)].mean()) for size in sizes}

    def speedup(self, plain: Trajectory) -> float:
        """Speedup Σ N · t0(B) / B ÷ Σ Δt of the counted rounds, t0 from a trajectory of plain decoding."""
        t0 = plain.step_seconds()
        plain_s = sum(self.tokens[self.at(size)].sum() * step_s / size for size, step_s in t0.items())
        return float(plain_s / self.seconds[self.counted].sum())


def block_speedups(plain: Trajectory, other: Trajectory, rounds: int) -> Floats:
    """[blocks] speedup of each block of `rounds` rounds, t0 from the same block of plain decoding."""
    blocks = [slice(begin, begin + rounds) for begin in range(0, len(other), rounds)]
    return np.array([other[block].speedup(plain[block]) for block in blocks])


class PlanSeconds(NamedTuple):
    """Mean seconds by plan, along the last axis.

    Attributes:
        plain_s: that plain decoding takes for the tokens of one round, E[N] · t0(B) / B.
        round_s: of the round, T(B, plan).
    """

    plain_s: Floats
    round_s: Floats


def plan_seconds(trajectories: Mapping[str, Trajectory], plans: Sequence[Plan], sizes: Sequence[int]) -> PlanSeconds:
    """[sizes, plans] from the trajectories of the plans, by their names, and of plain decoding."""
    t0 = trajectories[PLAIN].step_seconds()
    out = PlanSeconds(np.empty((len(sizes), len(plans))), np.empty((len(sizes), len(plans))))
    for j, plan in enumerate(plans):
        trajectory = trajectories[str(plan)]
        for i, batch in enumerate(sizes):
            rounds = trajectory.at(batch)
            out.plain_s[i, j] = trajectory.tokens[rounds].mean() * t0[batch] / batch
            out.round_s[i, j] = trajectory.seconds[rounds].mean()
    return out
