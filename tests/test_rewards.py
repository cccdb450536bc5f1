import math

import numpy as np
import pytest

from specrl.envs.rewards import Differential, Outcome, make_reward

# Published for MiniMax M2.1 at batch 1: tokens/s per request and accept length by num_steps.
PLAIN_TPS = 134.9
PUBLISHED = {3: (213.0, 2.42), 4: (211.8, 2.62)}


def published_round(num_steps: int) -> Outcome:
    """A round with the published means; tokens are scaled by 100 to be whole."""
    tps, accept_length = PUBLISHED[num_steps]
    return Outcome(round(100 * accept_length), 1, 100 * accept_length / tps, 1.0 / PLAIN_TPS)


@pytest.mark.parametrize("policy", [3, 4])
def test_the_default_prefers_the_faster_of_two_published_plans(policy: int) -> None:
    """Against the running speedup of either policy, 3 steps earn more, although 4 steps save more time per round."""
    reward = Differential()
    for _ in range(3000):
        reward(published_round(policy))
    gain = {k: published_round(k).plain_total_s - reward.speedup * published_round(k).seconds for k in PUBLISHED}
    assert gain[3] > gain[4] and (gain[3] > 0 if policy == 4 else gain[4] < 0)
    time_saved = make_reward("time_saved")
    assert time_saved(published_round(4)) > time_saved(published_round(3))


def test_the_speedup_of_the_default_is_the_ratio_of_sums() -> None:
    reward = Differential(forget=1.0)
    for outcome in (Outcome(3, 1, 2.0, 1.0), Outcome(8, 4, 1.0, 2.0)):
        reward(outcome)
    assert reward.speedup == pytest.approx((3.0 + 4.0) / 3.0)


def test_the_scale_of_the_default_is_the_first_plain_cost() -> None:
    reward = Differential()
    assert reward(Outcome(4, 4, 3.0, 2.0)) == pytest.approx((2.0 - 3.0) / 2.0)
    speedup = reward.speedup
    assert reward(Outcome(16, 16, 5.0, 10.0)) == pytest.approx((10.0 - speedup * 5.0) / 2.0)


def test_time_saved_is_in_units_of_the_first_plain_cost() -> None:
    reward = make_reward("time_saved")
    outcomes = [Outcome(3, 1, 2.0, 1.0), Outcome(2, 1, 1.5, 1.1), Outcome(1, 1, 1.0, 0.9)]
    assert [reward(o) for o in outcomes] == pytest.approx([o.plain_total_s - o.seconds for o in outcomes])


@pytest.mark.parametrize("name", ["differential", "time_saved", "speedup", "log_speedup", "tokens_per_second"])
def test_rewards_of_arrays_are_those_of_each_environment(name: str) -> None:
    rounds = np.random.default_rng(0).uniform(0.5, 2.0, (5, 4, 3))  # round, number, environment
    many, single = make_reward(name), [make_reward(name) for _ in range(3)]
    for numbers in rounds:
        expected = [reward(Outcome(*numbers[:, n].tolist())) for n, reward in enumerate(single)]
        assert many(Outcome(*numbers)) == pytest.approx(expected)


def test_rewards_by_name() -> None:
    outcome = Outcome(4, 2, 0.5, 0.75)
    for name, value in (("speedup", 3.0), ("log_speedup", math.log(3.0)), ("tokens_per_second", 8.0)):
        assert make_reward(name)(outcome) == pytest.approx(value)
    with pytest.raises(ValueError, match="did you mean 'differential'"):
        make_reward("diferential")
