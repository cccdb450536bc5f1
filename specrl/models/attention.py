"""The key-value cache of a decoder, and attention over it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specrl.models.layer import DecoderLayer


class KVCache:
    """Keys and values of `layers` layers for `batch` requests of up to `capacity` tokens, in static memory.

    Nothing is erased: the caller knows the lengths, and overwrites a stale slot before a mask makes it visible.

    Args:
        kv_heads, head_dim: heads of a layer, and entries of a head.
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
        self.capacity, self.kv_heads, self.head_dim = capacity, kv_heads, head_dim
        self.fused = device != "cpu" if fused is None else fused
        shape = (layers, 2, batch * kv_heads, capacity, head_dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)  # [layers, k and v, B * Hk, S, D]
        self.flat = self.data.view(layers, -1, head_dim).unbind(0)  # per layer [2 * B * Hk * S, D]
        heads = torch.arange(kv_heads, device=device) * capacity
        within = torch.cat([heads, heads + batch * kv_heads * capacity])  # [2 * Hk]: keys of every head, then values
        requests = torch.arange(batch, device=device) * (kv_heads * capacity)
        self._rows = requests[:, None, None] + within  # [B, 1, 2 * Hk] int64

    def rows(self, slots: Tensor, first_row: int) -> Tensor:
        """Return rows of `flat` [b * q, 2 * Hk]: keys and values at `slots [b, q]`, from cache row `first_row` on."""
        return (self._rows[first_row : first_row + slots.shape[0]] + slots[:, :, None]).flatten(0, 1)

    def window(self, length: int, first_row: int, count: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return, per layer, keys [b * Hk, D, L] and values [b * Hk, L, D] of `length` slots of `count` requests."""
        window = self.data[:, :, first_row * self.kv_heads : (first_row + count) * self.kv_heads, :length]
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


class TokenSlots(NamedTuple):
    """The cache slots of q tokens of each of b consecutive requests, and what these tokens attend to."""

    slots: Tensor  # [b, q] int64
    length: int  # visible slots: one more than the largest of `slots`
    positions: Tensor | None = None  # [b, q] int64 rotary positions; None: the slots. In a tree, siblings share one.
    attention_mask: Tensor | None = None  # [b, q, length] bool, visible slots of each token; None: all up to its own
    first_row: int = 0  # cache row of the first request
    equal_lengths: bool = False  # whether every slot is known to be `length - 1`; then nothing needs to be masked


class CachedAttention:
    """Attention of the tokens of one forward pass; called by each layer.

    Queries come scaled by head_dim ** -0.5; the weights of rotary pairs are interleaved.

    Args:
        cache: keys and values; those of the tokens are written to it.
        where: the tokens' slots.
        rotary_table: [P, D/2] complex64.
        num_heads: query heads.
    """

    __slots__ = (
        "_batch", "_bias", "_cache", "_group", "_heads", "_keys", "_queries", "_rotation", "_rows", "_size", "_values",
    )  # fmt: skip

    def __init__(self, cache: KVCache, where: TokenSlots, rotary_table: Tensor, num_heads: int) -> None:
        slots, length, positions, mask, first_row, equal_lengths = where
        batch, queries = slots.shape
        group = num_heads // cache.kv_heads
        if mask is None and (cache.fused or not (queries == 1 and (batch == 1 or equal_lengths))):
            mask = torch.arange(length, device=slots.device) <= slots[:, :, None]
        self._bias: Tensor | None = None  # [b * Hk, q * G, L], fused [b, 1, q * G, L]; 0 or -inf; None: no mask
        if mask is not None:
            zero = torch.zeros((), dtype=cache.data.dtype, device=slots.device)
            wide = torch.where(mask, zero, float("-inf"))  # [b, q, L]
            heads = 1 if cache.fused else cache.kv_heads
            bias = wide[:, None, :, None].expand(batch, heads, queries, group, length)
            leading = (batch, 1) if cache.fused else (batch * heads,)
            self._bias = bias.reshape(*leading, queries * group, length)
        self._keys, self._values = cache.window(length, first_row, batch)
        turned = slots if positions is None else positions
        self._rotation = rotary_table.index_select(0, turned.flatten())[:, None]  # [M, 1, D/2] complex64
        self._rows = cache.rows(slots, first_row)  # [M, 2 * Hk]
        self._cache, self._batch, self._queries = cache, batch, queries
        self._heads, self._group, self._size = num_heads, group, cache.head_dim

    def __call__(self, layer: DecoderLayer, qkv: Tensor) -> Tensor:
        """Attend: [b * q, (heads + 2 kv_heads) * D], overwritten -> [b * q, heads * D]; writes the layer's cache."""
        heads, kv_heads, size, group = self._heads, self._cache.kv_heads, self._size, self._group
        batch, count = self._batch, self._queries
        qkv = qkv.view(-1, heads + 2 * kv_heads, size)  # [M, Hq + 2 Hk, D]
        self._rotate(layer, qkv.narrow(1, 0, heads + kv_heads))
        self._cache.flat[layer.index].index_put_((self._rows,), qkv.narrow(1, heads, 2 * kv_heads))
        queries = qkv.narrow(1, 0, heads)
        if batch * count == 1:
            queries = queries.view(kv_heads, group, size)
        else:
            grouped = queries.view(batch, count, kv_heads, group, size).transpose(1, 2)
            queries = grouped.reshape(batch * kv_heads, count * group, size)
        keys, values = self._keys[layer.index], self._values[layer.index]
        if self._cache.fused:
            attended = self._fused(queries, keys, values)
        elif self._bias is None:
            attended = torch.bmm(torch.softmax(torch.bmm(queries, keys), -1), values)
        else:
            scores = torch.baddbmm(self._bias, queries, keys)
            attended = torch.bmm(torch.softmax(scores, -1), values)  # [b * Hk, q * G, D]
        if count == 1:
            return attended.view(batch, heads * size)
        attended = attended.view(batch, kv_heads, count, group * size).transpose(1, 2)
        return attended.reshape(-1, heads * size)

    def _fused(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend with `queries [b * Hk, q * G, D]` in one kernel, softmax in float32; same shape."""
        heads = (self._batch, self._cache.kv_heads)
        q, k = queries.view(*heads, -1, self._size), keys.transpose(-1, -2).unflatten(0, heads)
        v, mask = values.unflatten(0, heads), self._bias
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)  # the queries come scaled
        return attended.contiguous().view(queries.shape)  # kernels differ in the layout of their result

    def _rotate(self, layer: DecoderLayer, queries_and_keys: Tensor) -> None:
        """Rotate [M, Hq + Hk, D] in place, after the norm over heads if the layer has one."""
        if layer.head_norm is not None:
            norm, weight = layer.head_norm
            queries_and_keys.copy_(norm(queries_and_keys) * weight)
        pairs = queries_and_keys.unflatten(-1, (-1, 2))
        if pairs.dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(self._rotation)
        else:
            rotated = torch.view_as_complex(pairs.float()) * self._rotation
            pairs.copy_(torch.view_as_real(rotated))
