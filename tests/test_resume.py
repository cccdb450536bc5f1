"""A run that was interrupted at a checkpoint and one that was not do the same, bit for bit."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_loop import Ticking, new
from tiny import Drawn, tiny_target

from specrl.agents.draft.learner import LearnerConfig
from specrl.core.rollout import Step
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from specrl.training.config import CheckpointConfig, ServingConfig
from specrl.training.logger import Reporter
from specrl.training.run import Run, serve

EVERY = {"always": 30, "better": 125}  # requests between checkpoints
LEARNER: dict[str, Any] = {
    "dtype": "float32",
    "ttt_steps": 2,
    "replay_capacity": 40,
    "request_sample_rate": 0.9,
    "rejected_weight": 0.1,
}


def run(path: Path, stretches: int, update: Any, *, resume: bool = False, rounds: list[Any] | None = None) -> Run:
    """Serve for so many checkpoints, as `specrl train` does; `rounds` gets what every round was."""
    target, draft = tiny_target(), new()
    serving = ServingConfig(
        "0,1/1/2,3/1/4,2/2/4",
        batch_schedule="8x12,2x7",
        requests=stretches * EVERY[update],
        weight_sync_interval=10,
        deploy=update,
    )
    started = Run.start(
        LocalEngine(target, draft, max_context=32, clock=Ticking()),
        target,
        draft,
        Drawn(never=7),
        serving,
        target="tiny",
        learner=LearnerConfig(**LEARNER, holdout_fraction=0.4 if update == "better" else 0.0),
        seed=3,
        resume=path / "checkpoint" if resume else None,
    )
    if rounds is not None:
        kept = rounds

        def keep(step: Step) -> None:
            done = step.round
            kept.append((str(done.plan), done.tokens.tolist(), done.seconds, done.draft_version, step.plain.seconds))

        started.loop.on_step.append(keep)
    report = Reporter(started, OutputDir(path), every_s=1e9, print_line=lambda line: None)
    serve(report, serving, CheckpointConfig(EVERY[update], keep_replay_buffer=True))
    return started


def rows(path: Path) -> list[dict[str, str]]:
    """log.csv, but for the wall-clock time, of which an interruption takes its own."""
    found = csv.DictReader((path / "log.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.mark.parametrize("update", ["always", "better"])
def test_an_interrupted_run_equals_the_uninterrupted_one(tmp_path: Path, update: str) -> None:
    whole, cut = list[Any](), list[Any]()
    through = run(tmp_path / "through", 2, update, rounds=whole)
    run(tmp_path / "halted", 1, update, rounds=cut)
    halted = run(tmp_path / "halted", 2, update, resume=True, rounds=cut)
    assert len(whole) > 60 and whole == cut
    assert len({plan for plan, *_ in whole}) == 4 and len({version for *_, version, _ in whole}) > 2
    assert rows(tmp_path / "through") == rows(tmp_path / "halted") and len(rows(tmp_path / "through")) == 2
    assert through.decisions == halted.decisions
    assert ("trial" in {decision["look"] for decision in through.decisions}) == (update == "better")
    for name in ("learner.safetensors", "replay.safetensors"):
        one, other = (load_file(tmp_path / part / "checkpoint" / name) for part in ("through", "halted"))
        assert list(one) == list(other)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())
    states = [json.loads((tmp_path / part / "checkpoint/state.json").read_text()) for part in ("through", "halted")]
    for state in states:
        state.pop("seconds")
        for row in state["log"]:
            row.pop("seconds")
    assert states[0] == states[1]


def test_a_run_goes_on_with_the_updates_it_had(tmp_path: Path) -> None:
    run(tmp_path, 1, "always")
    with pytest.raises(ValueError, match="serving.deploy must be the checkpoint's, 'always', but got 'better'"):
        run(tmp_path, 2, "better", resume=True)


@pytest.mark.parametrize(
    ("name", "value", "match"), [("format", 3, "--draft"), ("kind", "offline", "of online training")]
)
def test_a_checkpoint_of_another_format_or_kind_is_refused(
    tmp_path: Path, name: str, value: object, match: str
) -> None:
    save_checkpoint(tmp_path / "checkpoint", "online", Checkpoint({}))
    path = tmp_path / "checkpoint" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path / "checkpoint", "online")
