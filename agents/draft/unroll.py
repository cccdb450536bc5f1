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
from torch.utils.checkpoint import checkpoint

from specrl.agents.draft.attention import attend
from specrl.models.config import DraftConfig
from specrl.models.layer import interleave

Parameters = Mapping[str, Tensor]
_RECOMPUTE_FROM = 1 << 22  # numbers in the MLP of a pass from which its products are made again rather than kept


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def _cast(weight: Tensor) -> Tensor:
    """In the dtype of the products, once for all passes."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def _swiglu(wide: Tensor, down: Tensor) -> Tensor:
    """The second half of the MLP, from gate and up side by side."""
    gate, up = wide.chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


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
    for state in unroll_states(parameters, config, embeddings, features, rotation, passes):
        yield F.linear(state, parameters["lm_head.weight"])


def unroll_states(
    parameters: Parameters,
    config: DraftConfig,
    embeddings: Tensor,
    features: Tensor,
    rotation: Tensor,
    passes: int,
    other: Tensor | None = None,
) -> Iterator[Tensor]:
    """What the head reads, [B, T, H], pass after pass (see `unroll`).

    Args:
        other: [B, T, H], embeddings of other tokens, such as rejected ones. After the last pass comes one more: pass 0
            as if slot t alone had read `other[t]`; its slot 0 is not meaningful.
    """
    c = config
    batch, length, _ = embeddings.shape
    heads, kv_heads, size = c.num_heads, c.num_kv_heads, c.head_dim
    at = "midlayer.self_attn."
    query, key, value = (_cast(parameters[f"{at}{name}_proj.weight"]) for name in "qkv")
    weight = torch.cat([interleave(query, size), interleave(key, size), value])
    of_token, of_state = weight.split(c.hidden_size, 1)
    gate_up = torch.cat([_cast(parameters[f"midlayer.mlp.{name}_proj.weight"]) for name in ("gate", "up")])
    down = _cast(parameters["midlayer.mlp.down_proj.weight"])

    def read(tokens: Tensor) -> Tensor:
        return F.linear(_norm(tokens, parameters["midlayer.input_layernorm.weight"], c.rms_norm_eps), of_token)

    token_part, turn = read(embeddings), rotation[:length, None]
    state = fused = F.linear(features, parameters["fc.weight"])
    past: list[tuple[Tensor, Tensor]] = []  # keys and values [B, Hk, T, D] of every pass
    for k in range(passes + (other is not None)):
        if k == passes:
            assert other is not None
            state, token_part, past = fused, read(other), past[:1]
        elif k:
            state = F.pad(state[:, :-1], (0, 0, 1, 0))
        normed = _norm(state, parameters["midlayer.hidden_norm.weight"], c.rms_norm_eps)
        qkv = (token_part + F.linear(normed, of_state)).view(batch, length, heads + 2 * kv_heads, size)
        turned = _rotate(qkv[:, :, : heads + kv_heads], turn)
        past.append((turned[:, :, heads:].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)))
        attended = attend(turned[:, :, :heads].transpose(1, 2), past)  # [B, heads, T, D]
        attended = attended.transpose(1, 2).reshape(batch, length, heads * size)
        state = state + F.linear(attended, parameters[f"{at}o_proj.weight"])
        normed = _norm(state, parameters["midlayer.post_attention_layernorm.weight"], c.rms_norm_eps)
        wide = F.linear(normed, gate_up)
        if wide.requires_grad and wide.numel() >= _RECOMPUTE_FROM:
            state = state + checkpoint(_swiglu, wide, down, use_reentrant=False, preserve_rng_state=False)
        else:
            state = state + _swiglu(wide, down)
        yield _norm(state, parameters["norm.weight"], c.rms_norm_eps)
