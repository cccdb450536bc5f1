"""A run that was interrupted at a checkpoint equals one that was not, bit for bit."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_loop import make_engine, new
from tiny import Drawn, tiny_target

from specrl.agents.draft.learner import LearnerConfig
from specrl.core.rollout import Step
from specrl.io.output import OutputDir
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from specrl.training.config import CheckpointConfig, ServingConfig
from specrl.training.logger import TrainingLogger
from specrl.training.run import Run, serve

INTERVAL = {"always": 30, "better": 125}  # requests between checkpoints


def run(path: Path, checkpoints: int, deploy: Any, *, resume: bool = False) -> tuple[list[Any], list[Any]]:
    """Serve until a number of checkpoints, as `specrl train` does; return the rounds and the gate's decisions."""
    target, draft, interval = tiny_target(), new(), INTERVAL[deploy]
    serving = ServingConfig(
        "0,1/1/2,3/1/4,2/2/4",
        batch_schedule="8x12,2x7",
        requests=checkpoints * interval,
        weight_sync_interval=10,
        deploy=deploy,
    )
    learner = LearnerConfig(
        dtype="float32",
        ttt_steps=2,
        replay_capacity=40,
        request_sample_rate=0.9,
        rejected_weight=0.1,
        holdout_fraction=0.4 if deploy == "better" else 0.0,
    )
    checkpoint, workload = path / "checkpoint" if resume else None, Drawn(never=7)
    settings: dict[str, Any] = {"target": "tiny", "learner": learner, "seed": 3, "resume": checkpoint}
    started = Run.start(make_engine(draft), target, draft, workload, serving, **settings)
    rounds: list[Any] = []

    def record(step: Step) -> None:
        done = step.round
        rounds.append((str(done.plan), done.tokens.tolist(), done.seconds, done.draft_version, step.plain.seconds))

    started.loop.on_step.append(record)
    logger = TrainingLogger(started, OutputDir(path), every_s=1e9, print_line=lambda line: None)
    serve(logger, serving, CheckpointConfig(interval, keep_replay_buffer=True))
    return rounds, [] if started.loop.deploy is None else started.loop.deploy.decisions


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def without_seconds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("deploy", ["always", "better"])
def test_an_interrupted_run_equals_the_uninterrupted_one(tmp_path: Path, deploy: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    rounds, decisions = run(whole, 2, deploy)
    first, _ = run(cut, 1, deploy)
    second, resumed_decisions = run(cut, 2, deploy, resume=True)
    assert len(rounds) > 60 and rounds == first + second
    assert len({plan for plan, *_ in rounds}) == 4 and len({version for *_, version, _ in rounds}) > 2
    assert decisions == resumed_decisions
    assert {decision["check"] for decision in decisions} == ({"held-out", "trial"} if deploy == "better" else set())
    logs = [without_seconds(rows(path / "log.csv")) for path in (whole, cut)]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    if decisions:
        requests = [int(row["requests"]) for row in rows(cut / "gate.csv")]
        assert len(requests) == len(decisions) and requests == sorted(requests)
    for name in ("learner.safetensors", "replay.safetensors"):
        one, other = (load_file(path / "checkpoint" / name) for path in (whole, cut))
        assert list(one) == list(other)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    states = [json.loads((path / "checkpoint/state.json").read_text()) for path in (whole, cut)]
    logs = [without_seconds(state.pop("log")) for state in states]
    assert logs[0] == logs[1] and without_seconds(states[:1]) == without_seconds(states[1:])


def test_a_run_resumes_with_its_deploy_policy(tmp_path: Path) -> None:
    run(tmp_path, 1, "always")
    with pytest.raises(ValueError, match="serving.deploy must be the checkpoint's"):
        run(tmp_path, 2, "better", resume=True)


@pytest.mark.parametrize(("name", "value", "match"), [("format", 3, "format"), ("kind", "offline", "must be")])
def test_a_checkpoint_of_another_format_or_kind_is_refused(
    tmp_path: Path, name: str, value: object, match: str
) -> None:
    save_checkpoint(tmp_path / "checkpoint", "online", Checkpoint({}))
    path = tmp_path / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path / "checkpoint", "online")
