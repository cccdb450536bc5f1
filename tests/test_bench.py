"""`specrl bench` on few tokens: its table and its files, live and simulated."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specrl.cli import main
from specrl.commands.bench import bench
from specrl.config import MeasureConfig
from specrl.core.plan import PLAIN, Plan
from specrl.measure.paired import Arm, measure
from specrl.simulation.engine import Requests, SimulatedEngine
from specrl.simulation.profile import Cost, Profile
from tools.fit_profiles import FOLDER, read_table

SHORT = MeasureConfig(precision=0.9)


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_bench_prints_and_writes_intervals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specrl.measure.plain.usable_cores", lambda: 1)  # two threads are slow beside other work
    monkeypatch.setattr("specrl.measure.plain.DTYPES", ("float32",))  # bfloat16 is slow on some processors
    line = "bench --batch_sizes 2 --plans 0,3/2/6 --temperatures 0.7,0 --workload.max_new_tokens 8"
    line += " --measure.seconds 1 --measure.precision 0.9 --output_dir out"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert "speedup [95 %]" in printed and "3/2/6" in printed and "temperature 0.7" in printed
    report = json.loads(Path("out/bench.json").read_text())
    arms = (PLAIN, "plain (A/A)", "0", "3/2/6")
    cells = [(row["temperature"], row["batch_size"], row["plan"]) for row in report["rows"]]
    assert cells == [(t, 2, plan) for t in (0.7, 0.0) for plan in arms]
    for row in report["rows"]:
        assert 0 < row["p05_tps"] <= row["p50_tps"] <= row["p95_tps"] and row["mean_tps"] > 0 and row["count"] >= 1
        assert row["round_ms"] == pytest.approx(row["draft_ms"] + row["verify_ms"] + row["other_ms"])
        assert row["speedup"] is None or row["low"] <= row["speedup"] <= row["high"]
    assert report["environment"]["torch"] and "clock_source" in report["environment"]
    assert report["measured"]["target"] == "embedded" and report["measured"]["engine"] == "local"
    table = list(csv.DictReader(Path("out/bench.csv").read_text().splitlines()))
    assert [float(row["mean_tps"]) for row in table] == [row["mean_tps"] for row in report["rows"]]


def test_simulated_bench_writes_blocks_markdown_and_sglangs_columns() -> None:
    bench(profile="embedded-fp32", batch_sizes=(1, 4), plans="0,1/1/2,3/2/6", measure=SHORT, output_dir=Path("out"))
    rows = json.loads(Path("out/bench.json").read_text())["rows"]
    seconds: dict[tuple[str, str], list[float]] = {}
    for block in csv.DictReader(Path("out/blocks.csv").read_text().splitlines()):
        key = block["batch_size"], block["arm"]
        seconds.setdefault(key, []).append(float(block["seconds"]) / float(block["tokens"]))
    for row in rows:
        batch, plan = str(row["batch_size"]), row["plan"]
        own = np.array(seconds[batch, plan])
        ratio = np.exp(np.log(np.array(seconds[batch, PLAIN])[: len(own)] / own).mean())
        assert ratio == pytest.approx(row["speedup"] or 1.0, abs=1e-4)
    lines = Path("out/bench.md").read_text(encoding="utf-8").splitlines()
    assert lines[2] == "| batch | plan | tok/s mean | P50 | P05 | P95 | requests | speedup [95 %] | accept length |"
    assert len(lines) == 4 + len(rows) + 2 and "no measurement" in lines[-1]
    assert lines[5].startswith("| 1 | 0 |") and f"{rows[1]['speedup']:.3f} [" in lines[5]
    records = [json.loads(line) for line in Path("out/bench_speculative.jsonl").read_text().splitlines()]
    names = "batch_size steps topk num_draft_tokens acc_length step_time speed completion_tokens".split()
    assert all(list(record) == names for record in records)
    cells = [tuple(record[name] for name in names[:4]) for record in records]
    assert cells == [(b, *plan) for b in (1, 4) for plan in ((0, 0, 0), (1, 1, 2), (3, 2, 6))]
    for record in records:
        assert record["speed"] == pytest.approx(record["acc_length"] / record["step_time"], rel=1e-3)
        assert (record["acc_length"] > 1.0) == (record["steps"] > 0)


def test_simulated_bench_reproduces_the_published_table() -> None:
    # Each cell to 2 %, as the profile (tests/test_profile.py), plus twice the 95 % half-width of the benchmark: 3.9
    # standard errors. The seed is fixed.
    name = "aurora-minimax-m2.1"
    rows: list[dict[str, Any]] = bench(profile=name, measure=MeasureConfig(precision=0.07))
    cells = {(row["batch_size"], row["plan"]): row for row in rows}
    for cell in read_table(FOLDER / f"{name}.csv")[1]:
        row = cells[cell.batch_size, str(Plan(cell.lookahead)) if cell.lookahead else PLAIN]
        low, high = (row["low"], row["high"]) if cell.lookahead else (1.0, 1.0)
        assert high - low < 0.2
        wide = 0.02 + (high - low) / (high + low) * 2.0
        assert row["total_tps"] / cell.batch_size == pytest.approx(cell.mean_tps, rel=wide), cell
        assert row["accept_length"] == pytest.approx(cell.accept_length or 1.0, rel=wide), cell


def test_arm_stops_when_its_own_interval_is_narrow() -> None:
    costs = [Cost(1, plan, 1e-3, jitter) for plan, jitter in ((None, 0.1), (Plan(1), 0.1), (Plan(2), 1.0))]
    profile = Profile("made up", {"kind": "made up", "source": "a test"}, tuple(costs), {"chain": (20.0, 20.0)})
    engine, requests = SimulatedEngine(profile), Requests((8, 8), (24, 24))
    arms = [Arm(PLAIN, engine, None), Arm("steady", engine, Plan(1)), Arm("noisy", engine, Plan(2))]
    until = MeasureConfig(precision=0.5, seconds=1e9)
    plain, steady, noisy = measure(arms, requests, batch_size=1, block_tokens=24, until=until, stop_each=True)
    assert len(plain.blocks) == len(noisy.blocks) > len(steady.blocks) == 12
    assert steady.speedup is not None and steady.speedup.value == pytest.approx(2.0, rel=0.1)
    assert noisy.speedup is not None and noisy.speedup.half_width <= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    {  # the argument, the rule
        "--batch_sizes 0": ("batch_sizes", "at least 1"),
        "--measure.precision 2": ("measure.precision", "in (0, 1)"),
        "--target.device tpu": ("device", "one of this machine's"),
        "--plans x": ("a plan", "is written"),
        "--draft /no/such": ("/no/such", "must hold config.json"),
        "--temperatures nan": ("temperatures", "a number"),
        "--temperatures 0,-1": ("temperatures", "at least 0"),
        "--temperatures 0,0": ("temperatures", "different"),
        "--engine simulated": ("--engine", "one of local, sglang"),
        "--engine sglang --profile aurora-minimax-m2.1": ("a profile", "'sglang'"),
        "--engine sglang --plans 0,3/2/6": ("leave out 3/2/6",),
        "--profile aurora-minimax-m2": ("profile", "did you mean 'aurora-minimax-m2.1'?"),
        "--profile aurora-minimax-m2.1 --plans 7": ("knows plans", "7"),
        "--profile aurora-minimax-m2.1 --batch_sizes 64": ("knows batch sizes", "1 to 32"),
    }.items(),
)
def test_bench_refuses_in_one_line(options: str, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *options.split()]) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words) and err.count("\n") == 1
