"""Rewards: what a round was worth, from its tokens, its seconds and the cost of plain decoding.

With N tokens committed in Δt seconds for B live requests and t0 the seconds of a plain round, plain decoding would
have taken N·t0/B. A run's speedup is the ratio of sums S = Σ N·t0/B ÷ Σ Δt. Rewards whose sum does not belong to that
ratio are offered by name for comparison; each says what it optimises instead.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from typing import NamedTuple

_FORGET = 0.995  # per round, of the running speedup λ


class Outcome(NamedTuple):
    """What a reward is computed from.

    Args:
        tokens: N, committed for all requests together.
        batch_size: B, live requests.
        seconds: Δt, the chooser's thinking included.
        plain_s: t0, seconds of a plain round at this batch size and context.
    """

    tokens: int
    batch_size: int
    seconds: float
    plain_s: float

    @property
    def plain_total_s(self) -> float:
        """N·t0/B: what plain decoding would have taken for these tokens."""
        return self.tokens * self.plain_s / self.batch_size


Reward = Callable[[Outcome], float]


class Differential:
    """r = (N·t0/B - λ·Δt) / t_ref, with λ the policy's own running speedup. The default.

    Dinkelbach's method for ratio objectives, the average-reward form: a policy that maximises it maximises S,
    whatever the horizon or discount. t_ref is the first t0 measured and never changes: a scale that moved with the
    batch size would change the objective.

    Args:
        forget: how much of λ's evidence is left after another round.
    """

    def __init__(self, forget: float = _FORGET) -> None:
        self._forget = forget
        self._plain = self._spent = 0.0
        self._reference: float | None = None

    @property
    def speedup(self) -> float:
        """λ, 1 before the first round."""
        return self._plain / self._spent if self._spent else 1.0

    def __call__(self, outcome: Outcome) -> float:
        """The reward of a round; λ is updated after it."""
        self._reference = self._reference or outcome.plain_s
        plain_s, seconds = outcome.plain_total_s, outcome.seconds
        value = (plain_s - self.speedup * seconds) / self._reference
        self._plain = self._plain * self._forget + plain_s
        self._spent = self._spent * self._forget + seconds
        return value


class TimeSaved:
    """r = (N·t0/B - Δt) / t_ref: its sum is plain time minus actual time.

    Right only undiscounted and in episodes that end at a token budget (`max_tokens`); per round it favours long
    rounds.
    """

    def __init__(self) -> None:
        self._reference: float | None = None

    def __call__(self, outcome: Outcome) -> float:
        """The reward of a round."""
        self._reference = self._reference or outcome.plain_s
        return (outcome.plain_total_s - outcome.seconds) / self._reference


def speedup(outcome: Outcome) -> float:
    """N·t0/(B·Δt). Its mean optimises E[N·t0/Δt], in which short lucky rounds count as much as long ones."""
    return outcome.plain_total_s / outcome.seconds


def log_speedup(outcome: Outcome) -> float:
    """log N·t0/(B·Δt). Its mean optimises the geometric mean of the rounds' speedups, not the run's."""
    return math.log(max(speedup(outcome), 1e-6))


def tokens_per_second(outcome: Outcome) -> float:
    """N/Δt. Its mean favours large batches where the batch size moves, and rounds over time."""
    return outcome.tokens / outcome.seconds


_MAKERS: dict[str, Callable[[], Reward]] = {
    "differential": Differential,
    "time_saved": TimeSaved,
    "speedup": lambda: speedup,
    "log_speedup": lambda: log_speedup,
    "tokens_per_second": lambda: tokens_per_second,
}


def make_reward(name: str) -> Reward:
    """A fresh reward by name.

    Raises:
        ValueError: no such reward.
    """
    if name not in _MAKERS:
        close = difflib.get_close_matches(str(name), _MAKERS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"reward must be one of {', '.join(_MAKERS)}, but got {name!r}{meant}")
    return _MAKERS[name]()
