"""The rewards of `specrl.envs.rewards` by the same formulas, of N environments at once."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_FORGET = 0.995  # per round, of the running speedup λ


class VectorOutcome(NamedTuple):
    """`specrl.envs.rewards.Outcome` of N environments; arrays are [N]."""

    tokens: NDArray[np.int64]
    batch_size: NDArray[np.int64]
    seconds: Floats
    plain_s: Floats
    plain_total_s: Floats


VectorReward = Callable[[VectorOutcome, "NDArray[np.bool_] | None"], Floats]


class Differential:
    """(N·t0/B - λ·Δt) / t_ref of each environment, by its own λ and t_ref (`specrl.envs.rewards.Differential`)."""

    def __init__(self, count: int) -> None:
        self._plain, self._spent, self._reference = np.zeros(count), np.zeros(count), np.zeros(count)

    def __call__(self, outcome: VectorOutcome, skip: NDArray[np.bool_] | None) -> Floats:
        """The rewards [N]; λ is updated after them, but where `skip` says so."""
        if not self._reference.all():
            self._reference = np.where(self._reference > 0, self._reference, outcome.plain_s)
        speedup = np.divide(self._plain, self._spent, out=np.ones_like(self._plain), where=self._spent > 0)
        value: Floats = (outcome.plain_total_s - speedup * outcome.seconds) / self._reference
        plain, spent = self._plain * _FORGET, self._spent * _FORGET
        plain += outcome.plain_total_s
        spent += outcome.seconds
        if skip is not None:
            plain, spent = np.where(skip, self._plain, plain), np.where(skip, self._spent, spent)
        self._plain, self._spent = plain, spent
        return value


class TimeSaved:
    """(N·t0/B - Δt) / t_ref of each environment (`specrl.envs.rewards.TimeSaved`)."""

    def __init__(self, count: int) -> None:
        self._reference = np.zeros(count)

    def __call__(self, outcome: VectorOutcome, skip: NDArray[np.bool_] | None) -> Floats:
        """The rewards [N]."""
        self._reference = np.where(self._reference > 0, self._reference, outcome.plain_s)
        value: Floats = (outcome.plain_total_s - outcome.seconds) / self._reference
        return value


def speedup(outcome: VectorOutcome, skip: NDArray[np.bool_] | None) -> Floats:
    """N·t0/(B·Δt)."""
    return outcome.plain_total_s / outcome.seconds


def log_speedup(outcome: VectorOutcome, skip: NDArray[np.bool_] | None) -> Floats:
    """log N·t0/(B·Δt)."""
    value: Floats = np.log(np.maximum(speedup(outcome, skip), 1e-6))
    return value


def tokens_per_second(outcome: VectorOutcome, skip: NDArray[np.bool_] | None) -> Floats:
    """N/Δt."""
    return outcome.tokens / outcome.seconds


_MAKERS: dict[str, Callable[[int], VectorReward]] = {
    "differential": Differential,
    "time_saved": TimeSaved,
    "speedup": lambda _: speedup,
    "log_speedup": lambda _: log_speedup,
    "tokens_per_second": lambda _: tokens_per_second,
}


def make_vector_reward(name: str, count: int, max_tokens: int | None) -> VectorReward:
    """A fresh reward of `count` environments by name.

    Raises:
        ValueError: no such reward, or 'time_saved' in episodes that do not end at a token budget.
    """
    if name not in _MAKERS:
        close = difflib.get_close_matches(str(name), _MAKERS, n=1)
        meant = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"reward must be one of {', '.join(_MAKERS)}, but got {name!r}{meant}")
    if name == "time_saved" and max_tokens is None:
        raise ValueError("reward 'time_saved' is right only in episodes of max_tokens, but got max_rounds")
    return _MAKERS[name](count)
