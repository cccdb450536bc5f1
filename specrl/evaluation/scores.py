"""Scores of choosers: speedups, shares of the best plan, regret, and comparisons. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from specrl.core.statistics import Interval, mean_interval, probability_of_improvement, stratified_iqm
from specrl.evaluation.trajectory import Floats, Ints, PlanSeconds

_RESAMPLES = 1000
_CURVE_POINTS = 100


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one chooser on one source with one seed.

    Attributes:
        speedups: [n] measured, Σ N · t0(B) / B ÷ Σ Δt: of each block if live, of the whole run in simulation.
        share: seconds that the best plan per batch size needs for the expected tokens, over the expected seconds.
        end: the share of the last quarter of the rounds.
        regret: [R] cumulative, in rounds (see `PlanSeconds.regret`).
        choices: [R] indices of plans.
    """

    speedups: Floats
    share: float
    end: float
    regret: Floats
    choices: Ints


def score(speedups: Floats, expected: PlanSeconds, choices: Ints) -> Score:
    """Return the score of a run, from expected seconds [R, plans] and choices [R]."""
    last = slice(3 * len(choices) // 4, None)
    end = expected[last].share(choices[last])
    return Score(speedups, expected.share(choices), end, expected.regret(choices), choices)


class Evaluation(NamedTuple):
    """Scores of choosers on one source.

    Attributes:
        source: name of the profile, or 'live'.
        scores: by chooser, one for each seed.
        bounds: speedups of the bounds by name.
        cycles: live: log speedups by cycle (see `specrl.evaluation.regret`).
    """

    source: str
    scores: Mapping[str, Sequence[Score]]
    bounds: Mapping[str, float]
    cycles: Mapping[str, Floats] | None = None

    def speedups(self, chooser: str) -> Floats:
        """Return the speedups of all runs or blocks of a chooser: [n] float64."""
        return np.concatenate([each.speedups for each in self.scores[chooser]])


def speedup_interval(samples: Floats) -> Interval:
    """Return the geometric mean of speedups [n >= 2] of runs or blocks, and its 95 % interval; deterministic."""
    mean = mean_interval(np.log(samples), rng=np.random.default_rng(0))
    with np.errstate(over="ignore"):  # the upper end of two or three samples may be infinite
        value, low, high = np.exp([mean.value, mean.low, mean.high]).tolist()
    return Interval(value, low, high, mean.level)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A chooser on one source or, with source 'all', on all of them.

    Attributes:
        speedup: geometric mean over runs or blocks.
        share: interquartile mean over seeds and sources, with a bootstrap stratified by source.
        end: the same for the last quarter.
        regret: mean rounds lost.
        better: P(its share is above the reference's), mean over sources, with an interval; None for the reference.
        closed: on one source, by bound: closed share of the gap between the reference's speedup and the bound's; None
            if there is no gap.
    """

    source: str
    chooser: str
    seeds: int
    speedup: Interval
    share: Interval
    end: Interval
    regret: float
    better: Interval | None
    closed: Mapping[str, float | None] = field(default_factory=dict)


def compare_choosers(evaluations: Sequence[Evaluation], reference: str) -> list[Comparison]:
    """Compare every chooser with the reference, on each source and, if there are several, on all of them."""
    rng = np.random.default_rng(0)
    groups = [[each] for each in evaluations] + ([list(evaluations)] if len(evaluations) > 1 else [])
    comparisons = []
    for group in groups:
        reference_shares = np.array([[run.share for run in each.scores[reference]] for each in group])
        for chooser in group[0].scores:
            runs = [each.scores[chooser] for each in group]  # by source and seed
            shares = np.array([[run.share for run in row] for row in runs])
            ends = np.array([[run.end for run in row] for row in runs])
            comparisons.append(
                Comparison(
                    source=group[0].source if len(group) == 1 else "all",
                    chooser=chooser,
                    seeds=len(runs[0]),
                    speedup=speedup_interval(np.concatenate([each.speedups(chooser) for each in group])),
                    share=stratified_iqm(shares.T, rng=rng),
                    end=stratified_iqm(ends.T, rng=rng),
                    regret=float(np.mean([run.regret[-1] for row in runs for run in row])),
                    better=None if chooser == reference else improvement(shares, reference_shares, rng=rng),
                    closed=_closed(group[0], chooser, reference) if len(group) == 1 else {},
                )
            )
    return comparisons


def _closed(evaluation: Evaluation, chooser: str, reference: str) -> dict[str, float | None]:
    own, base = (speedup_interval(evaluation.speedups(name)).value for name in (chooser, reference))
    gaps = {name: bound - base for name, bound in evaluation.bounds.items()}
    return {name: (own - base) / gap if gap > 1e-3 else None for name, gap in gaps.items()}


def improvement(shares: Floats, others: Floats, *, rng: np.random.Generator) -> Interval:
    """Return P(share > other), mean over sources, from [sources, seeds], with a bootstrap of seeds by source."""
    value = np.mean([probability_of_improvement(a, b) for a, b in zip(shares, others, strict=True)])
    resampled = []
    for _ in range(_RESAMPLES):
        picks = rng.integers(shares.shape[1], size=(2, *shares.shape))
        drawn = (np.take_along_axis(x, p, 1) for x, p in zip((shares, others), picks, strict=True))
        resampled.append(np.mean([probability_of_improvement(a, b) for a, b in zip(*drawn, strict=True)]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def regret_curves(evaluations: Sequence[Evaluation]) -> list[dict[str, object]]:
    """Return rows with the regret after each of about a hundred rounds: mean, least and greatest over seeds."""
    rows: list[dict[str, object]] = []
    for evaluation in evaluations:
        for chooser, runs in evaluation.scores.items():
            regrets = np.stack([run.regret for run in runs])  # [seeds, R]
            step = max(1, regrets.shape[1] // _CURVE_POINTS)
            for r in range(step - 1, regrets.shape[1], step):
                regret = regrets[:, r]
                row: dict[str, object] = {"source": evaluation.source, "chooser": chooser, "round": r + 1}
                rows.append(row | {"regret": regret.mean(), "least": regret.min(), "greatest": regret.max()})
    return rows
