"""The two copies of a round in fixed shapes: numbers of the requests to the device, and the outcome back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.round import Ints
from specrl.decoding.propose import MAX_DRAFT_TOKENS


class Rows(NamedTuple):
    """Numbers of each request, padding included: [B] int64 each, on the device or on the host."""

    slot: Any  # slot of the last committed token
    read: Any  # number of slots that the draft has read
    newest: Any  # index of the last pending hidden state
    last_token: Any  # the last committed token
    free: Any  # first free row of the buffer of pending hidden states


_NUMBERS = len(Rows._fields)


class DeviceLink:
    """Static memory on the device, and memory of the host that is pinned on a GPU (`pinned`).

    `max_width` is the largest number of tokens per request that the draft may catch up on.
    """

    def __init__(self, max_batch_size: int, max_width: int, device: str, *, pinned: bool) -> None:
        entries = max_batch_size * (_NUMBERS + max(max_width, 1))
        self._out = torch.zeros(entries, dtype=torch.int64, pin_memory=pinned)
        self._static = torch.zeros(entries, dtype=torch.int64, device=device)
        self._back = torch.zeros(max_batch_size * (MAX_DRAFT_TOKENS + 2), dtype=torch.int64, pin_memory=pinned)
        self._arrived: Any = torch.cuda.Event() if pinned else None

    def send(self, live: Rows, padding: Rows, batch_size: int, catch_up: Ints) -> None:
        """Copy numbers to the device: arrays of the live requests, and one number of each kind for all padding rows.

        `catch_up [live, width] int64` are the tokens that the draft catches up on.
        """
        count, width = catch_up.shape
        filled, host = batch_size * (_NUMBERS + width), self._out.numpy()
        numbers = host[: _NUMBERS * batch_size].reshape(_NUMBERS, batch_size)
        numbers[:, count:] = np.array(padding)[:, None]
        for row, values in zip(numbers, live, strict=True):
            row[:count] = values
        tokens = host[_NUMBERS * batch_size : filled].reshape(batch_size, width)
        tokens[:count], tokens[count:] = catch_up, 0
        self._static[:filled].copy_(self._out[:filled], non_blocking=True)

    def rows(self, batch_size: int) -> Rows:
        """Return the numbers on the device."""
        return Rows(*self._static[: _NUMBERS * batch_size].view(_NUMBERS, batch_size).unbind(0))

    def catch_up(self, batch_size: int, width: int) -> Tensor:
        """Return the tokens to catch up on, on the device: [B, width] int64."""
        return self._static[_NUMBERS * batch_size : (_NUMBERS + width) * batch_size].view(batch_size, width)

    def fetch(self, values: Tensor) -> Ints:
        """Copy `values` int64 from the device and wait for them; valid until the next fetch."""
        host = self._back[: values.numel()].view(values.shape)
        host.copy_(values, non_blocking=True)
        if self._arrived is not None:
            self._arrived.record()
            self._arrived.synchronize()
        fetched: Ints = host.numpy()
        return fetched
