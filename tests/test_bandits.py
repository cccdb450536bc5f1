import math
from collections.abc import Callable

import numpy as np
import pytest
from chooser_scripts import EMBEDDED, Script

from specrl.agents.choosers.bandits import EXP3, UCB1, MedianGreedy
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observer
from specrl.core.plan import Plan, parse_plans
from specrl.testing.agent import made_up_round

PLANS = parse_plans("0,1,3")


def choose(chooser: PlanChooser, batch: int) -> Plan:
    return chooser.choose(Observer(PLANS).observe(batch, 100.0))


@pytest.mark.parametrize("bandit", [MedianGreedy, UCB1, EXP3])
def test_the_same_seed_gives_the_same_choices_and_they_beat_random_choices(bandit: Callable[..., PlanChooser]) -> None:
    script = Script(EMBEDDED, 3000, seed=0)
    choices = script.play(bandit(EMBEDDED.plans))
    assert (choices == script.play(bandit(EMBEDDED.plans))).all()
    at_random = np.random.default_rng(0).integers(len(EMBEDDED.plans), size=script.rounds)
    late = np.arange(script.rounds) >= 2000
    assert script.share(choices, late) > script.share(at_random, late) + 0.004


def test_the_median_is_pooled_over_groups_and_ignores_hiccups() -> None:
    bandit = MedianGreedy(PLANS, epsilon=0.0)
    for plan, seconds in ((Plan(0), 1e-3), (Plan(1), 1.5e-3), (Plan(3), 2.5e-3)):
        for index in range(9):
            bandit.learn(made_up_round(plan, 1, [plan.num_steps], 50 * seconds if index % 3 == 2 else seconds))
    assert choose(bandit, 1) == Plan(3)  # 4 tokens in 2.5 ms; a third of the rounds are hiccups
    for plan, seconds in ((Plan(0), 2e-3), (Plan(1), 3e-3), (Plan(3), 9e-3)):
        bandit.learn(made_up_round(plan, 8, [0] * 8, seconds))  # no draft is accepted, unlike the pooled median
    assert choose(bandit, 8) == Plan(1)


def test_tiers_bound_the_plans_of_large_batches() -> None:
    bandit = MedianGreedy(PLANS, tiers={1: PLANS, 16: (Plan(0), Plan(1))}, epsilon=1.0, seed=3)
    assert {choose(bandit, 4) for _ in range(60)} == set(PLANS)  # odds of failing: 1e-10
    assert {choose(bandit, 16) for _ in range(60)} == {Plan(0), Plan(1)}


def test_ucb1_follows_its_formula() -> None:
    bandit, sums, counts, speed = UCB1(PLANS), [0.0] * 3, [0] * 3, 0.0
    rng = np.random.default_rng(0)
    for n in range(300):
        index = n
        if n >= 3:
            bounds = [s / c + math.sqrt(2 * math.log(n) / c) for s, c in zip(sums, counts, strict=True)]
            index = bounds.index(max(bounds))
        plan = choose(bandit, 2)
        assert plan == PLANS[index]
        seconds = float(rng.uniform(1e-3, 3e-3))
        bandit.learn(made_up_round(plan, 2, [0, 0], seconds))
        speed += (1 / seconds - speed) / (n + 1)
        sums[index] += 1 / seconds / (1 / seconds + speed)
        counts[index] += 1


def test_exp3_weighs_a_late_result_by_the_probability_it_was_chosen_with() -> None:
    """After two results of one arm, each chosen with p = 1/2 before both, that arm's probability is known."""
    for seed in range(20):
        bandit = EXP3((Plan(0), Plan(1)), gamma=0.5, seed=seed)
        observation = Observer(bandit.plans).observe(1, 100.0)
        if [bandit.choose(observation) for _ in range(2)] == [Plan(1)] * 2:
            break
    for _ in range(2):
        bandit.learn(made_up_round(Plan(1), 1, seconds=1e-3))
    weight = math.exp(2 * 0.5 * 0.5 / (0.5 * 2))  # gamma * reward / (p * K), twice; equal speeds have the reward 1/2
    share = np.mean([bandit.choose(observation) == Plan(1) for _ in range(20_000)])
    assert share == pytest.approx(0.5 * weight / (1 + weight) + 0.25, abs=0.015)  # 4 standard errors


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: MedianGreedy(()), "plans"),
        (lambda: MedianGreedy(PLANS, epsilon=2.0), "epsilon"),
        (lambda: UCB1(PLANS, scale=-1.0), "scale"),
        (lambda: UCB1(PLANS, groups=()), "groups"),
        (lambda: EXP3(PLANS, gamma=0.0), "gamma"),
    ],
)
def test_wrong_arguments_are_refused(make: Callable[[], PlanChooser], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        make()
