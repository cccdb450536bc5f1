import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.costs import Costs
from specrl.agents.choosers.survival import Survival
from specrl.agents.choosers.table import FixedPlan, PlanTable
from specrl.core.observation import Observer
from specrl.core.plan import Plan, parse_plans
from specrl.testing.agent import CHECKS, Make, made_up_round

PLANS = parse_plans("0,1,2,3,4,5")
# Seconds of a round relative to plain decoding's, by lookahead, as measured on the embedded target.
COSTS = {1: (1.0, 1.33, 1.45, 1.5, 1.6, 1.7), 4: (1.0, 1.4, 1.6, 1.8, 2.0, 2.2), 16: (1.0, 1.46, 1.88, 2.2, 2.6, 2.9)}
PLAIN_S = {1: 2.2e-3, 4: 2.8e-3, 16: 4.4e-3}
LEARNED, UNTRAINED = (0.62, 0.63, 0.62, 0.62, 0.6), (0.06, 0.1, 0.1, 0.1, 0.1)  # a_k


class World:
    """Rounds with 11 % timing noise and 1 % hiccups of six times the time."""

    def __init__(self, seed: int, rates: Sequence[float] = LEARNED) -> None:
        self.rng = np.random.default_rng(seed)
        self.rates = np.array(rates)
        self.costlier = 1.0  # of plans with three steps or more

    def seconds(self, batch: int, plan: Plan) -> float:
        factor = self.costlier if plan.num_steps >= 3 else 1.0
        return PLAIN_S[batch] * COSTS[batch][plan.num_steps] * factor

    def speed(self, batch: int, plan: Plan) -> float:
        return float(1.0 + np.cumprod(self.rates[: plan.num_steps]).sum()) / self.seconds(batch, plan)

    def best(self, batch: int) -> float:
        return max(self.speed(batch, plan) for plan in PLANS)

    def run(self, chooser: AdaptiveChooser, batches: Sequence[int], rounds: int) -> list[float]:
        """Regret of every choice, as a share of the best plan's speed."""
        observer, regret = Observer(PLANS), []
        for index in range(rounds):
            batch = batches[(index // 20) % len(batches)]
            plan = chooser.choose(observer.observe(batch, 100.0))
            stands = self.rng.random((batch, plan.num_steps)) < self.rates[: plan.num_steps]
            seconds = self.seconds(batch, plan) * np.exp(0.11 * self.rng.standard_normal())
            seconds *= 6.0 if self.rng.random() < 0.01 else 1.0
            chooser.learn(made_up_round(plan, batch, stands.cumprod(1).sum(1), seconds))
            regret.append(1.0 - self.speed(batch, plan) / self.best(batch))
        return regret


MAKERS: dict[str, Make] = {
    "adaptive": lambda plans: AdaptiveChooser(plans, seed=0),
    "fixed": lambda plans: FixedPlan(plans[-1]),
    "table": lambda plans: PlanTable({1: plans[0], 8: plans[-1]}),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_choosers_conform(check: Callable[[Make], None], make: Make) -> None:
    check(make)


# The seeds are fixed, so the tests below give the same result every time.
@pytest.mark.parametrize("seed", range(5))
def test_after_300_rounds_of_each_batch_size_the_greedy_choice_is_within_2_percent_of_the_best(seed: int) -> None:
    world, chooser = World(seed), AdaptiveChooser(PLANS, seed=seed)
    world.run(chooser, (1, 4, 16), 900)
    for batch in COSTS:
        assert world.speed(batch, chooser.best(batch)) >= 0.98 * world.best(batch)


def test_exploring_costs_little_in_the_long_run() -> None:
    regret = [World(seed).run(AdaptiveChooser(PLANS, seed=seed), (1, 4, 16), 2400)[1200:] for seed in range(3)]
    assert np.mean(regret) < 0.02


def test_where_drafts_are_worthless_it_settles_on_plan_0() -> None:
    world, chooser = World(0, UNTRAINED), AdaptiveChooser(PLANS, seed=0)
    regret = world.run(chooser, (1, 4, 16), 1500)
    assert [chooser.best(batch) for batch in COSTS] == [Plan(0)] * 3
    assert np.mean(np.array(regret[750:]) > 0) < 0.05


def test_it_follows_costs_that_shift() -> None:
    world, chooser = World(1), AdaptiveChooser(PLANS, seed=1)
    world.run(chooser, (1,), 600)
    world.costlier = 1.6
    world.run(chooser, (1,), 500)
    assert world.speed(1, chooser.best(1)) >= 0.98 * world.best(1)


@pytest.mark.parametrize(("before", "after"), [(UNTRAINED, LEARNED), (LEARNED, UNTRAINED)], ids=["learns", "decays"])
def test_it_follows_acceptance_that_shifts(before: Sequence[float], after: Sequence[float]) -> None:
    world, chooser = World(2, before), AdaptiveChooser(PLANS, seed=2)
    world.run(chooser, (1, 4, 16), 900)
    world.rates = np.array(after)
    world.run(chooser, (1, 4, 16), 2400)
    for batch in COSTS:
        assert world.speed(batch, chooser.best(batch)) >= 0.97 * world.best(batch)


def test_survival_is_pooled_over_batch_sizes_and_chain_lengths() -> None:
    survival, rng = Survival(), np.random.default_rng(0)
    for plan, batch in ((Plan(2), 1), (Plan(4), 16)) * 100:
        stands = rng.random((batch, plan.num_steps)) < 0.5
        survival.learn(made_up_round(plan, batch, stands.cumprod(1).sum(1)))
    assert survival.accept_length(Plan(3)) == pytest.approx(1.875, abs=0.1)  # never ran itself
    assert survival.accept_length(Plan(0)) == 1.0


def test_a_tree_leans_on_the_chain_until_it_is_tried() -> None:
    survival, tree = Survival(), Plan(2, 2, 4)
    for _ in range(200):
        survival.learn(made_up_round(Plan(2), 4, [0, 1, 2, 2]))
    before = survival.accept_length(tree)
    assert before == pytest.approx(survival.accept_length(Plan(2)), abs=0.05)
    for _ in range(200):
        survival.learn(made_up_round(tree, 4, [2, 2, 2, 2]))
    assert survival.accept_length(tree) > 2.8


def test_costs_shrug_off_hiccups_and_follow_what_lasts() -> None:
    costs = Costs(PLANS)
    for index in range(60):
        costs.learn(1, Plan(1), 2e-2 if index % 10 == 5 else 2e-3)
    assert np.exp(costs.log_seconds(1, Plan(1))[0]) == pytest.approx(2e-3, rel=1e-3)
    for _ in range(30):
        costs.learn(1, Plan(1), 6e-3)
    assert np.exp(costs.log_seconds(1, Plan(1))[0]) == pytest.approx(6e-3, rel=0.02)


def test_an_untried_cost_is_guessed_from_other_batch_sizes() -> None:
    costs = Costs(PLANS)
    for batch, plain in ((1, 1e-3), (4, 3e-3)):
        costs.learn(batch, Plan(0), plain)
    costs.learn(1, Plan(3), 2e-3)
    mean, sd = costs.log_seconds(4, Plan(3))
    assert np.exp(mean) == pytest.approx(6e-3) and sd > 0.2


def test_a_change_of_one_cost_is_partly_believed_of_the_others() -> None:
    costs, rng, truth = Costs(PLANS), np.random.default_rng(0), {Plan(3): 1e-3, Plan(4): 2e-3}

    def play(rounds: int, costlier: float) -> None:
        for _ in range(rounds):
            costs.learn(1, Plan(4), 2e-3 * costlier * np.exp(0.05 * rng.standard_normal()))

    for batch, plan in ((1, Plan(3)), (8, Plan(4)), (8, Plan(3))):
        for _ in range(60):
            costs.learn(batch, plan, truth[plan])
    play(60, 1.0)
    sure = costs.log_seconds(8, Plan(4))[1]
    play(40, 1.4)
    assert costs.changes == 1
    keys = ((8, Plan(4)), (1, Plan(3)), (8, Plan(3)))
    moved = {key: np.exp(costs.log_seconds(*key)[0]) / truth[key[1]] for key in keys}
    assert 1.2 < moved[8, Plan(4)] < 1.4  # the same plan elsewhere, most of it
    assert 1.05 < moved[1, Plan(3)] < moved[8, Plan(4)] and 1.05 < moved[8, Plan(3)] < moved[8, Plan(4)]
    assert costs.log_seconds(8, Plan(4))[1] > 2.0 * sure  # and far from sure
    for _ in range(20):
        costs.learn(8, Plan(4), 2e-3)  # it was not so
    assert np.exp(costs.log_seconds(8, Plan(4))[0]) == pytest.approx(2e-3, rel=0.1)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_hiccup_at_the_first_try_of_a_plan_does_not_rule_it_out(batch: int) -> None:
    world, chooser = World(0), AdaptiveChooser(PLANS, seed=0)
    chooser.learn(made_up_round(Plan(5), batch, [0] * batch, world.seconds(batch, Plan(5))))
    for plan in (Plan(0), Plan(1), Plan(2), Plan(3)):
        chooser.learn(made_up_round(plan, batch, [0] * batch, 6.0 * world.seconds(batch, plan)))
    world.run(chooser, (batch,), 300)
    assert world.speed(batch, chooser.best(batch)) >= 0.97 * world.best(batch)


def test_without_drafts_what_is_believed_of_them_fades_sooner() -> None:
    def doubt(**memory: float) -> float:
        survival, rng = Survival(**memory), np.random.default_rng(0)
        for _ in range(200):
            survival.learn(made_up_round(Plan(2), 4, [0, 1, 2, 2]))
        for _ in range(800):
            survival.learn(made_up_round(Plan(0), 4))
        return float(np.std([survival.accept_length(Plan(2), rng) for _ in range(300)]))

    assert doubt() > 1.5 * doubt(idle_memory=1600.0)


def test_the_first_speculative_round_after_plan_0_does_not_spoil_its_cost() -> None:
    chooser = AdaptiveChooser(PLANS)
    for _ in range(20):
        chooser.learn(made_up_round(Plan(0), 1, seconds=1e-3))
        chooser.learn(made_up_round(Plan(2), 1, seconds=9e-3))  # pays for the draft's catch-up
        chooser.learn(made_up_round(Plan(2), 1, seconds=2e-3))
    seconds = {e.plan: e.seconds for e in chooser.estimates(1)}
    assert seconds[Plan(2)] == pytest.approx(2e-3, rel=0.01)


def test_state_survives_json() -> None:
    chooser = AdaptiveChooser(PLANS, seed=3)
    World(3).run(chooser, (1, 4), 200)
    again = AdaptiveChooser(PLANS, seed=9)
    again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    assert again.estimates(4) == chooser.estimates(4)
    observation = Observer(PLANS).observe(4, 50.0)
    assert [again.choose(observation) for _ in range(20)] == [chooser.choose(observation) for _ in range(20)]


def test_a_table_takes_the_largest_bound_reached() -> None:
    table = PlanTable({1: "3/1/4", 8: Plan(1), 32: "0"})
    assert [str(table.best(b)) for b in (1, 7, 8, 31, 32, 500)] == ["3/1/4", "3/1/4", "1/1/2", "1/1/2", "0", "0"]
    assert table.state_dict() == {"1": "3/1/4", "8": "1/1/2", "32": "0"}
    with pytest.raises(ValueError, match="needs entries"):
        PlanTable({})
    with pytest.raises(ValueError, match="at least one plan"):
        AdaptiveChooser(())
