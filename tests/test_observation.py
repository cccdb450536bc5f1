import numpy as np
import pytest

from specrl.core.observation import MAX_AGE, MAX_CONTEXT, Observation, Observer, vector_bounds
from specrl.core.plan import Plan, parse_plans
from specrl.testing.agent import made_up_round

PLANS = parse_plans("0,1/1/2,3/1/4,3/2/6")  # K = 3, four plans: 5 + 3 + 3 * 4 = 20 numbers


def observe(*rounds: tuple[Plan, list[int], float, float, int], batch: int = 4, memory: float = 50.0) -> Observation:
    """The observation after rounds: plan, correct drafts, seconds, seconds of a plain step, draft version."""
    observer = Observer(PLANS, memory)
    for plan, correct, seconds, plain_s, version in rounds:
        observer.record(made_up_round(plan, len(correct), correct, seconds, version), plain_s)
    return observer.observe(batch, 1024.0)


def test_the_first_observation_is_neutral() -> None:
    observation = observe()
    assert (observation.batch_size, observation.context) == (4, 1024.0)
    assert observation.accept_length == 1.0 and observation.survival == (0.0,) * 3
    assert observation.costs == (1.0,) * 4 and observation.tried == (0.0,) * 4
    assert observation.last_plan == observation.draft_age == 0


def test_the_vector_is_laid_out_as_documented() -> None:
    vector = observe((Plan(3), [3, 3, 1, 0], 4e-3, 1e-3, 7), *[(Plan(0), [0] * 4, 1e-3, 1e-3, 7)] * 3).vector()
    assert vector.dtype == np.float32 and vector.shape == (20,)
    assert 0.0 < vector[2] < (1.75 / 3)  # 1.75 correct drafts in one round of four
    np.testing.assert_allclose(vector[[0, 1, 3, 4]], [2 / 10, 10 / 20, np.log2(1 + 3) / 20, 1.0], rtol=1e-6)
    np.testing.assert_allclose(vector[5:8], [0.75, 0.5, 0.5])
    np.testing.assert_allclose(vector[8:12], [0.0, 0.0, 2.0, 0.0], atol=1e-6)  # log2 of costs
    np.testing.assert_array_equal(vector[12:], [1, 0, 1, 0, 1, 0, 0, 0])  # tried, last plan
    for index, plan in enumerate(PLANS):
        np.testing.assert_array_equal(observe((plan, [0], 1e-3, 1e-3, 0)).vector()[16:], np.eye(4)[index])


@pytest.mark.parametrize("plans", ["0", "2", "0,1/1/2,3/1/4,3/2/6", "5/4/9,0"])
def test_the_vector_is_always_within_its_bounds(plans: str) -> None:
    parsed = parse_plans(plans)
    low, high = vector_bounds(parsed)
    observer, rng = Observer(parsed, memory=5.0), np.random.default_rng(0)
    for _ in range(300):
        batch, plan = int(rng.choice([1, 3, 49, 1024])), parsed[rng.integers(len(parsed))]
        least = 0 if rng.random() < 0.3 else plan.num_steps  # in most rounds all drafts are accepted
        correct = rng.integers(least, plan.num_steps + 1, batch).tolist()
        seconds = float(rng.choice([0.0, 1e-9, 1e-3, 1e3]))
        observer.record(made_up_round(plan, batch, correct, seconds, int(rng.integers(2))), plain_s=1e-3)
        vector = observer.observe(batch, float(rng.choice([0.5, 1.0, 300.0, MAX_CONTEXT]))).vector()
        assert vector.shape == low.shape and np.isfinite(vector).all()
        assert (low <= vector).all() and (vector <= high).all()


def test_bounds_are_ratios_for_costs_and_shares_for_the_rest() -> None:
    low, high = vector_bounds(PLANS)
    np.testing.assert_array_equal(low, [0] * 8 + [-4] * 4 + [0] * 8)
    np.testing.assert_array_equal(high, [1] * 8 + [4] * 4 + [1] * 8)
    assert np.log2(1.0 + MAX_AGE) / 20 <= high[3]


def test_costs_are_relative_to_plain_decoding_at_the_same_batch_size() -> None:
    rounds = (Plan(1), [0], 3e-3, 2e-3, 0), (Plan(1), [0] * 16, 3e-3, 6e-3, 0), (Plan(3), [0], 100.0, 1e-3, 0)
    assert observe(*rounds, batch=1).costs == pytest.approx((1.0, 1.5, 16.0, 1.0))  # at most 16
    assert observe(*rounds, batch=16).costs == pytest.approx((1.0, 0.5, 1.0, 1.0))
    assert observe(*rounds, batch=4).tried == (0.0,) * 4


def test_costs_follow_a_lasting_change() -> None:
    rounds = [(Plan(1), [0], seconds, 1e-3, 0) for seconds in [1e-3] * 20 + [3e-3] * 60]
    assert observe(*rounds, batch=1).costs[1] == pytest.approx(3.0, rel=0.01)


def test_survival_counts_only_rounds_that_proposed_as_many_drafts() -> None:
    observation = observe(
        (Plan(3), [3, 3, 2, 0], 1e-3, 1e-3, 0), (Plan(1), [1, 1], 1e-3, 1e-3, 0), (Plan(0), [0, 0], 1e-3, 1e-3, 0),
        memory=1e9,
    )  # fmt: skip
    assert observation.survival == pytest.approx(((0.75 + 1.0) / 2, 0.75, 0.5))
    assert observation.accept_length == pytest.approx(1.0 + (2.0 + 1.0 + 0.0) / 3)


def test_memory_is_the_number_of_rounds_after_which_1_over_e_is_left() -> None:
    rounds = [(Plan(3), [correct], 1e-3, 1e-3, 0) for correct in [3] * 500 + [0] * 10]
    assert observe(*rounds, memory=10.0).survival[2] == pytest.approx(np.exp(-1.0), abs=1e-3)


def test_age_counts_rounds_since_the_draft_version_changed() -> None:
    rounds = [(Plan(0), [0], 1e-3, 1e-3, version) for version in (0, 0, 0, 1, 1, 2)]
    assert [observe(*rounds[: n + 1]).draft_age for n in range(6)] == [0, 1, 2, 0, 1, 0]


def test_a_reset_forgets_all_rounds() -> None:
    observer = Observer(PLANS)
    observer.record(made_up_round(Plan(3), 2, [3, 1], draft_version=4), plain_s=1e-3)
    observer.reset()
    assert observer.observe(4, 1024.0) == observe()


@pytest.mark.parametrize("memory", [0.5, float("nan")])
def test_a_memory_below_one_round_is_refused(memory: float) -> None:
    with pytest.raises(ValueError, match="memory"):
        Observer(PLANS, memory)
