"""Scores of choosers: speedups, shares of the best plan, regret, and comparisons. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from specrl.core.statistics import Interval, mean_interval, probability_of_improvement, stratified_iqm
from specrl.evaluation.trajectory import Floats, Ints, PlanSeconds

_RESAMPLES, _POINTS = 1000, 100  # of a bootstrap; of a curve


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one chooser on one source with one seed.

    Attributes:
        speedups: [n] measured, Σ N · t0(B) / B ÷ Σ Δt: of each block if live, of the whole run in simulation.
        share: seconds that the best plan per batch size needs for the expected tokens, over the expected seconds.
        end: the same over the last quarter.
        regret: [R] cumulative, in rounds: Σ 1 - v / v*, with v the expected speed of the plan and v* the best one.
        choices: [R] indices of plans.
    """

    speedups: Floats
    share: float
    end: float
    regret: Floats
    choices: Ints


def share_of_best(expected: PlanSeconds, choices: Ints) -> float:
    """Seconds of the best plan per round for the expected tokens of the choices, over their expected seconds.

    Args:
        expected: [R, plans].
        choices: [R]; 1 is the best table.
    """
    rows = np.arange(len(choices))
    best = (expected.plain_s / expected.round_s).max(1)
    return float((expected.plain_s[rows, choices] / best).sum() / expected.round_s[rows, choices].sum())


def cumulative_regret(expected: PlanSeconds, choices: Ints) -> Floats:
    """[R] cumulative regret in rounds, for expected seconds [R, plans] and choices [R]."""
    values = expected.plain_s / expected.round_s
    return np.asarray((1.0 - values[np.arange(len(choices)), choices] / values.max(1)).cumsum())


def score(speedups: Floats, expected: PlanSeconds, choices: Ints) -> Score:
    """The score of a run, from expected seconds [R, plans] and choices [R]."""
    last = slice(3 * len(choices) // 4, None)
    end = share_of_best(PlanSeconds(expected.plain_s[last], expected.round_s[last]), choices[last])
    return Score(speedups, share_of_best(expected, choices), end, cumulative_regret(expected, choices), choices)


def speedup_interval(samples: Floats) -> Interval:
    """Geometric mean of speedups [n >= 2] of runs or blocks, and its 95 % interval; deterministic."""
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
        end: the same of the last quarter.
        regret: mean rounds lost.
        better: P(its share is above the reference's), mean over sources, with an interval; None for the reference.
        closed: by bound, share of the way from the reference's speedup to the bound's.
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


Scores = Mapping[str, Mapping[str, Sequence[Score]]]  # source -> chooser -> by seed


def compare_choosers(scores: Scores, bounds: Mapping[str, Mapping[str, float]], reference: str) -> list[Comparison]:
    """Every chooser against the reference, by source and, if there are several, on all of them.

    Args:
        scores: source -> chooser -> a score for each seed.
        bounds: source -> bound -> its speedup.
        reference: a chooser of `scores`.
    """
    rng = np.random.default_rng(0)
    groups = [[source] for source in scores] + ([list(scores)] if len(scores) > 1 else [])
    out = []
    for sources in groups:
        reference_shares = np.array([[x.share for x in scores[s][reference]] for s in sources])
        for chooser in scores[sources[0]]:
            mine = [scores[s][chooser] for s in sources]
            shares = np.array([[x.share for x in row] for row in mine])
            ends = np.array([[x.end for x in row] for row in mine])
            out.append(
                Comparison(
                    source=sources[0] if len(sources) == 1 else "all",
                    chooser=chooser,
                    seeds=len(mine[0]),
                    speedup=speedup_interval(np.concatenate([_samples(row) for row in mine])),
                    share=stratified_iqm(shares.T, rng=rng),
                    end=stratified_iqm(ends.T, rng=rng),
                    regret=float(np.mean([x.regret[-1] for row in mine for x in row])),
                    better=None if chooser == reference else improvement(shares, reference_shares, rng=rng),
                    closed=_closed(scores[sources[0]], chooser, reference, bounds[sources[0]])
                    if len(sources) == 1
                    else {},
                )
            )
    return out


def _closed(
    scores: Mapping[str, Sequence[Score]], chooser: str, reference: str, bounds: Mapping[str, float]
) -> dict[str, float | None]:
    """By bound, the share of the way from the reference's speedup; None where there is no way to go."""
    own, base = (speedup_interval(_samples(scores[name])).value for name in (chooser, reference))
    return {name: (own - base) / (bound - base) if bound - base > 1e-3 else None for name, bound in bounds.items()}


def _samples(scores: Sequence[Score]) -> Floats:
    return np.concatenate([x.speedups for x in scores])


def improvement(mine: Floats, others: Floats, *, rng: np.random.Generator) -> Interval:
    """P(mine > others), mean over tasks, of scores [tasks, seeds], with a bootstrap of seeds within each task."""
    value = np.mean([probability_of_improvement(a, b) for a, b in zip(mine, others, strict=True)])
    resampled = []
    for _ in range(_RESAMPLES):
        picks = rng.integers(mine.shape[1], size=(2, *mine.shape))
        drawn = (np.take_along_axis(x, p, 1) for x, p in zip((mine, others), picks, strict=True))
        resampled.append(np.mean([probability_of_improvement(a, b) for a, b in zip(*drawn, strict=True)]))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def regret_curves(scores: Scores) -> list[dict[str, object]]:
    """Regret after each of about a hundred rounds: mean over seeds, and the least and greatest."""
    out: list[dict[str, object]] = []
    for source, by_chooser in scores.items():
        for chooser, runs in by_chooser.items():
            regrets = np.stack([x.regret for x in runs])  # [seeds, R]
            step = max(1, regrets.shape[1] // _POINTS)
            for r in range(step - 1, regrets.shape[1], step):
                row = regrets[:, r]
                out.append(
                    {
                        "source": source,
                        "chooser": chooser,
                        "round": r + 1,
                        "regret": float(row.mean()),
                        "least": float(row.min()),
                        "greatest": float(row.max()),
                    }
                )
    return out
