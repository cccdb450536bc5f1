"""One decoder layer over a cache, shared by the target and the draft: fused weights, few calls.

Rotary pairs are stored next to each other (the rows of the query and key weights are reordered once), so that
a rotation is one complex product. Each norm's weight is folded into the linear map that follows it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from specrl.models.kv_cache import Placement
from specrl.models.linear import Linear


def interleave(weight: Tensor, head_dim: int) -> Tensor:
    """Reorder rows [heads * D, ...] from split halves (i, i + D/2) to neighbours (2i, 2i + 1)."""
    heads = weight.shape[0] // head_dim
    halves = weight.view(heads, 2, head_dim // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


class Norm:
    """Root-mean-square norm without its weight: `x / sqrt(mean(x^2) + eps)` over the last dimension.

    On a CPU in fp32 as `x * sqrt(d) / hypot(|x|, sqrt(d * eps))`, three calls of native kernels where
    `F.rms_norm` takes a dozen; the sqrt(d) is part of `gain`, which callers fold into the next weight.

    Args:
        size: of the last dimension.
        eps: of the norm.
        dtype, device: of its inputs.
    """

    __slots__ = ("_eps", "_floor", "_shape", "device", "dtype", "gain")

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: str) -> None:
        self._shape, self._eps = (size,), eps
        self.dtype, self.device = dtype, device
        native = device == "cpu" and dtype == torch.float32
        self._floor = torch.tensor(math.sqrt(size * eps)) if native else None
        self.gain = math.sqrt(size) if native else 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], to be multiplied by `gain`."""
        if self._floor is None:
            return F.rms_norm(x, self._shape, None, self._eps)
        return x / torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), self._floor)


class Layer:
    """Attention and MLP of one layer, reading `[M, in]` and adding to a residual `[M, H]`.

    Args:
        qkv: fused query, key and value map; query and key rows interleaved.
        output: attention output map.
        gate_up: fused gate and up map (post-attention norm folded in).
        down: MLP output map.
        norm: of the residual before the MLP.
        heads, kv_heads, head_dim: sizes of the attention; queries come scaled by head_dim ** -0.5.
        width: of the MLP.
        head_norm: norm over one head and its weights [heads + kv_heads, D] for queries and keys (Qwen3), or None.
    """

    def __init__(
        self,
        qkv: Linear,
        output: Linear,
        gate_up: Linear,
        down: Linear,
        norm: Norm,
        heads: int,
        kv_heads: int,
        head_dim: int,
        width: int,
        head_norm: tuple[Norm, Tensor] | None = None,
    ) -> None:
        self.qkv, self.output, self.gate_up, self.down, self.norm = qkv, output, gate_up, down, norm
        self.heads, self.kv_heads, self.head_dim, self.head_norm = heads, kv_heads, head_dim, head_norm
        self.group = heads // kv_heads
        self._width = width

    def __call__(self, x: Tensor, residual: Tensor, flat: Tensor, at: Placement, index: int) -> Tensor:
        """Input `x [M, in]` and `residual [M, H]` -> the new residual [M, H]; writes the cache's layer `index`.

        `flat` is the cache's layer, `at` where the tokens stand.
        """
        residual = self.output.added_to(residual, self._attend(x, flat, at, index))
        gate, up = self.gate_up(self.norm(residual)).view(-1, 2, self._width).unbind(1)
        return self.down.added_to(residual, F.silu(gate).mul_(up))

    def _attend(self, x: Tensor, flat: Tensor, at: Placement, index: int) -> Tensor:
        heads, kv_heads, size, group = self.heads, self.kv_heads, self.head_dim, self.group
        qkv = self.qkv(x).view(-1, heads + 2 * kv_heads, size)  # [M, Hq + 2 Hk, D]
        self._rotate(qkv.narrow(1, 0, heads + kv_heads), at.rotation)
        flat.index_put_((at.rows,), qkv.narrow(1, heads, 2 * kv_heads))
        queries = qkv.narrow(1, 0, heads)
        if at.batch * at.queries == 1:
            queries = queries.view(kv_heads, group, size)
        else:
            queries = (
                queries.view(at.batch, at.queries, kv_heads, group, size)
                .transpose(1, 2)
                .reshape(at.batch * kv_heads, at.queries * group, size)
            )
        if at.fused:
            attended = self._fused(queries, at, index)
        elif at.bias is None:
            attended = torch.bmm(torch.softmax(torch.bmm(queries, at.keys[index]), -1), at.values[index])
        else:
            scores = torch.baddbmm(at.bias, queries, at.keys[index])
            attended = torch.bmm(torch.softmax(scores, -1), at.values[index])  # [b * Hk, q * G, D]
        if at.queries == 1:
            return attended.view(at.batch, heads * size)
        attended = attended.view(at.batch, kv_heads, at.queries, group * size).transpose(1, 2)
        return attended.reshape(-1, heads * size)

    def _fused(self, queries: Tensor, at: Placement, index: int) -> Tensor:
        """Attention of `queries [b * Hk, q * G, D]` by one kernel, softmax in float32; the shape stays."""
        heads = (at.batch, self.kv_heads)
        attended = F.scaled_dot_product_attention(
            queries.view(*heads, -1, self.head_dim),
            at.keys[index].transpose(-1, -2).unflatten(0, heads),
            at.values[index].unflatten(0, heads),
            attn_mask=at.bias,
            scale=1.0,  # the queries come scaled
        )
        return attended.contiguous().view(queries.shape)  # kernels differ in how they lay it out

    def _rotate(self, queries_and_keys: Tensor, rotation: Tensor) -> None:
        """Rotate [M, Hq + Hk, D] in place, after the per-head norm where there is one."""
        if self.head_norm is not None:
            norm, weight = self.head_norm
            queries_and_keys.copy_(norm(queries_and_keys) * weight)
        pairs = queries_and_keys.unflatten(-1, (-1, 2))
        if pairs.dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(rotation)
        else:
            rotated = torch.view_as_complex(pairs.float()) * rotation
            pairs.copy_(torch.view_as_real(rotated))
