"""Attention of the training-time test: a causal part over pass 0, and a few slots of later passes beside it.

Both parts share one softmax. Where whole score matrices are large, they are made for a block of slots at a time, and
again backwards: a block's rows are whole, so each has its softmax and its gradient at once, and the products are as
wide as the key heads allow (all query heads of a group together).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_WHOLE_UP_TO = 512  # slots up to which whole score matrices are faster, and small
_SCORES = 1 << 22  # numbers in the scores of a block: 8 MiB in bfloat16


def attend(queries: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention of pass k = len(past) - 1: the true slots up to t - k, and slot t - k + j of each pass j >= 1.

    Args:
        queries: [B, heads, T, D] of pass k.
        past: keys and values [B, Hk, T, D] of every pass, pass 0 first; heads is a multiple of Hk.

    Returns:
        [B, heads, T, D]; slots t < k are 0.
    """
    k, length = len(past) - 1, queries.shape[2] - len(past) + 1
    # Slot t >= k and true slot t - k are in step: a causal square.
    keys, values = (x[:, :, :length] for x in past[0])
    more_keys, more_values = ([past[j][i][:, :, j : j + length] for j in range(1, k + 1)] for i in range(2))
    kernel = whole if length <= _WHOLE_UP_TO else blockwise
    out = kernel(queries[:, :, k:], keys, values, more_keys, more_values)
    return F.pad(out, (0, 0, k, 0)) if k else out


def whole(queries: Tensor, keys: Tensor, values: Tensor, more_keys: list[Tensor], more_values: list[Tensor]) -> Tensor:
    """One softmax over a causal part and each slot's own others, one of each tensor in the lists.

    Args:
        queries: [B, heads, n, D].
        keys, values, more_keys, more_values: [B, Hk, n, D] each.
    """
    batch, heads, length, size = queries.shape
    group, scale = heads // keys.shape[1], size**-0.5
    queries = queries.reshape(batch, -1, group, length, size)
    ahead = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    scores = (queries.flatten(2, 3) @ keys.transpose(-1, -2) * scale).view(batch, -1, group, length, length)
    parts = [scores.masked_fill(ahead, float("-inf"))]
    parts += [(queries * key[:, :, None]).sum(-1, keepdim=True).to(scores.dtype) * scale for key in more_keys]
    weights = torch.softmax(torch.cat(parts, -1), -1).to(values.dtype)
    out = (weights[..., :length].flatten(2, 3) @ values).view(queries.shape)
    for j, value in enumerate(more_values):
        out = out + weights[..., length + j, None] * value[:, :, None]
    return out.view(batch, heads, length, size)


def blockwise(
    queries: Tensor, keys: Tensor, values: Tensor, more_keys: list[Tensor], more_values: list[Tensor]
) -> Tensor:
    """`whole`, in memory that grows with n and not with its square; slower where n is small."""
    batch, heads, length, size = queries.shape
    grouped = (queries * size**-0.5).reshape(batch * keys.shape[1], -1, length, size)
    flat = [x.reshape(-1, length, size) for x in (keys, values, *more_keys, *more_values)]
    out: Tensor = _Blocks.apply(grouped, *flat)
    return out.view(batch, heads, length, size)


class _Blocks(torch.autograd.Function):
    """`blockwise` of scaled queries [G, group, n, D] by keys, values, and the other keys and values, [G, n, D] each."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, *more: Tensor) -> Tensor:
        """[G, group, n, D]."""
        count, out = len(more) // 2, torch.empty_like(queries)
        own = _dots(queries, more[:count])
        shares = torch.empty_like(own)
        for block in _blocks(queries):
            weights, shares_here = _split(_weights(queries, keys, own, block), block)
            _put(out, block, weights @ values[:, : block.stop])
            _put(shares, block, shares_here)
        for j, value in enumerate(more[count:]):
            out.addcmul_(shares[..., j, None], value[:, None])
        ctx.save_for_backward(queries, keys, values, own, shares, *more)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """A block's weights again, the gradients of its scores, and of what they were made of."""
        queries, keys, values, own, shares, *more = ctx.saved_tensors
        (grad,), count = grads, len(more) // 2
        dq, of_own = torch.empty_like(queries), torch.empty_like(own)
        dk, dv = (torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (keys, values))
        of_shares = _dots(grad, more[count:])
        for block in _blocks(queries):
            here, slope = (x[:, :, block].flatten(1, 2) for x in (queries, grad))
            weights = _weights(queries, keys, own, block)
            of_weights = _beside(slope @ values[:, : block.stop].mT, of_shares, block)
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            (weights, _), (of_scores, of_own_here) = _split(weights, block), _split(of_scores, block)
            dv[:, : block.stop] += weights.mT @ slope
            dk[:, : block.stop] += of_scores.mT @ here
            _put(dq, block, of_scores @ keys[:, : block.stop])
            _put(of_own, block, of_own_here)
        for j, key in enumerate(more[:count]):
            dq.addcmul_(of_own[..., j, None], key[:, None])
        of_more = [(x[..., j, None] * y).sum(1) for x, y in ((of_own, queries), (shares, grad)) for j in range(count)]
        return dq, dk.to(keys.dtype), dv.to(values.dtype), *of_more


def _dots(x: Tensor, others: Many[Tensor]) -> Tensor:
    """[G, group, n, k]: x [G, group, n, D] by the slot of each of k others [G, n, D]."""
    dots = [(x * other[:, None]).sum(-1) for other in others]
    return torch.stack(dots, -1) if dots else x.new_empty(*x.shape[:-1], 0)


def _blocks(queries: Tensor) -> Iterator[slice]:
    """Of the n slots of queries [G, group, n, D]."""
    heads, length = queries.shape[0] * queries.shape[1], queries.shape[2]
    size = max(1, _SCORES // (heads * length))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _weights(queries: Tensor, keys: Tensor, own: Tensor, block: slice) -> Tensor:
    """[G, group · m, block.stop + k]: the softmax of m slots over all slots before them, their own, and the others."""
    rows = queries[:, :, block]
    scores = rows.flatten(1, 2) @ keys[:, : block.stop].mT
    ahead = torch.ones(rows.shape[2], rows.shape[2], dtype=torch.bool, device=rows.device).triu(1)
    scores.view(*rows.shape[:3], -1)[..., block.start :].masked_fill_(ahead, float("-inf"))
    return torch.softmax(_beside(scores, own, block), -1)


def _beside(x: Tensor, own: Tensor, block: slice) -> Tensor:
    """x [G, group · m, block.stop] and what is of the others: [G, group · m, block.stop + k]."""
    return torch.cat([x, own[:, :, block].flatten(1, 2)], -1) if own.shape[-1] else x


def _split(x: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """The reverse of `_beside`; products of parts that are not contiguous are slow."""
    return x[..., : block.stop].contiguous(), x[..., block.stop :]


def _put(out: Tensor, block: slice, x: Tensor) -> None:
    """x [G, group · m, D] into out [G, group, n, D]."""
    out[:, :, block] = x.unflatten(1, (out.shape[1], -1))
