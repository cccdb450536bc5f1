"""Coverage is measured over hundreds of simulated experiments with fixed seeds; the bounds are wide for other seeds."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from specrl.core.statistics import (
    Floats,
    Interval,
    abba,
    iqm,
    mean_interval,
    paired_speedup,
    pairs_needed,
    prefix_survival,
    probability_of_improvement,
    ratio_of_sums,
    stratified_iqm,
)

EXPERIMENTS = 600  # the standard error of a coverage of 95 % is 0.9 points
Noise = Callable[[np.random.Generator, int], Floats]


def normal(rng: np.random.Generator, n: int) -> Floats:
    return rng.standard_normal(n)


def skewed(rng: np.random.Generator, n: int) -> Floats:
    """Mean 0 and a long right tail, as timings of an interrupted machine have."""
    return rng.exponential(size=n) - 1.0


def fixed(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def coverage(truth: float, interval: Callable[[], Interval]) -> float:
    return float(np.mean([interval().covers(truth) for _ in range(EXPERIMENTS)]))


@pytest.mark.parametrize("noise", [normal, skewed])
@pytest.mark.parametrize("blocks", [12, 30])
def test_the_interval_of_a_paired_speedup_covers_the_truth_95_percent_of_the_time(blocks: int, noise: Noise) -> None:
    rng = fixed(blocks)

    def experiment() -> Interval:
        machine = np.exp(0.2 * rng.standard_normal(blocks))  # affects both blocks of a pair
        plain = machine * np.exp(0.05 * noise(rng, blocks))
        return paired_speedup(1.4 * plain, machine, resamples=1000, rng=rng)

    assert coverage(1.4, experiment) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("noise", [normal, skewed])
def test_with_a_dozen_blocks_a_percentile_bootstrap_covers_nine_times_in_ten(noise: Noise) -> None:
    rng, percentile, studentised = fixed(1), 0, 0
    for _ in range(EXPERIMENTS):
        values = noise(rng, 12)
        low, high = np.quantile(values[rng.integers(12, size=(1000, 12))].mean(1), [0.025, 0.975])
        percentile += low <= 0.0 <= high
        studentised += mean_interval(values, resamples=1000, rng=rng).covers(0.0)
    assert percentile / EXPERIMENTS == pytest.approx(0.895, abs=0.035)
    assert studentised / EXPERIMENTS == pytest.approx(0.95, abs=0.025)


def test_the_interval_of_a_ratio_of_sums_covers_the_truth() -> None:
    rng = fixed(2)

    def experiment() -> Interval:
        spent = rng.uniform(0.5, 2.0, 30)
        saved = 1.7 * spent * np.exp(0.1 * rng.standard_normal(30) - 0.005)
        return ratio_of_sums(saved, spent, resamples=1000, rng=rng)

    assert coverage(1.7, experiment) == pytest.approx(0.95, abs=0.025)
    weighted = ratio_of_sums([1.0, 9.0], [1.0, 3.0], rng=fixed())
    assert weighted.value == pytest.approx(10.0 / 4.0)  # not (1 + 3) / 2


def test_blocks_of_a_group_are_resampled_together() -> None:
    rng, alone, together = fixed(4), 0, 0
    widths = []
    for _ in range(200):
        groups = np.repeat(np.arange(12), 4)
        values = rng.standard_normal(12)[groups] + 0.1 * rng.standard_normal(48)
        naive, grouped = (mean_interval(values, groups=g, resamples=1000, rng=rng) for g in (None, groups))
        assert naive.value == pytest.approx(grouped.value)
        widths.append(grouped.half_width / naive.half_width)
        alone += naive.covers(0.0)
        together += grouped.covers(0.0)
    assert np.median(widths) > 1.7  # four blocks of a group are nearly one value: about sqrt(4)
    assert together >= 180 and alone <= 160
    uneven = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0], groups=["b", "a", "b", "c", "b"], rng=fixed())
    assert uneven.value == pytest.approx(3.0) and uneven.low < 3.0 < uneven.high


def test_abba_cancels_a_linear_drift() -> None:
    assert [abba(n) for n in (1, 2, 3, 4)] == ["AB", "ABBA", "ABBAAB", "ABBAABBA"]
    order = np.array(list(abba(12)))
    seconds = 2e-3 + 5e-5 * np.arange(24)  # the machine slows down; A and B are the same
    a, b = seconds[order == "A"], seconds[order == "B"]
    assert a.sum() == pytest.approx(b.sum())
    assert paired_speedup(a, b, rng=fixed()).covers(1.0)
    assert not paired_speedup(seconds[0::2], seconds[1::2], rng=fixed()).covers(1.0)  # ABAB


@pytest.mark.parametrize("values", [2, 3, 5, 7])
def test_the_interval_of_a_few_values_covers_the_truth_and_is_bounded(values: int) -> None:
    rng = fixed(values)
    intervals = [mean_interval(normal(rng, values), rng=rng) for _ in range(EXPERIMENTS)]
    assert np.mean([interval.covers(0.0) for interval in intervals]) == pytest.approx(0.95, abs=0.025)
    assert max(interval.half_width for interval in intervals) < 60.0
    three = mean_interval([0.0, 1.0, 2.0], rng=rng)
    assert three.value == 1.0 and three.half_width == pytest.approx(4.303 / np.sqrt(3.0), rel=0.03)


def test_a_speedup_is_the_geometric_mean_of_ratios() -> None:
    interval = paired_speedup([2.0, 8.0, 4.0], [1.0, 1.0, 1.0], rng=fixed())
    assert interval.value == pytest.approx(4.0) and interval.low < 4.0 < interval.high and interval.level == 0.95
    assert paired_speedup([3.0] * 4, [2.0] * 4, rng=fixed()) == Interval(1.5, 1.5, 1.5)  # no noise
    two = paired_speedup([1.0, 9.0], [1.0, 1.0], rng=fixed())
    assert two.low < 0.01 and two.high > 100.0


def test_a_higher_level_is_a_wider_interval_and_a_seed_reproduces_it() -> None:
    values = fixed(5).standard_normal(20)
    intervals = [mean_interval(values, level=level, rng=fixed()) for level in (0.5, 0.8, 0.95, 0.99)]
    widths = [interval.half_width for interval in intervals]
    assert widths == sorted(widths) and widths[0] < 0.5 * widths[-1]
    assert intervals[2] == mean_interval(values, rng=fixed())
    assert str(Interval(1.5, 1.25, 1.875)) == "1.500 [1.250, 1.875]"


def test_the_needed_pairs_have_the_stated_power() -> None:
    """A z-test's formula; the bootstrap's wider interval costs a few points of power."""
    pairs = pairs_needed(0.05, 0.02)
    assert pairs == 50  # ((1.95996 + 0.84162) * 0.05 / 0.02)² = 49.06, rounded up
    rng = fixed(7)
    intervals = [mean_interval(0.02 + 0.05 * normal(rng, pairs), resamples=500, rng=rng) for _ in range(EXPERIMENTS)]
    assert np.mean([interval.low > 0.0 for interval in intervals]) == pytest.approx(0.80, abs=0.05)
    assert pairs_needed(0.001, 0.5) == 2
    assert pairs_needed(0.05, 0.02, power=0.9) > pairs > pairs_needed(0.05, 0.04)


def test_prefix_survival_adds_up_to_the_accept_length() -> None:
    survival = prefix_survival([0, 1, 3, 3], 4)
    np.testing.assert_array_equal(survival, [0.75, 0.5, 0.5, 0.0])
    assert 1.0 + survival.sum() == pytest.approx(1.0 + 7 / 4)
    assert prefix_survival([0, 0], 0).shape == (0,)


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([4.0, 1.0, 3.0, 100.0], 3.5),  # 3 and 4
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 70.0], 3.5),  # 2 .. 5
        ([-90.0, 1.0, 2.0, 4.0, 50.0], (0.75 * 1 + 2 + 0.75 * 4) / 2.5),  # a quarter of five is 1.25
        ([7.0], 7.0),
        ([[1.0, 2.0], [3.0, 4.0]], 2.5),
    ],
)
def test_the_interquartile_mean_drops_a_quarter_at_either_end(values: ArrayLike, mean: float) -> None:
    assert iqm(values) == pytest.approx(mean)


def test_the_stratified_interval_resamples_seeds_within_tasks() -> None:
    alike = stratified_iqm(np.tile([1.0, 2.0, 3.0, 4.0], (5, 1)), rng=fixed())
    assert alike == Interval(2.5, 2.5, 2.5)  # tasks differ, seeds do not
    scores = fixed(8).standard_normal((10, 4))
    interval = stratified_iqm(scores, rng=fixed())
    assert interval.value == pytest.approx(iqm(scores)) and interval.low < interval.value < interval.high
    assert 0.2 < interval.half_width < 0.6  # about two standard errors: 1.2 / sqrt(40), twice


def test_the_probability_of_improvement_counts_ties_half() -> None:
    assert probability_of_improvement([3.0, 2.0], [1.0, 2.0]) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert probability_of_improvement([1.0], [2.0, 3.0]) == 0.0


NAN = float("nan")
RNG = {"rng": fixed()}
LEVEL, GROUPS = {**RNG, "level": 1.0}, {**RNG, "groups": ["a", "a"]}


@pytest.mark.parametrize(
    ("function", "arguments", "options", "rule"),
    [
        (abba, [0], {}, "pairs must be at least 1"),
        (paired_speedup, [[1, 2], [1, 2, 3]], RNG, "must be paired"),
        (paired_speedup, [[1, 0], [1, 2]], RNG, "plain must be above 0"),
        (paired_speedup, [[1, NAN], [1, 2]], RNG, "plain must be finite"),
        (paired_speedup, [[], []], RNG, "plain must be at least one value"),
        (paired_speedup, [[1], [2]], RNG, "at least 2"),
        (mean_interval, [[1, 2]], GROUPS, "at least 2"),
        (mean_interval, [[1, 2, 3]], GROUPS, "groups"),
        (mean_interval, [[1, 2]], LEVEL, "level"),
        (ratio_of_sums, [[1, 2], [1]], RNG, "of one length"),
        (ratio_of_sums, [[1, 2], [1, 0]], RNG, "denominator must be above 0"),
        (pairs_needed, [0.0, 0.1], {}, "log_sd and effect"),
        (pairs_needed, [0.1, 0.1], {"power": 1.0}, "power and level"),
        (prefix_survival, [[], 3], {}, "correct_drafts"),
        (prefix_survival, [[1, 4], 3], {}, "correct_drafts"),
        (stratified_iqm, [[1.0, 2.0]], RNG, r"scores must be \[seeds, tasks\]"),
        (probability_of_improvement, [[1.0], []], {}, "y must be at least one value"),
    ],
)
def test_wrong_arguments_are_refused(
    function: Callable[..., object], arguments: list[Any], options: dict[str, Any], rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        function(*arguments, **options)
