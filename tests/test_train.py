"""`specrl train` and `specrl export`, run as a user runs them."""

import csv
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specrl.cli import main
from specrl.models.draft import load_draft
from specrl.models.target import load_target

SHORT = (
    "--workload.max_new_tokens 16 --workload.prompt_tokens 24 --serving.batch_schedule 4x8,1x4 "
    "--serving.weight_sync_interval 4 --learner.ttt_steps 2"
)
CHANGES = "--serving.requests 12 --checkpoint 4"


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def log(run: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(run, "log.csv").read_text().splitlines()))


def served(run: str) -> int:
    return int(json.loads(Path(run, "checkpoint", "state.json").read_text())["served"])


def error(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command ends in."""
    capsys.readouterr()
    assert main(line.split()) == 2
    out = capsys.readouterr().err
    assert out.count("\n") == 1 and "Traceback" not in out
    return out


def test_a_run_learns_and_its_export_loads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"train {SHORT} {CHANGES} --output_dir day0".split()) == 0
    plans = json.loads(Path("day0/plans.json").read_text())
    assert set(plans["plans"]) == {"1", "4"} and plans["requests"] >= 12
    assert int(log("day0")[-1]["draft_version"]) >= 12 and float(log("day0")[-1]["speedup_4"]) > 0.0
    learned = load_draft("day0/draft")
    assert main(["train", *f"{SHORT} {CHANGES} --learn false --output_dir idle".split()]) == 0
    first = load_draft("idle/draft")
    assert not torch.equal(learned.tensors["fc.weight"], first.tensors["fc.weight"])
    assert {row["draft_version"] for row in log("idle")} == {"0"}

    assert main("export --run day0 --output_dir out --dtype bfloat16".split()) == 0
    bundle = Path("out/bundle")
    exported = load_draft(bundle / "draft")
    assert torch.equal(exported.tensors["fc.weight"], learned.tensors["fc.weight"].bfloat16().float())
    assert json.loads((bundle / "plans.json").read_text())["plans"] == plans["plans"]
    for name, digest in json.loads((bundle / "manifest.json").read_text())["sha256"].items():
        assert hashlib.sha256((bundle / name).read_bytes()).hexdigest() == digest
    embedding = load_target("embedded").embedding
    assert all(tensor.shape != embedding.shape or "lm_head" in name for name, tensor in exported.tensors.items())

    Path("day0/plans.json").write_text('{"plans": 3}')
    assert "must be JSON with 'plans' by batch size" in error("export --run day0", capsys)
    assert "a run must hold plans.json" in error("export --run nowhere", capsys)


def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "specrl", "train", *SHORT.split(), "--output_dir", "run"]
    endless = subprocess.Popen(
        [*command, "--serving.requests", "100000", "--checkpoint.interval", "4"], stdout=subprocess.DEVNULL
    )
    for _ in range(6000):
        if Path("run/checkpoint/state.json").exists() and served("run") >= 8:
            break
        time.sleep(0.02)
        assert endless.poll() is None, "it ended by itself"
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    before = served("run")
    assert before >= 8
    version = json.loads(Path("run/checkpoint/state.json").read_text())["learner"]["updates"]

    assert main(f"train --config run/config.yaml --serving.requests {before + 8} --resume".split()) == 0
    assert served("run") >= before + 8
    rows = log("run")
    assert int(rows[-1]["draft_version"]) > version and int(rows[-1]["requests"]) == served("run")
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)
    assert not list(Path("run").rglob(".*"))

    # Another draft than the checkpoint's, a checkpoint made without learning, and one that is damaged.
    other = f"train {SHORT} --serving.requests 99 --output_dir run --resume"
    assert "the checkpoint's target must be resumed" in error(f"{other} --target embedded-strong", capsys)
    state = Path("run/checkpoint/state.json")
    state.write_text(state.read_text()[:100])
    assert "must be JSON" in error(other, capsys)
    state.write_text('{"format": 999}')
    assert "must have format" in error(other, capsys)
    assert "holds none" in error(f"train {SHORT} --output_dir elsewhere --resume", capsys)
    assert not Path("elsewhere").exists()


def test_a_limit_in_seconds_ends_at_a_checkpoint_with_results() -> None:
    assert main(f"train {SHORT} --serving.max_seconds 1e-6 --output_dir run".split()) == 0
    assert json.loads(Path("run/plans.json").read_text())["requests"] == served("run") < 4, "one round"
    assert load_draft("run/draft").config.draft_vocab_size == 512
    again = "train --config run/config.yaml --resume --serving.max_seconds null --serving.requests 6"
    assert main(again.split()) == 0
    assert served("run") >= 6


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole() -> None:
    assert main(f"train {SHORT} {CHANGES} --output_dir run".split()) == 0
    before = {path: path.read_bytes() for path in Path("run/checkpoint").iterdir()}

    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    full = subprocess.run(
        [
            sys.executable,
            "-m",
            "specrl",
            "train",
            *SHORT.split(),
            "--serving.requests",
            "40",
            "--checkpoint.interval",
            "4",
        ]
        + ["--output_dir", "run", "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=no_room,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert full.returncode == 2, full.stderr
    assert full.stderr.startswith("specrl train: error: ") and full.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in Path("run/checkpoint").iterdir()} == before
    assert not list(Path("run").rglob(".*"))


WRONG = {
    "--learner.ttt_steps 0": "learner.ttt_steps must be at least 1",
    "--learner.learning_rate -1": "learner.learning_rate must be above 0",
    "--learner.ema_decay 1.0": "learner.ema_decay must be in [0, 1)",
    "--learner.dtype fp8": "--learner.dtype must be one of 'auto', 'float32', 'bfloat16'",
    "--lerner.ttt_steps 2": "did you mean '--learner.ttt_steps'?",
    "--serving.plans 3/1/7": "write '3/1/4'",
    "--serving.plans 3,3": "plans must differ",
    "--serving.plans 90": "at most 64 tokens",
    "--serving.chooser random": "serving.chooser must be 'adaptive' or one plan",
    "--serving.batch_schedule 0x4": "must be at least 1",
    "--serving.batch_schedule fast": "is written",
    "--serving.requests 0": "serving.requests must be at least 1",
    "--serving.max_seconds 0": "serving.max_seconds must be a finite number above 0",
    "--serving.weight_sync_interval 0": "serving.weight_sync_interval must be at least 1",
    "--checkpoint 0": "checkpoint.interval must be at least 1",
    "--workload.temperature -1": "workload.temperature must be",
    "--workload /no/such": "does not exist",
    "--workload.prompt_tokens 0": "workload.prompt_tokens must be at least 1",
    "--workload.prompt_tokens 5000": "max_context must be in [2, 1024]",
    "--workload.max_new_tokens 0": "workload.max_new_tokens must be at least 1",
    "--target /no/such": "must hold config.json",
    "--target embedded-huge": "an embedded target is one of",
    "--target.dtype fp8": "--target.dtype must be one of",
    "--draft /no/such": "must hold config.json",
    "--draft run --draft.vocab_size 9": "draft.vocab_size is for a new draft",
    "--draft run --draft.intermediate_size 9": "draft.intermediate_size is for a new draft",
    "--draft.intermediate_size 0": "draft.intermediate_size must be at least 1",
    "--draft.vocab_size 513": "must have 1 to 512 tokens",
    "--engine.flags x": "engine.flags is for the engine 'sglang'",
    "--output_dir /proc/run": "output_dir must be a writable directory",
    "--seed x": "--seed must be an integer",
    "--config no.yaml": "--config must be a readable YAML file",
}


@pytest.mark.parametrize(("option", "message"), WRONG.items())
def test_wrong_input_ends_in_one_line_and_leaves_nothing(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(f"train {option}", capsys)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_a_stream_of_parts_a_vocabulary_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    stream = "--workload stdlib@8,encodings@8 --draft.vocab_size 100 --draft.intermediate_size 96"
    assert main(f"train {SHORT} --serving.requests 16 --checkpoint.interval 8 {stream} --output_dir run".split()) == 0
    printed = capsys.readouterr().out
    assert "draft vocabulary: 100 of 512 tokens" in printed and "encodings@8" in printed
    rows = log("run")
    assert {row["part"] for row in rows} <= {"stdlib@8", "encodings@8"} and len(rows) >= 2
    last = rows[-1]
    assert float(last["tokens_per_s"]) > 0 and float(last["staleness"]) >= 0 and float(last["dropped"]) == 0
    assert float(last["held"]) >= 12 and last["open"] == "0.0", "nothing is open at a checkpoint"
    draft = load_draft("run/draft")
    assert draft.config.intermediate_size == 96
    assert draft.config.draft_vocab_size == 100 and draft.target_ids is not None

    events = EventAccumulator("run/tensorboard").Reload()
    written = {event.step: event.value for event in events.Scalars("loss")}
    assert written == pytest.approx({int(row["requests"]): float(row["loss"]) for row in rows}, rel=1e-5)

    again = "train --config run/config.yaml --resume --serving.requests 24 --log.tensorboard false"
    assert main(again.split()) == 0
    resumed = load_draft("run/draft")
    assert resumed.target_ids is not None and torch.equal(resumed.target_ids, draft.target_ids)
    assert "draft.vocab_size must be the checkpoint's" in error(f"{again} --draft.vocab_size 90", capsys)


def test_only_better_drafts_serve_where_asked_for() -> None:
    better = "--serving.deploy better --learner.holdout_fraction 0.5 --serving.chooser 2/1/3"
    better += " --serving.requests 40 --checkpoint 100 --log.tensorboard false"
    line = f"train {SHORT} {better} --output_dir run"
    assert main(line.split()) == 0
    decisions = list(csv.DictReader(Path("run/gate.csv").read_text().splitlines()))
    assert "fewer than the required 8" in decisions[0]["reason"]
    assert {row["look"] for row in decisions} <= {"held-out", "trial"}
    counts = [int(row["requests"]) for row in decisions]
    assert counts == sorted(counts) and counts[-1] <= served("run")
    assert not Path("run/tensorboard").exists()


def test_weights_and_biases_gets_the_rows_or_says_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb needs Weights & Biases" in error(f"train {SHORT} --log.wandb mine --output_dir run", capsys)
    assert not Path("run").exists()
    told: list[Any] = []
    run = SimpleNamespace(log=lambda row, step: told.append((step, row)), finish=lambda: told.append("finished"))

    def init(**settings: str) -> SimpleNamespace:
        told.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    line = f"train {SHORT} --serving.requests 4 --log.wandb mine --log.tensorboard false --output_dir run"
    assert main(line.split()) == 0
    settings, (step, row), end = told
    assert settings["project"] == "mine" and end == "finished"
    assert step == served("run") and row["loss"] == pytest.approx(float(log("run")[-1]["loss"]))
