"""The survival of drafts: conditional acceptance by position, pooled over batch sizes. NumPy only.

a_k is the probability that draft k is accepted if the first k - 1 are; P_k = a_1 ... a_k and E[τ] = 1 + Σ P_k. It
depends on draft, workload and acceptance rule, not on the batch size. Chains of all lengths share their evidence; each
shape of trees has its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan
from specrl.core.round import Round

Floats = NDArray[np.float64]
_PRIOR = 2.0  # weight of the prior, in drafts
_SLACK, _ALARM = 1.0, 8.0  # of the change detection, in standard deviations of one round
_KEEP_AFTER_CHANGE = 0.02  # share of the evidence that is kept after a change


@dataclass(slots=True)
class Cusum:
    """Two-sided CUSUM of a family's residuals, and the counts since both sides were zero."""

    above: float = 0.0
    below: float = 0.0
    counts: Floats | None = None  # [2, K]: accepted, tried


class Survival:
    """Discounted Beta counts of a_k.

    A sudden change is detected by a two-sided CUSUM (Page, 1954) of each round's accepted drafts minus the expected
    number, over their standard deviation. The counts then start again from the rounds in the CUSUM.

    Args:
        memory: rounds with drafts, of any plan, after which evidence has faded to 1/e.
        version_memory: share of the evidence that is kept when the draft's weights change.
        idle_memory: `memory` in rounds without drafts; it is shorter, so that drafts are tried again.
    """

    def __init__(self, memory: float = 1600.0, version_memory: float = 0.97, idle_memory: float = 400.0) -> None:
        self._keep, self._keep_idle = math.exp(-1.0 / memory), math.exp(-1.0 / idle_memory)
        self._version_memory = version_memory
        self._counts: dict[str, Floats] = {}  # family -> [2, K]: accepted, tried
        self._cusums: dict[str, Cusum] = {}
        self._version: int | None = None
        self.changes = 0  # detected so far

    @staticmethod
    def family(plan: Plan) -> str:
        """Return the name of the plans that share their evidence with this one."""
        return "chain" if plan.is_chain else f"tree/{plan.topk}/{plan.num_draft_tokens}"

    def learn(self, done: Round) -> None:
        steps = done.plan.num_steps
        changed = self._version is not None and done.draft_version != self._version
        for counts in self._counts.values():
            counts *= (self._keep if steps else self._keep_idle) * (self._version_memory if changed else 1.0)
        self._version = done.draft_version
        if steps == 0:
            return
        reached = np.array(done.reached(), dtype=np.float64)
        evidence = np.stack([reached[1:], reached[:-1]])  # [2, steps]: accepted, tried
        family = self.family(done.plan)
        counts = self._of(family, steps)
        if not self._changed(family, counts, evidence):
            counts[:, :steps] += evidence

    def _changed(self, family: str, counts: Floats, evidence: Floats) -> bool:
        """Whether this round completes the evidence of a change; the counts then start again."""
        accepted, tried = evidence
        steps, cusum = len(tried), self._cusums.setdefault(family, Cusum())
        rates = (counts[0, :steps] + 0.5) / (counts[1, :steps] + 1.0)
        spread = rates * (1.0 - rates) * tried * (1.0 + tried / (1.0 + counts[1, :steps]))  # rates are uncertain too
        z = float((accepted - rates * tried).sum()) / math.sqrt(float(spread.sum()) + 1e-9)
        z = max(-4.0, min(z, 4.0))
        cusum.above, cusum.below = max(0.0, cusum.above + z - _SLACK), max(0.0, cusum.below - z - _SLACK)
        if cusum.above == cusum.below == 0.0:
            cusum.counts = None
            return False
        if cusum.counts is None or cusum.counts.shape != counts.shape:
            cusum.counts = np.zeros_like(counts)
        cusum.counts[:, :steps] += evidence
        if max(cusum.above, cusum.below) <= _ALARM:
            return False
        for old in self._counts.values():
            old *= _KEEP_AFTER_CHANGE
        counts += cusum.counts
        self._cusums.clear()
        self.changes += 1
        return True

    def _of(self, family: str, steps: int) -> Floats:
        counts = self._counts.get(family, np.zeros((2, 0)))
        missing = steps - counts.shape[1]
        if missing > 0:
            counts = self._counts[family] = np.pad(counts, ((0, 0), (0, missing)))
        return counts

    def accept_length(self, plan: Plan, rng: np.random.Generator | None = None) -> float:
        """Return E[τ] of a plan: its posterior mean, or a sample if there is a generator."""
        return self.accept_lengths((plan,), rng)[0]

    def accept_lengths(self, plans: tuple[Plan, ...], rng: np.random.Generator | None = None) -> list[float]:
        """Return E[τ] of plans; plans of one family share one sample of a_k, so that only their lengths differ."""
        longest, lengths = dict[str, Plan](), dict[str, list[float]]()
        for plan in plans:
            family = self.family(plan)
            longest[family] = max(longest.get(family, plan), plan, key=lambda plan: plan.num_steps)
        for family, plan in longest.items():
            a, b = self._posterior(plan)
            rates = a / (a + b) if rng is None else rng.beta(a, b)
            lengths[family] = [1.0, *(1.0 + rates.cumprod().cumsum()).tolist()]
        return [lengths[self.family(plan)][plan.num_steps] for plan in plans]

    def steps_above(self, threshold: float, max_steps: int) -> int:
        """Return the number of leading positions of a chain with a_k >= threshold, at most `max_steps`."""
        a, b = self._posterior(Plan(max_steps))
        return int((a / (a + b) >= threshold).cumprod().sum())

    def _posterior(self, plan: Plan) -> tuple[Floats, Floats]:
        """Return the Beta parameters of a_1 .. a_steps.

        The prior of a position is the rate of chains there, for trees, or else the rate of the position before it.
        """
        counts, prior = self._of(self.family(plan), plan.num_steps), 0.5
        chain = self._counts.get("chain")
        chain_counts = [] if plan.is_chain or chain is None else chain.T.tolist()
        a, b = [], []
        for k, (accepted, tried) in enumerate(counts.T[: plan.num_steps].tolist()):
            if k < len(chain_counts) and chain_counts[k][1] > 0:
                prior = chain_counts[k][0] / chain_counts[k][1]
            a.append(accepted + _PRIOR * prior + 1e-3)
            b.append(tried - accepted + _PRIOR * (1.0 - prior) + 1e-3)
            prior = a[k] / (a[k] + b[k])
        return np.array(a), np.array(b)

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": {name: counts.tolist() for name, counts in self._counts.items()},
            "watches": {
                name: [cusum.above, cusum.below, None if cusum.counts is None else cusum.counts.tolist()]
                for name, cusum in self._cusums.items()
            },
            "version": self._version,
            "changes": self.changes,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._counts = {name: np.array(counts, dtype=np.float64) for name, counts in state["counts"].items()}
        self._cusums = {
            name: Cusum(above, below, None if counts is None else np.array(counts, dtype=np.float64))
            for name, (above, below, counts) in state["watches"].items()
        }
        self._version, self.changes = state["version"], state["changes"]
