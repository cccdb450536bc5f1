"""Fits a profile to a recording: blocks of rounds and of plain steps, interleaved on one machine.

A shared machine has slow periods and interruptions of milliseconds.

- Cost: a slow period affects a plan's block and the plain steps next to it equally, so the cost of a plan is that of
  plain decoding times the geometric mean of block over neighbour.
- Hiccups: an interruption is as long in a short round as in a long one. A round is a hiccup if it exceeds the median of
  its block by 0.65 times the plain median. Share and size of hiccups are common to all plans.
- Context: the growth of seconds with context is a line that all plans share.
- Noise: jitter is the median variance within a block; slow noise is the further variance of the blocks' means (from
  their 5th to 95th percentile).
- Acceptance: c_k is the share of k-th drafts that were accepted among those whose first k - 1 were, over all chains.
  The spread of requests is the variance of requests' first drafts beyond chance (one-way analysis of variance). b_k is
  solved for so that rounds have c_k (see `specrl.simulation.acceptance_model`).

Other estimates that were tried: docs/decisions/0010-recorded-profiles.md.
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
from specrl.simulation.acceptance_model import request_effects, solve, spread_of_rate, survival
from specrl.simulation.profile import Cost, Profile, plan_family

Floats = NDArray[np.float64]
_HICCUP = 0.65  # a hiccup exceeds the median of its block by so many plain medians
_MIN_BLOCKS = 4
_P95_TO_P05 = 3.29  # standard deviations between the 5th and the 95th percentile of a normal distribution


@dataclass(frozen=True)
class Block:
    """Consecutive rounds of one plan, or plain steps, at one batch size."""

    rounds: tuple[Round, ...] | tuple[PlainSample, ...]

    @property
    def kind(self) -> tuple[int, Plan | None]:
        """Batch size and plan (None: plain steps)."""
        first = self.rounds[0]
        return first.batch_size, first.plan if isinstance(first, Round) else None

    @property
    def seconds(self) -> Floats:
        """[rounds] float64."""
        return np.array([done.seconds for done in self.rounds])

    @property
    def contexts(self) -> Floats:
        """Mean known tokens per request: [rounds] float64."""
        return np.array([r.context_lengths.mean() if isinstance(r, Round) else r.context for r in self.rounds])


def fit_recording(
    name: str,
    provenance: Mapping[str, Any],
    blocks: Sequence[Block],
    *,
    prompt_tokens: int,
    max_new_tokens: int,
) -> Profile:
    """Return the profile of interleaved blocks.

    Raises:
        ValueError: fewer than four blocks of a plan at a batch size, or no plain steps at a batch size.
    """
    kinds: dict[tuple[int, Plan | None], list[Block]] = {}
    for block in blocks:
        kinds.setdefault(block.kind, []).append(block)
    for (batch_size, plan), alike in kinds.items():
        if len(alike) < _MIN_BLOCKS:
            raise ValueError(
                f"a profile needs {_MIN_BLOCKS} blocks of every plan at every batch size, but got {len(alike)} of "
                f"{plan or 'plain steps'} at {batch_size}; record for longer"
            )
        if (batch_size, None) not in kinds:
            raise ValueError(f"a profile needs plain steps at every batch size, but got none at {batch_size}")
    context = float(np.mean([block.contexts.mean() for block in blocks]))
    costs: list[Cost] = []
    timings: list[_Timing] = []
    for batch_size in sorted({size for size, _ in kinds}):
        more_costs, more_timings = _costs(blocks, batch_size, context)
        costs += more_costs
        timings += more_timings
    hiccups = sum(timing.hiccups for timing in timings)
    rounds = [r for block in blocks for r in block.rounds if isinstance(r, Round)]
    spread = _request_spread(rounds)
    return Profile(
        name=name,
        provenance=provenance,
        costs=tuple(costs),
        log_odds=_log_odds(rounds, spread),
        request_spread=spread,
        memory=max(len(rounds) / max(len(kinds[next(iter(kinds))]), 1), 1.0),
        hiccup_share=min(hiccups / sum(t.usual + t.hiccups for t in timings), 0.5),
        hiccup_extra=sum(t.extra for t in timings) / hiccups if hiccups else 1.0,
        context=context,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
    )


class _Timing(NamedTuple):
    """Statistics of a block's seconds, corrected to the profile's context."""

    log_mean: float  # log of the mean without hiccups
    variance: float  # of log seconds, without hiccups
    usual: int  # rounds that are no hiccups
    hiccups: int
    extra: float  # sum over hiccups of seconds ÷ mean - 1


def _costs(blocks: Sequence[Block], batch_size: int, context: float) -> tuple[list[Cost], list[_Timing]]:
    """Return the costs at a batch size, and the timings of its blocks."""
    by_plan: dict[Plan | None, list[int]] = {}  # indices of the blocks
    for i, block in enumerate(blocks):
        if block.kind[0] == batch_size:
            by_plan.setdefault(block.kind[1], []).append(i)
    plain = by_plan[None]
    limit = _HICCUP * float(np.median(np.concatenate([blocks[i].seconds for i in plain])))
    slope = _per_token([[blocks[i] for i in indices] for indices in by_plan.values()], limit, context)
    timings = {i: _timing(blocks[i], limit, slope, context) for indices in by_plan.values() for i in indices}
    noise = {plan: _noise([timings[i] for i in indices]) for plan, indices in by_plan.items()}
    spread = math.sqrt(float(np.mean([slow for _, slow in noise.values()])))
    level = float(np.mean([math.exp(timings[i].log_mean) for i in plain]))

    def over_neighbour(i: int) -> float:
        """Log of a block's mean over that of the nearest block of plain steps, or of the two nearest."""
        nearest = min(abs(j - i) for j in plain)
        return timings[i].log_mean - float(np.mean([timings[j].log_mean for j in plain if abs(j - i) == nearest]))

    costs = []
    for plan in sorted(by_plan, key=lambda p: (p is not None, p or Plan(0))):
        over = 0.0 if plan is None else float(np.mean([over_neighbour(i) for i in by_plan[plan]]))
        jitter, share = math.sqrt(noise[plan][0]), _draft_share([blocks[i] for i in by_plan[plan]])
        costs.append(Cost(batch_size, plan, level * math.exp(over), jitter, spread, slope, share))
    return costs, list(timings.values())


def _is_usual(seconds: Floats, limit: float) -> NDArray[np.bool_]:
    """Return which of a block's rounds are no hiccups."""
    return np.asarray(seconds <= np.median(seconds) + limit)


def _timing(block: Block, limit: float, slope: float, context: float) -> _Timing:
    seconds = block.seconds / (1.0 + slope * (block.contexts - context))
    usual = _is_usual(seconds, limit)
    kept = seconds[usual]
    variance = float(np.log(kept).var(ddof=1)) if len(kept) > 1 else 0.0
    extra = float((seconds[~usual] / kept.mean() - 1.0).sum())
    return _Timing(math.log(kept.mean()), variance, len(kept), int((~usual).sum()), extra)


def _per_token(kinds: Sequence[Sequence[Block]], limit: float, context: float) -> float:
    """Return the growth of seconds with a token of context, over the seconds at `context`; common to all kinds."""
    x, y = [], []
    for blocks in kinds:
        usual = np.concatenate([_is_usual(block.seconds, limit) for block in blocks])
        contexts = np.concatenate([block.contexts for block in blocks])[usual]
        seconds = np.concatenate([block.seconds for block in blocks])[usual]
        x.append(contexts - contexts.mean())
        y.append(seconds / seconds.mean() - 1.0)
    contexts, growth = np.concatenate(x), np.concatenate(y)
    if np.ptp(contexts) < 0.2 * context:
        return 0.0
    return float(np.clip((contexts * growth).sum() / (contexts**2).sum(), 0.0, 0.5 / context))


def _noise(timings: Sequence[_Timing]) -> tuple[float, float]:
    """Return variances of log seconds: of rounds within a block, and of blocks beyond what their rounds explain."""
    within = float(np.median([timing.variance for timing in timings if timing.usual > 1] or [0.0]))
    low, high = np.percentile([timing.log_mean for timing in timings], [5, 95])
    between = ((high - low) / _P95_TO_P05) ** 2
    return within, max(float(between) - within / float(np.mean([timing.usual for timing in timings])), 0.0)


def _draft_share(blocks: Sequence[Block]) -> float:
    done = [r for block in blocks for r in block.rounds if isinstance(r, Round)]
    return sum(r.draft_s for r in done) / sum(r.seconds for r in done) if done else 0.0


def _request_spread(rounds: Sequence[Round]) -> float:
    """Return the standard deviation over requests of the log-odds, from their first drafts."""
    counts: dict[int, list[int]] = {}  # request -> first drafts that were accepted, and all
    for r in rounds:
        if r.plan.num_steps and r.plan.is_chain:
            for request, correct in zip(r.request_ids.tolist(), r.correct_drafts.tolist(), strict=True):
                own = counts.setdefault(request, [0, 0])
                own[0] += correct > 0
                own[1] += 1
    if len(counts) < 2:
        return 0.0
    accepted, tried = np.array(list(counts.values()), dtype=np.float64).T
    rate = accepted.sum() / tried.sum()
    between = (tried * (accepted / tried - rate) ** 2).sum() - (len(tried) - 1) * rate * (1.0 - rate)
    variance = between / (tried.sum() - (tried**2).sum() / tried.sum())
    if variance <= 0.0 or not 0.0 < rate < 1.0:
        return 0.0
    odds = math.log(rate / (1.0 - rate))
    return solve(lambda spread: spread_of_rate(odds, spread), math.sqrt(variance), 0.0, 5.0)


def _log_odds(rounds: Sequence[Round], spread: float) -> dict[str, tuple[float, ...]]:
    """Return b_1 .. b_K of chains, and of every tree."""
    plans = sorted({r.plan for r in rounds if r.plan.num_steps})
    steps = {plan_family(plan): plan.num_steps for plan in plans}  # of the longest plan, which is the last one
    counts = {family: np.zeros((2, longest)) for family, longest in steps.items()}  # accepted, tried
    for plan in plans:
        correct = np.concatenate([r.correct_drafts for r in rounds if r.plan == plan])[:, None]
        position = np.arange(plan.num_steps)
        counts[plan_family(plan)][:, : plan.num_steps] += (correct > position).sum(0), (correct >= position).sum(0)
    rates = {family: (accepted + 0.5) / (tried + 1.0) for family, (accepted, tried) in counts.items()}
    effects, weights = request_effects(spread)
    in_rounds = weights
    odds: dict[str, tuple[float, ...]] = {}
    for _ in range(6):  # the odds give the lengths, and the lengths give the weight of each effect over rounds
        odds = {family: _solve_odds(rate, effects, in_rounds) for family, rate in rates.items()}
        sample = rounds[:: max(1, len(rounds) // 200)]
        lengths = [
            1.0 + survival(odds.get(plan_family(r.plan), ())[: r.plan.num_steps], effects).sum(-1) for r in sample
        ]
        in_rounds = weights / np.mean(lengths, axis=0)
    return odds


def _solve_odds(rates: Floats, effects: Floats, weights: Floats) -> tuple[float, ...]:
    """Return b_k that give the conditional rates over rounds whose request effects have these weights."""
    odds: list[float] = []
    for rate in rates:
        left = weights / weights.sum()

        def mean_rate(b: float, left: Floats = left) -> float:
            return float(left @ survival([b], effects)[:, 0])

        odds.append(solve(mean_rate, float(rate), -15.0, 15.0))
        weights = weights * survival(odds[-1:], effects)[:, 0]
    return tuple(odds)
