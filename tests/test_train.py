"""`specrl train` and `specrl export`, run as a user runs them."""

import csv
import hashlib
import json
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
TRAIN = [sys.executable, "-m", "specrl", "train", *SHORT.split(), "--checkpoint.interval", "4", "--output_dir", "run"]


@pytest.fixture(autouse=True)
def _in_a_fresh_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def train(options: str) -> None:
    assert main(["train", *options.split()]) == 0


def rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def state(run: str) -> dict[str, Any]:
    return dict(json.loads(Path(run, "checkpoint", "state.json").read_text()))


def served(run: str) -> int:
    return int(state(run)["loop"]["requests"])


def error(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a wrong command prints."""
    capsys.readouterr()
    assert main(line.split()) == 2
    out = capsys.readouterr().err
    assert out.count("\n") == 1 and "Traceback" not in out
    return out


def test_a_run_learns_and_its_export_loads(capsys: pytest.CaptureFixture[str]) -> None:
    train(f"{SHORT} --serving.requests 12 --checkpoint 4 --output_dir day0")
    plans = json.loads(Path("day0/plans.json").read_text())
    assert set(plans["plans"]) == {"1", "4"} and plans["requests"] >= 12
    last = rows("day0/log.csv")[-1]
    assert int(last["draft_version"]) >= 12 and float(last["speedup_4"]) > 0.0
    learned = load_draft("day0/draft")
    train(f"{SHORT} --serving.requests 4 --learn false --output_dir idle")
    assert not torch.equal(learned.tensors["fc.weight"], load_draft("idle/draft").tensors["fc.weight"])
    assert {row["draft_version"] for row in rows("idle/log.csv")} == {"0"}

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
    assert "must be JSON with 'plans'" in error("export --run day0", capsys)
    assert "must hold plans.json" in error("export --run nowhere", capsys)


def test_a_killed_run_resumes_from_its_last_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    endless = subprocess.Popen([*TRAIN, "--serving.requests", "100000"], stdout=subprocess.DEVNULL)
    for _ in range(6000):
        if Path("run/checkpoint/state.json").exists() and served("run") >= 8:
            break
        time.sleep(0.02)
        assert endless.poll() is None, "it ended by itself"
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    before, version = served("run"), state("run")["learner"]["updates"]
    assert before >= 8

    train(f"--config run/config.yaml --serving.requests {before + 8} --resume")
    log = rows("run/log.csv")
    assert int(log[-1]["draft_version"]) > version and int(log[-1]["requests"]) == served("run") >= before + 8
    seconds = [float(row["seconds"]) for row in log]
    assert seconds == sorted(seconds) and not list(Path("run").rglob(".*"))

    resumed = f"train {SHORT} --serving.requests 99 --output_dir run --resume"
    assert "target must be resumed" in error(f"{resumed} --target embedded-strong", capsys)
    path = Path("run/checkpoint/state.json")
    path.write_text(path.read_text()[:100])
    assert "must be JSON" in error(resumed, capsys)
    assert "holds none" in error(f"train {SHORT} --output_dir elsewhere --resume", capsys)
    assert not Path("elsewhere").exists()


def test_a_limit_in_seconds_ends_at_a_checkpoint_with_results() -> None:
    train(f"{SHORT} --serving.max_seconds 1e-6 --output_dir run")
    assert json.loads(Path("run/plans.json").read_text())["requests"] == served("run") < 4, "one round"
    assert load_draft("run/draft").config.draft_vocab_size == 512
    train("--config run/config.yaml --resume --serving.max_seconds null --serving.requests 6")
    assert served("run") >= 6


@pytest.mark.skipif(sys.platform != "linux", reason="limits file sizes as Linux does")
def test_a_full_disk_ends_in_one_line_and_leaves_the_last_checkpoint_whole() -> None:
    train(f"{SHORT} --serving.requests 4 --checkpoint 4 --output_dir run")
    before = {path: path.read_bytes() for path in Path("run/checkpoint").iterdir()}
    full = subprocess.run(
        [*TRAIN, "--serving.requests", "40", "--resume"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        timeout=120,
    )
    assert full.returncode == 2 and full.stderr.count("\n") == 1, full.stderr
    assert full.stderr.startswith("specrl train: error: ")
    assert {path: path.read_bytes() for path in Path("run/checkpoint").iterdir()} == before
    assert not list(Path("run").rglob(".*"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--learner.ttt_steps 0", "learner.ttt_steps must be"),
        ("--lerner.ttt_steps 2", "did you mean '--learner.ttt_steps'?"),
        ("--serving.plans 3/1/7", "num_draft_tokens must be in [4, 4]"),
        ("--serving.chooser random", "serving.chooser must be"),
        ("--serving.batch_schedule 0x4", "at least 1"),
        ("--serving.requests 0", "serving.requests must be"),
        ("--serving.max_seconds 0", "serving.max_seconds must be"),
        ("--serving.weight_sync_interval 0", "serving.weight_sync_interval must be"),
        ("--checkpoint 0", "checkpoint.interval must be"),
        ("--workload.temperature -1", "workload.temperature must be"),
        ("--workload.prompt_tokens 0", "workload.prompt_tokens must be"),
        ("--workload.prompt_tokens 5000", "max_context must be"),
        ("--workload.max_new_tokens 0", "workload.max_new_tokens must be"),
        ("--target embedded-huge", "an embedded target must be one of"),
        ("--target /no/such", "must hold config.json"),
        ("--draft run --draft.vocab_size 9", "draft.vocab_size must be left out"),
        ("--draft run --draft.intermediate_size 9", "draft.intermediate_size must be left out"),
        ("--draft.vocab_size 513", "draft.vocab_size must be in [1, 512]"),
        ("--engine.flags x", "engine.flags must be left out"),
        ("--output_dir /proc/run", "output_dir must be"),
    ],
)
def test_wrong_input_ends_in_one_line_and_leaves_nothing(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in error(f"train {option}", capsys)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_a_shifting_workload_a_reduced_vocabulary_and_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--workload stdlib@8,encodings@8 --draft.vocab_size 100 --draft.intermediate_size 96"
    train(f"{SHORT} --serving.requests 16 --checkpoint.interval 8 {options} --output_dir run")
    printed = capsys.readouterr().out
    assert "draft vocabulary: 100 of 512 tokens" in printed and "encodings@8" in printed
    log = rows("run/log.csv")
    assert {row["part"] for row in log} <= {"stdlib@8", "encodings@8"} and len(log) >= 2
    last = log[-1]
    assert float(last["tokens_per_s"]) > 0 and float(last["staleness"]) >= 0 and float(last["dropped"]) == 0
    assert float(last["held"]) >= 12 and last["open"] == "0.0", "nothing is open at a checkpoint"
    draft = load_draft("run/draft")
    assert draft.config.intermediate_size == 96
    assert draft.config.draft_vocab_size == 100 and draft.target_ids is not None
    events = EventAccumulator("run/tensorboard").Reload()
    written = {event.step: event.value for event in events.Scalars("loss")}
    assert written == pytest.approx({int(row["requests"]): float(row["loss"]) for row in log}, rel=1e-5)

    resumed = "--config run/config.yaml --resume --serving.requests 24 --log.tensorboard false"
    train(resumed)
    target_ids = load_draft("run/draft").target_ids
    assert target_ids is not None and torch.equal(target_ids, draft.target_ids)
    assert "draft.vocab_size must be the checkpoint's" in error(f"train {resumed} --draft.vocab_size 90", capsys)


def test_weights_and_biases_gets_the_rows_and_must_be_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "--wandb needs Weights & Biases" in error(f"train {SHORT} --log.wandb mine --output_dir run", capsys)
    assert not Path("run").exists()
    calls: list[Any] = []
    run = SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append("finished"))

    def init(**settings: str) -> SimpleNamespace:
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train(f"{SHORT} --serving.requests 4 --log.wandb mine --log.tensorboard false --output_dir run")
    settings, (step, row), end = calls
    assert settings["project"] == "mine" and end == "finished"
    assert step == served("run") and row["loss"] == pytest.approx(float(rows("run/log.csv")[-1]["loss"]))
