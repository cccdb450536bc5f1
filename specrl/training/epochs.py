"""Where offline learning stands after an epoch: a directory with one file for each tensor, whoever wrote them.

A tensor is made whole, written and let go before the next one. So no process ever holds all of a state that several
keep in shards, and any number of processes goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specrl.io.output import to_json
from specrl.models.checkpoint import recover, save_tensors, write_atomic

_STATE, _FORMAT = "state.json", 1


def save_epoch(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, object],
    to_whole: Callable[[Tensor], Tensor],
    *,
    leads: bool,
) -> None:
    """Replace what stands in `directory`; every process calls it, and the one that `leads` writes."""

    def write(into: Path) -> None:
        (into / _STATE).write_text(to_json({"format": _FORMAT, **state}, indent=1) + "\n")
        for name, tensor in tensors.items():
            save_tensors(into / f"{name}.safetensors", {name: to_whole(tensor)}, {"format": "pt"})

    if leads:
        write_atomic(directory, write)
        return
    for tensor in tensors.values():
        to_whole(tensor)


def read_state(directory: Path) -> dict[str, Any]:
    """What was saved beside the tensors.

    Raises:
        ValueError: nothing is there, or it is not of this version.
    """
    recover(directory)
    path = directory / _STATE
    if not path.exists():
        raise ValueError(f"--resume needs a checkpoint, but {str(directory)!r} holds none; start without --resume")
    try:
        state = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"a checkpoint's state must be JSON, but {str(path)!r} is not: {error}") from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT or "epoch" not in state:
        raise ValueError(
            f"--resume with --traces goes on from what --traces left, but {str(directory)!r} is no such checkpoint; "
            "name the output_dir of one"
        )
    return state


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor that was saved, by name, one at a time.

    Raises:
        ValueError: a file is damaged.
    """
    for path in sorted(directory.glob("*.safetensors")):
        try:
            yield from load_file(path).items()
        except SafetensorError as error:
            raise ValueError(f"a checkpoint must hold safetensors, but {str(path)!r} is damaged: {error}") from error
