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
from specrl.core.plan import Plan, parse_plans
from specrl.decoding.engine import LocalEngine
from specrl.evaluation.backends import LiveBackend, SimulatedBackend
from specrl.evaluation.live import run_live
from specrl.evaluation.regret import CycleSpeedups, cycle_speedups, gap_closed, gap_lines, oracle_gap
from specrl.evaluation.results import append_rows
from specrl.evaluation.scores import (
    compare_choosers,
    cumulative_regret,
    improvement,
    score,
    share_of_best,
    speedup_interval,
)
from specrl.evaluation.simulation import ChooserSimulation, ReplayChooser, Schedule, parse_shifts
from specrl.evaluation.trajectory import PLAIN, PlanSeconds, Trajectory, block_speedups, plan_seconds
from specrl.simulation.profile import Shift, load_profile
from specrl.testing.agent import CHECKS

ROOT = Path(__file__).parent.parent
CODER = load_profile("aurora-qwen3-coder-next-fp8")
LOAD = parse_traffic("1x10,32x10")


@pytest.mark.parametrize("name", list(CHOOSERS))
def test_every_chooser_by_name_conforms(name: str) -> None:
    def make(plans: tuple[Plan, ...]) -> PlanChooser:
        costs = {b: {plan: 1.0 + 0.1 * plan.num_steps for plan in plans} for b in (1, 32)}
        return make_chooser(name, Known(plans, costs, dict.fromkeys(plans, 1.5)), 0)

    for check in CHECKS:
        check(make)


def test_unknown_choosers_are_refused_with_a_hint() -> None:
    known = Known(parse_plans("0,3"))
    with pytest.raises(ValueError, match="did you mean 'adaptive'"):
        make_chooser("adaptve", known)
    with pytest.raises(ValueError, match="one of 0, 3/1/4, but got 2"):
        make_chooser("2", known)
    assert make_chooser("3/1/4", known).plans == (Plan(3),)


def test_a_seed_gives_every_plan_the_same_random_numbers() -> None:
    """Noise depends on the round, acceptance on request and position, so costs differ by a constant factor."""
    simulation = ChooserSimulation(CODER, parse_traffic("8"), 40)
    one, two, again = (simulation.run(FixedPlan(plan), 3) for plan in (Plan(3), Plan(5), Plan(3)))
    assert (one.tokens == again.tokens).all() and (one.seconds == again.seconds).all()
    assert np.corrcoef(np.log(one.seconds), np.log(two.seconds))[0, 1] > 0.95
    assert (simulation.run(FixedPlan(Plan(3)), 4).seconds != one.seconds).any()
    assert two.tokens[0] >= one.tokens[0]  # the same drafts in the first round, and two more


def test_the_oracle_looks_ahead_without_changing_the_session() -> None:
    simulation = ChooserSimulation(CODER, LOAD, 60)
    plain = simulation.run(FixedPlan(Plan(5)), 0)
    oracle = simulation.run_oracle(0)
    repeated = simulation.run(ReplayChooser(simulation.plans, np.full(60, simulation.plans.index(Plan(5)))), 0)
    assert (repeated.tokens == plain.tokens).all() and len(oracle) == 60
    best = simulation.run(simulation.best_table(), 0)
    assert simulation.speedup(oracle) > simulation.speedup(best)


def test_expected_values_are_those_of_the_profile_and_move_with_shifts() -> None:
    simulation = ChooserSimulation(CODER, LOAD, 40, [Shift(20, cost=1.5, from_steps=4, log_odds=-1.0)])
    values = simulation.expected.plain_s / simulation.expected.round_s
    for j, plan in enumerate(simulation.plans):
        assert values[0, j] == pytest.approx(CODER.speedup(1, plan))
        assert values[10, j] == pytest.approx(CODER.speedup(32, plan))
    before, after = values[0], values[20]
    assert after[0] == pytest.approx(before[0])  # plan 0
    assert 0 < after[1] < before[1] and after[-1] / before[-1] < after[1] / before[1] / 1.4


def test_share_regret_and_score() -> None:
    expected = PlanSeconds(np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 1.0], [1.0, 4.0]]))
    best, worst = np.array([1, 0]), np.array([0, 1])
    assert share_of_best(expected, best) == 1.0
    assert share_of_best(expected, worst) == pytest.approx((0.5 + 2.0) / 5.0)
    assert cumulative_regret(expected, best).tolist() == [0.0, 0.0]
    assert cumulative_regret(expected, worst).tolist() == [0.5, 1.0]
    longer = PlanSeconds(np.ones((8, 2)), np.tile([1.0, 2.0], (8, 1)))
    found = score(np.array([1.0]), longer, np.array([1] * 6 + [0] * 2))
    assert found.share == pytest.approx(8 / 14) and found.end == 1.0 and found.regret[-1] == pytest.approx(3.0)


def test_bounds_are_in_order_and_the_gap_is_measured_between_them() -> None:
    found = SimulatedBackend(CODER, LOAD, 400).evaluate(("3/1/4", "best-table"), range(3), lambda _: None)
    assert found.bounds["best plan"] <= found.bounds["best table"] < found.bounds["clairvoyant"]
    rows = {c.chooser: c for c in compare_choosers({found.source: found.scores}, {found.source: found.bounds}, "3/1/4")}
    assert rows["best-table"].closed["best table"] == pytest.approx(1.0)
    assert rows["best-table"].share.value == pytest.approx(1.0)
    assert rows["3/1/4"].closed["best table"] == 0.0 and rows["3/1/4"].better is None
    better = rows["best-table"].better
    assert better is not None and better.low == 1.0


def test_improvement() -> None:
    same = improvement(np.arange(8.0)[None], np.arange(8.0)[None], rng=np.random.default_rng(0))
    assert same.value == 0.5 and same.low < 0.5 < same.high
    assert speedup_interval(np.array([1.0, 4.0])).value == pytest.approx(2.0)


def test_evaluate_writes_tables_and_curves_and_gives_the_same_numbers_again(tmp_path: Path) -> None:
    for turn in range(2):
        rows = evaluate(
            profiles=("aurora-minimax-m2.1",),
            choosers=("adaptive", "sglang-same"),
            seeds=2,
            schedule=Schedule(rounds=120),
            leaderboard=tmp_path / "board.csv",
            output_dir=tmp_path / str(turn),
        )
    assert [row["chooser"] for row in rows] == ["adaptive", "sglang-same"]
    first, second = (json.loads((tmp_path / f"{turn}/evaluate.json").read_text()) for turn in range(2))
    assert first["rows"] == second["rows"] == rows and first["bounds"] == second["bounds"]
    lines = list(csv.DictReader((tmp_path / "0/regret.csv").read_text().splitlines()))
    assert {line["chooser"] for line in lines} == {"adaptive", "sglang-same"}
    regrets = [float(line["regret"]) for line in lines if line["chooser"] == "adaptive"]
    assert regrets == sorted(regrets)
    assert (tmp_path / "0/regret.png").read_bytes()[:4] == b"\x89PNG"
    board = list(csv.DictReader((tmp_path / "board.csv").read_text().splitlines()))
    assert len(board) == 4 and all(Path(line["record"]).exists() for line in board)
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="must have the header"):
        append_rows(tmp_path / "other.csv", [])


def test_shifts_are_read() -> None:
    expected = Shift(9, 1.3, 3), Shift(20, log_odds=-0.5)
    assert parse_shifts("at=9,cost=1.3,from_steps=3; at=20,log_odds=-0.5") == expected
    assert parse_shifts("") == ()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"choosers": ("adaptive",), "reference": "ucb1"}, "reference must be one of"),
    ({"seeds": 1}, "seeds must be at least 2"),
    ({"profiles": ("live",), "schedule": Schedule(shifts="at=9,cost=2")}, "schedule.shifts is for simulations"),
    ({"profiles": ("embedded-fp32",) * 2, "schedule": Schedule(rounds=120)}, "profiles must have different names"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(**options)


@pytest.mark.parametrize("wrong", [{"rounds": 10}, *({"shifts": s} for s in ("cost=2", "at=1,price=2", "at=x"))])
def test_a_wrong_schedule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at least one cycle|a shift is written"):
        Schedule(**wrong)


def rounds(
    batch_sizes: list[int], tokens: list[int], seconds: list[float], counted: list[bool], choice: int = 0
) -> Trajectory:
    choices = np.full(len(seconds), choice)
    return Trajectory(np.array(batch_sizes), choices, np.array(tokens), np.array(seconds), np.array(counted))


def test_block_speedups_use_plain_rounds_of_the_same_batch_size() -> None:
    plain = rounds([1, 1, 2, 2], [1, 1, 2, 2], [9.0, 1.0, 9.0, 2.0], [False, True] * 2, -1)
    other = rounds([1, 1, 2, 2], [3, 3, 4, 4], [9.0, 1.0, 9.0, 3.0], [False, True] * 2)
    assert block_speedups(plain, other, 4) == pytest.approx([(3 * 1.0 + 4 * 2.0 / 2) / 4.0])
    values = plan_seconds({PLAIN: plain, "0": other}, (Plan(0),), (1, 2))
    assert values.plain_s[:, 0].tolist() == [3.0, 4.0] and values.round_s[:, 0].tolist() == [1.0, 3.0]


def live_backend(cycles: int = 3) -> LiveBackend:
    listed = [Request(p, 24, 0.7, ignore_eos=True) for p in prompts(16, 4)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    return LiveBackend(engine, Listed(listed), parse_plans("0,2"), parse_traffic("1x4,4x4"), cycles)


def test_live_choosers_take_turns_under_the_same_load() -> None:
    found = live_backend().evaluate(("adaptive", "0"), range(1), lambda _: None)
    assert all(len(x[0].speedups) == 3 and (x[0].speedups > 0).all() for x in found.scores.values())
    assert set(found.bounds) == {"best table", "best plan"}
    assert found.bounds["best plan"] <= found.bounds["best table"] * (1 + 1e-9)
    assert found.cycles is not None and len(found.cycles.table) == 3
    assert found.cycles.own["adaptive"] == pytest.approx(np.log(found.scores["adaptive"][0].speedups))
    assert found.scores["adaptive"][0].choices.shape == (30,)
    with pytest.raises(ValueError, match="at least 2 cycles"):
        live_backend(1)


class Noting(FixedPlan):
    """Writes its name into a list before every round."""

    def __init__(self, name: str, plan: Plan, notes: list[str]) -> None:
        super().__init__(plan)
        self.name, self.notes = name, notes

    def choose(self, observation: Observation) -> Plan:
        self.notes.append(self.name)
        return super().choose(observation)


def test_choosers_go_there_and_back() -> None:
    engine, notes = LocalEngine(tiny_target(), tiny_draft(), max_context=64), list[str]()
    work = Listed([Request(p, 24, 0.0, ignore_eos=True) for p in prompts(4, 4)])
    choosers = {"a": Noting("a", Plan(0), notes), "b": Noting("b", Plan(2), notes)}
    found = run_live(engine, work, choosers, parse_plans("0,2"), parse_traffic("2x1"), 2)
    assert notes == ["a", "a", "b", "b", "b", "b", "a", "a"]
    assert found["a"].counted.tolist() == [False, True] * 2 and list(found) == [PLAIN, "a", "b"]
    assert found["b"].choices.tolist() == [1] * 4


def stretch(seconds: tuple[float, float], cycles: int, tokens: int = 2) -> Trajectory:
    """Cycles of one round at batch size 1 and one at 2, each after a round that is not counted."""
    return rounds(
        [1, 1, 2, 2] * cycles,
        [tokens * batch for batch in (1, 1, 2, 2)] * cycles,
        [s for s in seconds for _ in range(2)] * cycles,
        [False, True] * (2 * cycles),
    )


def test_the_gap_is_the_best_table_over_the_best_single_plan_and_choosers_close_it() -> None:
    plans, cycles = parse_plans("0,2"), 6
    found = {
        PLAIN: stretch((1.0, 1.0), cycles, tokens=1),
        "0": stretch((1.0, 1.0), cycles, tokens=1),
        "2/1/3": stretch((1.0, 3.0), cycles),  # 2 at batch size 1, 2/3 at batch size 2
        "ideal": stretch((1.0, 1.0), cycles, tokens=1),
        "late": stretch((1.0, 1.0), cycles, tokens=1),
    }
    for name, first in (("ideal", 0), ("late", 3)):
        found[name].tokens[4 * first + 1 :: 4] = 2  # plan 2/1/3 at batch size 1
    speedups = cycle_speedups(found, ("ideal", "late", "0"), plans, (1, 2), 4)
    assert np.exp(speedups.table) == pytest.approx(1.5) and np.exp(speedups.single) == pytest.approx(1.0)
    assert oracle_gap(speedups).value == pytest.approx(1.5)
    share = gap_closed(speedups, "ideal").share
    assert share is not None and share.value == pytest.approx(1.0)
    late = gap_closed(speedups, "late").share
    assert late is not None and late.value == pytest.approx(0.5) and late.low < 0.5 < late.high
    assert gap_closed(speedups, "0").over_single.value == pytest.approx(1.0)
    assert not any("last half" in line for line in gap_lines(speedups))  # three cycles are too few
    twice = gap_lines(CycleSpeedups.concatenate([speedups, speedups]))
    assert [line.partition("last half: ")[2] for line in twice if "last half" in line] == ["1.500 [1.500, 1.500]"]
    equal = cycle_speedups({**found, "2/1/3": stretch((2.0, 2.0), cycles)}, ("0",), plans, (1, 2), 4)
    assert gap_closed(equal, "0").share is None  # nothing to close


def test_plans_that_were_lucky_once_make_no_gap() -> None:
    rng, plans = np.random.default_rng(0), parse_plans("0,1,2,3,4,5")
    found = {name: stretch((1.0, 1.0), 20, tokens=1) for name in (PLAIN, *map(str, plans))}
    for trajectory in found.values():
        trajectory.seconds[:] = np.exp(0.2 * rng.standard_normal(len(trajectory)))
    assert oracle_gap(cycle_speedups(found, (), plans, (1, 2), 4)).low < 1.0


def test_own_chooser_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/own_chooser.py"), run_name="__main__")
    assert "own" in capsys.readouterr().out
    CHOOSERS.pop("own")


def test_compare_choosers_example(tmp_path: Path) -> None:
    runpy.run_path(str(ROOT / "examples/compare_choosers.py"))["main"](tmp_path)
    rows = json.loads((tmp_path / "compare-choosers/evaluate.json").read_text())["rows"]
    assert [row["chooser"] for row in rows] == ["adaptive", "sglang-same", "throughput", "5/1/6"]
