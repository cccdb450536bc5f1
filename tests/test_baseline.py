import json
from collections.abc import Iterable

import numpy as np
import pytest

from specrl.core.plain_cost import PlainCost
from specrl.core.round import PlainSample


def measured(samples: Iterable[tuple[int, float, float]]) -> PlainCost:
    """A plain cost with these samples: batch size, context, seconds."""
    cost = PlainCost()
    for sample in samples:
        cost.add(PlainSample(*sample))
    return cost


def test_each_batch_size_has_its_own_cost() -> None:
    cost = measured([(1, 100.0, 2e-3), (16, 100.0, 5e-3)] * 5)
    assert cost.estimate(1, 100.0).seconds == pytest.approx(2e-3)
    assert cost.estimate(16, 100.0).seconds == pytest.approx(5e-3)


def test_the_cost_is_a_line_over_context() -> None:
    rng = np.random.default_rng(0)
    contexts = rng.uniform(50.0, 500.0, 48)
    cost = measured((4, c, (2e-3 + 4e-6 * c) * np.exp(0.02 * rng.standard_normal())) for c in contexts)
    for context in (50.0, 250.0, 500.0):
        estimate = cost.estimate(4, context)
        assert estimate.seconds == pytest.approx(2e-3 + 4e-6 * context, rel=0.02)
        assert estimate.samples == 48 and 0.0 < estimate.standard_error < 0.01 * estimate.seconds


@pytest.mark.parametrize(
    ("contexts", "slope"),
    [
        ([100.0 + i % 3 for i in range(20)], 1e-5),  # too alike
        ([100.0 * (i + 1) for i in range(4)], 1e-7),  # too few
        (np.linspace(100.0, 1000.0, 20), -1e-6),  # the cost never falls with context
    ],
    ids=["alike", "few", "falling"],
)
def test_the_cost_is_constant_without_evidence_of_a_slope(contexts: Iterable[float], slope: float) -> None:
    cost = measured((1, c, 4e-3 + slope * c) for c in contexts)
    assert cost.estimate(1, 2000.0) == cost.estimate(1, 100.0)


def test_the_cost_is_at_least_half_the_mean() -> None:
    cost = measured((1, c, 1e-5 * c) for c in np.linspace(500.0, 1000.0, 20))
    assert cost.estimate(1, 1.0).seconds == pytest.approx(0.5 * 7.5e-3)


@pytest.mark.parametrize("spike", [40.0, 5.0, 0.01])
def test_spikes_are_ignored(spike: float) -> None:
    rng = np.random.default_rng(1)
    clean = [(2, 100.0, 3e-3 * float(np.exp(0.01 * rng.standard_normal()))) for _ in range(40)]
    spoilt = [(b, c, s * spike if i % 5 == 2 else s) for i, (b, c, s) in enumerate(clean)]
    seconds = measured(clean).estimate(2, 100.0).seconds
    assert measured(spoilt).estimate(2, 100.0).seconds == pytest.approx(seconds, rel=0.01)


def test_a_rare_long_context_is_no_spike() -> None:
    """One sample in six has a long context and takes twice the time."""
    rng = np.random.default_rng(3)
    contexts = [1000.0 if i % 6 == 5 else 100.0 + i % 10 for i in range(48)]
    cost = measured((1, c, (2e-3 + 2e-6 * c) * float(np.exp(0.02 * rng.standard_normal()))) for c in contexts)
    assert cost.estimate(1, 1000.0).seconds == pytest.approx(4e-3, rel=0.02)
    assert cost.estimate(1, 105.0).seconds == pytest.approx(2.21e-3, rel=0.02)


def test_the_cost_follows_a_machine_that_becomes_slower() -> None:
    cost = measured([(1, 100.0, 2e-3)] * 48 + [(1, 100.0, 3e-3)] * 30)
    assert cost.estimate(1, 100.0).seconds == pytest.approx(3e-3)
    assert cost.estimate(1, 100.0).samples == 48  # the window


def test_samples_are_dense_at_first_and_rare_later_for_each_batch_size() -> None:
    cost, rounds = PlainCost(), []
    for index in range(90):
        for _ in range(cost.samples_due(4)):
            rounds.append(index)
            cost.add(PlainSample(4, 100.0, 2e-3))
    assert rounds == [0, 0, 0, 2, 4, 6, 8, 10, 34, 58, 82]
    cost = measured([(4, 100.0, 2e-3)])
    assert [cost.samples_due(size) for size in (1, 1, 1, 4, 4)] == [3, 3, 3, 0, 1]


def test_state_survives_json() -> None:
    rng = np.random.default_rng(2)
    cost = measured((b, float(c), 1e-3 * b + 1e-6 * c) for b in (1, 8) for c in rng.uniform(50.0, 500.0, 30))
    again = measured([(3, 10.0, 1.0)])
    again.load_state_dict(json.loads(json.dumps(cost.state_dict())))
    assert again.state_dict() == cost.state_dict()
    assert [again.estimate(b, 300.0) for b in (1, 8)] == [cost.estimate(b, 300.0) for b in (1, 8)]
    with pytest.raises(ValueError, match="batch size 3 first; measured: 1, 8"):
        again.estimate(3, 10.0)
    for _ in range(60):
        again.add(PlainSample(8, 100.0, 0.5))
    assert again.estimate(8, 100.0).samples == 48  # the window is restored too


@pytest.mark.parametrize("seconds", [0.0, -1e-3, float("nan"), float("inf")])
def test_impossible_times_are_refused(seconds: float) -> None:
    cost = PlainCost()
    with pytest.raises(ValueError, match="seconds of a plain step"):
        cost.add(PlainSample(1, 10.0, seconds))
    with pytest.raises(ValueError, match="measured: none"):
        cost.estimate(1, 10.0)
