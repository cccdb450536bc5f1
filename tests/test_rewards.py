import math

import pytest

from specrl.envs.rewards import Differential, Outcome, TimeSaved, log_speedup, make_reward, speedup, tokens_per_second

# Published for MiniMax M2.1 at batch 1: tokens/s per request and accept length by lookahead.
PLAIN_TPS = 134.9
PUBLISHED = {3: (213.0, 2.42), 4: (211.8, 2.62)}


def published_round(lookahead: int) -> Outcome:
    """A round as the published means have it; tokens scaled by 100 to be whole."""
    tps, accept_length = PUBLISHED[lookahead]
    return Outcome(round(100 * accept_length), 1, 100 * accept_length / tps, 1.0 / PLAIN_TPS)


def test_published_figures_prefer_lookahead_3_by_tokens_per_second_and_4_by_seconds_saved_per_round() -> None:
    saved = {k: published_round(k).plain_total_s - published_round(k).seconds for k in PUBLISHED}
    assert saved[4] > saved[3]
    assert PUBLISHED[3][0] > PUBLISHED[4][0]


def test_the_default_prefers_lookahead_3_on_the_published_figures() -> None:
    # Against the running speedup of either fixed policy, lookahead 3 earns more per second and so in the long run.
    for lam in (Differential(), Differential()):
        for _ in range(3000):
            lam(published_round(3))
        at_optimum = {k: published_round(k).plain_total_s - lam.speedup * published_round(k).seconds for k in PUBLISHED}
        assert at_optimum[3] > at_optimum[4]
    four = Differential()
    for _ in range(3000):
        four(published_round(4))
    gain = published_round(3).plain_total_s - four.speedup * published_round(3).seconds
    assert gain > 0  # deviating from lookahead 4 to 3 pays
    three = Differential()
    for _ in range(3000):
        three(published_round(3))
    assert published_round(4).plain_total_s - three.speedup * published_round(4).seconds < 0  # and not back


def test_mean_time_saved_per_round_would_prefer_lookahead_4() -> None:
    reward = TimeSaved()
    assert reward(published_round(4)) > reward(published_round(3))


def test_differential_speedup_is_the_ratio_of_sums() -> None:
    reward = Differential(forget=1.0)
    outcomes = [Outcome(3, 1, 2.0, 1.0), Outcome(8, 4, 1.0, 2.0)]
    for outcome in outcomes:
        reward(outcome)
    assert reward.speedup == pytest.approx((3.0 + 4.0) / 3.0)


def test_differential_scale_is_the_first_plain_cost_whatever_the_batch() -> None:
    reward = Differential()
    assert reward(Outcome(4, 4, 3.0, 2.0)) == pytest.approx((2.0 - 3.0) / 2.0)
    before = reward.speedup
    assert reward(Outcome(16, 16, 5.0, 10.0)) == pytest.approx((10.0 - before * 5.0) / 2.0)


def test_time_saved_sums_to_plain_minus_actual_time() -> None:
    reward = TimeSaved()
    outcomes = [Outcome(3, 1, 2.0, 1.0), Outcome(2, 1, 1.5, 1.1), Outcome(1, 1, 1.0, 0.9)]
    total = sum(reward(o) for o in outcomes)
    assert total == pytest.approx(sum(o.plain_total_s - o.seconds for o in outcomes) / 1.0)


def test_rewards_by_name() -> None:
    outcome = Outcome(4, 2, 0.5, 0.75)
    assert speedup(outcome) == pytest.approx(3.0)
    assert log_speedup(outcome) == pytest.approx(math.log(3.0))
    assert tokens_per_second(outcome) == pytest.approx(8.0)
    assert make_reward("speedup")(outcome) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="did you mean 'differential'"):
        make_reward("diferential")
