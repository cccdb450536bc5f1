import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target

from specrl.agents.choosers.registry import CHOOSERS, Known, make_chooser
from specrl.agents.choosers.table import FixedPlan
from specrl.commands.evaluate import append, evaluate, parse_shifts
from specrl.core.batch_schedule import parse_traffic
from specrl.core.interfaces import PlanChooser, Request
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Round
from specrl.core.statistics import Interval
from specrl.decoding.engine import LocalEngine
from specrl.evaluation.backends import Live, Simulated
from specrl.evaluation.live import PLAIN, block_speedups, measured_values, play_live
from specrl.evaluation.regret import blocks, closed, headroom, lines, together
from specrl.evaluation.scores import agree, compare, improvement, regret, score, share, speedup_interval
from specrl.evaluation.simulation import Play, Replayed, World
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


def test_the_same_seed_is_the_same_luck_for_every_plan() -> None:
    """Noise depends on the round, acceptance on request and position: so costs differ by a constant factor."""
    world = World(CODER, parse_traffic("8"), 40)
    one, two = (world.play(FixedPlan(plan), 3) for plan in (Plan(3), Plan(5)))
    again = world.play(FixedPlan(Plan(3)), 3)
    assert (one.tokens, one.seconds) == (again.tokens, again.seconds)
    assert np.corrcoef(np.log(one.seconds), np.log(two.seconds))[0, 1] > 0.95
    assert world.play(FixedPlan(Plan(3)), 4).seconds != one.seconds
    assert two.tokens[0] >= one.tokens[0]  # the same drafts of the first round, and two more


def test_foreseeing_changes_nothing() -> None:
    world = World(CODER, LOAD, 60)
    plain = world.play(FixedPlan(Plan(5)), 0)
    fore = world.clairvoyant()
    assert isinstance(fore.plans, tuple)
    played = world.play(fore, 0)
    constant = [i for i, plan in enumerate(world.plans) if plan == Plan(5)][0]
    repeated = world.play(Replayed(world.plans, [constant] * 60), 0)
    assert repeated.tokens == plain.tokens and len(played.tokens) == 60


def test_values_are_those_of_the_profile_and_move_with_shifts() -> None:
    world = World(CODER, LOAD, 40, [Shift(20, cost=1.5, from_steps=4, log_odds=-1.0)])
    values = world.earned / world.spent
    for j, plan in enumerate(world.plans):
        assert values[0, j] == pytest.approx(CODER.speedup(1, plan))
        assert values[10, j] == pytest.approx(CODER.speedup(32, plan))
    before, after = values[0], values[20]
    assert after[0] == pytest.approx(before[0])  # plan 0
    assert 0 < after[1] < before[1] and after[-1] / before[-1] < after[1] / before[1] / 1.4


def test_share_and_regret() -> None:
    earned, spent = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 1.0], [1.0, 4.0]])
    best, worst = np.array([1, 0]), np.array([0, 1])
    assert share(earned, spent, best) == 1.0
    assert share(earned, spent, worst) == pytest.approx((0.5 + 2.0) / 5.0)
    assert regret(earned, spent, best).tolist() == [0.0, 0.0]
    assert regret(earned, spent, worst).tolist() == [0.5, 1.0]


def test_bounds_are_in_order_and_the_gap_is_measured_between_them() -> None:
    source = Simulated(CODER, LOAD, 400)
    names = ("3/1/4", "best-table")
    scores = source.run(names, range(3), lambda _: None)
    assert source.bounds["best plan"] <= source.bounds["best table"] < source.bounds["clairvoyant"]
    rows = {c.chooser: c for c in compare({source.name: scores}, {source.name: source.bounds}, "3/1/4")}
    assert rows["best-table"].closed["best table"] == pytest.approx(1.0)
    assert rows["best-table"].share.value == pytest.approx(1.0)
    assert rows["3/1/4"].closed["best table"] == 0.0 and rows["3/1/4"].better is None
    better = rows["best-table"].better
    assert better is not None and better.low == 1.0


def test_improvement_and_agreement() -> None:
    rng = np.random.default_rng(0)
    same = improvement(np.arange(8.0)[None], np.arange(8.0)[None], rng=rng)
    assert same.value == 0.5 and same.low < 0.5 < same.high
    assert agree(Interval(1.5, 1.4, 1.6), Interval(1.6, 1.5, 1.7))
    assert not agree(Interval(1.5, 1.49, 1.51), Interval(1.6, 1.59, 1.61))
    assert speedup_interval(np.array([1.0, 4.0])).value == pytest.approx(2.0)


def test_evaluate_writes_tables_curves_records_and_appends_to_the_leaderboard(tmp_path: Path) -> None:
    for turn in range(2):
        rows = evaluate(
            profiles=("aurora-minimax-m2.1",),
            choosers=("adaptive", "sglang-same"),
            seeds=2,
            rounds=120,
            leaderboard=tmp_path / "board.csv",
            output_dir=tmp_path / str(turn),
        )
    assert [row["chooser"] for row in rows] == ["adaptive", "sglang-same"]
    assert json.loads((tmp_path / "0/evaluate.json").read_text())["rows"] == rows  # the same seeds, the same numbers
    lines = list(csv.DictReader((tmp_path / "0/regret.csv").read_text().splitlines()))
    assert {line["chooser"] for line in lines} == {"adaptive", "sglang-same"}
    regrets = [float(line["regret"]) for line in lines if line["chooser"] == "adaptive"]
    assert regrets == sorted(regrets)
    assert (tmp_path / "0/regret.png").read_bytes()[:4] == b"\x89PNG"
    board = list(csv.DictReader((tmp_path / "board.csv").read_text().splitlines()))
    assert len(board) == 4 and all(Path(line["record"]).exists() for line in board)
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="must have the header"):
        append(tmp_path / "other.csv", [])


def test_shifts_are_read() -> None:
    assert parse_shifts("at=9,cost=1.3,from_steps=3; at=20,log_odds=-0.5") == (
        Shift(9, 1.3, 3),
        Shift(20, log_odds=-0.5),
    )
    assert parse_shifts("") == ()
    for wrong in ("cost=2", "at=1,price=2", "at=x"):
        with pytest.raises(ValueError, match="a shift is written"):
            parse_shifts(wrong)


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="reference must be one of"):
        evaluate(choosers=("adaptive",), reference="ucb1")
    with pytest.raises(ValueError, match="at least one cycle"):
        evaluate(rounds=10)
    with pytest.raises(ValueError, match="seeds must be at least 2"):
        evaluate(seeds=1)
    with pytest.raises(ValueError, match="shifts must be left out"):
        evaluate(profiles=("live",), shifts="at=9,cost=2")


def test_block_speedups_hold_tokens_against_plain_rounds_of_the_same_batch_size() -> None:
    plain = Play([1, 1, 2, 2], [-1] * 4, [1, 1, 2, 2], [9.0, 1.0, 9.0, 2.0], [False, True, False, True])
    play = Play([1, 1, 2, 2], [0] * 4, [3, 3, 4, 4], [9.0, 1.0, 9.0, 3.0], [False, True, False, True])
    assert block_speedups(plain, play, 4) == pytest.approx([(3 * 1.0 + 4 * 2.0 / 2) / 4.0])
    values = measured_values({PLAIN: plain, "0": play}, (Plan(0),), (1, 2))
    assert values[:, :, 0].tolist() == [[3.0, 4.0], [1.0, 3.0]]


def live_source(cycles: int = 3) -> Live:
    listed = [Request(p, 24, 0.7, ignore_eos=True) for p in prompts(16, 4)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    return Live(engine, Listed(listed), parse_plans("0,2"), parse_traffic("1x4,4x4"), cycles, {})


def test_live_lanes_take_turns_on_the_same_load() -> None:
    source = live_source()
    scores = source.run(("adaptive", "0"), range(1), lambda _: None)
    assert all(len(x[0].speedups) == 3 and (x[0].speedups > 0).all() for x in scores.values())
    assert set(source.bounds) == {"best table", "best plan"}
    assert source.bounds["best plan"] <= source.bounds["best table"] * (1 + 1e-9)
    assert source.blocks is not None and len(source.blocks.table) == 3
    assert source.blocks.own["adaptive"] == pytest.approx(np.log(scores["adaptive"][0].speedups))
    record = source.record("adaptive", range(1), scores["adaptive"])
    assert record.choices.shape == (1, 30)
    chosen = [record.plans[i] for i in record.choices[0].tolist()]
    assert source.greedy_sha256(chosen, 0) == source.greedy_sha256((), 0) == record.tokens_sha256
    assert len(source.replay(record, lambda _: None)) == 3
    with pytest.raises(ValueError, match="at least 2 cycles"):
        live_source(1)


def stretch(plan: int, seconds: tuple[float, float], cycles: int, tokens: int = 2) -> Play:
    """Cycles of a round at batch size 1 and one at 2, a warm-up before each."""
    out = Play()
    for _ in range(cycles):
        for batch, spent in zip((1, 2), seconds, strict=True):
            for counted in (False, True):
                out.batches.append(batch)
                out.choices.append(plan)
                out.tokens.append(tokens * batch)
                out.seconds.append(spent)
                out.counted.append(counted)
    return out


def test_headroom_is_the_best_table_over_the_best_single_plan_and_choosers_close_it() -> None:
    plans, cycles = parse_plans("0,2"), 6
    plays = {
        PLAIN: stretch(-1, (1.0, 1.0), cycles, tokens=1),
        "0": stretch(0, (1.0, 1.0), cycles, tokens=1),
        "2/1/3": stretch(1, (1.0, 3.0), cycles),  # 2 at batch size 1, 2/3 at batch size 2
        "ideal": stretch(0, (1.0, 1.0), cycles, tokens=1),
        "late": stretch(0, (1.0, 1.0), cycles, tokens=1),
    }
    for name, at in (("ideal", range(cycles)), ("late", range(3, cycles))):
        for c in at:
            plays[name].tokens[4 * c + 1] = 2  # plan 2/1/3 at batch size 1
    found = blocks(plays, ("ideal", "late", "0"), plans, (1, 2), 4)
    assert np.exp(found.table) == pytest.approx(1.5) and np.exp(found.single) == pytest.approx(1.0)  # 4/4 < 2/2 + 0
    assert headroom(found).value == pytest.approx(1.5)
    share = closed(found, "ideal").share
    assert share is not None and share.value == pytest.approx(1.0)
    late = closed(found, "late").share
    assert late is not None and late.value == pytest.approx(0.5) and late.low < 0.5 < late.high
    assert closed(found, "0").over_single.value == pytest.approx(1.0)
    assert not any("last half" in line for line in lines(found))  # three cycles are too few
    twice = together([found, found])
    told = [line for line in lines(twice) if "last half" in line]
    assert told == ["oracle headroom: best plan per batch size over best single plan, last half: 1.500 [1.500, 1.500]"]
    only = blocks({**plays, "2/1/3": stretch(1, (2.0, 2.0), cycles)}, ("0",), plans, (1, 2), 4)
    assert closed(only, "0").share is None  # plans are equal: nothing to close


def test_plans_that_were_lucky_once_are_no_headroom() -> None:
    rng, plans = np.random.default_rng(0), parse_plans("0,1,2,3,4,5")
    plays = {name: stretch(0, (1.0, 1.0), 20, tokens=1) for name in (PLAIN, *map(str, plans))}
    for play in plays.values():
        play.seconds = np.exp(0.2 * rng.standard_normal(len(play.seconds))).tolist()
    assert headroom(blocks(plays, (), plans, (1, 2), 4)).low < 1.0


def test_lanes_go_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    record = Play.add
    names: dict[int, str] = {}

    def add(self: Play, done: Round, choice: int, counted: bool = True) -> None:
        seen.append(id(self))
        record(self, done, choice, counted)

    monkeypatch.setattr(Play, "add", add)
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=64)
    work = Listed([Request(p, 24, 0.0, ignore_eos=True) for p in prompts(4, 4)])
    lanes = {"a": FixedPlan(Plan(0)), "b": FixedPlan(Plan(2))}
    plays = play_live(engine, work, lanes, parse_plans("0,2"), parse_traffic("2x1"), 2)
    names.update({id(play): name for name, play in plays.items()})
    assert [names[i] for i in seen][::2] == [PLAIN, "a", "b", "b", "a", PLAIN]
    assert plays["a"].counted == [False, True] * 2


def test_own_chooser_example(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/own_chooser.py"), run_name="__main__")
    assert "own" in capsys.readouterr().out
    CHOOSERS.pop("own")


def test_compare_choosers_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runpy.run_path(str(ROOT / "examples/compare_choosers.py"))["main"](tmp_path)
    assert len(list((tmp_path / "compare-choosers").glob("record-*.json"))) == 4


def test_a_score_is_made_of_its_choices() -> None:
    earned, spent = np.ones((8, 2)), np.tile([1.0, 2.0], (8, 1))
    found = score(np.array([1.0]), earned, spent, np.array([1] * 6 + [0] * 2), np.ones(8, dtype=np.int64))
    assert found.share == pytest.approx(8 / 14) and found.end == 1.0 and found.regret[-1] == pytest.approx(3.0)
