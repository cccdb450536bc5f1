import json
from collections.abc import Iterable

import numpy as np
import pytest

from specrl.core.plain_cost import PlainCost
from specrl.core.round import PlainSample


def fed(samples: Iterable[tuple[int, float, float]]) -> PlainCost:
    """A baseline that took these (batch size, context, seconds)."""
    cost = PlainCost()
    for sample in samples:
        cost.add(PlainSample(*sample))
    return cost


def test_each_batch_size_has_its_own_cost() -> None:
    cost = fed([(1, 100.0, 2e-3), (16, 100.0, 5e-3)] * 5)
    assert cost.estimate(1, 100.0).seconds == pytest.approx(2e-3)
    assert cost.estimate(16, 100.0).seconds == pytest.approx(5e-3)


def test_it_is_a_line_over_context() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.uniform(50.0, 500.0, 48)
    cost = fed((4, c, (2e-3 + 4e-6 * c) * np.exp(0.02 * rng.standard_normal())) for c in contexts)
    for context in (50.0, 250.0, 500.0):
        estimate = cost.estimate(4, context)
        assert estimate.seconds == pytest.approx(2e-3 + 4e-6 * context, rel=0.02)
    assert estimate.samples == 48
    assert 0.0 < estimate.standard_error < 0.01 * estimate.seconds


def test_contexts_too_alike_or_too_few_say_nothing_about_the_slope() -> None:
    alike = fed((1, 100.0 + i % 3, 2e-3 + 1e-5 * (i % 3)) for i in range(20))
    assert alike.estimate(1, 1000.0) == alike.estimate(1, 100.0)
    few = fed((1, 100.0 * (i + 1), 2e-3 + 1e-5 * i) for i in range(4))
    assert few.estimate(1, 1000.0) == few.estimate(1, 100.0)


def test_cost_never_falls_with_context_nor_below_half_the_level() -> None:
    falling = fed((1, c, 4e-3 - 1e-6 * c) for c in np.linspace(100.0, 1000.0, 20))
    assert falling.estimate(1, 2000.0) == falling.estimate(1, 100.0)
    steep = fed((1, c, 1e-5 * c) for c in np.linspace(500.0, 1000.0, 20))
    assert steep.estimate(1, 1.0).seconds == pytest.approx(0.5 * 7.5e-3)


@pytest.mark.parametrize("spike", [40.0, 5.0, 0.01])
def test_spikes_are_ignored(spike: float) -> None:
    rng = np.random.default_rng(1)
    clean = [(2, 100.0, 3e-3 * float(np.exp(0.01 * rng.standard_normal()))) for _ in range(40)]
    spoilt = [(b, c, s * spike if i % 5 == 2 else s) for i, (b, c, s) in enumerate(clean)]
    assert fed(spoilt).estimate(2, 100.0).seconds == pytest.approx(fed(clean).estimate(2, 100.0).seconds, rel=0.01)


def test_the_rare_context_counts_too() -> None:
    """One sample in six is taken at a long context and takes twice the time: no spike, the line's other end."""
    rng = np.random.default_rng(3)
    contexts = [1000.0 if i % 6 == 5 else 100.0 + i % 10 for i in range(48)]
    cost = fed((1, c, (2e-3 + 2e-6 * c) * float(np.exp(0.02 * rng.standard_normal()))) for c in contexts)
    assert cost.estimate(1, 1000.0).seconds == pytest.approx(4e-3, rel=0.02)
    assert cost.estimate(1, 105.0).seconds == pytest.approx(2.21e-3, rel=0.02)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    cost = fed([(1, 100.0, 2e-3)] * 48)
    for _ in range(30):
        cost.add(PlainSample(1, 100.0, 3e-3))
    assert cost.estimate(1, 100.0).seconds == pytest.approx(3e-3)
    assert cost.estimate(1, 100.0).samples == 48  # the window


def test_it_is_measured_densely_at_first_and_seldom_later() -> None:
    cost, measured = PlainCost(every=10), []
    for index in range(60):
        for _ in range(cost.samples_due(4)):
            measured.append(index)
            cost.add(PlainSample(4, 100.0, 2e-3))
    assert measured == [0, 0, 0, 2, 4, 6, 8, 10, 20, 30, 40, 50]


def test_rounds_at_another_batch_size_do_not_make_it_due() -> None:
    cost = fed([(4, 100.0, 2e-3)])
    assert [cost.samples_due(1) for _ in range(10)] == [3] * 10
    assert [cost.samples_due(4) for _ in range(2)] == [0, 1]


def test_state_survives_json() -> None:
    rng = np.random.default_rng(2)
    cost = fed((b, float(c), 1e-3 * b + 1e-6 * c) for b in (1, 8) for c in rng.uniform(50.0, 500.0, 30))
    again = PlainCost()
    again.add(PlainSample(3, 10.0, 1.0))  # forgotten
    again.load_state_dict(json.loads(json.dumps(cost.state_dict())))
    assert again.state_dict() == cost.state_dict()
    assert [again.estimate(b, 300.0) for b in (1, 8)] == [cost.estimate(b, 300.0) for b in (1, 8)]
    with pytest.raises(ValueError, match="batch size 3 first; measured: 1, 8"):
        again.estimate(3, 10.0)
    for _ in range(60):  # the window goes on
        again.add(PlainSample(8, 100.0, 0.5))
    assert again.estimate(8, 100.0).samples == 48


def test_a_batch_size_never_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="must be measured at batch size 2 first; measured: none"):
        PlainCost().estimate(2, 10.0)
    with pytest.raises(ValueError, match="must be measured at batch size 2 first; measured: 1, 16"):
        fed([(16, 10.0, 1.0), (1, 10.0, 1.0)]).estimate(2, 10.0)


@pytest.mark.parametrize("seconds", [0.0, -1e-3, float("nan"), float("inf")])
def test_impossible_times_are_refused(seconds: float) -> None:
    cost = PlainCost()
    with pytest.raises(ValueError, match=f"must take a finite time above 0, but got {seconds} s"):
        cost.add(PlainSample(1, 10.0, seconds))
    with pytest.raises(ValueError, match="measured: none"):
        cost.estimate(1, 10.0)


@pytest.mark.parametrize(("window", "every"), [(3, 24), (48, 0)])
def test_wrong_arguments_get_one_clear_line(window: int, every: int) -> None:
    with pytest.raises(ValueError, match=f"window must be at least 4 and every at least 1, but got {window} and"):
        PlainCost(window, every)
