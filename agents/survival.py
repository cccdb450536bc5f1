"""How far drafts survive: conditional acceptance by position, pooled over batch sizes. NumPy only.

a_k is the probability that draft k is accepted given that the first k - 1 were; P_k = a_1 ... a_k and
E[τ] = 1 + Σ P_k. It is a property of draft, traffic and acceptance rule, not of the batch size. Chains pool over
their lengths; trees of one shape stand alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrl.plan import Plan
from specrl.rounds import Round

_PRIOR = 2.0  # pseudo-drafts behind a position that was never tried
_INDEPENDENT = 0.5  # neighbouring rounds of a request are alike: what one draft counts for


class Survival:
    """Discounted Beta counts of a_k.

    Args:
        memory: rounds, of any plan, after which evidence has faded to 1/e.
        version_memory: the share of evidence kept when the draft's weights change.
    """

    def __init__(self, memory: float = 400.0, version_memory: float = 0.97) -> None:
        self._keep, self.version_memory = math.exp(-1.0 / memory), version_memory
        self._counts: dict[str, NDArray[np.float64]] = {}  # family -> [2, K]: accepted, tried
        self._version: int | None = None

    @staticmethod
    def family(plan: Plan) -> str:
        """Plans that share their acceptance."""
        return "chain" if plan.is_chain else f"tree/{plan.topk}/{plan.num_draft_tokens}"

    def learn(self, done: Round) -> None:
        """Take a finished round."""
        changed = self._version is not None and done.draft_version != self._version
        for counts in self._counts.values():
            counts *= self._keep * (self.version_memory if changed else 1.0)
        self._version = done.draft_version
        steps = done.plan.num_steps
        if steps == 0:
            return
        reached = (done.correct_drafts[:, None] >= np.arange(steps + 1)).sum(0)  # reached[k]: k or more correct
        counts = self._of(self.family(done.plan), steps)
        counts[0, :steps] += reached[1:]
        counts[1, :steps] += reached[:-1]

    def _of(self, family: str, steps: int) -> NDArray[np.float64]:
        counts = self._counts.get(family)
        if counts is None or counts.shape[1] < steps:
            grown = np.zeros((2, steps))
            if counts is not None:
                grown[:, : counts.shape[1]] = counts
            counts = self._counts[family] = grown
        return counts

    def accept_length(self, plan: Plan, rng: np.random.Generator | None = None) -> float:
        """E[τ] of a plan: its posterior mean, or with a generator a sample of it."""
        steps = plan.num_steps
        if steps == 0:
            return 1.0
        a, b = self._posterior(plan)
        rates = a / (a + b) if rng is None else rng.beta(a, b)
        return 1.0 + float(np.multiply.accumulate(rates).sum())

    def _posterior(self, plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Beta parameters of a_1 .. a_steps; a position never tried leans on the one before it."""
        steps = plan.num_steps
        own = self._of(self.family(plan), steps)
        chain = self._counts.get("chain")
        before = 0.5
        a, b = np.empty(steps), np.empty(steps)
        for k in range(steps):
            lean = before
            if not plan.is_chain and chain is not None and k < chain.shape[1] and chain[1, k] > 0:
                lean = float(chain[0, k] / chain[1, k])
            hits, tried = own[0, k] * _INDEPENDENT, own[1, k] * _INDEPENDENT
            a[k], b[k] = hits + _PRIOR * lean + 1e-3, tried - hits + _PRIOR * (1.0 - lean) + 1e-3
            before = float(a[k] / (a[k] + b[k]))
        return a, b

    def state_dict(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return {"counts": {name: counts.tolist() for name, counts in self._counts.items()}, "version": self._version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._counts = {name: np.array(counts, dtype=np.float64) for name, counts in state["counts"].items()}
        self._version = state["version"]
