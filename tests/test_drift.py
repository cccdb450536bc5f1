import json
import math
from typing import Any

import numpy as np
import pytest

from specrl.agents.draft.drift import DriftDetector

LOOKAHEAD = 4
BEFORE, AFTER = 0.65, 0.5545  # odds that a draft stands: accept lengths of 2.526 and, 15 % less, 2.147
HEAVY = {
    "no mean": lambda rng, n: rng.standard_cauchy(n),
    "no variance": lambda rng, n: rng.pareto(1.2, n),
    "many equal": lambda rng, n: np.minimum(rng.geometric(0.4, n), 5.0),
}


def accept_lengths(alpha: float, batch: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Of rounds: [count]."""
    return 1.0 + (rng.random((count, batch, LOOKAHEAD)) < alpha).cumprod(-1).sum(-1).mean(-1)


def alarms(detector: DriftDetector, values: np.ndarray) -> list[int]:
    return [i for i, value in enumerate(values.tolist()) if detector.add(value)]


@pytest.mark.parametrize("kind", HEAVY)
def test_false_alarms_are_rarer_than_one_in_ten_thousand(kind: str) -> None:
    """At 5e-5 at most 3 are expected of 60,000 values, and 6 would be one in 10,000; the seeds are fixed."""
    values = HEAVY[kind](np.random.default_rng(0), 60_000)
    assert len(alarms(DriftDetector(seed=1), values)) < 6


@pytest.mark.parametrize("kind", HEAVY)
def test_the_stated_odds_hold_from_a_start_and_are_not_idle(kind: str) -> None:
    """Of 400 detectors, at most 0.2 raise one within 400 values at 5e-4: 80 ± 8, and 5 standard errors are 120."""
    rng, raised = np.random.default_rng(2), 0
    for seed in range(400):
        detector = DriftDetector(odds=5e-4, memory=256, seed=seed)
        raised += any(detector.add(value) for value in HEAVY[kind](rng, 400).tolist())
    assert 10 < raised < 120


@pytest.mark.parametrize(("batch", "within"), [(4, 300), (16, 80)])
def test_a_drop_of_15_percent_is_found(batch: int, within: int) -> None:
    """In each of 40 runs; medians were near 55 and 27 rounds, the longest of 100 below 160 and 41."""
    for seed in range(40):
        rng, detector = np.random.default_rng(seed), DriftDetector(seed=seed)
        alarms(detector, accept_lengths(BEFORE, batch, int(rng.integers(500, 3000)), rng))
        assert alarms(detector, accept_lengths(AFTER, batch, within, rng)), seed


def test_after_an_alarm_the_new_level_is_the_reference() -> None:
    rng, detector = np.random.default_rng(0), DriftDetector()
    alarms(detector, accept_lengths(BEFORE, 16, 1000, rng))
    assert len(alarms(detector, accept_lengths(AFTER, 16, 2000, rng))) == 1
    assert detector.alarms == 1
    assert len(alarms(detector, accept_lengths(0.45, 16, 200, rng))) == 1


def test_a_rise_is_none_unless_asked_for() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([accept_lengths(AFTER, 16, 1000, rng), accept_lengths(BEFORE, 16, 200, rng)])
    assert alarms(DriftDetector(), values) == []
    (found,) = alarms(DriftDetector(rises=True), values)
    assert 1000 <= found < 1080


def test_learning_raises_no_alarm_and_the_drop_after_it_does() -> None:
    """A slow rise over many references, then the drop of drifted traffic."""
    rng, detector = np.random.default_rng(0), DriftDetector(memory=512)
    for alpha in np.linspace(0.2, BEFORE, 40):
        assert alarms(detector, accept_lengths(float(alpha), 16, 50, rng)) == []
    assert alarms(detector, accept_lengths(AFTER, 16, 200, rng))


def mixed_traffic(rounds: int, rng: np.random.Generator, batch: int = 8, lasts: int = 12) -> np.ndarray:
    """Accept lengths of rounds of easy and hard requests that last some rounds each: [rounds]."""
    alpha, left = rng.beta(6, 3, batch), rng.integers(1, lasts + 1, batch)
    out = []
    for _ in range(rounds):
        out.append(1.0 + (rng.random((batch, LOOKAHEAD)) < alpha[:, None]).cumprod(-1).sum(-1).mean())
        left -= 1
        alpha, left = np.where(left == 0, rng.beta(6, 3, batch), alpha), np.where(left == 0, lasts, left)
    return np.array(out)


def test_rounds_of_the_same_requests_need_blocks() -> None:
    """Fed one by one, they break the promise; in blocks longer than requests 0.1 alarms are expected of 40,000."""
    values = mixed_traffic(40_000, np.random.default_rng(1))
    assert len(alarms(DriftDetector(), values)) > 10
    assert len(alarms(DriftDetector(block=24), values)) <= 2


def test_a_block_is_one_value() -> None:
    values = np.random.default_rng(0).normal(size=900)
    values[600:] -= 2.0
    (by_three,) = alarms(DriftDetector(block=3), values)
    (by_mean,) = alarms(DriftDetector(), values.reshape(-1, 3).mean(1))
    assert by_three == 3 * by_mean + 2


def test_its_state_goes_through_json_and_on() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([accept_lengths(BEFORE, 16, 700, rng), accept_lengths(AFTER, 16, 150, rng)])
    whole, first, second = (DriftDetector(memory=512, block=2, seed=seed) for seed in (3, 3, 4))
    wanted = alarms(whole, values)
    alarms(first, values[:711])  # one of a block waits
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.evidence == first.evidence > 0.0
    assert [711 + i for i in alarms(second, values[711:])] == [i for i in wanted if i >= 711] != []
    assert second.state() == whole.state()
    with pytest.raises(ValueError, match="same settings, but its reference is .* and the memory is 128"):
        DriftDetector(memory=128).load_state(whole.state() | {"ages": [512, 3]})


def test_evidence_grows_to_the_alarm() -> None:
    detector, seen = DriftDetector(), []
    for i in range(200):
        if detector.add(float(i % 7) - 10.0 * (i >= 150)):
            break
        seen.append(detector.evidence)
    assert seen[31] == 0.0 and max(seen[:150]) < 0.1 and 0.3 < seen[-1] < 1.0
    assert detector.evidence == 0.0 and detector.alarms == 1


@pytest.mark.parametrize(
    "settings",
    [{"odds": 0.0}, {"odds": 1.0}, {"odds": math.nan}, {"block": 0}, {"warmup": 0}, {"memory": 64, "warmup": 32}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a drift detector needs odds in"):
        DriftDetector(**settings)


def test_a_value_that_is_not_finite_is_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"takes finite values, but got {value}"):
            DriftDetector().add(value)
