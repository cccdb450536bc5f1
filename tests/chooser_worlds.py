"""Small worlds to hold plan choosers against: tables of costs and survival, made into rounds.

A script holds everything random of a run (batch sizes, timing noise, which drafts would stand), drawn ahead of it: all
choosers that play a script meet the same luck, so they may be compared in pairs. What a choice is worth is computed
from the table, not from what happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specrl.agents.choosers.survival import Survival
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.simulation.acceptance_model import accept_length
from specrl.simulation.profile import load_profile

Floats = NDArray[np.float64]
LOADS = (1, 2, 4, 8, 16, 32)
NOISE, HICCUPS, HICCUP = 0.11, 0.01, 6.0  # log standard deviation; share of rounds and how many times longer they take
MIX, LIFE = 0.6, 40  # requests differ by this much in logits of acceptance; rounds that a request lives
BURST, SLOWER = 5, 1.5  # rounds in a row of a stuttering machine, and how many times longer they take
CATCH_UP = 0.2  # of plan 0's seconds: what the first speculative round after plan 0 pays for the draft's cache
_U = np.linspace(-3.5, 3.5, 141)
_WEIGHTS = np.exp(-0.5 * _U**2) / np.exp(-0.5 * _U**2).sum()


@dataclass(frozen=True)
class Table:
    """Seconds by plan at some batch sizes (log-log interpolated between them), and P_k by family of plans."""

    name: str
    batch_sizes: tuple[int, ...]
    seconds: Mapping[Plan, tuple[float, ...]]
    survival: Mapping[str, tuple[float, ...]]  # Survival.family -> P_1 .. P_K
    known: dict[tuple[int, Plan], float] = field(default_factory=dict, compare=False)

    @property
    def plans(self) -> tuple[Plan, ...]:
        return tuple(self.seconds)

    def cost(self, batch: int, plan: Plan) -> float:
        """Seconds of a round."""
        if (batch, plan) not in self.known:
            logs = np.interp(np.log(batch), np.log(self.batch_sizes), np.log(self.seconds[plan]))
            self.known[batch, plan] = float(np.exp(logs))
        return self.known[batch, plan]

    def costs(self, batches: Sequence[int] = LOADS) -> dict[int, dict[Plan, float]]:
        """All of them, as a profile at start-up would have them."""
        return {batch: {plan: self.cost(batch, plan) for plan in self.plans} for batch in batches}


@dataclass(frozen=True)
class Shift:
    """From round `at` on: plans with three steps or more cost `costlier` times as much, every a_k `kinder` times.

    Before it, a_k is `first` times the table's.
    """

    name: str
    at: int = 0
    costlier: float = 1.0
    kinder: float = 1.0
    first: float = 1.0


# Published with the draft Aurora-Spec-Qwen3-Coder-Next-FP8: tokens/s per request by batch size, and the accept lengths
# at lookahead 3, 4 and 5 (2.67, 2.91, 3.06). Seconds = accept length / tokens/s. The sum P_1 + P_2 + P_3 = 1.67 is
# published; how it divides into the three is our assumption.
_TOKENS_PER_S = {
    0: (176.4, 119.8, 99.6, 85.0),
    3: (252.1, 141.0, 104.0, 78.9),
    4: (263.1, 142.5, 105.6, 79.5),
    5: (265.7, 146.3, 107.6, 80.3),
}
_LENGTH = {0: 1.0, 3: 2.67, 4: 2.91, 5: 3.06}
CODER_NEXT = Table(
    "coder-next-fp8",
    (1, 8, 16, 32),
    {Plan(s): tuple(_LENGTH[s] / v for v in speeds) for s, speeds in _TOKENS_PER_S.items()},
    {"chain": (0.77, 0.54, 0.36, 0.24, 0.15)},
)

# As measured on the embedded target at 1, 4 and 16 requests (tests/test_choosers.py), drawn on to 32 at the same slope.
_PLAIN_S = (2.2e-3, 2.8e-3, 4.4e-3, 5.5e-3)
_RELATIVE = {
    0: (1.0, 1.0, 1.0, 1.0),
    1: (1.33, 1.4, 1.46, 1.49),
    2: (1.45, 1.6, 1.88, 2.04),
    3: (1.5, 1.8, 2.2, 2.43),
    4: (1.6, 2.0, 2.6, 2.96),
    5: (1.7, 2.2, 2.9, 3.33),
}


def _embedded(relative: Sequence[float]) -> tuple[float, ...]:
    return tuple(r * s for r, s in zip(relative, _PLAIN_S, strict=True))


EMBEDDED = Table(
    "embedded",
    (1, 4, 16, 32),
    {Plan(s): _embedded(relative) for s, relative in _RELATIVE.items()},
    {"chain": tuple(np.cumprod((0.62, 0.63, 0.62, 0.62, 0.6)).tolist())},
)
# A draft half way through its training, and trees beside the chains: best is a tree, then a short chain, then plan 0.
TREES = Table(
    "embedded-trees",
    (1, 4, 16, 32),
    {
        **{Plan(s): _embedded(_RELATIVE[s]) for s in (0, 1, 3)},
        Plan(3, 2, 6): _embedded((1.55, 2.0, 2.9, 3.5)),
        Plan(3, 4, 8): _embedded((1.6, 2.2, 3.4, 4.2)),
    },
    {
        "chain": tuple(np.cumprod((0.48, 0.48, 0.48)).tolist()),
        "tree/2/6": tuple(np.cumprod((0.62, 0.58, 0.52)).tolist()),
        "tree/4/8": tuple(np.cumprod((0.70, 0.58, 0.50)).tolist()),
    },
)


def recorded(name: str) -> Table:
    """Costs and survival of a shipped profile, under this file's noise."""
    profile = load_profile(name)
    survival: dict[str, tuple[float, ...]] = {}
    for plan in profile.plans:
        lengths = [profile.accept_length(Plan(0))]
        odds = profile.odds(plan)
        lengths += [
            accept_length(odds[:k], profile.request_spread, profile.drift) for k in range(1, plan.num_steps + 1)
        ]
        if plan.num_steps > len(survival.get(Survival.family(plan), ())):
            survival[Survival.family(plan)] = tuple(np.diff(lengths).tolist())
    sizes = profile.batch_sizes
    seconds = {plan: tuple(profile.cost(b, plan).seconds for b in sizes) for plan in profile.plans}
    return Table(name, sizes, seconds, survival)


BF16 = recorded("embedded-bf16")
FLAT = recorded("embedded-fp32")  # 3/1/4 is best or nearly so at all batch sizes but 1: hardly anything to choose
EARLY = recorded("embedded-fp32-early")  # 5/1/6 is best for one or two requests, 3/1/4 for more, 2/1/3 for 32
TABLES = (CODER_NEXT, EMBEDDED, TREES, BF16, EARLY)
STEADY = Shift("steady")
SHIFTS = (
    Shift("costlier", at=1800, costlier=1.3),
    Shift("worse", at=1800, kinder=0.7),
    Shift("better", at=1800, first=0.7),
)


class Script:
    """What happens in `rounds` rounds of a table, whatever is chosen.

    The load stays about 20 rounds at a batch size and moves to another one; each request is easier or harder than the
    mean by a normal number of logits, and a_k is set so that the mix has the table's P_k exactly. About a share
    `bursts` of the rounds lies in bursts of slow ones.
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
        self.table, self.shift, self.rounds = table, shift, rounds
        moves = rng.random(rounds) < 1 / 20
        moves[0] = True
        turns = np.concatenate([rng.permutation(loads) for _ in range(int(moves.sum()) // len(loads) + 1)])
        self.batches = turns[moves.cumsum() - 1]  # [R] int64
        noise = np.exp(NOISE * rng.standard_normal(rounds))
        self.noise = noise * np.where(rng.random(rounds) < HICCUPS, HICCUP, 1.0)
        begin = np.random.default_rng((seed, 1)).random(rounds) < bursts / BURST
        self.noise *= np.where(np.convolve(begin, np.ones(BURST))[:rounds] > 0, SLOWER, 1.0)
        slots = max(loads)
        request = (rng.random((rounds, slots)) < 1 / LIFE).cumsum(0)
        ease = MIX * rng.standard_normal((int(request.max()) + 1, slots))[request, np.arange(slots)]
        before = np.arange(rounds) < shift.at
        self.survival = [
            {name: _scaled(p, factor) for name, p in table.survival.items()} for factor in (shift.first, shift.kinder)
        ]
        coins = rng.random((rounds, slots, max(len(p) for p in table.survival.values())))
        self.correct = {}  # by family, [R, slots]: drafts that would stand
        for name in table.survival:
            rates = np.where(before[:, None], *(_logits(then[name]) for then in self.survival))
            stands = coins[..., : rates.shape[1]] < _sigmoid(rates[:, None] + ease[..., None])
            self.correct[name] = stands.cumprod(-1).sum(-1)
        plans = table.plans
        # [2, batch, plan]: tokens and seconds of a round, before the shift and after it
        self.loads = tuple(sorted(set(loads)))
        self.tokens = np.array(
            [[1.0 + sum(then.get(Survival.family(p), ())[: p.num_steps]) for p in plans] for then in self.survival]
        )
        factors = [shift.costlier if p.num_steps >= 3 else 1.0 for p in plans]
        base = np.array([[table.cost(b, p) for p in plans] for b in self.loads])
        self.seconds = np.stack([base, base * factors])
        self.after = (~before).astype(np.int64) if shift.at else np.ones(rounds, dtype=np.int64)
        self.load = np.searchsorted(self.loads, self.batches)

    def play(self, chooser: PlanChooser) -> NDArray[np.int64]:
        """The plan of every round, by its place in the table: [R] int64."""
        plans = self.table.plans
        steps = max(plan.num_steps for plan in plans)
        place = {plan: i for i, plan in enumerate(plans)}
        seconds, ids = self.seconds.tolist(), np.arange(max(self.loads))
        families = {plan: self.correct.get(Survival.family(plan)) for plan in plans}
        contexts = np.full(max(self.loads), 100)
        chosen, idle, zero = np.empty(self.rounds, dtype=np.int64), False, place.get(Plan(0))
        values = [0.0] * (5 + steps + 3 * len(plans))
        batches, noise = self.batches.tolist(), self.noise.tolist()
        after, load = self.after.tolist(), self.load.tolist()
        for r, batch in enumerate(batches):
            self.now = r
            plan = chooser.choose(Observation(batch, 100.0, values, steps))
            i = chosen[r] = place[plan]
            correct = families[plan]
            right = (
                np.zeros(batch, dtype=np.int64) if correct is None else np.minimum(correct[r, :batch], plan.num_steps)
            )
            here = seconds[after[r]][load[r]]
            spent = here[i] + (CATCH_UP * here[zero] if idle and i != zero and zero is not None else 0.0)
            idle = i == zero
            chooser.learn(Round(plan, ids[:batch], right + 1, right, contexts[:batch], 0.0, spent * noise[r], 0.0))
        return chosen

    def share(
        self, chosen: NDArray[np.int64], where: NDArray[np.bool_] | slice = slice(None), *, lucky: bool = False
    ) -> float:
        """Seconds that the best plan per batch size needs for the same tokens, over the seconds spent.

        Tokens are those expected of the plans; with `lucky` those that came, for a chooser that knows them beforehand.
        """
        tokens = self.tokens[self.after, chosen]
        if lucky:
            tokens = np.array([self._came(r, self.table.plans[i]) for r, i in enumerate(chosen.tolist())])
        spent = self.seconds[self.after, self.load, chosen]
        zero = self.table.plans.index(Plan(0)) if Plan(0) in self.table.plans else -1
        idle = np.concatenate([[False], chosen[:-1] == zero])
        spent = spent + CATCH_UP * self.seconds[self.after, self.load, zero] * (idle & (chosen != zero))
        best = (self.tokens[:, None] / self.seconds).max(-1)[self.after, self.load]
        return float((tokens / best)[where].sum() / spent[where].sum())

    def _came(self, r: int, plan: Plan) -> float:
        correct = self.correct.get(Survival.family(plan))
        if correct is None:
            return 1.0
        return 1.0 + float(np.minimum(correct[r, : self.batches[r]], plan.num_steps).mean())

    def visits(self) -> NDArray[np.int64]:
        """How often the batch size of each round was met before: [R] int64."""
        out = np.empty(self.rounds, dtype=np.int64)
        for batch in self.loads:
            here = self.batches == batch
            out[here] = np.arange(here.sum())
        return out

    def foresee(self) -> NDArray[np.int64]:
        """Drafts of the longest chain that will stand in the round now being chosen: [B] int64."""
        return self.correct["chain"][self.now, : self.batches[self.now]]


def _sigmoid(x: Floats) -> Floats:
    return 1.0 / (1.0 + np.exp(-x))


def _scaled(survival: Sequence[float], factor: float) -> tuple[float, ...]:
    """P_k when every a_k is `factor` times as large."""
    return tuple(p * factor ** (k + 1) for k, p in enumerate(survival))


def _logits(survival: Sequence[float]) -> Floats:
    """Logits l_k of an average request such that the mix of requests survives as told, by bisection."""
    alive, out = _WEIGHTS.copy(), []
    for p in survival:
        low, high = -12.0, 12.0
        for _ in range(50):
            middle = (low + high) / 2
            if (alive * _sigmoid(middle + MIX * _U)).sum() < p:
                low = middle
            else:
                high = middle
        alive = alive * _sigmoid(low + MIX * _U)
        out.append(low)
    return np.array(out)
