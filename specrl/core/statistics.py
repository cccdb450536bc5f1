"""Paired ratios, bootstrap intervals and the comparison of agents: pure functions over NumPy arrays.

Intervals are studentised bootstraps, because a percentile bootstrap of a dozen values covers the truth nine times in
ten instead of 95 % (tests/test_statistics.py). With fewer than eight values, they use Student's t.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specrl.core.checks import require

Floats = NDArray[np.float64]
_FEW = 8  # with fewer values, many resamples hold almost equal ones, and a bootstrap interval is unbounded


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float
    level: float = 0.95

    @property
    def half_width(self) -> float:
        """Half of high - low."""
        return (self.high - self.low) / 2.0

    def covers(self, x: float) -> bool:
        """Whether `x` is inside."""
        return self.low <= x <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def abba(pairs: int) -> str:
    """Return the order 'ABBAABBA…' of 2 * pairs blocks, pairs >= 1: a linear drift adds the same to A and B."""
    require(pairs >= 1, "pairs", "at least 1", pairs)
    return ("ABBA" * ((pairs + 1) // 2))[: 2 * pairs]


def paired_speedup(
    plain: ArrayLike,
    speculative: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    rng: np.random.Generator,
) -> Interval:
    """Return the geometric mean of the paired ratios plain / speculative, with its interval.

    Args:
        plain, speculative: [n] seconds per token of paired blocks, n >= 2; above 0 and finite.
        groups: [n] the group of each block, at least 2 groups; they are resampled as a whole. None: no groups.
        level: confidence level of the interval.
        resamples: number of resamples of the bootstrap.
        rng: generator of the resamples.
    """
    a, b = _positive(plain, "plain"), _positive(speculative, "speculative")
    require(a.shape == b.shape, "plain and speculative", "paired", (len(a), len(b)))
    mean = mean_interval(np.log(a / b), groups=groups, level=level, resamples=resamples, rng=rng)
    with np.errstate(over="ignore"):  # with two or three pairs the upper end may be infinite
        value, low, high = np.exp([mean.value, mean.low, mean.high]).tolist()
    return Interval(value, low, high, level)


def mean_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    rng: np.random.Generator,
) -> Interval:
    """Return the mean of `values` [n] with its interval, as `ratio_of_sums` does for denominators of 1."""
    x = _finite(values, "values")
    return ratio_of_sums(x, np.ones_like(x), groups=groups, level=level, resamples=resamples, rng=rng)


def ratio_of_sums(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    resamples: int = 4000,
    rng: np.random.Generator,
) -> Interval:
    """Return Σ numerator ÷ Σ denominator, such as a run's speedup ΣN·t0/B ÷ ΣΔt, with its interval.

    The interval is a studentised bootstrap over values or groups (Efron, 1979; Hall, 1988). The standard error of each
    resample is the ratio estimator's (Cochran, 1977, section 6.4). For fewer than eight values or groups it is
    Student's t (1908), which assumes that they are normal.

    Args:
        numerator, denominator: [n], n >= 2, finite; denominators above 0.
        groups, level, resamples, rng: as in `paired_speedup`.
    """
    x, y = _finite(numerator, "numerator"), _positive(denominator, "denominator")
    require(x.shape == y.shape, "numerator and denominator", "of one length", (len(x), len(y)))
    require(0.0 < level < 1.0, "level", "in (0, 1)", level)
    if groups is not None:
        index = np.unique(np.asarray(groups), return_inverse=True)[1]
        require(index.shape == x.shape, "groups", f"a group for each of {len(x)} values", len(index))
        x, y = (np.bincount(index, values).astype(np.float64) for values in (x, y))
    n = len(x)
    require(n >= 2, "values or groups of an interval", "at least 2", n)
    value, error = float(x.sum() / y.sum()), float(_ratio_error(x, y))
    if error == 0.0:
        return Interval(value, value, value, level)
    if n < _FEW:
        width = error * float(np.quantile(np.abs(rng.standard_t(n - 1, size=100_000)), level))
        return Interval(value, value - width, value + width, level)
    picks = rng.integers(n, size=(resamples, n))
    xs, ys = x[picks], y[picks]
    t = (xs.sum(1) / ys.sum(1) - value) / np.maximum(_ratio_error(xs, ys), 1e-3 * error)
    tail = (1.0 - level) / 2.0
    low, high = value - error * np.quantile(t, [1.0 - tail, tail])
    return Interval(value, float(low), float(high), level)


def _ratio_error(x: Floats, y: Floats) -> Floats:
    """Return the standard error of Σx ÷ Σy over the last axis."""
    n = x.shape[-1]
    ratio = x.sum(-1, keepdims=True) / y.sum(-1, keepdims=True)
    residual = x - ratio * y
    return np.sqrt((residual**2).sum(-1) / (n - 1) / n) / y.mean(-1)


def pairs_needed(log_sd: float, effect: float, *, power: float = 0.8, level: float = 0.95) -> int:
    """Return the number of pairs that show a relative `effect` > 0 with a probability of `power`, in (0, 1).

    This is a paired z-test: n = ((z_level + z_power) · log_sd / effect)², rounded up; at least 2. The log ratios of
    pairs have standard deviation `log_sd` > 0.
    """
    require(min(log_sd, effect) > 0, "log_sd and effect", "above 0", (log_sd, effect))
    require(0 < min(power, level) and max(power, level) < 1, "power and level", "in (0, 1)", (power, level))
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + level / 2.0) + normal.inv_cdf(power)
    return max(2, math.ceil((z * log_sd / effect) ** 2))


def prefix_survival(correct_drafts: ArrayLike, num_steps: int) -> Floats:
    """Return P_k for k = 1 .. num_steps: the share of `correct_drafts` [n], n >= 1, that are at least k."""
    correct = np.asarray(correct_drafts)
    valid = correct.size > 0 and correct.min() >= 0 and correct.max() <= num_steps
    require(valid, "correct_drafts", f"at least one number in [0, num_steps={num_steps}]", correct_drafts)
    return (correct[:, None] >= np.arange(1, num_steps + 1)).mean(0)


def iqm(values: ArrayLike) -> float:
    """Return the interquartile mean: the mean of the middle half of all values (Agarwal et al., 2021)."""
    x = np.sort(_finite(values, "values").ravel())
    weight = np.clip(np.minimum(np.arange(1, len(x) + 1) - len(x) / 4, len(x) * 3 / 4 - np.arange(len(x))), 0.0, 1.0)
    return float((weight * x).sum() / weight.sum())


def stratified_iqm(
    scores: ArrayLike, *, level: float = 0.95, resamples: int = 2000, rng: np.random.Generator
) -> Interval:
    """Return the IQM of `scores` [seeds, tasks] with a percentile bootstrap that resamples seeds within each task.

    Source: Agarwal et al., 2021, "Deep RL at the edge of the statistical precipice", section 4.
    """
    x = _finite(scores, "scores")
    require(x.ndim == 2, "scores", "[seeds, tasks]", x.shape)
    seeds, tasks = x.shape
    picks = rng.integers(seeds, size=(resamples, seeds, tasks))
    resampled = [iqm(x[pick, np.arange(tasks)]) for pick in picks]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(iqm(x), float(low), float(high), level)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """Return P(X > Y) for scores of two agents on one task, ties counting half (Agarwal et al., 2021)."""
    a, b = _finite(x, "x"), _finite(y, "y")
    return float(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())


def _finite(values: ArrayLike, name: str) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    require(x.size > 0, name, "at least one value", values)
    require(bool(np.isfinite(x).all()), name, "finite", x[~np.isfinite(x)].tolist())
    return x


def _positive(values: ArrayLike, name: str) -> Floats:
    x = _finite(values, name)
    require(bool((x > 0).all()), name, "above 0", x[x <= 0].tolist())
    return x
