"""The requests of a session as the host knows them: their tokens, and which of them are live or parked."""

from __future__ import annotations

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
    """A request and the tokens generated for it. Any token of `eos` ends it, unless it ignores them."""

    id: int
    request: Request
    eos: frozenset[int]
    generated: list[int] = field(default_factory=list)

    def cut(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Return the part of `tokens` up to the end of the request, and whether it ends there; changes nothing."""
        left = self.request.max_new_tokens - len(self.generated)
        tokens = tokens[:left]
        if not self.request.ignore_eos and not self.eos.isdisjoint(tokens):
            end = next(i for i, token in enumerate(tokens) if token in self.eos)
            return tokens[: end + 1], True
        return tokens, len(tokens) == left

    def completion(self) -> Completion:
        """Return the finished request."""
        return Completion(self.id, self.request.prompt, tuple(self.generated))


class Committed(NamedTuple):
    """Result of committing a round."""

    request_ids: Ints  # [B] int64
    context_lengths: Ints  # [B] int64, tokens known before
    counts: Ints  # [B] int64, tokens committed; tokens after the end of a request are dropped
    ended: list[int]  # rows of requests that ended


class Batch:
    """Requests by row: the first `size` are live, the others are parked and keep their state.

    The arrays below are views of the live rows. Rounds write into them; `resize` makes new views.

    Args:
        max_batch_size: number of rows.
        capacity: a row has room for one token more.
        device: device of the tensors made from the arrays.
    """

    size: int
    live: list[LiveRequest]
    ids: Ints  # [B] int64
    temperatures: Temperatures
    tokens: Ints  # [B, capacity + 1] int64
    shared_tokens: Tensor  # the same memory
    length: Ints  # [B] int64, tokens known, L

    def __init__(self, max_batch_size: int, capacity: int, device: str) -> None:
        self.max_batch_size, self._device = max_batch_size, device
        self._all_shared = torch.zeros(max_batch_size, capacity + 1, dtype=torch.int64)
        self._all_tokens = self._all_shared.numpy()
        self._all_length = np.zeros(max_batch_size, dtype=np.int64)
        self.admitted: list[LiveRequest] = []  # live and parked requests, by row
        self.padded_temperatures = torch.ones(max_batch_size, device=device)  # of the live rows, then 1

    def place(self, row: int, new: LiveRequest) -> None:
        """Put `new` into the first free row or the row of a finished request; `resize` makes it live."""
        tokens = (*new.request.prompt, *new.generated)
        self._all_tokens[row, : len(tokens)] = tokens
        self._all_length[row] = len(tokens)
        self.admitted[row : row + 1] = [new]

    def resize(self, size: int) -> None:
        """Make the first `size` admitted requests live, and park the others."""
        self.size, self.live = size, self.admitted[:size]
        self.length = self._all_length[:size]
        self.tokens, self.shared_tokens = self._all_tokens[:size], self._all_shared[:size]
        self._rows = np.arange(size)
        self.ids = np.array([live.id for live in self.live])
        self.temperatures = Temperatures.of([live.request.temperature for live in self.live], self._device)
        self.padded_temperatures.fill_(1.0)
        self.padded_temperatures[:size].copy_(self.temperatures.values)

    def commit(self, tokens: list[list[int]]) -> Committed:
        """Append to each request its tokens, up to its end."""
        context, counts, ended = self.length.copy(), np.empty(self.size, dtype=np.int64), []
        for row, (live, verified) in enumerate(zip(self.live, tokens, strict=True)):
            new, ends = live.cut(verified)
            length = self.length[row]
            self.tokens[row, length : length + len(new)] = new
            live.generated.extend(new)
            self.length[row] += len(new)
            counts[row] = len(new)
            if ends:
                ended.append(row)
        return Committed(self.ids, context, counts, ended)

    def last_tokens(self) -> Ints:
        """Return the last committed token of each request: [B] int64."""
        last: Ints = self.tokens[self._rows, self.length - 1]
        return last

    def equal_lengths(self) -> bool:
        """Return whether all live requests have the same length."""
        return self.size == 1 or bool((self.length == self.length[0]).all())

    def on_device(self, values: Ints) -> Tensor:
        """Return `values` as a tensor on the device."""
        return torch.from_numpy(values).to(self._device)
