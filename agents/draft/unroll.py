"""Training-time test: the draft unrolled on its own hidden states, as it runs when it serves.

EAGLE-3 (Li et al., 2025, arXiv:2503.01840), section 3. Pass 0 reads the target's hidden states; pass k reads the
states of pass k - 1, one slot later. Slot t holds (state before it, token t + 1) and predicts token t + 2. In pass k,
slot t attends to slots 0 .. t - k of pass 0 and to slot t - k + j of each later pass j, as a draft k steps past the
last verified token does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specrl.agents.draft.attention import attend
from specrl.models.config import DraftArchitecture
from specrl.models.layer import DecoderLayer, GatedMLP, interleave, rms_norm
from specrl.models.linear import TrainableLinear
from specrl.models.rope import rope_table

_RECOMPUTE_FROM = 1 << 22  # entries of the MLP's gate and up from which the backward pass computes its products again


class _RecomputedMLP(GatedMLP):
    """A gated MLP that stores less for the backward pass if it is large."""

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        wide = self.gate_up(x)
        if wide.requires_grad and wide.numel() >= _RECOMPUTE_FROM:
            return residual + checkpoint(self._output, wide, use_reentrant=False, preserve_rng_state=False)
        return residual + self._output(wide)

    def _output(self, wide: Tensor) -> Tensor:
        return self.down(self.gated(wide))


def _cast(weight: Tensor) -> Tensor:
    """Cast to the dtype of the products, once for all passes."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight


def unroll(
    parameters: Mapping[str, Tensor],
    config: DraftArchitecture,
    embeddings: Tensor,
    features: Tensor,
    passes: int,
    other: Tensor | None = None,
) -> Iterator[Tensor]:
    """Compute the inputs of the draft's head at every slot, pass after pass.

    Args:
        parameters: the draft's tensors by SGLang's names; trained ones require gradients.
        config: the draft's shape.
        embeddings: [B, T, H], the target's embedding of the token that each slot reads.
        features: [B, T, 3H], the target's hidden states.
        passes: in [1, T].
        other: [B, T, H], embeddings of other tokens, such as rejected ones. Adds a last pass: pass 0 as if only slot t
            had read `other[t]`; its slot 0 is not meaningful.

    Yields:
        [B, T, H] of pass k; slots t < k are not meaningful.
    """
    c = config
    batch, length, _ = embeddings.shape
    heads, kv_heads, size = c.num_heads, c.num_kv_heads, c.head_dim
    rotation = rope_table(c.rope, size, length).to(features.device)[:, None]  # [T, 1, D / 2]
    past: list[tuple[Tensor, Tensor]] = []  # keys and values [B, Hk, T, D] of every pass

    def norm(name: str) -> partial[Tensor]:
        return partial(rms_norm, weight=parameters[f"{name}.weight"], eps=c.rms_norm_eps)

    def attend_to_passes(_: DecoderLayer, qkv: Tensor) -> Tensor:
        qkv = qkv.view(batch, length, heads + 2 * kv_heads, size)
        pairs = qkv[:, :, : heads + kv_heads].float().unflatten(-1, (-1, 2)).contiguous()
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * rotation).flatten(-2).to(qkv.dtype)
        past.append((rotated[:, :, heads:].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)))
        attended = attend(rotated[:, :, :heads].transpose(1, 2), past)  # [B, heads, T, D]
        return attended.transpose(1, 2).reshape(-1, heads * size)

    query, key, value = (_cast(parameters[f"midlayer.self_attn.{name}_proj.weight"]) for name in "qkv")
    weight = torch.cat([interleave(query, size), interleave(key, size), value])
    token_weight, state_weight = weight.split(c.hidden_size, 1)
    gate_up = torch.cat([_cast(parameters[f"midlayer.mlp.{name}_proj.weight"]) for name in ("gate", "up")])
    down = _cast(parameters["midlayer.mlp.down_proj.weight"])
    mlp = _RecomputedMLP(TrainableLinear(gate_up), TrainableLinear(down), c.intermediate_size)
    input_norm, hidden_norm = norm("midlayer.input_layernorm"), norm("midlayer.hidden_norm")
    output = TrainableLinear(parameters["midlayer.self_attn.o_proj.weight"])

    def project(tokens: Tensor) -> Tensor:  # the tokens' part of queries, keys and values, the same in every pass
        return F.linear(input_norm(tokens), token_weight).flatten(0, 1)

    token_part, mlp_norm = project(embeddings), norm("midlayer.post_attention_layernorm")
    layer = DecoderLayer(lambda normed: token_part + F.linear(normed, state_weight), output, mlp, mlp_norm)
    state = fused = F.linear(features, parameters["fc.weight"])
    for k in range(passes + (other is not None)):
        if k == passes:
            assert other is not None
            state, token_part = fused, project(other)
            del past[1:]
        elif k:
            state = F.pad(state[:, :-1], (0, 0, 1, 0))
        rows = state.flatten(0, 1)
        state = layer.forward(hidden_norm(rows), rows, attend_to_passes).view(state.shape)
        yield norm("norm")(state)
