"""`specrl evaluate`: choosers in simulation and live, their scores, and the oracle gap."""

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.agents.choosers.registry import CHOOSERS, Known, make_chooser
from specrl.agents.choosers.table import FixedPlan
from specrl.commands.evaluate import evaluate
from specrl.core.batch_schedule import parse_traffic
from specrl.core.interfaces import PlanChooser, Request
from specrl.core.observation import Observation
from specrl.core.plan import PLAIN, Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.evaluation.live import LiveBackend
from specrl.evaluation.regret import concatenate_cycles, cycle_speedups, gap_closed, gap_lines, oracle_gap
from specrl.evaluation.scores import compare_choosers, improvement, score, speedup_interval
from specrl.evaluation.simulation import Schedule, SimulatedBackend
from specrl.evaluation.trajectory import PlanSeconds, Trajectory, plan_seconds
from specrl.simulation.profile import load_profile
from specrl.simulation.shifts import Shift, parse_shifts
from specrl.testing.agent import CHECKS

EXAMPLES = Path(__file__).parent.parent / "examples"
CODER = load_profile("aurora-qwen3-coder-next-fp8")
LOAD = parse_traffic("1x10,32x10")


@pytest.mark.parametrize("name", list(CHOOSERS))
def test_chooser_by_name_conforms(name: str) -> None:
    def make(plans: tuple[Plan, ...]) -> PlanChooser:
        costs = {b: {plan: 1.0 + 0.1 * plan.num_steps for plan in plans} for b in (1, 32)}
        return make_chooser(name, Known(plans, costs, dict.fromkeys(plans, 1.5)), 0)

    for check in CHECKS:
        check(make)


def test_plan_is_a_chooser_name_and_unknown_names_are_refused() -> None:
    known = Known(parse_plans("0,3"))
    assert make_chooser("3/1/4", known).plans == (Plan(3),)
    for name, message in {"adaptve": "did you mean 'adaptive'", "2": "one of 0, 3/1/4, but got '2"}.items():
        with pytest.raises(ValueError, match=message):
            make_chooser(name, known)


def test_bounds_are_ordered_and_scores_are_relative_to_them() -> None:
    evaluation = SimulatedBackend(CODER, LOAD, 400).evaluate(("3/1/4", "best-table"), range(3), lambda _: None)
    assert evaluation.bounds["best plan"] <= evaluation.bounds["best table"] < evaluation.bounds["clairvoyant"]
    fixed, table = compare_choosers([evaluation], "3/1/4")
    assert (fixed.chooser, table.chooser) == ("3/1/4", "best-table")
    assert table.closed["best table"] == table.share.value == pytest.approx(1.0)
    assert fixed.closed["best table"] == 0.0 and fixed.better is None
    assert table.better is not None and table.better.low == 1.0


def test_expected_speedups_are_those_of_the_profile_and_shift() -> None:
    simulation = SimulatedBackend(CODER, LOAD, 40, [Shift(20, cost=1.5, from_steps=4, log_odds=-1.0)])
    values = simulation.expected.speedups
    for j, plan in enumerate(simulation.plans):
        assert values[0, j] == pytest.approx(CODER.speedup(1, plan))
        assert values[10, j] == pytest.approx(CODER.speedup(32, plan))
    before, after = values[0], values[20]
    assert after[0] == pytest.approx(before[0])  # plan 0
    assert 0 < after[1] < before[1] and after[-1] / before[-1] < after[1] / before[1] / 1.4


def test_share_regret_and_score() -> None:
    expected = PlanSeconds(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 1.0], [1.0, 4.0]]))
    best, worst = expected.best_table(), np.array([0, 1])
    assert best.tolist() == [1, 0] and expected.best_plan().tolist() == [0, 0]
    assert expected.share(best) == 1.0 and expected.share(worst) == pytest.approx((0.5 + 2.0) / 5.0)
    assert expected.regret(best).tolist() == [0.0, 0.0] and expected.regret(worst).tolist() == [0.5, 1.0]
    run = score(np.ones(1), PlanSeconds(np.ones((8, 2)), np.tile([1.0, 2.0], (8, 1))), np.array([1] * 6 + [0] * 2))
    assert run.share == pytest.approx(8 / 14) and run.end == 1.0 and run.regret[-1] == pytest.approx(3.0)
    same = improvement(np.arange(8.0)[None], np.arange(8.0)[None], rng=np.random.default_rng(0))
    assert same.value == 0.5 and same.low < 0.5 < same.high
    assert speedup_interval(np.array([1.0, 4.0])).value == pytest.approx(2.0)


def test_evaluate_writes_reproducible_tables_and_curves(tmp_path: Path) -> None:
    board, choosers = tmp_path / "board.csv", ("adaptive", "sglang-same")
    options: dict[str, Any] = {"profiles": ("aurora-minimax-m2.1",), "choosers": choosers, "seeds": 2}
    options["schedule"] = Schedule(rounds=120)
    for run in "01":
        rows = evaluate(**options, leaderboard=board, output_dir=tmp_path / run)
    first, second = (json.loads((tmp_path / run / "evaluate.json").read_text()) for run in "01")
    assert first["rows"] == second["rows"] == rows and first["bounds"] == second["bounds"]
    curves = list(csv.DictReader((tmp_path / "0/regret.csv").read_text().splitlines()))
    assert {row["chooser"] for row in curves} == {row["chooser"] for row in rows} == set(choosers)
    regrets = [float(row["regret"]) for row in curves if row["chooser"] == "adaptive"]
    assert regrets == sorted(regrets)
    assert (tmp_path / "0/regret.png").read_bytes()[:4] == b"\x89PNG"
    entries = list(csv.DictReader(board.read_text().splitlines()))
    assert len(entries) == 4 and all(Path(entry["record"]).exists() for entry in entries)
    board.write_text("a,b\n")
    with pytest.raises(ValueError, match="leaderboard must have the header"):
        evaluate(**options, leaderboard=board, output_dir=tmp_path / "2")


def test_parse_shifts() -> None:
    expected = Shift(9, 1.3, 3), Shift(20, log_odds=-0.5)
    assert parse_shifts("at=9,cost=1.3,from_steps=3; at=20,log_odds=-0.5") == expected and parse_shifts("") == ()


@pytest.mark.parametrize(
    ("options", "schedule", "message"),
    [
        ({"choosers": ("adaptive",), "reference": "ucb1"}, {}, "reference"),
        ({"seeds": 1}, {}, "seeds must be at least 2"),
        ({"profiles": ("live",)}, {"shifts": "at=9,cost=2"}, "schedule.shifts is for simulations"),
        ({"profiles": ("embedded-fp32",) * 2}, {"rounds": 120}, "profiles must have different names"),
        ({}, {"rounds": 10}, "schedule.rounds must be at least one cycle"),
        *(({}, {"shifts": shifts}, "a shift is written") for shifts in ("cost=2", "at=1,price=2", "at=x")),
    ],
)
def test_evaluate_refuses(options: dict[str, Any], schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(**options, schedule=Schedule(**schedule))


def trajectory(seconds: list[float], tokens: list[int], sizes: list[int], choice: int = 0) -> Trajectory:
    """Turns of two rounds; the first one is not counted."""
    counted = np.arange(len(seconds)) % 2 == 1
    return Trajectory(np.array(sizes), np.full(len(seconds), choice), np.array(tokens), np.array(seconds), counted)


def test_block_speedups_use_plain_rounds_of_the_same_batch_size() -> None:
    plain = trajectory([9.0, 1.0, 9.0, 2.0], [1, 1, 2, 2], [1, 1, 2, 2], -1)
    other = trajectory([9.0, 1.0, 9.0, 3.0], [3, 3, 4, 4], [1, 1, 2, 2])
    assert other.block_speedups(plain, 4) == pytest.approx([(3 * 1.0 + 4 * 2.0 / 2) / 4.0])
    seconds = plan_seconds({PLAIN: plain, "0": other}, (Plan(0),), (1, 2))
    assert seconds.plain_s[:, 0].tolist() == [3.0, 4.0] and seconds.round_s[:, 0].tolist() == [1.0, 3.0]


def live_backend(cycles: int = 3) -> LiveBackend:
    requests = Listed([Request(p, 24, 0.7, ignore_eos=True) for p in prompts(16, 4)])
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    return LiveBackend(engine, requests, parse_plans("0,2"), parse_traffic("1x4,4x4"), cycles)


def test_live_evaluation_has_scores_bounds_and_cycles() -> None:
    evaluation = live_backend().evaluate(("adaptive", "0"), range(1), lambda _: None)
    assert all(len(x[0].speedups) == 3 and (x[0].speedups > 0).all() for x in evaluation.scores.values())
    assert evaluation.bounds["best plan"] <= evaluation.bounds["best table"] * (1 + 1e-9)
    assert evaluation.cycles is not None and len(evaluation.cycles["table"]) == 3
    assert evaluation.cycles["chooser adaptive"] == pytest.approx(np.log(evaluation.speedups("adaptive")))
    assert evaluation.scores["adaptive"][0].choices.shape == (30,)
    with pytest.raises(ValueError, match="cycles of the load must be at least 2"):
        live_backend(1)


class LoggingChooser(FixedPlan):
    """Appends its plan to a list before every round."""

    def __init__(self, plan: Plan, log: list[Plan]) -> None:
        super().__init__(plan)
        self.log = log

    def choose(self, observation: Observation) -> Plan:
        self.log.append(super().choose(observation))
        return self.log[-1]


def test_live_choosers_alternate_in_reverse_order() -> None:
    engine, log = LocalEngine(tiny_target(), tiny_draft(), max_context=64), list[Plan]()
    requests = Listed([Request(p, 24, 0.0, ignore_eos=True) for p in prompts(4, 4)])
    choosers = {"a": LoggingChooser(Plan(0), log), "b": LoggingChooser(Plan(2), log)}
    runs = LiveBackend(engine, requests, parse_plans("0,2"), parse_traffic("2x1"), 2).run(choosers, 2)
    assert [plan.num_steps for plan in log] == [0, 0, 2, 2, 2, 2, 0, 0]
    assert runs["a"].counted.tolist() == [False, True] * 2 and list(runs) == [PLAIN, "a", "b"]
    assert runs["b"].choices.tolist() == [1] * 4


def cycles_of(seconds: tuple[float, float], cycles: int, tokens: int = 1) -> Trajectory:
    """Cycles of one round at batch size 1 and one at 2, each after a round that is not counted."""
    sizes = [1, 1, 2, 2] * cycles
    return trajectory([s for s in seconds for _ in range(2)] * cycles, [tokens * size for size in sizes], sizes)


def test_oracle_gap_and_the_share_that_choosers_close() -> None:
    plans = parse_plans("0,2")
    runs = {name: cycles_of((1.0, 1.0), 6) for name in (PLAIN, "0", "ideal", "late")}
    runs["2/1/3"] = cycles_of((1.0, 3.0), 6, tokens=2)  # speedup 2 at batch size 1, 2/3 at batch size 2
    for name, first in (("ideal", 0), ("late", 3)):
        runs[name].tokens[4 * first + 1 :: 4] = 2  # plan 2/1/3 at batch size 1
    speedups = cycle_speedups(runs, ("ideal", "late", "0"), plans, (1, 2), 4)
    assert np.exp(speedups["table"]) == pytest.approx(1.5) and np.exp(speedups["single"]) == pytest.approx(1.0)
    assert oracle_gap(speedups).value == pytest.approx(1.5)
    for name, closed in (("ideal", 1.0), ("late", 0.5)):
        _, share = gap_closed(speedups, name)
        assert share is not None and share.value == pytest.approx(closed) and share.low <= closed <= share.high
    assert gap_closed(speedups, "0")[0].value == pytest.approx(1.0)
    assert not any("last half" in line for line in gap_lines(speedups))  # three cycles are too few
    twice = gap_lines(concatenate_cycles([speedups, speedups]))
    assert [line.partition("last half: ")[2] for line in twice if "last half" in line] == ["1.500 [1.500, 1.500]"]
    runs["2/1/3"] = cycles_of((2.0, 2.0), 6, tokens=2)
    assert gap_closed(cycle_speedups(runs, ("0",), plans, (1, 2), 4), "0")[1] is None  # no gap


def test_noise_alone_makes_no_oracle_gap() -> None:
    rng, plans = np.random.default_rng(0), parse_plans("0,1,2,3,4,5")
    runs = {name: cycles_of((1.0, 1.0), 20) for name in (PLAIN, *map(str, plans))}
    for run in runs.values():
        run.seconds[:] = np.exp(0.2 * rng.standard_normal(len(run)))
    assert oracle_gap(cycle_speedups(runs, (), plans, (1, 2), 4)).low < 1.0


def test_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_chooser.py"), run_name="__main__")
    assert "own" in capsys.readouterr().out
    CHOOSERS.pop("own")
    runpy.run_path(str(EXAMPLES / "compare_choosers.py"))["main"](tmp_path)
    rows = json.loads((tmp_path / "compare-choosers/evaluate.json").read_text())["rows"]
    assert [row["chooser"] for row in rows] == ["adaptive", "sglang-same", "throughput", "5/1/6"]
