import numpy as np
import pytest

from specrl.core.observation import MAX_AGE, MAX_CONTEXT, Observer, vector_bounds
from specrl.core.plan import Plan, parse_plans
from specrl.testing.agent import made_up_round

PLANS = parse_plans("0,1/1/2,3/1/4,3/2/6")  # K = 3, four plans: 5 + 3 + 3 * 4 = 20 numbers


def test_the_first_observation_is_neutral() -> None:
    observation = Observer(PLANS).observe(4, 100.0)
    assert (observation.batch_size, observation.context) == (4, 100.0)
    assert observation.accept_length == 1.0 and observation.survival == (0.0,) * 3
    assert observation.costs == (1.0,) * 4 and observation.tried == (0.0,) * 4
    assert observation.last_plan == observation.draft_age == 0


def test_the_vector_is_laid_out_as_documented() -> None:
    observer = Observer(PLANS)
    observer.record(made_up_round(Plan(3), 4, [3, 3, 1, 0], seconds=4e-3, draft_version=7), plain_s=1e-3)
    for _ in range(3):
        observer.record(made_up_round(Plan(0), 4, seconds=1e-3, draft_version=7), plain_s=1e-3)
    vector = observer.observe(4, 1024.0).vector()
    assert vector.dtype == np.float32 and vector.shape == (20,)
    assert vector[0] == pytest.approx(2 / 10) and vector[1] == pytest.approx(10 / 20)
    assert 0.0 < vector[2] < (1.75 / 3)  # 1.75 correct drafts in one round of four
    assert vector[3] == pytest.approx(np.log2(1 + 3) / 20) and vector[4] == 1.0
    np.testing.assert_allclose(vector[5:8], [0.75, 0.5, 0.5])
    np.testing.assert_allclose(vector[8:12], [0.0, 0.0, 2.0, 0.0], atol=1e-6)  # log2 of costs
    np.testing.assert_array_equal(vector[12:16], [1, 0, 1, 0])  # tried
    np.testing.assert_array_equal(vector[16:], [1, 0, 0, 0])  # last plan


@pytest.mark.parametrize("plans", ["0", "2", "0,1/1/2,3/1/4,3/2/6", "5/4/9,0"])
def test_whatever_happens_the_vector_is_within_its_bounds(plans: str) -> None:
    parsed = parse_plans(plans)
    low, high = vector_bounds(parsed)
    observer, rng = Observer(parsed, memory=5.0), np.random.default_rng(0)
    for _ in range(300):
        batch, plan = int(rng.choice([1, 3, 49, 1024])), parsed[rng.integers(len(parsed))]
        correct = rng.integers(plan.num_steps, plan.num_steps + 1, batch)  # all accepted, mostly
        if rng.random() < 0.3:
            correct = rng.integers(0, plan.num_steps + 1, batch)
        seconds = float(rng.choice([0.0, 1e-9, 1e-3, 1e3]))
        observer.record(made_up_round(plan, batch, correct.tolist(), seconds, int(rng.integers(2))), plain_s=1e-3)
        context = float(rng.choice([0.5, 1.0, 300.0, MAX_CONTEXT]))
        vector = observer.observe(batch, context).vector()
        assert vector.shape == low.shape and np.isfinite(vector).all()
        assert (low <= vector).all() and (vector <= high).all()


def test_the_oldest_draft_is_within_the_bounds_too() -> None:
    observer = Observer(PLANS)
    observer.record(made_up_round(Plan(0), 1), plain_s=1e-3)
    observer._age = MAX_AGE - 1
    for _ in range(2):
        observer.record(made_up_round(Plan(0), 1), plain_s=1e-3)
    assert observer.observe(1, 1.0).draft_age == MAX_AGE
    vector = observer.observe(1, 1.0).vector()
    assert vector[3] == pytest.approx(1.0) and vector[3] <= vector_bounds(PLANS)[1][3]


def test_bounds_are_of_ratios_for_costs_and_of_shares_for_the_rest() -> None:
    low, high = vector_bounds(PLANS)
    np.testing.assert_array_equal(low, [0] * 8 + [-4] * 4 + [0] * 8)
    np.testing.assert_array_equal(high, [1] * 8 + [4] * 4 + [1] * 8)


def test_the_last_plan_is_one_hot() -> None:
    observer = Observer(PLANS)
    for index, plan in enumerate(PLANS):
        observer.record(made_up_round(plan, 1), plain_s=1e-3)
        np.testing.assert_array_equal(observer.observe(1, 1.0).vector()[16:], np.eye(4)[index])


def test_costs_are_relative_to_plain_decoding_at_the_same_batch_size() -> None:
    observer = Observer(PLANS)
    observer.record(made_up_round(Plan(1), 1, seconds=3e-3), plain_s=2e-3)
    observer.record(made_up_round(Plan(1), 16, seconds=3e-3), plain_s=6e-3)
    assert observer.observe(1, 1.0).costs == pytest.approx((1.0, 1.5, 1.0, 1.0))
    assert observer.observe(16, 1.0).costs == pytest.approx((1.0, 0.5, 1.0, 1.0))
    assert observer.observe(4, 1.0).tried == (0.0,) * 4  # this batch size was never seen


def test_hopeless_costs_stop_at_16_times_plain() -> None:
    observer = Observer(PLANS)
    observer.record(made_up_round(Plan(1), 1, seconds=100.0), plain_s=1e-3)
    assert observer.observe(1, 1.0).costs[1] == pytest.approx(16.0)


def test_costs_follow_what_lasts() -> None:
    observer = Observer(PLANS)
    for seconds in [1e-3] * 20 + [3e-3] * 60:
        observer.record(made_up_round(Plan(1), 1, seconds=seconds), plain_s=1e-3)
    assert observer.observe(1, 1.0).costs[1] == pytest.approx(3.0, rel=0.01)


def test_survival_counts_only_rounds_that_proposed_as_much() -> None:
    observer = Observer(PLANS, memory=1e9)
    observer.record(made_up_round(Plan(3), 4, [3, 3, 2, 0]), plain_s=1e-3)
    observer.record(made_up_round(Plan(1), 2, [1, 1]), plain_s=1e-3)
    observer.record(made_up_round(Plan(0), 2), plain_s=1e-3)
    observation = observer.observe(4, 1.0)
    assert observation.survival == pytest.approx(((0.75 + 1.0) / 2, 0.75, 0.5))
    assert observation.accept_length == pytest.approx(1.0 + (2.0 + 1.0 + 0.0) / 3)  # plan 0 yields its one token


def test_memory_is_the_rounds_after_which_1_over_e_is_left() -> None:
    observer = Observer(PLANS, memory=10.0)
    for correct in [3] * 500 + [0] * 10:
        observer.record(made_up_round(Plan(3), 1, [correct]), plain_s=1e-3)
    assert observer.observe(1, 1.0).survival[2] == pytest.approx(np.exp(-1.0), abs=1e-3)


def test_age_counts_rounds_since_the_drafts_weights_changed() -> None:
    observer, ages = Observer(PLANS), []
    for version in (0, 0, 0, 1, 1, 2):
        observer.record(made_up_round(Plan(0), 1, draft_version=version), plain_s=1e-3)
        ages.append(observer.observe(1, 1.0).draft_age)
    assert ages == [0, 1, 2, 0, 1, 0]


def test_a_reset_forgets_everything() -> None:
    observer = Observer(PLANS)
    for _ in range(5):
        observer.record(made_up_round(Plan(3), 2, [3, 1], draft_version=4), plain_s=1e-3)
    observer.reset()
    assert observer.observe(2, 9.0) == Observer(PLANS).observe(2, 9.0)


@pytest.mark.parametrize("memory", [0.5, float("nan")])
def test_a_memory_below_one_round_is_refused(memory: float) -> None:
    with pytest.raises(ValueError, match=f"memory must be at least 1 round, but got {memory}"):
        Observer(PLANS, memory)
