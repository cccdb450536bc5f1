"""Coverage is measured over hundreds of simulated experiments with fixed seeds; the bounds are wide for others."""

from collections.abc import Callable

import numpy as np
import pytest

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
    """Mean 0 and a long right tail, as a slice that the machine interrupts has."""
    return rng.exponential(size=n) - 1.0


def fixed(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("noise", [normal, skewed])
@pytest.mark.parametrize("blocks", [12, 30])
def test_the_interval_of_a_paired_speedup_covers_the_truth_95_percent_of_the_time(blocks: int, noise: Noise) -> None:
    rng, covered = fixed(blocks), 0
    for _ in range(EXPERIMENTS):
        machine = np.exp(0.2 * rng.standard_normal(blocks))  # what both blocks of a pair meet
        plain = machine * np.exp(0.05 * noise(rng, blocks))
        interval = paired_speedup(1.4 * plain, machine, resamples=1000, rng=rng)
        covered += interval.covers(1.4)
    assert covered / EXPERIMENTS == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("noise", [normal, skewed])
def test_at_a_dozen_blocks_a_percentile_bootstrap_covers_nine_times_in_ten(noise: Noise) -> None:
    rng, percentile, studentised = fixed(1), 0, 0
    for _ in range(EXPERIMENTS):
        values = noise(rng, 12)
        low, high = np.quantile(values[rng.integers(12, size=(1000, 12))].mean(1), [0.025, 0.975])
        percentile += low <= 0.0 <= high
        studentised += mean_interval(values, resamples=1000, rng=rng).covers(0.0)
    assert percentile / EXPERIMENTS == pytest.approx(0.895, abs=0.035)
    assert studentised / EXPERIMENTS == pytest.approx(0.95, abs=0.025)


def test_the_interval_of_a_ratio_of_sums_covers_the_truth() -> None:
    rng, covered = fixed(2), 0
    for _ in range(EXPERIMENTS):
        spent = rng.uniform(0.5, 2.0, 30)
        saved = 1.7 * spent * np.exp(0.1 * rng.standard_normal(30) - 0.005)
        covered += ratio_of_sums(saved, spent, resamples=1000, rng=rng).covers(1.7)
    assert covered / EXPERIMENTS == pytest.approx(0.95, abs=0.025)


def test_identical_lanes_are_found_equal() -> None:
    """A/A: the two lanes differ by noise alone."""
    rng, covered = fixed(3), 0
    for _ in range(200):
        covered += paired_speedup(*np.exp(0.05 * rng.standard_normal((2, 16))), resamples=1000, rng=rng).covers(1.0)
    assert covered >= 180


def test_blocks_that_share_requests_are_resampled_together() -> None:
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
    assert np.median(widths) > 1.7  # the four blocks of a group say little more than one: nearly sqrt(4)
    assert together >= 180 and alone <= 160


def test_groups_need_not_be_of_one_size_nor_sorted() -> None:
    values, groups = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array(["b", "a", "b", "c", "b"])
    interval = mean_interval(values, groups=groups, rng=fixed())
    assert interval.value == pytest.approx(3.0) and interval.low < 3.0 < interval.high


def test_abba_cancels_a_linear_drift() -> None:
    assert [abba(n) for n in (1, 2, 3, 4)] == ["AB", "ABBA", "ABBAAB", "ABBAABBA"]
    order = np.array(list(abba(12)))
    seconds = 2e-3 + 5e-5 * np.arange(24)  # the machine slows down; A and B are the same
    a, b = seconds[order == "A"], seconds[order == "B"]
    assert a.sum() == pytest.approx(b.sum())
    assert paired_speedup(a, b, rng=fixed()).covers(1.0)
    in_turns = paired_speedup(seconds[0::2], seconds[1::2], rng=fixed())  # ABAB charges the drift to B
    assert not in_turns.covers(1.0)


def test_the_speedup_is_the_geometric_mean_of_the_ratios() -> None:
    interval = paired_speedup([2.0, 8.0, 4.0], [1.0, 1.0, 1.0], rng=fixed())
    assert interval.value == pytest.approx(4.0)
    assert interval.low < 4.0 < interval.high and interval.level == 0.95


@pytest.mark.parametrize("seeds", [2, 3, 5, 7])
def test_a_few_values_have_an_interval_that_covers_the_truth_and_has_bounds(seeds: int) -> None:
    rng = fixed(seeds)
    found = [mean_interval(normal(rng, seeds), rng=rng) for _ in range(EXPERIMENTS)]
    assert np.mean([interval.covers(0.0) for interval in found]) == pytest.approx(0.95, abs=0.025)
    assert max(interval.half_width for interval in found) < 60.0
    of_three = mean_interval([0.0, 1.0, 2.0], rng=rng)
    assert of_three.value == 1.0 and of_three.half_width == pytest.approx(4.303 / np.sqrt(3.0), rel=0.03)


def test_blocks_without_any_noise_leave_no_doubt() -> None:
    assert paired_speedup([3.0] * 4, [2.0] * 4, rng=fixed()) == Interval(1.5, 1.5, 1.5)


def test_two_pairs_prove_nothing() -> None:
    interval = paired_speedup([1.0, 9.0], [1.0, 1.0], rng=fixed())
    assert interval.value == pytest.approx(3.0) and interval.low < 0.01 and interval.high > 100.0


def test_a_higher_level_is_a_wider_interval() -> None:
    values = fixed(5).standard_normal(20)
    widths = [mean_interval(values, level=level, rng=fixed()).half_width for level in (0.5, 0.8, 0.95, 0.99)]
    assert widths == sorted(widths) and widths[0] < 0.5 * widths[-1]


def test_the_same_seed_gives_the_same_interval() -> None:
    values = fixed(6).standard_normal(20)
    assert mean_interval(values, rng=fixed(1)) == mean_interval(values, rng=fixed(1))


def test_a_ratio_of_sums_weighs_long_rounds_more() -> None:
    assert ratio_of_sums([1.0, 9.0], [1.0, 3.0], rng=fixed()).value == pytest.approx(10.0 / 4.0)  # not (1 + 3) / 2


def test_an_interval_tells_its_width_and_prints() -> None:
    interval = Interval(1.5, 1.25, 1.875)
    assert interval.half_width == 0.3125 and str(interval) == "1.500 [1.250, 1.875]"
    assert interval.covers(1.25) and interval.covers(1.875) and not interval.covers(1.9)


def test_pairs_needed_give_the_power_they_promise() -> None:
    """A z-test's formula; the bootstrap's wider interval costs a few points of power."""
    pairs = pairs_needed(0.05, 0.02)
    assert pairs == 50  # ((1.95996 + 0.84162) * 0.05 / 0.02)² = 49.06, rounded up
    rng, shown = fixed(7), 0
    for _ in range(EXPERIMENTS):
        shown += mean_interval(0.02 + 0.05 * rng.standard_normal(pairs), resamples=500, rng=rng).low > 0.0
    assert shown / EXPERIMENTS == pytest.approx(0.80, abs=0.05)


def test_pairs_needed_are_never_too_few_for_an_interval() -> None:
    assert pairs_needed(0.001, 0.5) == 2
    assert pairs_needed(0.05, 0.02, power=0.9) > pairs_needed(0.05, 0.02) > pairs_needed(0.05, 0.04)


def test_prefix_survival_adds_up_to_the_accept_length() -> None:
    correct = [0, 1, 3, 3]
    survival = prefix_survival(correct, 4)
    np.testing.assert_array_equal(survival, [0.75, 0.5, 0.5, 0.0])
    assert 1.0 + survival.sum() == pytest.approx(1.0 + np.mean(correct))
    assert prefix_survival([0, 0], 0).shape == (0,)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0, 1.0, 3.0, 100.0], 3.5),  # 3 and 4
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 70.0], 3.5),  # 2 .. 5
        ([-90.0, 1.0, 2.0, 4.0, 50.0], (0.75 * 1 + 2 + 0.75 * 4) / 2.5),  # a quarter of five is 1.25
        ([7.0], 7.0),
        ([[1.0, 2.0], [3.0, 4.0]], 2.5),
    ],
)
def test_the_interquartile_mean_drops_a_quarter_at_either_end(values: list[float], expected: float) -> None:
    assert iqm(values) == pytest.approx(expected)


def test_the_stratified_interval_resamples_seeds_within_tasks() -> None:
    alike = stratified_iqm(np.tile([1.0, 2.0, 3.0, 4.0], (5, 1)), rng=fixed())
    assert alike == Interval(2.5, 2.5, 2.5)  # tasks differ, seeds do not: nothing is uncertain
    scores = fixed(8).standard_normal((10, 4))
    interval = stratified_iqm(scores, rng=fixed())
    assert interval.value == pytest.approx(iqm(scores)) and interval.low < interval.value < interval.high
    assert 0.2 < interval.half_width < 0.6  # about two standard errors: 1.2 / sqrt(40), twice


def test_the_probability_of_improvement_counts_ties_half() -> None:
    assert probability_of_improvement([3.0, 2.0], [1.0, 2.0]) == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert probability_of_improvement([1.0], [2.0, 3.0]) == 0.0
    assert probability_of_improvement([1.0, 2.0], [1.0, 2.0]) == 0.5


NAN = float("nan")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: abba(0), "pairs must be at least 1, but got 0"),
        (lambda: paired_speedup([1, 2], [1, 2, 3], rng=fixed()), "must be paired, but got 2 and 3 blocks"),
        (lambda: paired_speedup([1, 0], [1, 2], rng=fixed()), "plain must be above 0, but its least is 0.0"),
        (lambda: paired_speedup([1, 2], [1, -2], rng=fixed()), "speculative must be above 0, but its least is -2.0"),
        (lambda: paired_speedup([1, NAN], [1, 2], rng=fixed()), "plain must be finite, but 1 of 2 are not"),
        (lambda: paired_speedup([], [], rng=fixed()), "plain must hold at least one value, but it is empty"),
        (lambda: paired_speedup([1], [2], rng=fixed()), "needs at least 2 values or groups, but got 1; measure longer"),
        (lambda: mean_interval([1, 2], groups=["a", "a"], rng=fixed()), "at least 2 values or groups, but got 1"),
        (lambda: mean_interval([1, 2, 3], groups=[0, 1], rng=fixed()), "the group of each of 3 values, but got 2"),
        (lambda: mean_interval([1, 2], level=1.0, rng=fixed()), r"level must be in \(0, 1\), but got 1.0"),
        (lambda: mean_interval([1, float("inf")], rng=fixed()), "values must be finite, but 1 of 2 are not"),
        (lambda: ratio_of_sums([1, 2], [1], rng=fixed()), "must have one length, but got 2 and 1"),
        (lambda: ratio_of_sums([1, 2], [1, 0], rng=fixed()), "denominator must be above 0, but its least is 0.0"),
        (lambda: pairs_needed(0.0, 0.1), "log_sd and effect must be above 0, .* but got 0.0, 0.1, 0.8, 0.95"),
        (lambda: pairs_needed(0.1, 0.1, power=1.0), "but got 0.1, 0.1, 1.0, 0.95"),
        (lambda: prefix_survival([], 3), r"must be in \[0, num_steps=3\] and at least one"),
        (lambda: prefix_survival([1, 4], 3), r"must be in \[0, num_steps=3\]"),
        (lambda: prefix_survival([-1], 3), r"must be in \[0, num_steps=3\]"),
        (lambda: iqm([]), "values must hold at least one value"),
        (lambda: stratified_iqm([1.0, 2.0], rng=fixed()), r"scores must be \[seeds, tasks\].* got shape \(2,\)"),
        (lambda: stratified_iqm([[1.0, NAN]], rng=fixed()), "scores must be .* finite"),
        (lambda: probability_of_improvement([1.0], []), "y must hold at least one value"),
    ],
)
def test_wrong_arguments_get_one_clear_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
