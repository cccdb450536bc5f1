"""Checkpoints of training: safetensors and JSON in one directory, which is replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specrl.io.output import to_json
from specrl.models.checkpoint import recover, save_tensors, write_atomic

FORMAT = 5  # version of the format; other versions are refused
_STATE, _TENSORS, _REPLAY = "state.json", "learner.safetensors", "replay.safetensors"


class Checkpoint(NamedTuple):
    """The state of a training run.

    Attributes:
        state: JSON-able values. 'learner' is the `state_dict` of a learner, tensors included, or None.
        vocabulary: [Vd] int64, target ids of a reduced draft vocabulary; None: the target's whole vocabulary.
        replay: sequences of the replay buffer (`specrl.training.trace_files.pack`); empty if they are not saved.
    """

    state: dict[str, Any]
    vocabulary: Tensor | None = None
    replay: Mapping[str, Tensor] = {}


def save_checkpoint(directory: Path, kind: str, checkpoint: Checkpoint) -> None:
    """Replace the checkpoint in `directory` atomically; only training of the same `kind` can load it."""
    learner = dict(checkpoint.state.get("learner") or {})
    tensors = learner.pop("tensors", {})
    if checkpoint.vocabulary is not None:
        tensors = {**tensors, "vocabulary": checkpoint.vocabulary}
    state = {"format": FORMAT, "kind": kind, **checkpoint.state, "learner": learner or None}

    def write(into: Path) -> None:
        (into / _STATE).write_text(to_json(state, indent=1) + "\n")
        for name, content in ((_TENSORS, tensors), (_REPLAY, checkpoint.replay)):
            if content:
                save_tensors(into / name, content)

    write_atomic(directory, write)


def load_checkpoint(directory: Path, kind: str) -> Checkpoint:
    """Read the checkpoint in `directory`; a ValueError if it is missing, damaged, or of another format or kind."""
    recover(directory)
    path = directory / _STATE
    if not path.exists():
        raise ValueError(f"--resume needs a checkpoint, but {str(directory)!r} holds none; start without --resume")
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint {str(path)!r} must be JSON, but is not: {error}") from error
    version = state.get("format") if isinstance(state, dict) else None
    if version != FORMAT:
        raise ValueError(
            f"checkpoint {str(directory)!r} must have format {FORMAT}, but has {version}; start without --resume, with "
            f"the draft of that run: --draft {directory.parent / 'draft'}"
        )
    if state["kind"] != kind:
        raise ValueError(
            f"checkpoint {str(directory)!r} must be of {kind} training, but is of {state['kind']} training; resume it "
            "with the options that it was started with"
        )
    try:
        paths = directory / _TENSORS, directory / _REPLAY
        tensors, replay = (load_file(path) if path.exists() else {} for path in paths)
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(directory)!r} must hold safetensors, but is damaged: {error}") from error
    vocabulary = tensors.pop("vocabulary", None)
    if state["learner"] is not None:
        state["learner"]["tensors"] = tensors
    return Checkpoint(state, vocabulary, replay)
