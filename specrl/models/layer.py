"""One decoder layer for serving, for training a draft and for pretraining; the attention is passed in.

For serving, the weights are fused: query, key and value in one map, gate and up in another, and each norm's weight is
folded into the next map. Rotary pairs are neighbours (`interleave`), so a rotation is one complex product.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from specrl.models.linear import LinearMap


class DecoderLayer:
    """Attention and MLP: `h = residual + output(attend(qkv(x)))`, then `h + mlp(norm(h))`.

    Args:
        qkv: map from the layer's input to the queries, keys and values of all heads, side by side.
        index: number of the layer in its model.
        head_norm: norm over one head, and its weights for queries and keys [heads + kv_heads, D] (Qwen3); or None.
    """

    def __init__(
        self,
        qkv: Callable[[Tensor], Tensor],
        output: LinearMap,
        mlp: GatedMLP,
        norm: Callable[[Tensor], Tensor],
        index: int = 0,
        head_norm: tuple[Norm, Tensor] | None = None,
    ) -> None:
        self.qkv, self.output, self.mlp, self.norm = qkv, output, mlp, norm
        self.index, self.head_norm = index, head_norm

    def forward(self, x: Tensor, residual: Tensor, attend: Attend) -> Tensor:
        """Map the input `x [M, in]` and `residual [M, H]` to the new residual [M, H]."""
        residual = self.output.added_to(residual, attend(self, self.qkv(x)))
        return self.mlp.added_to(residual, self.norm(residual))


Attend = Callable[[DecoderLayer, Tensor], Tensor]
"""Attention of a layer: queries, keys and values [M, (heads + 2 kv_heads) * D] -> attended values [M, heads * D]."""


class GatedMLP:
    """SwiGLU (Shazeer, 2020): `down(silu(gate(x)) * up(x))`, with one map to gate and up of `width` entries each."""

    def __init__(self, gate_up: LinearMap, down: LinearMap, width: int) -> None:
        self.gate_up, self.down, self.width = gate_up, down, width

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`: [M, H] and [M, H] -> [M, H]."""
        return self.down.added_to(residual, self.gated(self.gate_up(x)))

    def gated(self, gate_up: Tensor) -> Tensor:
        """`silu(gate) * up` of gate and up side by side: [M, 2 * width] -> [M, width]."""
        gate, up = gate_up.view(-1, 2, self.width).unbind(1)
        activated = F.silu(gate)
        return activated * up if activated.requires_grad else activated.mul_(up)


class Norm:
    """Root-mean-square norm without its weight: `x / sqrt(mean(x^2) + eps)` over the last dimension.

    On a CPU in fp32 it is computed as `x * sqrt(d) / hypot(|x|, sqrt(d * eps))`: three native kernels, where
    `F.rms_norm` runs a dozen. The factor sqrt(d) is left out here; it is `gain`, which callers fold into the next map.

    Args:
        size: of the last dimension.
        dtype, device: of the inputs.
    """

    __slots__ = ("_eps", "_floor", "_shape", "gain")

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: str) -> None:
        self._shape, self._eps = (size,), eps
        native = device == "cpu" and dtype == torch.float32
        self._floor = torch.tensor(math.sqrt(size * eps)) if native else None
        self.gain = math.sqrt(size) if native else 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], to be multiplied by `gain`."""
        if self._floor is None:
            return F.rms_norm(x, self._shape, None, self._eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), self._floor)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, with its weight: [..., H] -> [..., H]. Gradients pass through."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads * D, ...] from split halves (i, i + D/2) to neighbours (2i, 2i + 1)."""
    heads = weight.shape[0] // head_dim
    halves = weight.view(heads, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
