"""`benchmarks/gpu.py` in its small size on a CPU, and a learner on a device of its own."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import AUX_LAYERS, tiny_target

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.clock import VirtualClock
from specrl.core.plan import Plan
from specrl.io.output import OutputDir
from specrl.measure.plain import PlainSetting
from specrl.models.draft import load_draft, new_draft
from specrl.models.target import load_target

HERE = Path(__file__).parent


class Ticking(VirtualClock):
    """Every reading takes 10 ms, so that the stages do the same on any machine."""

    def now(self) -> float:
        self.advance(0.01)
        return super().now()


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parent / "benchmarks"))
        patch.setattr("specrl.measure.arms.fastest_plain", lambda *_: PlainSetting("float32", 1, 1, 1e-3))
        yield importlib.import_module("gpu")


def stage(name: str) -> ModuleType:
    return importlib.import_module(f"gpu_stages.{name}")


def small(output: Path, seconds: float) -> Any:
    clock = Ticking()
    return stage("stage").Stage(output, "cpu", "small", clock, clock.now() + seconds)


@pytest.fixture(scope="module")
def done(gpu: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of all stages but the check."""
    output = tmp_path_factory.mktemp("gpu")
    for name, seconds in {"pretrain": 0.1, "train": 600.0, "bench": 1.0, "host": 1.0, "plain": 1.0}.items():
        gpu.STAGES[name](small(output, seconds))
    gpu.main(["report", "--output", str(output), "--device", "cpu"])
    return output


def test_every_stage_leaves_its_results(done: Path) -> None:
    rows = {path.stem: json.loads(path.read_text())["rows"] for path in done.glob("*.json")}
    assert rows["pretrain"][0]["steps"] > 5 and load_target(done / "target").config.num_layers == 7
    assert [row["batch_size"] for row in rows["train"]] == [1, 2]
    plans = ["plain", "plain (A/A)", "0", "3/1/4", "4/1/5", "5/1/6"]
    assert [row["plan"] for row in rows["bench"]] == 2 * plans and rows["bench"][-1]["batch_size"] == 2
    assert rows["host"] == [], "it is defined on a GPU only"
    assert len(rows["plain"]) == 2 and all(row["of_copy"] > 0 for row in rows["plain"])
    assert (done / "page.md").read_text().count("NOT MEASURED") == 4
    assert "bench-2" in (done / "report" / "report.html").read_text()


def test_a_failed_stage_stops_no_other(gpu: ModuleType, tmp_path: Path) -> None:
    def run_stage(words: Sequence[str], seconds: float) -> int:
        assert words[-2:] == ["--size", "small"]
        return 124 if words[0] == "train" else 0

    assert gpu.run_all(tmp_path, ["--size", "small"], minutes=1.0, run_stage=run_stage) == 1
    rows = json.loads((tmp_path / "stages.json").read_text())["rows"]
    assert [row["exit_status"] for row in rows] == [124 * (name == "train") for name in gpu.STAGES]


def test_rounds_are_profiled(done: Path) -> None:
    target, draft = load_target(done / "target"), load_draft(done / "train" / "draft")
    wall_s, busy_s = stage("host").round_seconds(small(done, 1.0), target, draft, 1, Plan(1), groups=1)
    assert wall_s > 0 and busy_s > 0


def test_the_large_shape_has_the_sizes_of_llama_3_1_8b() -> None:
    plain, config = stage("plain"), stage("stage").LLAMA_8B
    assert plain.count(config) == 8_030_261_248
    assert plain.weight_bytes(config) == 2 * (8_030_261_248 - 128256 * 4096 + 4096)
    assert plain.cache_bytes(config, 1000) == 131_072_000


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ["PASS"] * 4),
        ({"of_copy": 0.59, "host_share": 0.11}, ["FAIL", "FAIL", "PASS", "PASS"]),
        ({"speedup": 1.49, "high": 0.99}, ["PASS", "PASS", "FAIL", "FAIL"]),
        ({"plan": "5/1/6"}, ["PASS", "PASS", "NOT MEASURED", "NOT MEASURED"]),
        ({"size": "small"}, ["NOT MEASURED"] * 4),
    ],
)
def test_goals_are_judged_by_what_was_measured(changes: dict[str, Any], verdicts: list[str], tmp_path: Path) -> None:
    """Of files that reach every goal, but for `changes`."""
    cell = {"plan": "3/1/4", "speedup": 1.6, "low": 1.5, "high": 1.7}
    records: dict[str, list[dict[str, Any]]] = {
        "plain": [{"context": context, "of_copy": 0.7} for context in (128.0, 1024.0)],
        "host": [{"batch_size": batch, "plan": str(n), "host_share": 0.05} for batch in (1, 32) for n in range(5)],
        "train": [{"batch_size": batch, "plan": "3/1/4"} for batch in (1, 8, 16, 32)],
        "bench": [{"batch_size": batch, **cell} for batch in (1, 8, 16, 32)],
    }
    for name, rows in records.items():
        for row in rows[:1]:
            row.update({key: value for key, value in changes.items() if key in row and name != "train"})
        where = {"size": changes.get("size", "full"), "device": changes.get("device", "cuda")}
        OutputDir(tmp_path).write_json(f"{name}.json", {**where, "rows": rows})
    assert [goal["verdict"] for goal in stage("report").goals(tmp_path)] == verdicts


def test_a_learner_computes_on_one_device_and_hands_out_on_the_targets() -> None:
    """In a process of its own, for the device that it pretends stays known to torch."""
    script = [sys.executable, str(HERE / "learner_on_a_device.py")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "coherent", done.stderr[:4000]


def test_a_device_that_is_not_there_is_refused() -> None:
    draft = new_draft(tiny_target(), aux_layers=AUX_LAYERS)
    with pytest.raises(ValueError, match=r"learner\.device must be one of this machine's cpu.*'cuda:99'"):
        OnlineLearner(draft, tiny_target().embedding, LearnerConfig(device="cuda:99"))
    assert OnlineLearner(draft, tiny_target().embedding, LearnerConfig(device="cpu")).device == torch.device("cpu")
