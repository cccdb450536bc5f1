"""What plays are worth: speedups, shares of the best plan, regret, and choosers against each other. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from specrl.core.statistics import Interval, mean_interval, probability_of_improvement, stratified_iqm

_RESAMPLES, _POINTS = 1000, 100  # of a bootstrap; of a curve
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Score:
    """One chooser's play of one source and seed.

    Attributes:
        speedups: [n] measured, Σ N·t0(B)/B ÷ Σ Δt: of each block on a live clock, of the whole play in simulation.
        share: seconds that the best plan per batch size would need for the expected tokens, over the expected seconds.
        end: the same over the last quarter.
        regret: [R] cumulative, in rounds: Σ 1 - v / v*, where v is the speed expected of the plan and v* the best.
        choices: [R] plans as indices.
        tokens: [R] tokens that came.
    """

    speedups: Floats
    share: float
    end: float
    regret: Floats
    choices: Ints
    tokens: Ints


def share(earned: Floats, spent: Floats, choices: Ints) -> float:
    """Of `earned` and `spent` [R, plans] (see `World`): Σ earned / v* ÷ Σ spent of the choices; 1 is the best table."""
    rows = np.arange(len(choices))
    best = (earned / spent).max(1)
    return float((earned[rows, choices] / best).sum() / spent[rows, choices].sum())


def regret(earned: Floats, spent: Floats, choices: Ints) -> Floats:
    """[R] cumulative regret in rounds."""
    values = earned / spent
    return np.asarray((1.0 - values[np.arange(len(choices)), choices] / values.max(1)).cumsum())


def score(speedups: Floats, earned: Floats, spent: Floats, choices: Ints, tokens: Ints) -> Score:
    """The score of a play, from what its plans are worth."""
    last = slice(3 * len(choices) // 4, None)
    end = share(earned[last], spent[last], choices[last])
    return Score(speedups, share(earned, spent, choices), end, regret(earned, spent, choices), choices, tokens)


def speedup_interval(samples: Floats) -> Interval:
    """Geometric mean of speedups [n >= 2] of plays or blocks, and its 95 % interval; the same samples give the same."""
    mean = mean_interval(np.log(samples), rng=np.random.default_rng(0))
    with np.errstate(over="ignore"):  # two or three samples say so little that the upper end may be infinite
        value, low, high = np.exp([mean.value, mean.low, mean.high]).tolist()
    return Interval(value, low, high, mean.level)


def agree(one: Interval, two: Interval) -> bool:
    """Whether two measured speedups may be the same.

    |log a - log b| <= 1.32 · sqrt(h_a² + h_b²) with h the half-widths of the 95 % intervals in logs: two honest
    measurements disagree once in a hundred times.
    """
    logs = [np.log([x.value, x.low, x.high]) for x in (one, two)]
    halves = [(high - low) / 2.0 for _, low, high in logs]
    return bool(abs(logs[0][0] - logs[1][0]) <= 1.32 * np.hypot(*halves))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A chooser on one source or, where `source` is 'all', on all of them.

    Attributes:
        speedup: geometric mean over plays or blocks.
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


def compare(scores: Scores, bounds: Mapping[str, Mapping[str, float]], reference: str) -> list[Comparison]:
    """Every chooser against the reference, by source and, where there are several, on all of them.

    Args:
        scores: source -> chooser -> a score for each seed.
        bounds: source -> bound -> its speedup.
        reference: a chooser of `scores`.
    """
    rng = np.random.default_rng(0)
    groups = [[source] for source in scores] + ([list(scores)] if len(scores) > 1 else [])
    out = []
    for sources in groups:
        first = scores[sources[0]]
        base = {s: speedup_interval(_samples(scores[s][reference])).value for s in sources}
        theirs = np.array([[x.share for x in scores[s][reference]] for s in sources])
        for chooser in first:
            mine = [scores[s][chooser] for s in sources]
            shares = np.array([[x.share for x in row] for row in mine])
            ends = np.array([[x.end for x in row] for row in mine])
            closed: dict[str, float | None] = {}
            if len(sources) == 1:
                own = speedup_interval(_samples(mine[0])).value
                for bound, reach in bounds[sources[0]].items():
                    way = reach - base[sources[0]]
                    closed[bound] = (own - base[sources[0]]) / way if way > 1e-3 else None
            out.append(
                Comparison(
                    source=sources[0] if len(sources) == 1 else "all",
                    chooser=chooser,
                    seeds=len(mine[0]),
                    speedup=speedup_interval(np.concatenate([_samples(row) for row in mine])),
                    share=stratified_iqm(shares.T, rng=rng),
                    end=stratified_iqm(ends.T, rng=rng),
                    regret=float(np.mean([x.regret[-1] for row in mine for x in row])),
                    better=None if chooser == reference else improvement(shares, theirs, rng=rng),
                    closed=closed,
                )
            )
    return out


def _samples(scores: Sequence[Score]) -> Floats:
    return np.concatenate([x.speedups for x in scores])


def improvement(mine: Floats, theirs: Floats, *, rng: np.random.Generator) -> Interval:
    """P(mine > theirs), mean over tasks, of scores [tasks, seeds], with a bootstrap of seeds within each task."""
    value = np.mean([probability_of_improvement(a, b) for a, b in zip(mine, theirs, strict=True)])
    again = []
    for _ in range(_RESAMPLES):
        picks = rng.integers(mine.shape[1], size=(2, *mine.shape))
        drawn = (np.take_along_axis(x, p, 1) for x, p in zip((mine, theirs), picks, strict=True))
        again.append(np.mean([probability_of_improvement(a, b) for a, b in zip(*drawn, strict=True)]))
    low, high = np.quantile(again, [0.025, 0.975])
    return Interval(float(value), float(low), float(high))


def curves(scores: Scores) -> list[dict[str, object]]:
    """Regret after each of about a hundred rounds: mean over seeds, and the least and greatest."""
    out: list[dict[str, object]] = []
    for source, by_chooser in scores.items():
        for chooser, plays in by_chooser.items():
            every = np.stack([x.regret for x in plays])
            step = max(1, every.shape[1] // _POINTS)
            for r in range(step - 1, every.shape[1], step):
                row = every[:, r]
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
