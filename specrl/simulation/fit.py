"""A profile from a recording: blocks of rounds and of plain steps, interleaved on one machine.

A machine that others share is slow for a while, and interrupted for milliseconds. What is slow meets a plan's block
and the plain steps beside it alike, so the cost of a plan is that of plain decoding times the geometric mean of block
over neighbour. An interruption takes as long in a short round as in a long one, so hiccups are what exceeds the median
of the block by 0.65 times the plain median, whatever the plan; they are set apart, and their share and size are common
to all. Growth with context is a line common to the kinds. The noise is split by the blocks: the median variance within
a block is jitter, and what the means of blocks differ by beyond it (from P05 to P95) is slow. What other estimates came
to: docs/decisions/0010-recorded-profiles.md.

Of the drafts, c_k is the share of k-th drafts that stood among those whose first k - 1 did, over all chains; the spread
of skill is what requests' first drafts differ by beyond chance (one-way analysis of variance); and b_k is solved for
so that rounds, which see more of unskilled requests (`specrl.simulation.acceptance_model`), have c_k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round
from specrl.simulation.acceptance_model import skills, solve, spread_of_rate, survival
from specrl.simulation.profile import CHAIN, Cost, Profile

Floats = NDArray[np.float64]
_HICCUP = 0.65  # times the plain median, above the median of the block
_P95_TO_P05 = 3.29  # standard deviations between the 5th and the 95th percentile of a normal distribution


@dataclass(frozen=True)
class Block:
    """Consecutive rounds of one plan, or plain steps, at one batch size."""

    rounds: tuple[Round, ...] | tuple[PlainSample, ...]

    @property
    def kind(self) -> tuple[int, Plan | None]:
        """Batch size, and plan; None: plain steps."""
        first = self.rounds[0]
        return first.batch_size, first.plan if isinstance(first, Round) else None

    @property
    def seconds(self) -> Floats:
        """[rounds] float64."""
        return np.array([done.seconds for done in self.rounds])

    @property
    def contexts(self) -> Floats:
        """Mean tokens known per request [rounds] float64."""
        return np.array([r.context_lengths.mean() if isinstance(r, Round) else r.context for r in self.rounds])


def fit_recording(
    name: str,
    provenance: Mapping[str, Any],
    blocks: Sequence[Block],
    *,
    prompt_tokens: int,
    max_new_tokens: int,
) -> Profile:
    """The profile of interleaved blocks; every kind at least four times.

    Raises:
        ValueError: there is too little of a kind, or no plain steps at a batch size.
    """
    kinds: dict[tuple[int, Plan | None], list[Block]] = {}
    for block in blocks:
        kinds.setdefault(block.kind, []).append(block)
    for (batch_size, plan), found in kinds.items():
        if len(found) < 4:
            raise ValueError(
                f"a profile needs 4 blocks of every plan at every batch size, but got {len(found)} of "
                f"{plan or 'plain steps'} at {batch_size}; record for longer"
            )
        if (batch_size, None) not in kinds:
            raise ValueError(f"a profile needs plain steps at every batch size, but got none at {batch_size}")
    context = float(np.mean([block.contexts.mean() for block in blocks]))
    costs: list[Cost] = []
    timed: list[_Timed] = []
    for batch_size in sorted({size for size, _ in kinds}):
        costs_here, timed_here = _costs(blocks, batch_size, context)
        costs, timed = costs + costs_here, timed + timed_here
    hiccups = sum(t.hiccups for t in timed)
    done = [r for block in blocks for r in block.rounds if isinstance(r, Round)]
    skill = _skill(done)
    return Profile(
        name=name,
        provenance=provenance,
        costs=tuple(costs),
        log_odds=_log_odds(done, skill),
        skill=skill,
        memory=max(len(done) / max(len(kinds[next(iter(kinds))]), 1), 1.0),
        hiccup_share=min(hiccups / sum(t.usual + t.hiccups for t in timed), 0.5),
        hiccup_extra=sum(t.extra for t in timed) / hiccups if hiccups else 1.0,
        context=context,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
    )


class _Timed(NamedTuple):
    """A block's seconds as they would be at the profile's context."""

    mean: float  # log of the mean, hiccups apart
    variance: float  # of log seconds, hiccups apart
    usual: int  # rounds without
    hiccups: int
    extra: float  # Σ seconds ÷ mean - 1, of hiccups


def _costs(blocks: Sequence[Block], batch_size: int, context: float) -> tuple[list[Cost], list[_Timed]]:
    """The costs at a batch size, and its blocks."""
    by_plan: dict[Plan | None, list[int]] = {}  # places among the blocks, by which one sees what is beside what
    for i, block in enumerate(blocks):
        if block.kind[0] == batch_size:
            by_plan.setdefault(block.kind[1], []).append(i)
    plain = by_plan[None]
    limit = _HICCUP * float(np.median(np.concatenate([blocks[i].seconds for i in plain])))
    slope = _per_token([[blocks[i] for i in places] for places in by_plan.values()], limit, context)
    timed = {i: _timed(blocks[i], limit, slope, context) for places in by_plan.values() for i in places}
    noise = {plan: _noise([timed[i] for i in places]) for plan, places in by_plan.items()}
    spread = math.sqrt(float(np.mean([slow for _, slow in noise.values()])))
    level = float(np.mean([math.exp(timed[i].mean) for i in plain]))
    costs = []
    for plan in sorted(by_plan, key=lambda p: (p is not None, p or Plan(0))):
        places = by_plan[plan]
        over = 0.0 if plan is None else float(np.mean([timed[i].mean - _beside(i, plain, timed) for i in places]))
        jitter, share = math.sqrt(noise[plan][0]), _draft_share([blocks[i] for i in places])
        costs.append(Cost(batch_size, plan, level * math.exp(over), jitter, spread, slope, share))
    return costs, list(timed.values())


def _usual(seconds: Floats, limit: float) -> NDArray[np.bool_]:
    """Which of a block's rounds are no hiccups."""
    usual: NDArray[np.bool_] = seconds <= np.median(seconds) + limit
    return usual


def _timed(block: Block, limit: float, slope: float, context: float) -> _Timed:
    seconds = block.seconds / (1.0 + slope * (block.contexts - context))
    usual = _usual(seconds, limit)
    kept = seconds[usual]
    variance = float(np.log(kept).var(ddof=1)) if len(kept) > 1 else 0.0
    extra = float((seconds[~usual] / kept.mean() - 1.0).sum())
    return _Timed(math.log(kept.mean()), variance, len(kept), int((~usual).sum()), extra)


def _beside(index: int, plain: Sequence[int], timed: Mapping[int, _Timed]) -> float:
    """Log of the plain mean beside a block: that of the nearest block of plain steps, or of the two as near."""
    nearest = min(abs(i - index) for i in plain)
    return float(np.mean([timed[i].mean for i in plain if abs(i - index) == nearest]))


def _per_token(kinds: Sequence[Sequence[Block]], limit: float, context: float) -> float:
    """Growth of the seconds with a token of context, over the seconds at `context`: a line common to the kinds."""
    x, y = [], []
    for blocks in kinds:
        usual = [_usual(block.seconds, limit) for block in blocks]
        contexts = np.concatenate([block.contexts[kept] for block, kept in zip(blocks, usual, strict=True)])
        seconds = np.concatenate([block.seconds[kept] for block, kept in zip(blocks, usual, strict=True)])
        x.append(contexts - contexts.mean())
        y.append(seconds / seconds.mean() - 1.0)
    moved, grown = np.concatenate(x), np.concatenate(y)
    if np.ptp(moved) < 0.2 * context:
        return 0.0
    return float(np.clip((moved * grown).sum() / (moved**2).sum(), 0.0, 0.5 / context))


def _noise(blocks: Sequence[_Timed]) -> tuple[float, float]:
    """Variances of log seconds: of rounds within a block, and of blocks beyond what their rounds explain."""
    within = float(np.median([block.variance for block in blocks if block.usual > 1] or [0.0]))
    low, high = np.percentile([block.mean for block in blocks], [5, 95])
    between = ((high - low) / _P95_TO_P05) ** 2
    return within, max(float(between) - within / float(np.mean([block.usual for block in blocks])), 0.0)


def _draft_share(blocks: Sequence[Block]) -> float:
    done = [r for block in blocks for r in block.rounds if isinstance(r, Round)]
    return sum(r.draft_s for r in done) / sum(r.seconds for r in done) if done else 0.0


def _skill(done: Sequence[Round]) -> float:
    """Standard deviation over requests of the log-odds, from their first drafts."""
    tries: dict[int, list[int]] = {}
    for r in done:
        if r.plan.num_steps and r.plan.is_chain:
            for request, correct in zip(r.request_ids.tolist(), r.correct_drafts.tolist(), strict=True):
                counts = tries.setdefault(request, [0, 0])
                counts[0] += correct > 0
                counts[1] += 1
    if len(tries) < 2:
        return 0.0
    stood, tried = np.array(list(tries.values()), dtype=np.float64).T
    rate = stood.sum() / tried.sum()
    between = (tried * (stood / tried - rate) ** 2).sum() - (len(tried) - 1) * rate * (1.0 - rate)
    variance = between / (tried.sum() - (tried**2).sum() / tried.sum())
    if variance <= 0.0 or not 0.0 < rate < 1.0:
        return 0.0
    odds = math.log(rate / (1.0 - rate))
    return solve(lambda spread: spread_of_rate(odds, spread), math.sqrt(variance), 0.0, 5.0)


def _log_odds(done: Sequence[Round], skill: float) -> dict[str, tuple[float, ...]]:
    """b_1 .. b_K of chains, and of every tree."""
    shares: dict[str, Floats] = {}
    rates: dict[str, Floats] = {}
    for plan in {r.plan for r in done if r.plan.num_steps}:
        family = CHAIN if plan.is_chain else str(plan)
        correct = np.concatenate([r.correct_drafts for r in done if r.plan == plan])
        counts = np.stack([(correct[:, None] > np.arange(plan.num_steps)).sum(0)] * 2)  # [2, K]: stood, tried
        counts[1] = (correct[:, None] >= np.arange(plan.num_steps)).sum(0)
        known = shares.get(family, np.zeros((2, 0)))
        both = np.zeros((2, max(known.shape[1], plan.num_steps)))
        both[:, : known.shape[1]] += known
        both[:, : plan.num_steps] += counts
        shares[family] = both
    for family, (stood, tried) in shares.items():
        rates[family] = (stood + 0.5) / (tried + 1.0)
    nodes, weights = skills(skill)
    seen = weights
    odds: dict[str, tuple[float, ...]] = {}
    for _ in range(6):  # rounds see skills by odds, and odds follow from what rounds see
        odds = {family: _solved(rate, nodes, seen) for family, rate in rates.items()}
        length = np.mean([_lengths(r.plan, odds, nodes) for r in done[:: max(1, len(done) // 200)]], axis=0)
        seen = weights / length
    return odds


def _solved(rates: Floats, nodes: Floats, seen: Floats) -> tuple[float, ...]:
    """b_k with which rounds that see skills so have the conditional rates."""
    odds: tuple[float, ...] = ()
    reach = seen
    for rate in rates:
        left = reach / reach.sum()
        b = solve(lambda b: float(left @ survival([b], nodes)[:, 0]), float(rate), -15.0, 15.0)  # noqa: B023
        reach = reach * survival([b], nodes)[:, 0]
        odds = (*odds, b)
    return odds


def _lengths(plan: Plan, odds: Mapping[str, tuple[float, ...]], nodes: Floats) -> Floats:
    if not plan.num_steps:
        return np.ones_like(nodes)
    known = odds[CHAIN if plan.is_chain else str(plan)][: plan.num_steps]
    return 1.0 + survival(known, nodes).sum(-1)
