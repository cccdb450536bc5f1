"""The key-value cache of a decoder: static memory, one row per request, written by slot."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of `layers` layers for `batch` requests of up to `capacity` tokens.

    Nothing is erased. The length of each request is kept elsewhere, and a stale slot is overwritten before an attention
    mask makes it visible.

    Args:
        layers, batch, capacity: sizes, at least 1.
        kv_heads, head_dim: of one layer.
        dtype, device: of the entries.
        fused: attend with one fused kernel, always with a mask; None: on a GPU only. The fused kernel keeps scores in
            float32 whatever the dtype, and its shapes do not depend on the lengths of requests.
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
        self.batch, self.capacity, self.kv_heads, self.head_dim = batch, capacity, kv_heads, head_dim
        self.fused = device != "cpu" if fused is None else fused
        shape = (layers, 2, batch * kv_heads, capacity, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # [layers, k and v, B * Hk, S, D]
        self.flat = self.data.view(layers, -1, head_dim).unbind(0)  # per layer [2 * B * Hk * S, D]
        plane = batch * kv_heads * capacity
        heads = torch.arange(kv_heads, device=device) * capacity
        within = torch.cat([heads, heads + plane])  # [2 * Hk]: keys of every head, then values
        requests = torch.arange(batch, device=device) * (kv_heads * capacity)
        self._rows = requests[:, None, None] + within  # [B, 1, 2 * Hk] int64

    def rows(self, slots: Tensor, first_row: int = 0) -> Tensor:
        """Rows of `flat` for the keys and values of `slots [b, q]`: [b * q, 2 * Hk] int64.

        `first_row` is the cache row of the first request; the b requests are consecutive.
        """
        return (self._rows[first_row : first_row + slots.shape[0]] + slots[:, :, None]).flatten(0, 1)

    def window(self, length: int, first_row: int = 0, count: int | None = None) -> tuple[tuple[Tensor, ...], ...]:
        """Per layer, keys (transposed) and values of the first `length` slots: [b * Hk, D, L] and [b * Hk, L, D]."""
        start = first_row * self.kv_heads
        stop = (self.batch if count is None else first_row + count) * self.kv_heads
        window = self.data[:, :, start:stop, :length]
        return window[:, 0].transpose(-1, -2).unbind(0), window[:, 1].unbind(0)

    def move(self, requests: Tensor, sources: Tensor, destinations: Tensor) -> None:
        """Copy entries between slots of the same request, in every layer.

        Args:
            requests, sources, destinations: [m] int64 cache rows and slots; no destination twice.
        """
        heads = torch.arange(self.kv_heads, device=self.data.device)
        plane = ((requests * self.kv_heads)[:, None] + heads) * self.capacity  # [m, Hk]
        slots = self.data.flatten(2, 3)  # [layers, 2, B * Hk * S, D]
        slots[:, :, plane + destinations[:, None]] = slots[:, :, plane + sources[:, None]]
