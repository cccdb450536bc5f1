import math
from collections.abc import Callable

import numpy as np
import pytest
from chooser_scripts import EMBEDDED, Script

from specrl.agents.choosers.bandits import EXP3, UCB1, MedianGreedy
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observation, Observer
from specrl.core.plan import Plan, parse_plans
from specrl.testing.agent import CHECKS, Make, made_up_round

PLANS = parse_plans("0,1,3")
MAKERS: dict[str, Make] = {
    "median-greedy": lambda plans: MedianGreedy(plans, seed=0),
    "ucb1": UCB1,
    "exp3": lambda plans: EXP3(plans, seed=0),
}


def ask(chooser: PlanChooser, batch: int) -> Plan:
    return chooser.choose(Observer(PLANS).observe(batch, 100.0))


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_bandits_conform(check: Callable[[Make], None], make: Make) -> None:
    check(make)


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_seed_gives_the_same_choices_and_they_beat_choosing_at_random(name: str) -> None:
    script = Script(EMBEDDED, 3000, seed=0)
    chosen = script.play(MAKERS[name](EMBEDDED.plans))
    assert (chosen == script.play(MAKERS[name](EMBEDDED.plans))).all()
    at_random = np.random.default_rng(0).integers(len(EMBEDDED.plans), size=script.rounds)
    late = np.arange(script.rounds) >= 2000
    assert script.share(chosen, late) > script.share(at_random, late) + 0.004


def test_the_median_is_pooled_over_groups_and_shrugs_off_hiccups() -> None:
    bandit = MedianGreedy(PLANS, epsilon=0.0)
    for batch, plan, seconds in ((1, Plan(0), 1e-3), (1, Plan(1), 1.5e-3), (1, Plan(3), 2.5e-3)):
        for index in range(9):
            drafts = [plan.num_steps] * batch
            bandit.learn(made_up_round(plan, batch, drafts, 50 * seconds if index % 3 == 2 else seconds))
    assert ask(bandit, 1) == Plan(3)  # 4 tokens in 2.5 ms, a third of the rounds being hiccups
    for plan, seconds in ((Plan(0), 2e-3), (Plan(1), 3e-3), (Plan(3), 9e-3)):
        bandit.learn(made_up_round(plan, 8, [0] * 8, seconds))  # unlucky, but the pooled median says otherwise
    assert ask(bandit, 8) == Plan(1)


def test_tiers_bound_what_large_batches_may_run() -> None:
    bandit = MedianGreedy(PLANS, tiers={1: PLANS, 16: (Plan(0), Plan(1))}, epsilon=1.0, seed=3)
    assert {ask(bandit, 4) for _ in range(60)} == set(PLANS)  # all three but for odds of 1e-10
    assert {ask(bandit, 16) for _ in range(60)} == {Plan(0), Plan(1)}


def test_ucb1_is_its_formula() -> None:
    bandit, sums, counts, speed = UCB1(PLANS), [0.0] * 3, [0] * 3, 0.0
    rng = np.random.default_rng(0)
    for n in range(300):
        expected = n
        if n >= 3:
            bounds = [s / c + math.sqrt(2 * math.log(n) / c) for s, c in zip(sums, counts, strict=True)]
            expected = bounds.index(max(bounds))
        plan = ask(bandit, 2)
        assert plan == PLANS[expected]
        seconds = float(rng.uniform(1e-3, 3e-3))
        bandit.learn(made_up_round(plan, 2, [0, 0], seconds))
        speed += (1 / seconds - speed) / (n + 1)
        sums[expected] += 1 / seconds / (1 / seconds + speed)
        counts[expected] += 1


def test_exp3_weighs_a_late_result_by_the_probability_it_was_chosen_with() -> None:
    bandit = EXP3((Plan(0), Plan(1)), gamma=0.5, seed=0)
    observation = Observation(1, 100.0, [0.0] * 12, 1)
    chosen = [bandit.choose(observation) for _ in range(2)]  # both at p = 1/2
    for plan in chosen:
        bandit.learn(made_up_round(plan, 1, seconds=1e-3))
    weight = 0.5 * 0.5 / (0.5 * 2)  # gamma * reward / (p * K), the reward of equal speeds being 1/2
    expected = [weight * chosen.count(plan) for plan in (Plan(0), Plan(1))]
    assert bandit._arms[1].sums == pytest.approx(expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MedianGreedy(()), "at least one plan"),
        (lambda: MedianGreedy(PLANS, epsilon=2.0), r"epsilon must be in \[0, 1\].*got 2.0"),
        (lambda: UCB1(PLANS, scale=-1.0), "scale must be at least 0, but got -1.0"),
        (lambda: UCB1(PLANS, groups=()), "lower bounds of batch sizes"),
        (lambda: EXP3(PLANS, gamma=0.0), r"gamma must be in \(0, 1\], but got 0.0"),
    ],
)
def test_errors_say_rule_and_value_in_one_line(make: Callable[[], PlanChooser], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
