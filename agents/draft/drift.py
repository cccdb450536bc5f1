"""Notices that traffic has drifted: values, such as the accept length, that fell below what they were.

A conformal test (Vovk et al., 2021, arXiv:2102.10439) run as an e-detector (Shin et al., 2022, arXiv:2203.03532).
Only the rank of each value among those before it is used: while nothing drifts it is uniform and independent of the
ranks before, whatever the values' distribution and its tails. A bet that it is low multiplies by 1 + ε (1 - 2 rank), 1
on average; R ← (R + 1) · bet sums the bets begun at every value, so R - n is a martingale, and R reaches c within n
values with odds of at most n / c (Doob). A drop makes R grow exponentially.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Mapping
from typing import Any

import numpy as np

_BETS = (0.15, 0.4, 0.85)  # ε: for small drops, middling and large ones


class DriftDetector:
    """Raises an alarm when values fall.

    **Odds of a false alarm**: at most n · `odds` within n values from any start or alarm on, if they are exchangeable
    while nothing drifts. The accept lengths of neighbouring rounds are of the same requests and are not: give one
    value for each finished request, or means over as many rounds as requests last (`block`). Give values of one kind:
    rounds of one plan, not of all that a chooser tries. A rise, as from learning, raises no alarm.

    Args:
        odds: of a false alarm, for each value (of `block` of them, where they are averaged).
        memory: values after which the reference begins anew; two references take turns, so that one of them is always
            at least half as old. The drift must show before it fills them.
        warmup: values that a reference has before it is bet against.
        block: values that are averaged into one.
        rises: look for rises instead, as of a loss.
        seed: of the order of equal values.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        *,
        odds: float = 5e-5,
        memory: int = 4096,
        warmup: int = 32,
        block: int = 1,
        rises: bool = False,
        seed: int = 0,
    ) -> None:
        if not 0 < odds < 1 or block < 1 or not 1 <= warmup < memory // 2:
            raise ValueError(
                f"a drift detector needs odds in (0, 1), block >= 1 and 1 <= warmup < memory // 2, but got {odds}, "
                f"{block}, {warmup} and {memory}"
            )
        self._limit, self._memory, self._warmup, self._block = 2.0 / odds, memory, warmup, block  # 2: of references
        self._sign = -1.0 if rises else 1.0
        self._rng = np.random.default_rng(seed)
        self.alarms = 0
        self._begin()

    def _begin(self) -> None:
        self._held: list[list[float]] = [[], []]  # sorted
        self._ages = [0, self._memory // 2]
        self._wealth = [[0.0] * len(_BETS) for _ in range(2)]  # R of each reference and bet
        self._waiting: list[float] = []

    @property
    def evidence(self) -> float:
        """From 0 to 1, at which the alarm is raised."""
        return min(1.0, max(sum(each) for each in self._wealth) / len(_BETS) / self._limit)

    def add(self, value: float) -> bool:
        """Take a value; whether an alarm is raised. After one, what was seen before it is forgotten.

        Raises:
            ValueError: a value that is not finite.
        """
        if not math.isfinite(value):
            raise ValueError(f"a drift detector takes finite values, but got {value}; leave out what was not measured")
        self._waiting.append(self._sign * value)
        if len(self._waiting) < self._block:
            return False
        mean, self._waiting = sum(self._waiting) / self._block, []
        for i in range(2):
            self._take(i, mean)
        if self.evidence < 1.0:
            return False
        self.alarms += 1
        self._begin()
        return True

    def _take(self, i: int, value: float) -> None:
        if self._ages[i] == self._memory:
            self._ages[i], self._held[i] = 0, []
        held = self._held[i]
        below = bisect_left(held, value)
        equal = bisect_right(held, value) - below + 1  # with itself
        rank = (below + float(self._rng.random()) * equal) / (len(held) + 1)  # uniform in (0, 1)
        if len(held) >= self._warmup:
            lean = 1.0 - 2.0 * rank
            self._wealth[i] = [(r + 1.0) * (1.0 + bet * lean) for r, bet in zip(self._wealth[i], _BETS, strict=True)]
        insort(held, value)
        self._ages[i] += 1

    def state(self) -> dict[str, Any]:
        """JSON-able; `load_state` goes on from it."""
        return {
            "held": [list(held) for held in self._held],
            "ages": list(self._ages),
            "wealth": [list(each) for each in self._wealth],
            "waiting": list(self._waiting),
            "alarms": self.alarms,
            "rng": self._rng.bit_generator.state,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state` of a detector with the same settings.

        Raises:
            ValueError: its memory was longer than this one's.
        """
        if max(state["ages"]) > self._memory:
            raise ValueError(
                f"a drift detector's state must be of the same settings, but its reference is {max(state['ages'])} "
                f"values old and the memory is {self._memory}"
            )
        self._held = [[float(x) for x in held] for held in state["held"]]
        self._ages = [int(age) for age in state["ages"]]
        self._wealth = [[float(r) for r in each] for each in state["wealth"]]
        self._waiting, self.alarms = [float(x) for x in state["waiting"]], int(state["alarms"])
        self._rng.bit_generator.state = dict(state["rng"])
