import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from chooser_scripts import EMBEDDED, Script, Shift

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.costs import Costs
from specrl.agents.choosers.survival import Survival
from specrl.agents.choosers.table import ClairvoyantLength, FixedPlan, PlanTable
from specrl.core.observation import Observer
from specrl.core.plan import Plan
from specrl.testing.agent import CHECKS, Make, made_up_round

PLANS = EMBEDDED.plans  # 0, and chains of 1 to 5 steps
UNTRAINED = replace(EMBEDDED, survival={"chain": tuple(np.cumprod((0.06, 0.1, 0.1, 0.1, 0.1)).tolist())})


def best_speeds(chooser: AdaptiveChooser, script: Script) -> list[float]:
    """Expected speed of the best plan of the chooser at each batch size, as a share of the fastest plan's."""
    speeds = script.tokens[1] / script.seconds[1]  # [batch size, plan]
    best = [PLANS.index(chooser.best(batch)) for batch in script.loads]
    return (speeds[np.arange(len(best)), best] / speeds.max(1)).tolist()


MAKERS: dict[str, Make] = {  # test_evaluate.py checks the choosers that have names
    "fixed": lambda plans: FixedPlan(plans[-1]),
    "table": lambda plans: PlanTable({1: plans[0], 8: plans[-1]}),
    "clairvoyant": lambda plans: ClairvoyantLength(
        plans, {1: {plan: 1.0 + plan.num_steps for plan in plans}}, lambda: [0, 2, 3]
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_choosers_conform(check: Callable[[Make], None], make: Make) -> None:
    check(make)


# The seeds are fixed, so the tests below give the same result every time.
@pytest.mark.parametrize("seed", range(5))
def test_after_300_rounds_of_each_batch_size_the_best_plan_is_within_2_percent(seed: int) -> None:
    script, chooser = Script(EMBEDDED, 900, seed=seed, loads=(1, 4, 16)), AdaptiveChooser(PLANS, seed=seed)
    script.play(chooser)
    assert min(best_speeds(chooser, script)) >= 0.98


def test_plan_0_is_chosen_if_drafts_are_rejected() -> None:
    script, chooser = Script(UNTRAINED, 1500, seed=0, loads=(1, 4, 16)), AdaptiveChooser(PLANS, seed=0)
    choices = script.play(chooser)
    assert [chooser.best(batch) for batch in script.loads] == [Plan(0)] * 3
    assert np.mean(choices[750:] != PLANS.index(Plan(0))) < 0.05


@pytest.mark.parametrize(
    "shift",
    [Shift("costs", 900, costlier=1.6), Shift("rises", 900, first=0.1), Shift("falls", 900, kinder=0.1)],
    ids=lambda shift: shift.name,
)
def test_it_follows_large_changes_of_costs_and_acceptance(shift: Shift) -> None:
    script, chooser = Script(EMBEDDED, 3300, seed=2, shift=shift, loads=(1, 4, 16)), AdaptiveChooser(PLANS, seed=2)
    script.play(chooser)
    assert min(best_speeds(chooser, script)) >= 0.97


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_a_hiccup_in_the_first_round_of_a_plan_does_not_exclude_it(batch: int) -> None:
    script, chooser = Script(EMBEDDED, 300, seed=0, loads=(batch,)), AdaptiveChooser(PLANS, seed=0)
    for plan in (Plan(5), *PLANS[:4]):
        seconds = EMBEDDED.costs((batch,))[batch][plan] * (1.0 if plan == Plan(5) else 6.0)
        chooser.learn(made_up_round(plan, batch, [0] * batch, seconds))
    script.play(chooser)
    assert min(best_speeds(chooser, script)) >= 0.97


def test_the_first_speculative_round_after_plan_0_does_not_change_the_cost_of_its_plan() -> None:
    chooser = AdaptiveChooser(PLANS)
    for _ in range(20):
        for plan, seconds in ((Plan(0), 1e-3), (Plan(2), 9e-3), (Plan(2), 2e-3)):  # 9e-3 includes the catch-up
            chooser.learn(made_up_round(plan, 1, seconds=seconds))
    estimates = {estimate.plan: estimate.seconds for estimate in chooser.estimates(1)}
    assert estimates[Plan(2)] == pytest.approx(2e-3, rel=0.01)


def test_state_survives_json() -> None:
    chooser, again = AdaptiveChooser(PLANS, seed=3), AdaptiveChooser(PLANS, seed=9)
    Script(EMBEDDED, 200, seed=3, loads=(1, 4)).play(chooser)
    again.load_state_dict(json.loads(json.dumps(chooser.state_dict())))
    assert again.estimates(4) == chooser.estimates(4)
    observation = Observer(PLANS).observe(4, 50.0)
    assert [again.choose(observation) for _ in range(20)] == [chooser.choose(observation) for _ in range(20)]


def test_survival_is_pooled_over_batch_sizes_and_chain_lengths() -> None:
    survival, rng = Survival(), np.random.default_rng(0)
    for plan, batch in ((Plan(2), 1), (Plan(4), 16)) * 100:
        accepted = rng.random((batch, plan.num_steps)) < 0.5
        survival.learn(made_up_round(plan, batch, accepted.cumprod(1).sum(1)))
    assert survival.accept_length(Plan(3)) == pytest.approx(1.875, abs=0.1)  # never ran
    assert survival.accept_length(Plan(0)) == 1.0


def test_the_survival_of_an_untried_tree_is_that_of_chains() -> None:
    survival, tree = Survival(), Plan(2, 2, 4)
    for _ in range(200):
        survival.learn(made_up_round(Plan(2), 4, [0, 1, 2, 2]))
    assert survival.accept_length(tree) == pytest.approx(survival.accept_length(Plan(2)), abs=0.05)
    for _ in range(200):
        survival.learn(made_up_round(tree, 4, [2, 2, 2, 2]))
    assert survival.accept_length(tree) > 2.8


def test_evidence_about_drafts_fades_sooner_in_rounds_without_drafts() -> None:
    def spread(**memory: float) -> float:
        survival, rng = Survival(**memory), np.random.default_rng(0)
        for _ in range(200):
            survival.learn(made_up_round(Plan(2), 4, [0, 1, 2, 2]))
        for _ in range(800):
            survival.learn(made_up_round(Plan(0), 4))
        return float(np.std([survival.accept_length(Plan(2), rng) for _ in range(300)]))

    assert spread() > 1.5 * spread(idle_memory=1600.0)


def test_costs_ignore_hiccups_and_follow_lasting_changes() -> None:
    costs = Costs(PLANS)
    for index in range(60):
        costs.learn(1, Plan(1), 2e-2 if index % 10 == 5 else 2e-3)
    assert np.exp(costs.log_seconds(1, Plan(1))[0]) == pytest.approx(2e-3, rel=1e-3)
    for _ in range(30):
        costs.learn(1, Plan(1), 6e-3)
    assert np.exp(costs.log_seconds(1, Plan(1))[0]) == pytest.approx(6e-3, rel=0.02)


def test_an_untried_cost_is_estimated_from_other_batch_sizes() -> None:
    costs = Costs(PLANS)
    for batch, plan, seconds in ((1, Plan(0), 1e-3), (4, Plan(0), 3e-3), (1, Plan(3), 2e-3)):
        costs.learn(batch, plan, seconds)
    mean, sd = costs.log_seconds(4, Plan(3))
    assert np.exp(mean) == pytest.approx(6e-3) and sd > 0.2


def test_a_change_of_one_cost_moves_the_others_by_a_share() -> None:
    costs, rng, seconds = Costs(PLANS), np.random.default_rng(0), {Plan(3): 1e-3, Plan(4): 2e-3}
    for batch, plan in ((1, Plan(3)), (8, Plan(4)), (8, Plan(3))):
        for _ in range(60):
            costs.learn(batch, plan, seconds[plan])
    for round_ in range(100):
        if round_ == 60:
            before = costs.log_seconds(8, Plan(4))[1]
        slowdown = 1.4 if round_ >= 60 else 1.0
        costs.learn(1, Plan(4), 2e-3 * slowdown * np.exp(0.05 * rng.standard_normal()))
    assert costs.changes == 1
    other_batch, other_plan, both = (
        np.exp(costs.log_seconds(batch, plan)[0]) / seconds[plan]
        for batch, plan in ((8, Plan(4)), (1, Plan(3)), (8, Plan(3)))
    )
    assert 1.2 < other_batch < 1.4 and 1.05 < other_plan < other_batch and 1.05 < both < other_batch
    assert costs.log_seconds(8, Plan(4))[1] > 2.0 * before  # the spread has grown
    for _ in range(20):
        costs.learn(8, Plan(4), 2e-3)  # this cost had not changed
    assert np.exp(costs.log_seconds(8, Plan(4))[0]) == pytest.approx(2e-3, rel=0.1)


def test_a_table_uses_the_largest_bound_reached() -> None:
    table = PlanTable({1: "3/1/4", 8: Plan(1), 32: "0"})
    assert [str(table.best(b)) for b in (1, 7, 8, 31, 32, 500)] == ["3/1/4", "3/1/4", "1/1/2", "1/1/2", "0", "0"]
    assert table.state_dict() == {"1": "3/1/4", "8": "1/1/2", "32": "0"}
    for make, rule in ((lambda: PlanTable({}), "a plan table"), (lambda: AdaptiveChooser(()), "plans")):
        with pytest.raises(ValueError, match=rule):
            make()
