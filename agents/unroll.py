"""Training-time test: the draft unrolled on its own hidden states, as it will run when it serves.

EAGLE-3 (Li et al., 2025, arXiv:2503.01840), section 3. Pass 0 reads the target's features; pass k reads the
states of pass k - 1, one slot further on. Slot t stands for (state before it, token t + 1) and predicts token
t + 2. In pass k slot t sees the true slots 0 .. t - k of pass 0 and, of each later pass j, slot t - k + j:
what a draft k steps past the last verified token sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from specrl.models.config import DraftConfig
from specrl.models.layer import interleave

Parameters = Mapping[str, Tensor]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, T, heads, D] with neighbouring pairs, rotation [T, 1, D/2] complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def unroll(
    parameters: Parameters,
    config: DraftConfig,
    embeddings: Tensor,
    features: Tensor,
    rotation: Tensor,
    passes: int,
) -> Iterator[Tensor]:
    """The draft's logits at every slot, pass after pass; memory of a pass is the caller's to keep or drop.

    Args:
        parameters: the draft's tensors by SGLang's names, with gradients where they are to be learnt.
        config: the draft's shape.
        embeddings: [B, T, H], the target's embedding of the token after each slot's own.
        features: [B, T, 3H], fused taps.
        rotation: [>= T, D/2] complex64 rotary table.
        passes: in [1, T].

    Yields:
        [B, T, Vd] logits of pass k; slots t < k are not meaningful.
    """
    c = config
    batch, length, _ = embeddings.shape
    heads, kv_heads, size = c.num_heads, c.num_kv_heads, c.head_dim
    group = heads // kv_heads
    at = "midlayer.self_attn."
    weight = torch.cat(
        [
            interleave(parameters[f"{at}q_proj.weight"], size),
            interleave(parameters[f"{at}k_proj.weight"], size),
            parameters[f"{at}v_proj.weight"],
        ]
    )
    of_token, of_state = weight.split(c.hidden_size, 1)
    gate_up = torch.cat([parameters["midlayer.mlp.gate_proj.weight"], parameters["midlayer.mlp.up_proj.weight"]])
    token_part = F.linear(_norm(embeddings, parameters["midlayer.input_layernorm.weight"], c.rms_norm_eps), of_token)
    turn = rotation[:length, None]
    slots = torch.arange(length, device=embeddings.device)
    state = F.linear(features, parameters["fc.weight"])
    past: list[tuple[Tensor, Tensor]] = []  # keys and values [B, Hk, T, D] of every pass
    for k in range(passes):
        if k:
            state = F.pad(state[:, :-1], (0, 0, 1, 0))
        normed = _norm(state, parameters["midlayer.hidden_norm.weight"], c.rms_norm_eps)
        qkv = (token_part + F.linear(normed, of_state)).view(batch, length, heads + 2 * kv_heads, size)
        turned = _rotate(qkv[:, :, : heads + kv_heads], turn)
        queries = turned[:, :, :heads].view(batch, length, kv_heads, group, size).permute(0, 2, 3, 1, 4)
        past.append((turned[:, :, heads:].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)))
        attended = _attend(queries, past, k, slots)  # [B, Hk, G, T, D]
        attended = attended.permute(0, 3, 1, 2, 4).reshape(batch, length, heads * size)
        state = state + F.linear(attended, parameters[f"{at}o_proj.weight"])
        normed = _norm(state, parameters["midlayer.post_attention_layernorm.weight"], c.rms_norm_eps)
        gate, up = F.linear(normed, gate_up).chunk(2, -1)
        state = state + F.linear(F.silu(gate) * up, parameters["midlayer.mlp.down_proj.weight"])
        yield F.linear(_norm(state, parameters["norm.weight"], c.rms_norm_eps), parameters["lm_head.weight"])


def _attend(queries: Tensor, past: list[tuple[Tensor, Tensor]], k: int, slots: Tensor) -> Tensor:
    """Attention of pass k: the true slots up to t - k, and slot t - k + j of each pass j >= 1."""
    batch, kv_heads, group, length, size = queries.shape
    keys, values = past[0]
    flat = queries.reshape(batch, kv_heads, group * length, size)
    if k == 0:
        mask = (slots[None] <= slots[:, None]).repeat(group, 1)
        out = F.scaled_dot_product_attention(flat, keys, values, attn_mask=mask)
        return out.view(queries.shape)
    scale = size**-0.5
    allowed = slots[None] <= slots[:, None] - k  # [T, T]
    scores = (flat @ keys.transpose(-1, -2) * scale).view(batch, kv_heads, group, length, length)
    parts = [scores.masked_fill(~allowed, float("-inf"))]
    later = []
    for j in range(1, k + 1):
        key, value = (_shift(x, k - j) for x in past[j])
        parts.append((queries * key[:, :, None]).sum(-1, keepdim=True) * scale)
        later.append(value[:, :, None])
    weights = torch.softmax(torch.cat(parts, -1), -1)
    out = weights[..., :length].reshape(batch, kv_heads, group * length, length) @ values
    out = out.view(queries.shape)
    for j, value in enumerate(later):
        out = out + weights[..., length + j, None] * value
    return out


def _shift(x: Tensor, slots: int) -> Tensor:
    """[B, Hk, T, D] moved `slots` later, zeros before."""
    return x if slots == 0 else F.pad(x[:, :, :-slots], (0, 0, slots, 0))
