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

FORMAT = 4  # version of the format; other versions are refused
_STATE, _TENSORS, _REPLAY = "state.json", "learner.safetensors", "replay.safetensors"


def save_checkpoint(
    directory: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, object],
    replay: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace the checkpoint in `directory`; the old one is kept until the new one is complete.

    Args:
        directory: of the checkpoint.
        kind: the kind of training, such as 'online' or 'offline'; it can only be resumed by the same kind.
        tensors: of the learner.
        state: all other state, JSON-able.
        replay: sequences of the replay buffer.
    """

    def write(into: Path) -> None:
        (into / _STATE).write_text(to_json({"format": FORMAT, "kind": kind, **state}, indent=1) + "\n")
        if tensors:
            save_tensors(into / _TENSORS, tensors, {"format": "pt"})
        if replay:
            save_tensors(into / _REPLAY, replay, {"format": "pt"})

    write_atomic(directory, write)


class Checkpoint(NamedTuple):
    """The arguments of `save_checkpoint`."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    replay: dict[str, Tensor]  # empty if it was not saved


def load_checkpoint(directory: Path, kind: str) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises:
        ValueError: there is none, it is damaged, or it has another format or kind.
    """
    state = load_state(directory, kind)
    try:
        tensors, replay = (
            load_file(directory / name) if (directory / name).exists() else {} for name in (_TENSORS, _REPLAY)
        )
    except SafetensorError as error:
        raise ValueError(f"checkpoint {str(directory)!r} must hold safetensors, but is damaged: {error}") from error
    return Checkpoint(tensors, state, replay)


def load_state(directory: Path, kind: str) -> dict[str, Any]:
    """The state of the checkpoint in `directory`, without its tensors.

    Raises:
        ValueError: there is none, it is damaged, or it has another format or kind.
    """
    recover(directory)
    path = directory / _STATE
    if not path.exists():
        raise ValueError(f"--resume needs a checkpoint, but {str(directory)!r} holds none; start without --resume")
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"checkpoint {str(path)!r} must be JSON, but is not: {error}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise ValueError(
            f"checkpoint {str(directory)!r} must have format {FORMAT}, but has {found}; it was written by another "
            f"version, so start without --resume, from the draft that it learnt: --draft {directory.parent / 'draft'}"
        )
    if state["kind"] != kind:
        raise ValueError(
            f"checkpoint {str(directory)!r} must be of {kind} training, but is of {state['kind']} training; resume it "
            "with the options that it was started with"
        )
    return dict(state)
