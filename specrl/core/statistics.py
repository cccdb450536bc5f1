"""Paired ratios, bootstrap intervals and the comparison of agents: pure functions over NumPy arrays.

Intervals are studentised bootstraps over blocks, or over groups of blocks that share requests. A percentile bootstrap
of a dozen blocks covers 95 % only nine times in ten (tests/test_statistics.py measures both). Fewer than eight values
are too few to resample; Student's t is used for them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specrl.core.checks import require

Floats = NDArray[np.float64]
_FEW = 8  # values; with fewer, many resamples hold almost equal values, and the interval is unbounded


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
    """The order 'ABBAABBA…' of 2 * pairs blocks: a linear drift of the machine adds the same to A as to B.

    Raises:
        ValueError: fewer than one pair.
    """
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
    """Geometric mean of the paired ratios plain / speculative: the exponential of their mean log ratio.

    Args:
        plain, speculative: [n] seconds per token of paired blocks, n >= 2.
        groups: [n] which blocks belong together and are resampled together; None: each on its own.
        level: of the interval.
        resamples: of the bootstrap.
        rng: of the bootstrap.

    Raises:
        ValueError: lengths differ, fewer than two pairs or groups, or a value that is not positive and finite.
    """
    a, b = _positive(plain, "plain"), _positive(speculative, "speculative")
    if a.shape != b.shape:
        raise ValueError(f"plain and speculative must be paired, but got {len(a)} and {len(b)} blocks")
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
    """Mean of `values [n]` by a studentised bootstrap over values, or over groups of them (Efron, 1979; Hall, 1988).

    For fewer than eight, Student's t (1908), which assumes normal values.

    Args:
        values: [n], n >= 2.
        groups, level, resamples, rng: as in `paired_speedup`.

    Raises:
        ValueError: fewer than two values or groups, or one that is not finite.
    """
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
    """Σ numerator ÷ Σ denominator, such as a run's speedup ΣN·t0/B ÷ ΣΔt, by a studentised bootstrap.

    The standard error of each resample is the ratio estimator's (Cochran, 1977, section 6.4).

    Args:
        numerator, denominator: [n], n >= 2.
        groups, level, resamples, rng: as in `paired_speedup`.

    Raises:
        ValueError: lengths differ, fewer than two values or groups, or a value that is not finite or not positive.
    """
    x, y = _finite(numerator, "numerator"), _positive(denominator, "denominator")
    if x.shape != y.shape:
        raise ValueError(f"numerator and denominator must have one length, but got {len(x)} and {len(y)}")
    require(0.0 < level < 1.0, "level", "in (0, 1)", level)
    if groups is not None:
        index = np.unique(np.asarray(groups), return_inverse=True)[1]
        if index.shape != x.shape:
            raise ValueError(f"groups must name the group of each of {len(x)} values, but got {len(index)}")
        x, y = (np.bincount(index, values).astype(np.float64) for values in (x, y))
    n = len(x)
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values or groups, but got {n}; measure longer")
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
    """Standard error of Σx ÷ Σy over the last axis."""
    n = x.shape[-1]
    ratio = x.sum(-1, keepdims=True) / y.sum(-1, keepdims=True)
    residual = x - ratio * y
    return np.sqrt((residual**2).sum(-1) / (n - 1) / n) / y.mean(-1)


def pairs_needed(log_sd: float, effect: float, *, power: float = 0.8, level: float = 0.95) -> int:
    """Pairs that show a relative `effect` with `power` when per-pair log ratios have standard deviation `log_sd`.

    n = ((z_level + z_power) · log_sd / effect)², rounded up, as in any paired z-test; at least the 2 of an interval.

    Raises:
        ValueError: a number out of range.
    """
    if not (log_sd > 0 and effect > 0 and 0 < power < 1 and 0 < level < 1):
        raise ValueError(
            "log_sd and effect must be above 0, power and level in (0, 1), "
            f"but got {log_sd}, {effect}, {power}, {level}"
        )
    normal = NormalDist()
    z = normal.inv_cdf(0.5 + level / 2.0) + normal.inv_cdf(power)
    return max(2, math.ceil((z * log_sd / effect) ** 2))


def prefix_survival(correct_drafts: ArrayLike, num_steps: int) -> Floats:
    """P_k for k = 1 .. num_steps: the share of `correct_drafts [n]` that reached k; E[τ] = 1 + Σ P_k.

    Raises:
        ValueError: no rounds, or more correct drafts than steps.
    """
    correct = np.asarray(correct_drafts)
    if correct.size == 0 or correct.min() < 0 or correct.max() > num_steps:
        raise ValueError(f"correct_drafts must be in [0, num_steps={num_steps}] and at least one, but got {correct}")
    return (correct[:, None] >= np.arange(1, num_steps + 1)).mean(0)


def iqm(values: ArrayLike) -> float:
    """Interquartile mean: the mean of the middle half of all values (Agarwal et al., 2021)."""
    x = np.sort(_finite(values, "values").ravel())
    weight = np.clip(np.minimum(np.arange(1, len(x) + 1) - len(x) / 4, len(x) * 3 / 4 - np.arange(len(x))), 0.0, 1.0)
    return float((weight * x).sum() / weight.sum())


def stratified_iqm(
    scores: ArrayLike, *, level: float = 0.95, resamples: int = 2000, rng: np.random.Generator
) -> Interval:
    """IQM of `scores [seeds, tasks]` with a percentile bootstrap that resamples seeds within each task.

    Source: Agarwal et al., 2021, "Deep RL at the edge of the statistical precipice", section 4.
    """
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != 2 or x.size == 0 or not np.isfinite(x).all():
        raise ValueError(f"scores must be [seeds, tasks], finite and not empty, but got shape {x.shape}")
    seeds, tasks = x.shape
    picks = rng.integers(seeds, size=(resamples, seeds, tasks))
    again = [iqm(x[p, np.arange(tasks)]) for p in picks]
    low, high = np.quantile(again, [(1 - level) / 2, (1 + level) / 2])
    return Interval(iqm(x), float(low), float(high), level)


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """P(X > Y) for scores of two agents on one task, ties counting half (Agarwal et al., 2021)."""
    a, b = _finite(x, "x"), _finite(y, "y")
    return float(((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean())


def _finite(values: ArrayLike, name: str) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError(f"{name} must hold at least one value, but it is empty")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must be finite, but {int((~np.isfinite(x)).sum())} of {x.size} are not")
    return x


def _positive(values: ArrayLike, name: str) -> Floats:
    x = _finite(values, name)
    if not (x > 0).all():
        raise ValueError(f"{name} must be above 0, but its least is {x.min()}")
    return x
