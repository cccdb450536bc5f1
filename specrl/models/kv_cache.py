"""The key-value cache of a decoder: static, one row per request, written by slot."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `layers` layers for `batch` requests of up to `capacity` tokens.

    Nothing is ever erased: a request's length lives with its owner, and a stale slot is overwritten before a
    mask lets anyone see it.

    Args:
        layers, batch, capacity: sizes, at least 1.
        kv_heads, head_dim: of one layer.
        dtype, device: of the entries.
        fused: attend by one fused kernel, always under a mask; None: where the entries are on a GPU. It keeps scores in
            float32 whatever the dtype, and its shapes depend on no request's length.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: str,
        fused: bool | None = None,
    ) -> None:
        self.batch, self.capacity, self.kv_heads = batch, capacity, kv_heads
        self.fused = device != "cpu" if fused is None else fused
        shape = (layers, 2, batch * kv_heads, capacity, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # [layers, k and v, B * Hk, S, D]
        self.flat = self.data.view(layers, -1, head_dim).unbind(0)  # per layer [2 * B * Hk * S, D]
        plane = batch * kv_heads * capacity
        heads = torch.arange(kv_heads, device=device) * capacity
        within = torch.cat([heads, heads + plane])  # [2 * Hk]: keys of every head, then values
        requests = torch.arange(batch, device=device) * (kv_heads * capacity)
        self._rows = requests[:, None, None] + within  # [B, 1, 2 * Hk] int64

    def rows(self, slots: Tensor, first: int = 0) -> Tensor:
        """Rows of `flat` where the keys and values of `slots [b, q]` go: [b * q, 2 * Hk] int64.

        `first` is the cache row of slots' first request; the b requests are consecutive.
        """
        return (self._rows[first : first + slots.shape[0]] + slots[:, :, None]).flatten(0, 1)

    def window(self, length: int, first: int = 0, count: int | None = None) -> tuple[tuple[Tensor, ...], ...]:
        """Per layer, keys transposed and values of the first `length` slots: [b * Hk, D, L] and [b * Hk, L, D]."""
        start = first * self.kv_heads
        stop = (self.batch if count is None else first + count) * self.kv_heads
        seen = self.data[:, :, start:stop, :length]
        return seen[:, 0].transpose(-1, -2).unbind(0), seen[:, 1].unbind(0)

    def move(self, requests: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Copy entries between slots of the same request, in every layer.

        Args:
            requests, sources, destinations: [m] int64 cache rows and slots; no destination twice.
        """
        heads = torch.arange(self.kv_heads, device=self.data.device)
        plane = ((requests * self.kv_heads)[:, None] + heads) * self.capacity  # [m, Hk]
        slots = self.data.flatten(2, 3)  # [layers, 2, B * Hk * S, D]
        slots[:, :, plane + destinations[:, None]] = slots[:, :, plane + sources[:, None]]


class Placement(NamedTuple):
    """Where q tokens of each of b consecutive requests stand, and what they may see.

    Made once per forward pass and shared by all layers.
    """

    rotation: Tensor  # [M, 1, D/2] complex64
    rows: Tensor  # [M, 2 * Hk] int64, where keys and values are written
    keys: tuple[Tensor, ...]  # per layer [b * Hk, D, L]
    values: tuple[Tensor, ...]  # per layer [b * Hk, L, D]
    bias: Tensor | None  # [b * Hk, q * G, L], fused [b, 1, q * G, L]; 0 or -inf; None: everything is seen
    batch: int
    queries: int
    fused: bool = False


def place(
    cache: KVCache,
    table: Tensor,
    slots: Tensor,
    positions: Tensor,
    length: int,
    group: int,
    first: int = 0,
    seen: Tensor | None = None,
    level: bool = False,
) -> Placement:
    """Placement of tokens at `slots [b, q]` with rotary `positions [b, q]`, looking at the first `length` slots.

    Args:
        cache: where they are written.
        table: rotary table [P, D/2] complex64.
        slots, positions: int64; for a chain they are equal, in a tree siblings share a position.
        length: one more than the largest slot.
        group: query heads per key-value head.
        first: cache row of the first request.
        seen: [b, q, length] bool, what each token may attend to; None: every slot up to its own.
        level: whether all slots are known to be the same, `length - 1`; then nothing need be masked.
    """
    batch, queries = slots.shape
    if seen is None and (cache.fused or not (queries == 1 and (batch == 1 or level))):
        seen = torch.arange(length, device=slots.device) <= slots[:, :, None]
    bias = None
    if seen is not None:
        zero = torch.zeros((), dtype=cache.data.dtype, device=slots.device)
        wide = torch.where(seen, zero, float("-inf"))  # [b, q, L]
        heads = 1 if cache.fused else cache.kv_heads
        bias = wide[:, None, :, None].expand(batch, heads, queries, group, length)
        leading = (batch, 1) if cache.fused else (batch * heads,)
        bias = bias.reshape(*leading, queries * group, length)
    keys, values = cache.window(length, first, batch)
    rotation = table.index_select(0, positions.flatten())[:, None]
    return Placement(rotation, cache.rows(slots, first), keys, values, bias, batch, queries, cache.fused)
