"""`specrl compare`: drafts measured in turns, and finished benchmarks."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specrl.cli import main
from specrl.commands.bench import bench
from specrl.commands.compare import compare
from specrl.config import MeasureConfig
from specrl.core.plan import PLAIN, Plan
from specrl.measure.compare import DraftedRun, compare_benches, mean_difference, paired_row, read_drafted
from specrl.measure.paired import Arm, measure
from specrl.models.draft import new_draft
from specrl.models.target import load_target
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.profile import Profile, load_profile


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("specrl.measure.plain.usable_cores", lambda: 1)  # two threads are slow beside other work
    monkeypatch.setattr("specrl.measure.plain.DTYPES", ("float32",))  # bfloat16 is slow on some processors


def faster(factor: float) -> Profile:
    """A profile with speculative rounds that take `factor` of their time."""
    profile = load_profile("aurora-minimax-m2.1")
    costs = [replace(c, seconds=c.seconds * (factor if c.plan and c.plan.num_steps else 1.0)) for c in profile.costs]
    return replace(profile, name=f"{profile.name} x {factor}", costs=tuple(costs))


def test_ratio_of_two_arms_is_paired() -> None:
    # Both arms have the same random numbers, so their ratio is exactly that of their costs.
    slow, fast = (SimulatedEngine(faster(factor)) for factor in (1.0, 0.8))
    arms = [Arm("A", slow, Plan(3)), Arm("B", fast, Plan(3)), Arm(PLAIN, slow, None)]
    requests, until = Requests((8, 8), (64, 64)), MeasureConfig(0.9, 1e9)
    results = measure(arms, requests, batch_size=8, block_tokens=64, until=until, stop_each=True)
    row: dict[str, Any] = paired_row({m.name: m for m in results})
    ratios = row["ratio"], row["ratio_low"], row["ratio_high"], row["speedup_b"] / row["speedup_a"]
    assert ratios == pytest.approx((1.25,) * 4, rel=1e-6)
    assert row["probability"] == 1.0 and (row["plan_a"], row["plan_b"]) == ("3/1/4", "3/1/4")
    assert row["accept_length_a"] == row["accept_length_b"]


def test_two_drafts_are_measured_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    target = load_target("embedded")
    new_draft(target, draft_vocab_size=64, intermediate_size=64, seed=0).save("one")
    new_draft(target, draft_vocab_size=64, intermediate_size=64, seed=1).save("run/draft")
    Path("run/plans.json").write_text(json.dumps({"plans": {"1": "1/1/2", "4": "2/1/3"}}))
    line = "compare one run --batch_sizes 2 --workload.max_new_tokens 8 --measure.precision 0.9 --measure.seconds 1"
    assert main([*line.split(), "--output_dir", "out"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "B over A [95 %]" in printed and "Paired: A, B and plain decoding took turns" in printed
    report = json.loads(Path("out/compare.json").read_text())
    (row,) = report["rows"]
    assert report["paired"] is True and (row["plan_a"], row["plan_b"]) == ("3/1/4", "1/1/2")
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and 0.0 <= row["probability"] <= 1.0
    assert min(row["blocks_a"], row["blocks_b"]) >= 6 and row["accept_length_a"] >= 1.0
    assert Path("out/compare.csv").read_text().splitlines()[0].startswith("batch_size,plan_a,plan_b,speedup_a")
    drafted = read_drafted(Path("one"))
    assert drafted.plans is None and drafted.plan(1) == Plan(3)
    run = DraftedRun(drafted.draft, {1: Plan(4), 8: Plan(2)})
    assert [run.plan(b) for b in (1, 7, 8, 32)] == [Plan(4), Plan(4), Plan(2), Plan(2)]


def test_benchmarks_are_compared_by_their_common_arms(capsys: pytest.CaptureFixture[str]) -> None:
    for seed, (name, factor, plans) in enumerate((("a", 1.0, "3,4"), ("same", 1.0, "3,4"), ("b", 0.5, "3"))):
        Path(f"{name}.json").write_text(faster(factor).to_json())
        until = MeasureConfig(precision=0.9)
        bench(profile=f"{name}.json", batch_sizes=(16,), plans=plans, measure=until, seed=seed, output_dir=Path(name))
    report = json.loads(Path("b/bench.json").read_text())
    report["environment"]["cpu"] = "another"
    Path("b/bench.json").write_text(json.dumps(report))
    rows: list[dict[str, Any]] = compare_benches(Path("a"), Path("same"))
    assert [row["plan_a"] for row in rows] == ["3/1/4", "4/1/5"]
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=0.1)  # 190 requests each: standard error 0.012
    assert rows[0]["ratio_low"] < rows[0]["ratio"] < rows[0]["ratio_high"]
    capsys.readouterr()
    twice: Any
    (twice,) = compare(a=Path("a"), b=Path("b"))
    assert twice["ratio_low"] > 1.5 and twice["ratio"] == pytest.approx(2.0, abs=0.2) and twice["probability"] == 1.0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not paired: A and B were measured at different times" in printed and "They differ in: cpu" in printed


def test_interval_of_a_difference_covers_the_truth() -> None:
    # 300 trials of 95 %: 90 % or fewer have odds below 1 in 2,000 if coverage is 95 %. The seed is fixed.
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        x, y = 0.3 + 0.05 * rng.standard_normal(8), 0.1 + 0.15 * rng.standard_normal(14)
        covered += mean_difference(x, y, resamples=400, rng=rng).covers(0.2)
    assert covered > 270
    point = mean_difference(np.full(3, 2.0), np.full(2, 1.0), rng=rng)
    assert (point.value, point.low, point.high) == (1.0, 1.0, 1.0) and math.isfinite(point.half_width)


@pytest.mark.parametrize(
    ("line", "message"),
    {
        "compare nowhere nothing": "'nowhere' is none",
        "compare one": "required: b",
        "compare a_bench nowhere": "a benchmark can only be compared with another",
        "compare a_bench damaged": "damaged",
        "compare a_bench older": "'arm'",
        "compare a_bench another": "must share",
        "compare one two --measure.precision 3": "measure.precision",
        "compare one two --batch_sizes 0": "batch_sizes",
    }.items(),
)
def test_compare_refuses_in_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name, plan in (("a_bench", "3/1/4"), ("another", "4/1/5"), ("damaged", "3/1/4"), ("older", "3/1/4")):
        Path(name).mkdir()
        head = f"temperature,batch_size,{'lane' if name == 'older' else 'arm'},block,tokens,seconds\n"
        blocks = "".join(f"0.7,1,{arm},{n},10,{n + 1}\n" for arm in (PLAIN, plan) for n in range(3))
        Path(name, "blocks.csv").write_text(head + (blocks if name != "damaged" else "0.7,1,plain,0,ten,1\n"))
        row = {"temperature": 0.7, "batch_size": 1, "plan": plan, "accept_length": 2.0, "mean_tps": 1.0}
        Path(name, "bench.json").write_text(json.dumps({"rows": [row], "environment": {}}))
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
