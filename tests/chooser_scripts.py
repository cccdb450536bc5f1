"""Scripted rounds for tests of plan choosers.

A script draws everything random of a run in advance (batch sizes, timing noise, accepted drafts), so all choosers have
the same random numbers and may be compared in pairs. The value of a choice is computed from a table of costs and
survival, not from the drawn rounds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.survival import Survival
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.simulation.acceptance_model import accept_length, solve
from specrl.simulation.profile import load_profile

Floats = NDArray[np.float64]
LOADS = (1, 2, 4, 8, 16, 32)
NOISE, HICCUPS, HICCUP = 0.11, 0.01, 6.0  # log standard deviation; share of rounds, and factor on their seconds
EFFECT, LIFE = 0.6, 40  # standard deviation over requests of the log-odds of acceptance; mean rounds of a request
BURST, SLOWER = 5, 1.5  # rounds of a burst of slow ones, and factor on their seconds
CATCH_UP = 0.2  # cost of the first speculative round after plan 0, for the draft's cache; of plan 0's seconds
_EFFECTS = np.linspace(-3.5, 3.5, 141)
_WEIGHTS = np.exp(-0.5 * _EFFECTS**2) / np.exp(-0.5 * _EFFECTS**2).sum()


@dataclass(frozen=True)
class Table:
    """Seconds by plan at some batch sizes (log-log interpolated between them), and P_1 .. P_K by family of plans."""

    name: str
    batch_sizes: tuple[int, ...]
    seconds: Mapping[Plan, tuple[float, ...]]
    survival: Mapping[str, tuple[float, ...]]  # by Survival.family

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(self.seconds)

    def costs(self, batches: Sequence[int] = LOADS) -> dict[int, dict[Plan, float]]:
        """Seconds by batch size and plan, as a profile has them."""
        known = np.log(self.batch_sizes)
        return {
            batch: {p: float(np.exp(np.interp(np.log(batch), known, np.log(s)))) for p, s in self.seconds.items()}
            for batch in batches
        }


@dataclass(frozen=True)
class Shift:
    """From round `at` on, plans with three or more steps take `costlier` times as long, and every a_k is `kinder` times
    as large. Before, a_k is `first` times the table's.
    """

    name: str
    at: int = 0
    costlier: float = 1.0
    kinder: float = 1.0
    first: float = 1.0


# Published with the draft Aurora-Spec-Qwen3-Coder-Next-FP8: tokens/s per request by batch size, and the accept lengths
# at lookahead 3, 4 and 5 (2.67, 2.91, 3.06). Seconds = accept length / tokens/s. The sum P_1 + P_2 + P_3 = 1.67 is
# published; its division into three is our assumption.
_PUBLISHED = {
    0: (1.0, (176.4, 119.8, 99.6, 85.0)),
    3: (2.67, (252.1, 141.0, 104.0, 78.9)),
    4: (2.91, (263.1, 142.5, 105.6, 79.5)),
    5: (3.06, (265.7, 146.3, 107.6, 80.3)),
}
CODER_NEXT = Table(
    "coder-next-fp8",
    (1, 8, 16, 32),
    {Plan(s): tuple(length / speed for speed in speeds) for s, (length, speeds) in _PUBLISHED.items()},
    {"chain": (0.77, 0.54, 0.36, 0.24, 0.15)},
)

# As measured on the embedded target at 1, 4 and 16 requests (tests/test_choosers.py), extrapolated to 32.
_PLAIN_S = (2.2e-3, 2.8e-3, 4.4e-3, 5.5e-3)
_CHAINS = {  # num_steps -> seconds relative to plain decoding
    0: (1.0, 1.0, 1.0, 1.0),
    1: (1.33, 1.4, 1.46, 1.49),
    2: (1.45, 1.6, 1.88, 2.04),
    3: (1.5, 1.8, 2.2, 2.43),
    4: (1.6, 2.0, 2.6, 2.96),
    5: (1.7, 2.2, 2.9, 3.33),
}


def _embedded(name: str, relative: Mapping[Plan, tuple[float, ...]], rates: Mapping[str, Sequence[float]]) -> Table:
    seconds = {plan: tuple(r * s for r, s in zip(each, _PLAIN_S, strict=True)) for plan, each in relative.items()}
    survival = {family: tuple(np.cumprod(each).tolist()) for family, each in rates.items()}
    return Table(name, (1, 4, 16, 32), seconds, survival)


EMBEDDED = _embedded("embedded", {Plan(s): _CHAINS[s] for s in _CHAINS}, {"chain": (0.62, 0.63, 0.62, 0.62, 0.6)})
# A draft in the middle of its training, with trees beside chains: best is a tree, then a short chain, then plan 0.
TREES = _embedded(
    "embedded-trees",
    {
        **{Plan(s): _CHAINS[s] for s in (0, 1, 3)},
        Plan(3, 2, 6): (1.55, 2.0, 2.9, 3.5),
        Plan(3, 4, 8): (1.6, 2.2, 3.4, 4.2),
    },
    {"chain": (0.48, 0.48, 0.48), "tree/2/6": (0.62, 0.58, 0.52), "tree/4/8": (0.70, 0.58, 0.50)},
)


def recorded(name: str) -> Table:
    """Return the costs and the survival of a shipped profile."""
    profile, sizes = load_profile(name), load_profile(name).batch_sizes
    survival: dict[str, tuple[float, ...]] = {}
    for plan in profile.plans:  # the longest of a family is the last one
        odds, spread = profile.odds(plan), profile.request_spread
        lengths = [1.0, *(accept_length(odds[:k], spread, profile.drift) for k in range(1, plan.num_steps + 1))]
        if plan.num_steps:
            survival[Survival.family(plan)] = tuple(np.diff(lengths).tolist())
    seconds = {plan: tuple(profile.cost(b, plan).seconds for b in sizes) for plan in profile.plans}
    return Table(name, sizes, seconds, survival)


BF16 = recorded("embedded-bf16")
FLAT = recorded("embedded-fp32")  # 3/1/4 is best or nearly best at all batch sizes but 1
EARLY = recorded("embedded-fp32-early")  # 5/1/6 is best for one or two requests, 3/1/4 for more, 2/1/3 for 32
TABLES = (CODER_NEXT, EMBEDDED, TREES, BF16, EARLY)
STEADY = Shift("steady")
SHIFTS = (
    Shift("costlier", at=1800, costlier=1.3),
    Shift("worse", at=1800, kinder=0.7),
    Shift("better", at=1800, first=0.7),
)


class Script:
    """`rounds` rounds of a table, drawn in advance.

    The load stays about 20 rounds at a batch size. The log-odds of a_k differ between requests by a normal number, and
    their mean is such that the average over requests is the table's P_k. About a share `bursts` of the rounds lies in
    bursts of slow ones.
    """

    def __init__(
        self,
        table: Table,
        rounds: int,
        *,
        seed: int,
        shift: Shift = STEADY,
        loads: Sequence[int] = LOADS,
        bursts: float = 0.0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.table, self.shift, self.rounds, self.loads = table, shift, rounds, tuple(sorted(set(loads)))
        moves = rng.random(rounds) < 1 / 20
        moves[0] = True
        turns = np.concatenate([rng.permutation(loads) for _ in range(int(moves.sum()) // len(loads) + 1)])
        self.batches = turns[moves.cumsum() - 1]  # [R] int64
        self.load = np.searchsorted(self.loads, self.batches)
        noise = np.exp(NOISE * rng.standard_normal(rounds))
        self.noise = noise * np.where(rng.random(rounds) < HICCUPS, HICCUP, 1.0)
        begin = np.random.default_rng((seed, 1)).random(rounds) < bursts / BURST
        self.noise *= np.where(np.convolve(begin, np.ones(BURST))[:rounds] > 0, SLOWER, 1.0)
        slots = max(loads)
        request = (rng.random((rounds, slots)) < 1 / LIFE).cumsum(0)
        effect = EFFECT * rng.standard_normal((int(request.max()) + 1, slots))[request, np.arange(slots)]
        # [R]: 0 before the shift and 1 after it; an index into survival, tokens and seconds
        self.after = (np.arange(rounds) >= shift.at).astype(np.int64)
        survival = [
            {family: np.array(p) * factor ** np.arange(1, len(p) + 1) for family, p in table.survival.items()}
            for factor in (shift.first, shift.kinder)
        ]
        drawn = rng.random((rounds, slots, max(map(len, table.survival.values()))))
        self.correct = {}  # by family, [R, slots]: drafts that would be accepted
        for family in table.survival:
            odds = np.array([_log_odds(each[family]) for each in survival])[self.after]  # [R, K]
            accepted = drawn[..., : odds.shape[1]] < _sigmoid(odds[:, None] + effect[..., None])
            self.correct[family] = accepted.cumprod(-1).sum(-1)
        plans, costs = table.plans, table.costs(self.loads)
        # expected tokens per request [2, plan], and seconds of a round [2, batch, plan]
        lengths = [[1.0 + sum(s.get(Survival.family(p), [])[: p.num_steps]) for p in plans] for s in survival]
        self.tokens = np.array(lengths)
        base = np.array([[costs[b][p] for p in plans] for b in self.loads])
        self.seconds = np.stack([base, base * [shift.costlier if p.num_steps >= 3 else 1.0 for p in plans]])

    def play(self, chooser: PlanChooser) -> NDArray[np.int64]:
        """Run a chooser; return the index of the plan of every round, [R] int64."""
        plans = self.table.plans
        steps = max(plan.num_steps for plan in plans)
        index, zero = {plan: i for i, plan in enumerate(plans)}, Plan(0)
        seconds, ids = self.seconds[self.after, self.load], np.arange(max(self.loads))  # [R, plan]
        chosen, idle = np.empty(self.rounds, dtype=np.int64), False
        values = [0.0] * (5 + steps + 3 * len(plans))
        for r, batch in enumerate(self.batches.tolist()):
            self.now = r
            plan = chooser.choose(Observation(batch, 100.0, values, steps))
            chosen[r] = index[plan]
            correct, spent = self._correct(r, plan), seconds[r, index[plan]]
            if idle and plan != zero:
                spent += CATCH_UP * seconds[r, index[zero]]
            idle = plan == zero
            context = np.full(batch, 100)
            chooser.learn(Round(plan, ids[:batch], correct + 1, correct, context, 0.0, spent * self.noise[r], 0.0))
        return chosen

    def _correct(self, r: int, plan: Plan) -> NDArray[np.int64]:
        batch, correct = self.batches[r], self.correct.get(Survival.family(plan))
        return np.zeros(batch, dtype=np.int64) if correct is None else np.minimum(correct[r, :batch], plan.num_steps)

    def share(
        self, chosen: NDArray[np.int64], where: NDArray[np.bool_] | slice = slice(None), *, lucky: bool = False
    ) -> float:
        """Return the seconds that the best plan per batch size needs for the same tokens, over those of the choices.

        Tokens are the expected ones; with `lucky` the drawn ones, for a chooser that knows them in advance.
        """
        plans = self.table.plans
        tokens = self.tokens[self.after, chosen]
        if lucky:
            tokens = np.array([1.0 + self._correct(r, plans[i]).mean() for r, i in enumerate(chosen.tolist())])
        spent = self.seconds[self.after, self.load, chosen]
        zero = plans.index(Plan(0)) if Plan(0) in plans else -1
        idle = np.concatenate([[False], chosen[:-1] == zero])
        spent = spent + CATCH_UP * self.seconds[self.after, self.load, zero] * (idle & (chosen != zero))
        best = (self.tokens[:, None] / self.seconds).max(-1)[self.after, self.load]
        return float((tokens / best)[where].sum() / spent[where].sum())

    def visits(self) -> NDArray[np.int64]:
        """Return how many earlier rounds had the batch size of each round: [R] int64."""
        visits = np.empty(self.rounds, dtype=np.int64)
        for batch in self.loads:
            here = self.batches == batch
            visits[here] = np.arange(here.sum())
        return visits

    def foresee(self) -> NDArray[np.int64]:
        """Return the drafts of the longest chain that will be accepted in the present round: [B] int64."""
        return self.correct["chain"][self.now, : self.batches[self.now]]


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def _log_odds(survival: Floats) -> Floats:
    """Return the log-odds of an average request with which all requests have this survival: [K]."""
    reached, odds = _WEIGHTS.copy(), []
    for p in survival:

        def share(b: float, reached: Floats = reached) -> float:
            return float((reached * _sigmoid(b + EFFECT * _EFFECTS)).sum())

        odds.append(solve(share, p, -12.0, 12.0))
        reached = reached * _sigmoid(odds[-1] + EFFECT * _EFFECTS)
    return np.array(odds)
