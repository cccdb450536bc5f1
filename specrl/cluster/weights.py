"""Weights and sequences on their way between actors: safetensors bytes, never pickled tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from specrl.agents.draft.sequences import Sequence as Traced
from specrl.training.trace_files import pack, unpack


class SentTraces(NamedTuple):
    """Finished requests on their way."""

    body: bytes  # safetensors
    notes: str  # JSON

    @classmethod
    def of(cls, sequences: Sequence[Traced]) -> SentTraces:
        """Sequences as they are sent."""
        tensors, notes = pack(sequences)
        return cls(to_bytes(tensors), json.dumps(notes))

    def sequences(self) -> list[Traced]:
        """The sequences."""
        tensors = load(self.body)
        return [unpack(i, tensors, note) for i, note in enumerate(json.loads(self.notes))]


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors."""
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def from_bytes(body: bytes) -> dict[str, Tensor]:
    """Tensors from safetensors."""
    return load(body)
