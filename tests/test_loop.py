"""The online loop and its policies, on a clock that every look at moves: the same seed gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import AUX_LAYERS, Drawn, Listed, tiny_draft, tiny_target
from torch import Tensor

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.choosers.table import FixedPlan
from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.batch_schedule import Phase, parse_traffic
from specrl.core.clock import VirtualClock
from specrl.core.interfaces import PlanCost, Request, Workload
from specrl.core.plan import Plan
from specrl.core.round import Round, Trace
from specrl.decoding.engine import LocalEngine
from specrl.models.draft import Draft, new_draft
from specrl.training.deploy import PAIRS, TURN, DeployIfBetter
from specrl.training.loop import OnlineLoop, ResumableRequests, plan_costs

PLAN = Plan(3)
QUICK: dict[str, Any] = {
    "dtype": "float32",
    "batch_size": 8,
    "ttt_steps": 2,
    "holdout_fraction": 0.25,
    "ema_decay": 0.9,
    "updates_per_request": 0.75,
}


class Ticking(VirtualClock):
    """Time passes when it is read, 2⁻¹⁰ s each time: a round costs the same whatever its plan."""

    def now(self) -> float:
        self.advance(2.0**-10)
        return super().now()


def new() -> Draft:
    return new_draft(tiny_target(), intermediate_size=32, aux_layers=AUX_LAYERS)


class Lane:
    """A loop that deploys better drafts only, and its decisions."""

    def __init__(
        self,
        draft: Draft,
        engine: LocalEngine | None = None,
        learner: type[OnlineLearner] = OnlineLearner,
        **changes: Any,
    ) -> None:
        target = tiny_target()
        self.engine = engine or LocalEngine(target, draft, max_context=32, clock=Ticking())
        self.learner = learner(draft, target.embedding, LearnerConfig(**{**QUICK, **changes}), gated=True)
        self.decisions: list[dict[str, Any]] = []
        gate = Gate(draft.config, target.embedding, min_gain=0.0)
        chooser = FixedPlan(PLAN)
        self.deploy = DeployIfBetter(self.engine, self.learner, gate, chooser.plans, on_decision=self.decisions.append)
        self.loop = OnlineLoop(self.engine, Drawn(), chooser, self.learner, [Phase(16)], deploy=self.deploy)
        self.versions: list[int] = []

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.versions.append(self.loop.step().round.draft_version)

    def looks(self, look: str) -> list[dict[str, Any]]:
        return [decision for decision in self.decisions if decision["look"] == look]


def test_a_better_draft_comes_to_serve() -> None:
    lane = Lane(new(), learning_rate=1e-2)
    while not any(decision["passed"] for decision in lane.looks("trial")):
        lane.run(8)
        assert len(lane.versions) < 800
    lane.run(24)
    passed = [decision for decision in lane.looks("trial") if decision["passed"]]
    assert lane.deploy.version == passed[-1]["version"] > 0
    serving = [version for version in lane.versions if version == passed[0]["version"]]
    assert len(serving) > PAIRS[0] * TURN  # longer than its turns of the trial
    accept = Gate(new().config, tiny_target().embedding)
    held = list(lane.learner.held_out)
    gain = accept.accept_lengths(lane.deploy.weights(), held) - accept.accept_lengths(new().tensors, held)
    assert gain.mean() > 0.05


class Broken(OnlineLearner):
    """The weights that it hands out are not finite after its first update."""

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        version, weights = super().weights()
        if self.updates:
            weights["fc.weight"][0, 0] = math.nan
        return version, weights


def test_weights_that_are_not_numbers_never_serve() -> None:
    lane = Lane(tiny_draft(), learner=Broken)
    lane.run(120)
    assert len(lane.decisions) >= 5 and all(decision["harmful"] for decision in lane.decisions)
    assert "fc.weight is not finite" in lane.decisions[0]["reason"]
    assert set(lane.versions) == {0} and lane.learner.counts()["rollbacks"] >= 5
    assert all(torch.isfinite(weight).all() for weight in lane.deploy.weights().values())


def test_gradients_that_are_not_numbers_change_nothing() -> None:
    lane = Lane(tiny_draft())
    lane.learner.parameters["fc.weight"].register_hook(lambda gradient: gradient * math.nan)
    lane.run(100)
    assert lane.learner.updates == 0 and lane.learner.counts()["bad_updates"] > 10
    assert set(lane.versions) == {0}
    assert torch.equal(lane.learner.weights()[1]["fc.weight"], tiny_draft().tensors["fc.weight"])


def test_a_learning_rate_a_hundred_times_too_high_never_serves_longer_than_a_trial() -> None:
    lane = Lane(tiny_draft(), learning_rate=0.5, ema_decay=0.0)
    lane.run(110)
    assert lane.decisions and not any(decision["passed"] for decision in lane.looks("trial"))
    assert any(decision["harmful"] for decision in lane.decisions) and lane.learner.counts()["rollbacks"] > 0
    assert lane.deploy.version == 0
    assert all(lane.versions.count(version) <= PAIRS[-1] * TURN for version in set(lane.versions) - {0})


class Spoilt(LocalEngine):
    """Its traces tell of another language: every token is called by the next one's number."""

    def start(self, workload: Workload, **settings: Any) -> Any:
        session = super().start(workload, **settings)
        drain = session.drain
        session.drain = lambda: [_renamed(trace) for trace in drain()]  # type: ignore[method-assign]
        return session


def _renamed(trace: Trace) -> Trace:
    return replace(trace, tokens=(trace.tokens + 1) % 10, logits=trace.logits.roll(1, -1))


def test_poisoned_traces_convince_the_comparison_and_fail_the_trial() -> None:
    engine = Spoilt(tiny_target(), tiny_draft(), max_context=32, clock=Ticking())
    lane = Lane(tiny_draft(), engine, learning_rate=2e-2, ema_decay=0.0)
    while not lane.looks("trial"):
        lane.run(1)
        assert len(lane.versions) < 1000
    refused = lane.looks("trial")[0]
    assert lane.looks("held-out")[-1]["passed"] and refused["harmful"] and not refused["passed"]
    assert 0 < lane.versions.count(refused["version"]) <= PAIRS[-1] * TURN
    assert engine.draft_version == 0 and len(lane.learner.replay) == len(lane.learner.held_out) == 0
    assert torch.equal(lane.learner.weights()[1]["fc.weight"], tiny_draft().tensors["fc.weight"])
    tried = len(lane.versions)
    lane.run(20)
    assert set(lane.versions[tried:]) == {0}, "the next trial waits"


def test_in_a_trial_both_drafts_run_the_same_plans_and_the_chooser_sees_one() -> None:
    """A chooser that prefers plan 0 tells nothing of a draft: then the shortest plan that drafts is run."""
    lane = Lane(new(), learning_rate=1e-2)
    seen: list[int] = []
    chooser = AdaptiveChooser([Plan(0), Plan(2), Plan(3)], seed=0)
    chooser.learn = lambda done: seen.append(done.draft_version)  # type: ignore[method-assign]
    chooser.choose = lambda observation: Plan(0)  # type: ignore[method-assign]
    gate = Gate(new().config, tiny_target().embedding, min_gain=0.0)
    deploy = DeployIfBetter(lane.engine, lane.learner, gate, chooser.plans)
    loop = OnlineLoop(lane.engine, Drawn(), chooser, lane.learner, [Phase(16)], deploy=deploy)
    tried: list[Round] = []  # all other rounds have plan 0
    while len(tried) < 2 * TURN * PAIRS[0]:
        done = loop.step().round
        assert loop.rounds < 600
        if done.plan != Plan(0):
            tried.append(done)
    assert {done.plan for done in tried} == {Plan(2)} and len({done.draft_version for done in tried}) == 2
    turns = [done.draft_version for done in tried[::TURN]][:4]
    assert turns[0] == turns[3] == 0 and turns[1] == turns[2] > 0
    assert set(seen) == {0}


class Priced(OnlineLearner):
    """Remembers the costs that were set."""

    set: tuple[Sequence[PlanCost], float] = ((), 0.0)

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float = 1.0) -> None:
        self.set = costs, speedup
        super().set_plan_costs(costs, speedup)


@pytest.mark.parametrize("loss", ["seconds_saved", "forward_kl"])
def test_a_loss_in_seconds_is_told_what_they_cost(loss: str) -> None:
    target = tiny_target()
    engine = LocalEngine(target, tiny_draft(), max_context=32, clock=Ticking())
    learner = Priced(tiny_draft(), target.embedding, LearnerConfig(**{**QUICK, "loss": loss}))
    chooser = AdaptiveChooser([Plan(0), Plan(1), Plan(3)], seed=0)
    loop = OnlineLoop(engine, Drawn(), chooser, learner, parse_traffic("8x12,2x6"), sync_every=16)
    for _ in range(144):
        loop.step()
    costs, speedup = learner.set
    if loss == "forward_kl":
        assert not costs
        return
    assert {cost.batch_size for cost in costs} == {2, 8} and {cost.num_steps for cost in costs} <= {0, 1, 3}
    shares = {b: sum(cost.share for cost in costs if cost.batch_size == b) for b in (2, 8)}
    assert shares[8] == pytest.approx(2 * shares[2], rel=0.3)
    for cost in costs:
        assert cost.plain_s == pytest.approx(loop.baseline.estimate(cost.batch_size, 12.0).seconds, rel=0.01)
        assert cost.round_s == pytest.approx(3 * 2.0**-10, rel=0.35)  # four looks at the clock, and the belief's prior
    assert 0.2 < speedup < 3.0 and loop.metrics["updates"] > 0

    (cost, _), fixed = plan_costs(FixedPlan(PLAN), loop.recent)
    assert (cost.num_steps, cost.share) == (3, loop.recent[8].rounds) and cost.round_s == loop.recent[8].total.round_s
    totals = [stats.total for stats in loop.recent.values()]
    assert fixed == pytest.approx(sum(t.plain_s for t in totals) / sum(t.seconds for t in totals))


def test_a_request_that_opted_out_is_served_and_not_learnt_from() -> None:
    target = tiny_target()
    engine = LocalEngine(target, tiny_draft(), max_context=32, clock=Ticking())
    learner = OnlineLearner(tiny_draft(), target.embedding, LearnerConfig(**QUICK))
    loop = OnlineLoop(engine, Drawn(never=4), FixedPlan(PLAN), learner, [Phase(8)], sync_every=8)
    while loop.requests < 64:
        loop.step()
    counts = learner.counts()
    assert learner.requests + counts["opted_out"] >= 60
    assert 0.15 < counts["opted_out"] / (learner.requests + counts["opted_out"]) < 0.35


def test_a_stream_goes_on_where_it_stopped_whatever_the_sessions() -> None:
    listed = Listed([Request((i,), 4) for i in range(1, 9)])
    once = ResumableRequests(listed, seed=0)
    first, again = once.requests(0), once.requests(1)
    taken = [next(first).prompt[0] for _ in range(3)] + [next(again).prompt[0] for _ in range(2)]
    assert taken == [1, 2, 3, 4, 5] and once.taken == 5
    assert next(ResumableRequests(listed, seed=0, taken=5).requests(7)).prompt[0] == 6
