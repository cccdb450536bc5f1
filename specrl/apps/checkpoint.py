"""Checkpoints of a training run: safetensors and JSON in one directory that appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from specrl.apps.output import to_json
from specrl.models.checkpoint import save_tensors, write_atomic

if TYPE_CHECKING:
    from specrl.agents.adaptive import AdaptiveChooser
    from specrl.agents.draft_learner import OnlineLearner
    from specrl.agents.fixed import PlanTable

_STATE, _TENSORS = "state.json", "learner.safetensors"
_FORMAT = 1


def save_checkpoint(
    directory: Path, *, learner: OnlineLearner | None, chooser: AdaptiveChooser | PlanTable, served: int
) -> None:
    """Replace the checkpoint in `directory` by this state; the old one stands until the new one is complete."""
    tensors, numbers = ({}, {}) if learner is None else learner.state()
    state = {"format": _FORMAT, "served": served, "learner": numbers, "chooser": chooser.state_dict()}

    def write(into: Path) -> None:
        (into / _STATE).write_text(to_json(state, indent=1) + "\n")
        if tensors:
            save_tensors(into / _TENSORS, tensors, {"format": "pt"})

    write_atomic(directory, write)


def load_checkpoint(directory: Path, *, learner: OnlineLearner | None, chooser: AdaptiveChooser | PlanTable) -> int:
    """Put a checkpoint's state into learner and chooser; the requests served until then.

    Raises:
        ValueError: there is none, or it is not one that this version wrote for these parts.
    """
    path = directory / _STATE
    if not path.exists():
        raise ValueError(
            f"--resume needs a checkpoint, but there is none in {str(directory)!r}; start without --resume"
        )
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"a checkpoint's {_STATE} must be JSON, but {str(path)!r} is not; start without --resume"
        ) from error
    if state.get("format") != _FORMAT:
        raise ValueError(
            f"a checkpoint must be of format {_FORMAT}, but got {state.get('format')!r}; start without --resume"
        )
    if learner is not None:
        if not state["learner"]:
            raise ValueError(
                "the checkpoint was made without learning, so a learner cannot go on from it; use --learn false"
            )
        learner.load_state(load_file(directory / _TENSORS), state["learner"])
    chooser.load_state_dict(state["chooser"])
    return int(state["served"])
