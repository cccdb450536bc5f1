"""Attention of the training-time test: a causal part over pass 0, and a few slots of later passes beside it.

Both parts share one softmax. The causal part runs in PyTorch's blockwise kernel, which never holds [T, T] scores and
also gives the log of its normaliser; the two are merged by it, and the same kernel's backward, told the merged output
and normaliser, gives the gradients of its part (as in ring attention, Liu et al., 2023, arXiv:2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_WHOLE_UP_TO = 512  # slots up to which whole score matrices are faster, and small


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
    merged = blockwise if length > _WHOLE_UP_TO and queries.device.type == "cpu" and _forward is not None else whole
    out = merged(queries[:, :, k:], keys, values, more_keys, more_values)
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
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    if not more_keys:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    more = [torch.stack(x, -2).repeat_interleave(group, 1) for x in (more_keys, more_values)]  # [B, heads, n, k, D]
    return _Merged.apply(queries, keys, values, *more)


class _Merged(torch.autograd.Function):
    """The part of `blockwise` that has others beside the causal part."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, more_keys: Tensor, more_values: Tensor
    ) -> Tensor:
        """[B, h, n, D]."""
        scale = queries.shape[-1] ** -0.5
        out, total = _forward(queries, keys, values, 0.0, True, scale=scale)  # type: ignore[misc]
        scores = (more_keys * queries[..., None, :]).sum(-1, dtype=total.dtype) * scale  # [B, h, n, k]
        merged = torch.logaddexp(total, scores.logsumexp(-1))  # [B, h, n]
        shares = (scores - merged[..., None]).exp().to(out.dtype)
        out = out * (total - merged).exp()[..., None].to(out.dtype) + (shares[..., None] * more_values).sum(-2)
        ctx.save_for_backward(queries, keys, values, more_keys, more_values, out, merged, shares)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """With D = Σ dO · O and weight a of a slot: dV = a dO, dS = a (dO · V - D)."""
        queries, keys, values, more_keys, more_values, out, merged, shares = ctx.saved_tensors
        (grad,), scale = grads, queries.shape[-1] ** -0.5
        dq, dk, dv = _backward(  # type: ignore[misc]
            grad, queries, keys, values, out, merged, 0.0, True, scale=scale
        )
        of_value = (grad[..., None, :] * more_values).sum(-1)
        ds = (shares * (of_value - (grad * out).sum(-1, keepdim=True)) * scale)[..., None]  # [B, h, n, k, 1]
        dq = dq + (ds * more_keys).sum(-2)
        return dq, dk, dv, ds * queries[..., None, :], shares[..., None] * grad[..., None, :]
