"""The one round loop and the one round statistic."""

from __future__ import annotations

from itertools import cycle, islice

import pytest

from specrl.agents.choosers.table import PlanTable
from specrl.core.observation import Observation
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.core.rollout import Rollout
from specrl.core.round import Round
from specrl.core.round_stats import RoundStats
from specrl.simulation.engine import Requests, SimulatedEngine, SimulatedSession

PLANS = parse_plans("0,1/1/2,3/1/4")
PROFILE = "embedded-fp32"


class Recorder(PlanTable):
    """A table of plans that keeps what it is asked and told."""

    def __init__(self) -> None:
        super().__init__({1: "3/1/4", 4: "1/1/2"})
        self.seen: list[Observation] = []
        self.learnt: list[Round] = []

    def choose(self, observation: Observation) -> Plan:
        """Keep the observation."""
        self.seen.append(observation)
        return super().choose(observation)

    def learn(self, done: Round) -> None:
        """Keep the round."""
        self.learnt.append(done)


def session(batch_size: int = 2) -> tuple[SimulatedEngine, SimulatedSession]:
    engine = SimulatedEngine(PROFILE)
    requests = Requests((16, 16), (32, 32))
    return engine, engine.start(requests, batch_size=batch_size, max_batch_size=8, seed=3)


def test_a_chooser_sees_the_batch_size_of_its_round_and_learns_from_every_round() -> None:
    engine, live = session()
    rollout = Rollout(live, PLANS, PlainCost(), batch_sizes=cycle([2, 2, 8]))
    chooser = Recorder()
    steps = list(islice(rollout.play(chooser, engine.clock), 6))
    assert [seen.batch_size for seen in chooser.seen] == [2, 2, 8, 2, 2, 8]
    assert [step.round.batch_size for step in steps] == [2, 2, 8, 2, 2, 8]
    assert [str(step.plan) for step in steps] == ["3/1/4", "3/1/4", "1/1/2"] * 2
    assert chooser.learnt == [step.round for step in steps]


def test_late_results_reach_observation_and_chooser_late() -> None:
    engine, live = session()
    rollout = Rollout(live, PLANS, PlainCost(), result_delay=2)
    chooser = Recorder()
    steps = list(islice(rollout.play(chooser, engine.clock), 5))
    assert chooser.learnt == [step.round for step in steps[:3]]
    ages = [seen.draft_age for seen in chooser.seen]
    assert ages == [0, 0, 0, 0, 1], "the observation counts the rounds that are known"


def test_an_engine_without_a_plain_measurement_is_refused() -> None:
    _, live = session()
    live.measure_plain = lambda: None  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ValueError, match="must measure plain decoding"):
        Rollout(live, PLANS, PlainCost()).step(PLANS[0])


def test_statistics_merge_to_those_of_all_rounds() -> None:
    _, live = session(4)
    rollout = Rollout(live, PLANS, PlainCost())
    parts, everything = [RoundStats(), RoundStats()], RoundStats()
    for turn in range(12):
        step = rollout.step(PLANS[turn % 3], thinking_s=1e-4)
        parts[turn % 2].add(step.round, step.plain.seconds, step.thinking_s)
        everything.add(step.round, step.plain.seconds, step.thinking_s)
    merged = RoundStats()
    for part in parts:
        merged.merge(part)
    assert merged.rounds == everything.rounds == 12
    assert merged.accepted == everything.accepted and merged.proposed == everything.proposed == [32, 16, 16]
    assert merged.seconds == pytest.approx(everything.seconds)
    assert merged.speedup == pytest.approx(everything.speedup)
    assert merged.accept_length == everything.accept_length == 1 + sum(everything.accepted) / 48
