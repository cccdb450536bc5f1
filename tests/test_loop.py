"""The online loop and its policies, on a clock that every reading moves: the same seed gives the same numbers."""

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
from specrl.core.interfaces import PlanChooser, PlanCost, Request, Workload
from specrl.core.observation import Observation
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


def make_engine(draft: Draft) -> LocalEngine:
    return LocalEngine(tiny_target(), draft, max_context=32, clock=Ticking())


class GatedRun:
    """A loop that deploys better drafts only."""

    def __init__(
        self,
        draft: Draft,
        *,
        engine: LocalEngine | None = None,
        learner: type[OnlineLearner] = OnlineLearner,
        chooser: PlanChooser | None = None,
        **changes: Any,
    ) -> None:
        target, chooser = tiny_target(), chooser or FixedPlan(PLAN)
        self.engine = engine or make_engine(draft)
        self.learner = learner(draft, target.embedding, LearnerConfig(**{**QUICK, **changes}), gated=True)
        gate = Gate(draft.config, target.embedding, min_gain=0.0)
        self.deploy = DeployIfBetter(self.engine, self.learner, gate, chooser.plans)
        self.loop = OnlineLoop(self.engine, Drawn(), chooser, self.learner, [Phase(16)], deploy=self.deploy)
        self.versions: list[int] = []

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.versions.append(self.loop.step().round.draft_version)

    def decisions(self, check: str) -> list[dict[str, Any]]:
        return [decision for decision in self.deploy.decisions if decision["check"] == check]


def test_a_better_draft_serves_after_its_trial() -> None:
    run = GatedRun(new(), learning_rate=1e-2)
    while not any(decision["passed"] for decision in run.decisions("trial")):
        run.run(8)
        assert len(run.versions) < 800
    run.run(24)
    passed = [decision for decision in run.decisions("trial") if decision["passed"]]
    assert run.deploy.version == passed[-1]["version"] > 0
    assert run.versions.count(passed[0]["version"]) > PAIRS[0] * TURN, "longer than its turns of the trial"
    gate, held_out = Gate(new().config, tiny_target().embedding), list(run.learner.held_out)
    gain = gate.accept_lengths(run.deploy.weights(), held_out) - gate.accept_lengths(new().tensors, held_out)
    assert gain.mean() > 0.05


class Broken(OnlineLearner):
    """Returns weights that are not finite after its first update."""

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        version, weights = super().weights()
        if self.updates:
            weights["fc.weight"][0, 0] = math.nan
        return version, weights


def test_weights_that_are_not_finite_never_serve() -> None:
    run = GatedRun(tiny_draft(), learner=Broken)
    run.run(80)
    decisions = run.deploy.decisions
    assert len(decisions) >= 3 and all(decision["harmful"] for decision in decisions)
    assert "fc.weight is not finite" in str(decisions[0]["reason"])
    assert set(run.versions) == {0} and run.learner.counts()["rollbacks"] >= 3
    assert all(torch.isfinite(weight).all() for weight in run.deploy.weights().values())


class RenamingEngine(LocalEngine):
    """Its traces are of another language: every token has the name of the next one."""

    def start(self, workload: Workload, **settings: Any) -> Any:
        session = super().start(workload, **settings)
        drain = session.drain
        session.drain = lambda: [rename(trace) for trace in drain()]  # type: ignore[method-assign]
        return session


def rename(trace: Trace) -> Trace:
    return replace(trace, tokens=(trace.tokens + 1) % 10, logits=trace.logits.roll(1, -1))


def test_poisoned_traces_pass_the_held_out_check_and_fail_the_trial() -> None:
    engine = RenamingEngine(tiny_target(), tiny_draft(), max_context=32, clock=Ticking())
    run = GatedRun(tiny_draft(), engine=engine, learning_rate=2e-2, ema_decay=0.0)
    while not run.decisions("trial"):
        run.run(1)
        assert len(run.versions) < 1000
    refused = run.decisions("trial")[0]
    assert run.decisions("held-out")[-1]["passed"] and refused["harmful"] and not refused["passed"]
    assert 0 < run.versions.count(refused["version"]) <= PAIRS[-1] * TURN
    assert engine.draft_version == 0 and len(run.learner.replay) == len(run.learner.held_out) == 0
    assert torch.equal(run.learner.weights()[1]["fc.weight"], tiny_draft().tensors["fc.weight"])
    count = len(run.versions)
    run.run(20)
    assert set(run.versions[count:]) == {0}, "the next trial is delayed"


class ChoosesPlanZero(AdaptiveChooser):
    """Records the draft versions of the rounds that it learns from."""

    def __init__(self) -> None:
        super().__init__([Plan(0), Plan(2), Plan(3)], seed=0)
        self.versions: set[int] = set()

    def choose(self, observation: Observation) -> Plan:
        return Plan(0)

    def learn(self, done: Round) -> None:
        self.versions.add(done.draft_version)


def test_in_a_trial_both_drafts_run_the_shortest_drafting_plan_and_the_chooser_learns_from_one() -> None:
    chooser = ChoosesPlanZero()
    run = GatedRun(new(), chooser=chooser, learning_rate=1e-2)
    trial: list[Round] = []  # all other rounds have plan 0
    while len(trial) < 2 * TURN * PAIRS[0]:
        done = run.loop.step().round
        assert run.loop.rounds < 600
        if done.plan != Plan(0):
            trial.append(done)
    assert {done.plan for done in trial} == {Plan(2)} and len({done.draft_version for done in trial}) == 2
    turns = [done.draft_version for done in trial[::TURN]][:4]
    assert turns[0] == turns[3] == 0 and turns[1] == turns[2] > 0
    assert chooser.versions == {0}


class RecordsCosts(OnlineLearner):
    """Records the costs that are set."""

    costs: tuple[Sequence[PlanCost], float] = ((), 0.0)

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float = 1.0) -> None:
        self.costs = costs, speedup
        super().set_plan_costs(costs, speedup)


@pytest.mark.parametrize("loss", ["seconds_saved", "forward_kl"])
def test_a_loss_in_seconds_gets_the_costs_of_plans(loss: str) -> None:
    learner = RecordsCosts(tiny_draft(), tiny_target().embedding, LearnerConfig(**{**QUICK, "loss": loss}))
    chooser = AdaptiveChooser([Plan(0), Plan(1), Plan(3)], seed=0)
    loop = OnlineLoop(
        make_engine(tiny_draft()), Drawn(), chooser, learner, parse_traffic("8x12,2x6"), weight_sync_interval=16
    )
    for _ in range(144):
        loop.step()
    costs, speedup = learner.costs
    if loss == "forward_kl":
        assert not costs
        return
    assert {cost.batch_size for cost in costs} == {2, 8} and {cost.num_steps for cost in costs} <= {0, 1, 3}
    shares = {b: sum(cost.share for cost in costs if cost.batch_size == b) for b in (2, 8)}
    assert shares[8] == pytest.approx(2 * shares[2], rel=0.3)
    for cost in costs:
        assert cost.plain_s == pytest.approx(loop.baseline.estimate(cost.batch_size, 12.0).seconds, rel=0.01)
        assert cost.round_s == pytest.approx(3 * 2.0**-10, rel=0.35)  # four readings, and the chooser's prior
    assert 0.2 < speedup < 3.0 and loop.metrics["updates"] > 0

    (cost, _), fixed = plan_costs(FixedPlan(PLAN), loop.recent)
    assert (cost.num_steps, cost.share) == (3, loop.recent[8].rounds) and cost.round_s == loop.recent[8].total.round_s
    totals = [stats.total for stats in loop.recent.values()]
    assert fixed == pytest.approx(sum(t.plain_s for t in totals) / sum(t.seconds for t in totals))


def test_a_request_that_opted_out_is_served_and_not_learned_from() -> None:
    learner = OnlineLearner(tiny_draft(), tiny_target().embedding, LearnerConfig(**QUICK))
    engine = make_engine(tiny_draft())
    loop = OnlineLoop(engine, Drawn(never=4), FixedPlan(PLAN), learner, [Phase(8)], weight_sync_interval=8)
    while loop.requests < 64:
        loop.step()
    opted_out = learner.counts()["opted_out"]
    assert learner.requests + opted_out >= 60
    assert 0.15 < opted_out / (learner.requests + opted_out) < 0.35


def test_requests_continue_in_the_next_session() -> None:
    listed = Listed([Request((i,), 4) for i in range(1, 9)])
    stream = ResumableRequests(listed, seed=0)
    first, second = stream.requests(0), stream.requests(1)
    prompts = [next(first).prompt[0] for _ in range(3)] + [next(second).prompt[0] for _ in range(2)]
    assert prompts == [1, 2, 3, 4, 5] and stream.position == 5
    assert next(ResumableRequests(listed, seed=0, position=5).requests(7)).prompt[0] == 6
