"""Sequences on disk: tensors as safetensors, other values as JSON, in shards under an index."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from specrl.agents.draft.sequences import RejectedDrafts, TrainingSequence
from specrl.io.output import OutputDir
from specrl.models.checkpoint import save_tensors

INDEX = "index.json"
_FORMAT = 1
_TENSORS, _NUMBERS = ("tokens", "features", "logits"), ("temperature", "draft_version", "prompt_tokens")
_REJECTED = ("positions", "tokens", "logits")


def pack(sequences: Sequence[TrainingSequence]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the tensors by '<number>.<name>', and the other values of each sequence, JSON-able."""
    tensors: dict[str, Tensor] = {}
    notes: list[dict[str, Any]] = []
    for i, sequence in enumerate(sequences):
        tensors |= {f"{i}.{name}": getattr(sequence, name) for name in _TENSORS}
        if sequence.rejected is not None:
            tensors |= {f"{i}.rejected.{name}": getattr(sequence.rejected, name) for name in _REJECTED}
        note = {name: getattr(sequence, name) for name in _NUMBERS}
        notes.append({**note, "length": len(sequence.tokens), "rejected": sequence.rejected is not None})
    return tensors, notes


def unpack(i: int, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> TrainingSequence:
    """Return sequence `i` of a `pack`."""
    rejected = RejectedDrafts(*(tensors[f"{i}.rejected.{name}"] for name in _REJECTED)) if note["rejected"] else None
    fields: dict[str, Any] = {name: tensors[f"{i}.{name}"] for name in _TENSORS}
    return TrainingSequence(**fields, **{name: note[name] for name in _NUMBERS}, rejected=rejected)


class ShardWriter:
    """Writes sequences to a directory in shards of `size`; its index names complete shards only.

    `about` describes the sequences, JSON-able: at least 'target', 'taps' and 'vocab_size'. A directory that holds
    sequences already raises a ValueError.
    """

    def __init__(self, directory: OutputDir, about: Mapping[str, Any], size: int) -> None:
        if (directory.path / INDEX).exists():
            raise ValueError(f"traces must be recorded to a new directory, but {str(directory.path)!r} holds some")
        self._directory, self._about, self._size = directory, dict(about), size
        self._buffer: list[TrainingSequence] = []
        self._shards: list[dict[str, Any]] = []

    def add(self, sequences: Sequence[TrainingSequence]) -> None:
        """Add sequences, and write complete shards."""
        self._buffer += sequences
        while len(self._buffer) >= self._size:
            self._write_shard()

    def close(self) -> None:
        """Write the last shard."""
        if self._buffer:
            self._write_shard()

    def _write_shard(self) -> None:
        tensors, notes = pack(self._buffer[: self._size])
        name = f"shard-{len(self._shards):05d}.safetensors"
        save_tensors(self._directory.path / name, tensors)
        self._shards.append({"file": name, "sequences": notes})
        self._directory.write_json(INDEX, {"format": _FORMAT, **self._about, "shards": self._shards})
        del self._buffer[: self._size]


class Traces:
    """Recorded sequences, which are read on demand; a ValueError if there is no index or it has another format."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        if not (directory / INDEX).is_file():
            raise ValueError(
                f"traces must be a directory with {INDEX}, but {str(directory)!r} has none; 'specrl record'"
            )
        try:
            self.about: dict[str, Any] = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            version, shards = self.about["format"], self.about.pop("shards")
            self._notes = [(str(s["file"]), i, dict(note)) for s in shards for i, note in enumerate(s["sequences"])]
            outside = [file for file, _, _ in self._notes if Path(file).name != file][:1]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{INDEX} of traces must be JSON with 'shards', but got {error}; record again") from error
        if version != _FORMAT or outside:
            rule = f"format {_FORMAT} and shards in the folder of {INDEX}"
            raise ValueError(f"traces must have {rule}, but got {version} {outside}")

    def __len__(self) -> int:
        return len(self._notes)

    def length(self, number: int) -> int:
        """Return the number of tokens of a sequence."""
        return int(self._notes[number][2]["length"])

    def read(self, numbers: Sequence[int]) -> Iterator[TrainingSequence]:
        """Read the sequences with these numbers, from 0; raise a ValueError if a shard is missing or damaged."""
        for number in numbers:
            name, i, note = self._notes[number]
            try:
                with safe_open(self.path / name, framework="pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys() if key.startswith(f"{i}.")}
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"traces must be complete, but {name} cannot be read: {error}; record again"
                ) from error
            yield unpack(i, tensors, note)
