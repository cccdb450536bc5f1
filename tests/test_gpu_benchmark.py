"""`benchmarks/gpu.py`, shrunk, and the learner on a device of its own: ready for a GPU, on a machine without one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pretraining
import pytest
import torch
from safetensors.torch import load_file
from tiny import AUX_LAYERS, tiny_target

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.clock import VirtualClock
from specrl.core.plan import Plan
from specrl.io.output import OutputDir
from specrl.models.draft import new_draft
from specrl.models.target import load_target

HERE = Path(__file__).parent
PLANS = ["0", "3/1/4", "4/1/5", "5/1/6"]


class Ticking(VirtualClock):
    """Every reading takes 10 ms, so that what stages do is the same however slow the machine."""

    def now(self) -> float:
        self.advance(0.01)
        return super().now()


@pytest.fixture(scope="module", autouse=True)
def gpu() -> Any:
    """The script; its stages can be imported from then on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parent / "benchmarks"))
        yield importlib.import_module("gpu")


@pytest.fixture(scope="module")
def done(gpu: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("gpu")
    gpu.tell(gpu.run(0.06, output, "cpu", "small", Ticking()))
    return output


def read(output: Path) -> dict[str, Any]:
    found = json.loads((output / "gpu.json").read_text())
    assert isinstance(found, dict)
    return found


def stage(name: str) -> ModuleType:
    return importlib.import_module(f"gpu_stages.{name}")


def test_every_stage_leaves_its_raw_data(done: Path) -> None:
    raw = read(done)
    assert [at["stage"] for at in raw["times"]] == ["pretrain", "learn", "measure", "host", "plain_8b"]
    assert raw["environment"]["torch"] == torch.__version__ and raw["device"]["name"] == "CPU" and not raw["on_gpu"]
    stages = raw["stages"]
    assert stages["pretrain"]["steps"] > 20
    course = stages["pretrain"]["course"]
    assert course[-1]["loss"] < course[0]["loss"] - 0.5
    learnt = stages["learn"]
    assert learnt["requests"] >= 16 and learnt["updates"] >= 16 and learnt["rounds"] >= 32
    assert learnt["serving_s_per_request"] > 0 and learnt["learning_s_per_request"] > 0
    assert set(learnt["picks"]) == {"1", "2"} and set(learnt["picks"].values()) <= set(PLANS)
    lanes = [(row["batch_size"], row["plan"]) for row in stages["measure"]["rows"]]
    assert lanes == [(1, "plain"), (1, "plain (A/A)"), *((1, p) for p in PLANS), (2, "plain"), *((2, p) for p in PLANS)]
    for row in stages["measure"]["rows"]:
        name = {"plain (A/A)": "A/A"}.get(row["plan"], row["plan"])
        blocks = [b for b in stages["measure"]["blocks"] if (b["batch_size"], b["lane"]) == (row["batch_size"], name)]
        assert len(blocks) >= 6 and all(block["seconds"] > 0 for block in blocks)
        assert row["p05_tps"] <= row["p50_tps"] <= row["p95_tps"]
        assert row["draft_ms"] + row["verify_ms"] + row["other_ms"] == pytest.approx(row["round_ms"])
        assert row["plan"] == "plain" or row["low"] <= row["speedup"] <= row["high"]
    for row in stages["plain_8b"]["rows"]:
        assert row["of_copy"] == pytest.approx(row["bytes"] / row["seconds"] / stages["plain_8b"]["copy_bytes_per_s"])


def test_the_page_is_made_of_the_raw_data_alone(
    gpu: ModuleType, done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = read(done)
    OutputDir(tmp_path).write_json("gpu.json", raw)
    capsys.readouterr()
    gpu.main(["report", "--output", str(tmp_path)])
    said = capsys.readouterr().out
    assert "Shrunk, on a CPU" in said and said.count("NOT MEASURED") == 4
    row = raw["stages"]["measure"]["rows"][2]
    assert f"| 1 | 0 | {row['mean_tps']:.1f} | {row['p50_tps']:.1f} |" in said
    gpu.main(["report", "--output", str(tmp_path), "--page", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8").strip() == said.strip()
    row = {"batch_size": 1, "plan": "3/1/4", "wall_s": 0.004, "busy_s": 0.003, "share": 0.25}
    raw["on_gpu"], raw["stages"]["host"] = True, {"defined": True, "rows": [row], "out_of_time": []}
    said = stage("report").page(raw)
    assert "| 1 | 3/1/4 | 4.000 | 3.000 | 25.0% |" in said and "Shrunk" not in said
    assert "| host share of every round < 10% | 25.0% (batch 1, 3/1/4) | FAIL |" in said


def test_what_is_pretrained_is_what_is_loaded(done: Path) -> None:
    config = stage("sizes").SMALL.target
    target = load_target(done / "target")
    assert target.config.num_layers == config.num_layers
    weights = pretraining.new_weights(config)
    with torch.no_grad():
        for name, tensor in load_file(done / "target" / "model.safetensors").items():
            weights[name].copy_(tensor)
        ids = torch.randint(0, config.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
        found = pretraining.logits(weights, ids, *pretraining.rotary(30, config), config)
        torch.testing.assert_close(found, target(ids), atol=1e-3, rtol=1e-3)


def test_time_that_is_up_leaves_cells_out_and_says_so(done: Path) -> None:
    sizes, model = stage("sizes").SMALL, load_target(done / "target")
    clock = Ticking()
    found = stage("measure").measure(model, new_draft(model), done / "target", sizes, clock, clock.now())
    assert found["out_of_time"] == [1, 2] and found["rows"] == []
    plain = stage("plain").plain(sizes, "cpu", clock, clock.now())
    assert len(plain["rows"]) == 1 and plain["out_of_time"] == [32]


def test_device_busy_seconds_are_a_union() -> None:
    spans = [(0.0, 10.0, "gpu"), (5.0, 12.0, "gpu"), (6.0, 7.0, "gpu"), (20.0, 21.0, "gpu"), (0.0, 99.0, "cpu")]
    events = [SimpleNamespace(time_range=SimpleNamespace(start=a, end=b), device_type=d) for a, b, d in spans]
    assert stage("measure").busy_seconds(events, "gpu") == pytest.approx(13e-6)


def test_rounds_are_profiled_without_a_request_that_ends(done: Path) -> None:
    """On a CPU, operations stand for kernels."""
    model = load_target(done / "target")
    sizes = stage("sizes").SMALL
    wall, busy = stage("measure").round_seconds(model, new_draft(model), done / "target", sizes, 1, Plan(1))
    assert wall > 0 and busy > 0


def test_the_large_shape_is_llamas() -> None:
    plain, config = stage("plain"), stage("sizes").LLAMA_8B
    assert plain.count(config) == 8_030_261_248  # as meta-llama/Llama-3.1-8B states
    embedding = 128256 * 4096
    assert plain.weight_bytes(config, 2) == 2 * (8_030_261_248 - embedding + 4096)
    assert plain.cache_bytes(config, 1000, 2) == 131_072_000
    assert stage("plain").count(stage("sizes").FULL.target) >= 150e6
    drawn = plain.RandomTensors(config, "meta", torch.bfloat16)
    assert drawn["lm_head.weight"].shape == (128256, 4096) and drawn["lm_head.weight"].device.type == "meta"


def measured(**changes: Any) -> dict[str, Any]:
    """Raw data that reaches every goal, but for `changes`."""
    cells = {1: (1.6, 1.5, 1.7), 8: (1.0, 0.99, 1.01)} | changes.get("cells", {})
    rows = [{"batch_size": b, "plan": "3/1/4", "speedup": v, "low": lo, "high": hi} for b, (v, lo, hi) in cells.items()]
    host = {"batch_size": 1, "plan": "0", "share": changes.get("share", 0.05)}
    return {
        "on_gpu": changes.get("on_gpu", True),
        "batch_sizes": [1, 8],
        "stages": {
            "learn": {"picks": {"1": "3/1/4", "8": changes.get("pick", "3/1/4")}},
            "measure": {"rows": rows},
            "host": {"rows": [host]},
            "plain_8b": {"rows": [{"of_copy": changes.get("of_copy", 0.7), "context": 128.0}]},
        },
    }


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ["PASS"] * 4),
        ({"of_copy": 0.59}, ["FAIL", "PASS", "PASS", "PASS"]),
        ({"share": 0.11}, ["PASS", "FAIL", "PASS", "PASS"]),
        ({"cells": {1: (1.49, 1.4, 1.6)}}, ["PASS", "PASS", "FAIL", "PASS"]),
        ({"cells": {8: (0.97, 0.95, 0.99)}}, ["PASS", "PASS", "PASS", "FAIL"]),
        ({"pick": "5/1/6"}, ["PASS", "PASS", "PASS", "NOT MEASURED"]),
        ({"on_gpu": False}, ["NOT MEASURED"] * 4),
    ],
)
def test_goals_are_judged_by_what_was_measured(changes: dict[str, Any], verdicts: list[str]) -> None:
    assert [verdict for _, _, verdict in stage("report").goals(measured(**changes))] == verdicts


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
