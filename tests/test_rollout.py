from __future__ import annotations

import csv
import json
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest

from specrl.agents.choosers.table import PlanTable
from specrl.cli import main
from specrl.core.observation import Observation
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.core.rollout import Rollout, Step
from specrl.core.round import Round
from specrl.core.round_stats import BLOCK, RECENT_BLOCKS, WINDOW, RecentStats, RoundStats, StatsByWindow
from specrl.simulation.engine import Requests, SimulatedEngine, SimulatedSession
from specrl.testing.agent import made_up_round
from specrl.training.logger import read_windows

PLANS = parse_plans("0,1/1/2,3/1/4")


class Recorder(PlanTable):
    """A table of plans that records its calls."""

    def __init__(self) -> None:
        super().__init__({1: "3/1/4", 4: "1/1/2"})
        self.observations: list[Observation] = []
        self.learned: list[Round] = []

    def choose(self, observation: Observation) -> Plan:
        self.observations.append(observation)
        return super().choose(observation)

    def learn(self, done: Round) -> None:
        self.learned.append(done)


def session(batch_size: int = 2) -> SimulatedSession:
    requests = Requests((16, 16), (32, 32))
    return SimulatedEngine("embedded-fp32").start(requests, batch_size=batch_size, max_batch_size=8, seed=3)


def play(rollout: Rollout, count: int) -> tuple[Recorder, list[Step]]:
    chooser = Recorder()
    return chooser, list(islice(rollout.play(chooser, SimulatedEngine("embedded-fp32").clock), count))


def test_a_chooser_sees_the_batch_size_of_its_round_and_learns_from_every_round() -> None:
    chooser, steps = play(Rollout(session(), PLANS, PlainCost(), batch_sizes=cycle([2, 2, 8])), 6)
    assert [seen.batch_size for seen in chooser.observations] == [2, 2, 8, 2, 2, 8]
    assert [step.round.batch_size for step in steps] == [2, 2, 8, 2, 2, 8]
    assert [str(step.round.plan) for step in steps] == ["3/1/4", "3/1/4", "1/1/2"] * 2
    assert chooser.learned == [step.round for step in steps]


def test_late_results_reach_observation_and_chooser_late() -> None:
    chooser, steps = play(Rollout(session(), PLANS, PlainCost(), result_delay=2), 5)
    assert chooser.learned == [step.round for step in steps[:3]]
    assert [seen.draft_age for seen in chooser.observations] == [0, 0, 0, 0, 1]  # counts the rounds that are known


def test_an_engine_without_a_plain_measurement_is_refused() -> None:
    live = session()
    live.measure_plain = lambda: None  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ValueError, match="must measure plain decoding"):
        Rollout(live, PLANS, PlainCost()).step(PLANS[0])


def test_statistics_merge_to_those_of_all_rounds() -> None:
    rollout = Rollout(session(4), PLANS, PlainCost())
    parts, merged, everything = [RoundStats(), RoundStats()], RoundStats(), RoundStats()
    for turn in range(12):
        step = rollout.step(PLANS[turn % 3], thinking_s=1e-4)
        for stats in (parts[turn % 2], everything):
            stats.add(step.round, step.plain.seconds, step.thinking_s)
    for part in parts:
        merged.merge(part)
    assert merged.rounds == everything.rounds == 12
    assert merged.accepted == everything.accepted and merged.proposed == everything.proposed == [32, 16, 16]
    assert merged.seconds == pytest.approx(everything.seconds) and merged.speedup == pytest.approx(everything.speedup)
    assert merged.accept_length == everything.accept_length == 1 + sum(everything.accepted) / 48


def test_a_row_counts_the_drafts_accepted_at_each_position() -> None:
    stats = RoundStats()
    stats.add(made_up_round(Plan(3), 4, [0, 1, 3, 3], seconds=0.002), plain_s=0.01)
    stats.add(made_up_round(Plan(3), 4, [2, 0, 0, 0], seconds=0.004), plain_s=0.01)
    row = stats.row()
    assert [row[f"accepted_{k}"] for k in (1, 2, 3)] == [4, 3, 2]
    assert (row["rounds"], row["requests"], row["tokens"]) == (2, 8, 17)
    assert row["verify_s"] == pytest.approx(0.006) and row["plain_s"] == pytest.approx(17 / 4 * 0.01)


def test_windows_are_split_by_batch_size_and_plan_and_returned_once() -> None:
    windows = StatsByWindow()
    for batch, plan in ((2, Plan(3)), (1, Plan(3)), (1, Plan(0))):
        windows.add(made_up_round(plan, batch), 0.25)
    rows = windows.take_rows()
    assert [(row["batch_size"], row["plan"]) for row in rows] == [(1, "0"), (1, "3/1/4"), (2, "3/1/4")]
    for _ in range(WINDOW + 1):
        windows.add(made_up_round(Plan(3), 1), 0.25)
    assert [row["rounds"] for row in windows.take_rows()] == [WINDOW, 1]


def test_recent_statistics_have_intervals_that_contain_their_values() -> None:
    recent, rng = RecentStats(), np.random.default_rng(0)
    for n in range((RECENT_BLOCKS + 3) * BLOCK):
        assert (recent.intervals() is None) == (n < 8 * BLOCK)
        seconds = 0.002 + 0.001 * rng.random()
        recent.add(made_up_round(Plan(3), 2, rng.integers(0, 4, 2).tolist(), seconds), 0.003, 1e-4)
    intervals, total = recent.intervals(), recent.total
    assert intervals is not None
    for interval, value in zip(intervals, (total.speedup, total.accept_length), strict=True):
        assert interval.value == pytest.approx(value) and 0.0 < interval.half_width < 0.5
    assert total.rounds == RECENT_BLOCKS * BLOCK and recent.rounds == (RECENT_BLOCKS + 3) * BLOCK
    again = RecentStats()
    again.load_state_dict(json.loads(json.dumps(recent.state_dict())))
    assert again.total == total and again.intervals() == intervals


def test_a_resumed_run_continues_its_windows(tmp_path: Path) -> None:
    line = "train --workload.max_new_tokens 16 --workload.prompt_tokens 24 --serving.batch_schedule 4x8,1x4"
    line += f" --learn false --checkpoint 4 --log.tensorboard false --output_dir {tmp_path}"
    runs = []
    for options in (["8"], ["12", "--resume"]):
        assert main([*line.split(), "--serving.requests", *options]) == 0
        runs.append(list(csv.DictReader((tmp_path / "windows.csv").read_text().splitlines())))
    first, rows = runs
    assert len(rows) > len(first) and [r["draft_s"] for r in rows[: len(first)]] == [r["draft_s"] for r in first]
    assert all(float(row["verify_s"]) > 0 and int(row["requests"]) >= int(row["rounds"]) for row in rows)
    assert len(read_windows(tmp_path, 8)) == len(first) and read_windows(tmp_path, 0) == []
