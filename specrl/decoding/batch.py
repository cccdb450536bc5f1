"""The live requests as the host knows them: their tokens, how far target and draft have read, and who is parked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.interfaces import Request
from specrl.core.round import Completion, Ints
from specrl.decoding.sampling import Temperatures


@dataclass(slots=True)
class LiveRequest:
    """A request and what it has generated; any token of `eos` ends it, unless it ignores them."""

    id: int
    request: Request
    eos: frozenset[int]
    generated: list[int] = field(default_factory=list)

    def cut(self, tokens: list[int]) -> tuple[list[int], bool]:
        """`tokens` up to where the request ends, and whether it ends there; it is asked, and keeps nothing."""
        left = self.request.max_new_tokens - len(self.generated)
        kept = tokens[:left]
        if not self.request.ignore_eos and not self.eos.isdisjoint(kept):
            end = next(i for i, token in enumerate(kept) if token in self.eos)
            return kept[: end + 1], True
        return kept, len(kept) == left

    def completion(self) -> Completion:
        """What is handed out when it has ended."""
        return Completion(self.id, self.request.prompt, tuple(self.generated))


class Known(NamedTuple):
    """What the host knows of the live requests."""

    tokens: Ints  # [B, capacity + 1]
    length: Ints  # [B], tokens known, L
    read: Ints  # [B], slots that the draft has read, D
    temperatures: Temperatures


class Batch:
    """Requests by row: the first `size` are live, the others are parked and keep their state.

    The arrays below are views of the live rows, which rounds write in place; they are made anew when the batch is
    resized.

    Args:
        most: rows.
        capacity: one less than the tokens that a row has room for.
        device: of the tensors that are made of all this.
    """

    size: int
    live: list[LiveRequest]
    ids: Ints  # [B] int64
    temperatures: Temperatures
    tokens: Ints  # [B, capacity + 1] int64
    shared: Tensor  # the same memory
    length: Ints  # [B] int64, tokens known, L
    read: Ints  # [B] int64, slots that the draft has read, D

    def __init__(self, most: int, capacity: int, device: str) -> None:
        self.most, self._device = most, device
        self._all_shared = torch.zeros(most, capacity + 1, dtype=torch.int64)
        self._all_tokens = self._all_shared.numpy()
        self._all_length = np.zeros(most, dtype=np.int64)
        self._all_read = np.zeros(most, dtype=np.int64)
        self._admitted: list[LiveRequest] = []

    @property
    def admitted(self) -> int:
        """Requests that have a row, live or parked."""
        return len(self._admitted)

    def place(self, row: int, tokens: Sequence[int]) -> None:
        """Let `row` begin with a prefilled prompt and its first token: neither target nor draft has read that token."""
        length = len(tokens)
        self._all_tokens[row, :length] = tokens
        self._all_length[row], self._all_read[row] = length, length - 2

    def join(self, new: LiveRequest) -> None:
        """Let a request have the next row, where it was placed; it lives when the batch is resized."""
        self._admitted.append(new)

    def resize(self, size: int) -> None:
        """Let the first `size` requests that joined live."""
        self.size, self.live = size, self._admitted[:size]
        self.length, self.read = self._all_length[:size], self._all_read[:size]
        self.tokens, self.shared = self._all_tokens[:size], self._all_shared[:size]
        self._rows = np.arange(size)
        self._note()

    def replace(self, row: int, new: LiveRequest) -> LiveRequest:
        """Let `new`, which was placed there, live in the row of a request that is done; the latter."""
        done = self.live[row]
        self.live[row] = self._admitted[row] = new
        self._note()
        return done

    def _note(self) -> None:
        """Note who is live."""
        self.ids = np.array([live.id for live in self.live])
        self.temperatures = Temperatures.of([live.request.temperature for live in self.live], self._device)

    def commit(self, committed: list[list[int]]) -> tuple[Ints, list[int]]:
        """Append what each request keeps of its tokens; how many that are [B], and the rows that ended."""
        counts, ended = np.empty(len(committed), dtype=np.int64), []
        for row, (live, tokens) in enumerate(zip(self.live, committed, strict=True)):
            kept, ends = live.cut(tokens)
            length = self.length[row]
            self.tokens[row, length : length + len(kept)] = kept
            live.generated.extend(kept)
            self.length[row] = length + len(kept)
            counts[row] = len(kept)
            if ends:
                ended.append(row)
        return counts, ended

    def known(self) -> Known:
        """All of it, for rounds in fixed shapes."""
        return Known(self.tokens, self.length, self.read, self.temperatures)

    def newest(self) -> Ints:
        """The last committed token of each request: [B] int64."""
        newest: Ints = self.tokens[self._rows, self.length - 1]
        return newest

    def last(self) -> Tensor:
        """`newest` on the device."""
        return self.at(self.newest())

    def waiting(self) -> Ints:
        """Features of each request that the draft has not read: [B] int64, at least 1."""
        return self.length - 1 - self.read

    def is_level(self) -> bool:
        """Whether all requests are as long as each other."""
        return bool((self.length == self.length[0]).all())

    def at(self, values: Ints) -> Tensor:
        """`values` on the device."""
        return torch.from_numpy(values).to(self._device)
