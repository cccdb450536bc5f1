"""Rewards of a round, from its tokens, its seconds and the cost of plain decoding.

A round commits N tokens for B live requests in Δt seconds. Plain decoding, with t0 seconds for a step, would have taken
N·t0/B for these tokens. The speedup of a run is the ratio of sums S = Σ N·t0/B ÷ Σ Δt. Only 'differential' optimises S
in general; the other rewards are for comparison.

Every reward takes the numbers of one environment as Python floats, or those of N environments as arrays [N].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.checks import require_known

Numbers = Any  # float, or [N] float64; plain floats are several times faster than NumPy scalars
Skip = NDArray[np.bool_] | None  # [N]: environments whose round does not count; None: all count
_FORGET = 0.995  # per round, of the sums behind the running speedup λ
_NEARLY_ZERO = 1e-300  # makes 0 / 0 a 1, and changes no other sum


class Outcome(NamedTuple):
    """The numbers of a round that rewards are computed from; floats or arrays [N]."""

    tokens: Numbers  # N, committed for all requests together
    batch_size: Numbers  # B, live requests
    seconds: Numbers  # Δt, including the time that choosing the plan took
    plain_s: Numbers  # t0, seconds of a plain decoding step at this batch size and context

    @property
    def plain_total_s(self) -> Numbers:
        """N·t0/B, the seconds that plain decoding would have taken for these tokens."""
        return self.tokens * self.plain_s / self.batch_size


# Takes an `Outcome` and, for N environments, those to skip; may remember earlier rounds.
Reward = Callable[..., Numbers]


class Differential:
    """r = (N·t0/B - λ·Δt) / t_ref, with λ the policy's own running speedup. The default.

    This is Dinkelbach's method (1967) for ratios, in its average-reward form: a policy that maximises it maximises S,
    for any horizon or discount. t_ref is the first t0 and never changes, because a scale that depends on the batch
    size would change the objective.

    Args:
        forget: share of the evidence for λ that is left after another round.
    """

    def __init__(self, forget: float = _FORGET) -> None:
        self._forget = forget
        self._plain: Numbers = 0.0
        self._spent: Numbers = 0.0
        self._reference: Numbers = None

    @property
    def speedup(self) -> Numbers:
        """λ; 1 before the first round."""
        return (self._plain + _NEARLY_ZERO) / (self._spent + _NEARLY_ZERO)

    def __call__(self, outcome: Outcome, skip: Skip = None) -> Numbers:
        """Return the reward of a round, then update λ."""
        if self._reference is None:
            self._reference = 1.0 * outcome.plain_s  # a copy
        plain_s, seconds = outcome.plain_total_s, outcome.seconds
        value = (plain_s - self.speedup * seconds) / self._reference
        plain, spent = self._plain * self._forget + plain_s, self._spent * self._forget + seconds
        if skip is not None:
            plain, spent = np.where(skip, self._plain, plain), np.where(skip, self._spent, spent)
        self._plain, self._spent = plain, spent
        return value


class TimeSaved(Differential):
    """r = (N·t0/B - Δt) / t_ref, whose sum is the time saved over plain decoding: 'differential' with λ = 1.

    Use it undiscounted, and in episodes that end after `max_tokens` tokens only. In episodes of `max_rounds` rounds it
    would favour long rounds.
    """

    @property
    def speedup(self) -> Numbers:
        """λ, always 1."""
        return 1.0


def speedup(outcome: Outcome, skip: Skip = None) -> Numbers:
    """Return N·t0/(B·Δt). Its mean counts short rounds as much as long ones."""
    return outcome.plain_total_s / outcome.seconds


def log_speedup(outcome: Outcome, skip: Skip = None) -> Numbers:
    """Return log N·t0/(B·Δt). Its mean optimises the geometric mean of rounds' speedups, not the run's speedup."""
    return np.log(np.maximum(speedup(outcome), 1e-6))


def tokens_per_second(outcome: Outcome, skip: Skip = None) -> Numbers:
    """Return N/Δt. If the batch size varies, its mean favours large batches."""
    return outcome.tokens / outcome.seconds


_REWARDS: dict[str, Callable[[], Reward]] = {
    "differential": Differential,
    "time_saved": TimeSaved,
    "speedup": lambda: speedup,
    "log_speedup": lambda: log_speedup,
    "tokens_per_second": lambda: tokens_per_second,
}


def make_reward(name: str) -> Reward:
    """Make a reward by name, for one environment or for N; raises ValueError if there is none."""
    require_known("reward", name, _REWARDS)
    return _REWARDS[name]()
