"""Attention of the training-time test: a causal part over pass 0, and a few slots of later passes, in one softmax."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_WHOLE_UP_TO = 512  # slots up to which all scores are stored for the backward pass
_SCORES = 1 << 22  # numbers in the scores of a block of slots: 8 MiB in bfloat16


def attend(queries: Tensor, past: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Compute the attention of pass k = len(past) - 1 to slots 0 .. t - k of pass 0 and slot t - k + j of pass j >= 1.

    Long sequences are computed in blocks of slots, whose scores the backward pass recomputes: memory grows with T, not
    with its square.

    Args:
        queries: [B, heads, T, D] of pass k.
        past: keys and values [B, Hk, T, D] of every pass, pass 0 first; heads is a multiple of Hk.

    Returns:
        [B, heads, T, D]; slots t < k are 0.
    """
    batch, heads, slots, _ = queries.shape
    k, length = len(past) - 1, slots - len(past) + 1
    queries = queries[:, :, k:]
    keys, values = (x[:, :, :length] for x in past[0])  # slot t of pass k is aligned with slot t - k of pass 0
    later = [past[j][i][:, :, j : j + length] for i in range(2) for j in range(1, k + 1)]
    if length <= _WHOLE_UP_TO:
        out = _attend_rows(queries, keys, values, *later)
    else:
        size = max(1, _SCORES // (batch * heads * length))
        wide = torch.promote_types(keys.dtype, torch.float32)
        keys, values = keys.to(wide), values.to(wide)  # the blocks' gradients are added up in float32
        recomputed = partial(checkpoint, _attend_rows, use_reentrant=False, preserve_rng_state=False)
        parts = []
        for start in range(0, length, size):
            stop = min(start + size, length)
            block, *later_block = (x[:, :, start:stop] for x in (queries, *later))
            parts.append(recomputed(block, keys[:, :, :stop], values[:, :, :stop], *later_block))
        out = torch.cat(parts, 2)
    return F.pad(out, (0, 0, k, 0)) if k else out


def _attend_rows(queries: Tensor, keys: Tensor, values: Tensor, *later: Tensor) -> Tensor:
    """Compute the attention of n consecutive slots to m slots of pass 0, and to the aligned slots of later passes.

    queries [B, heads, n, D]; keys and values [B, Hk, m, D]; later: [B, Hk, n, D] keys of each later pass, then values.
    """
    dtype, rows, columns, count = queries.dtype, queries.shape[2], keys.shape[2], len(later) // 2
    queries = (queries * queries.shape[-1] ** -0.5).unflatten(1, (keys.shape[1], -1))  # [B, Hk, group, n, D]
    group = queries.shape[2]
    scores = queries.flatten(2, 3) @ keys.to(dtype).mT  # [B, Hk, group * n, m]
    ahead = torch.ones(rows, columns, dtype=torch.bool, device=queries.device).triu(columns - rows + 1)
    scores.masked_fill_(ahead.repeat(group, 1), float("-inf"))
    dots = [(queries * key[:, :, None]).sum(-1, keepdim=True).flatten(2, 3).to(scores.dtype) for key in later[:count]]
    weights = torch.softmax(torch.cat([scores, *dots], -1) if dots else scores, -1).to(dtype)
    out = weights[..., :columns].contiguous() @ values.to(dtype)  # the product is slow if its input is not contiguous
    for j, value in enumerate(later[count:]):
        share = weights[..., columns + j, None].unflatten(2, (group, rows))
        out = out + (share * value[:, :, None]).flatten(2, 3)
    return out.view(queries.shape[0], -1, rows, queries.shape[-1])
