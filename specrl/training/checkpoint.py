"""Checkpoints of a training run: safetensors and JSON in one directory that appears whole or not at all."""

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

_STATE, _TENSORS = "state.json", "learner.safetensors"
_REPLAY = "replay.safetensors"
_FORMAT = 3


def save_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, object],
    replay: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace the checkpoint in `directory` by this one; the old one stands until the new one is complete."""

    def write(into: Path) -> None:
        (into / _STATE).write_text(to_json({"format": _FORMAT, **state}, indent=1) + "\n")
        if tensors:
            save_tensors(into / _TENSORS, tensors, {"format": "pt"})
        if replay:
            save_tensors(into / _REPLAY, replay, {"format": "pt"})

    write_atomic(directory, write)


class Checkpoint(NamedTuple):
    """What `save_checkpoint` was given."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]
    replay: dict[str, Tensor]  # empty where it was not kept


def load_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in `directory`.

    Raises:
        ValueError: there is none, or it is not one that this version wrote.
    """
    recover(directory)
    path = directory / _STATE
    if not path.exists():
        raise ValueError(
            f"--resume needs a checkpoint, but there is none in {str(directory)!r}; start without --resume"
        )
    try:
        state = json.loads(path.read_text())
        tensors, replay = (
            load_file(directory / name) if (directory / name).exists() else {} for name in (_TENSORS, _REPLAY)
        )
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"a checkpoint must be JSON and safetensors, but {str(directory)!r} is not: {error}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        got = state.get("format") if isinstance(state, dict) else state
        raise ValueError(f"a checkpoint must be of format {_FORMAT}, but got {got!r}; start without --resume")
    return Checkpoint(tensors, state, replay)
