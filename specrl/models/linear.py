"""Linear maps for decoding: few rows at a time, where reading the weights is most of the work."""

from __future__ import annotations

import torch
from torch import Tensor

_PACK_FOR_ROWS = 16
_HELD_TWICE = 1 << 22  # entries
_SHARED = 1 << 17  # entries from which one row is worth two threads


def _packed(weight: Tensor) -> Tensor | None:
    """The weight in oneDNN's blocked layout, or None where that is not to be had."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS)
        torch.ops.mkldnn._linear_pointwise(weight[:1], packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed


class Linear:
    """`x @ weight.T + bias` for `x [M, in]`.

    On a CPU the weight is held twice, because reading it is most of the work and the kernels differ in how they
    read: transposed (and halved, for two threads) for one row, in oneDNN's blocked layout for more. A weight too
    large to be held twice is held blocked only. Figures: docs/decisions/0001-cpu-decoding.md.

    Args:
        weight: [out, in], any floating dtype.
        bias: [out] or None.
    """

    __slots__ = ("_halves", "_packed", "_transposed", "bias")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._hold(weight.contiguous())

    def _hold(self, weight: Tensor) -> None:
        self._packed = _packed(weight)
        self._transposed: Tensor | None = weight.t()  # [in, out]
        if self._packed is not None:
            self._transposed = weight.t().contiguous() if weight.numel() <= _HELD_TWICE else None
        self._halves: Tensor | None = None  # [2, in, out / 2]: a batch of two, which two threads share
        if (
            self._transposed is not None
            and self._packed is not None
            and weight.numel() >= _SHARED
            and not weight.shape[0] % 2
        ):
            self._halves = self._transposed.view(weight.shape[1], 2, -1).transpose(0, 1).contiguous()
            self._transposed = None

    def load(self, weight: Tensor) -> None:
        """Take another weight [out, in] of the same shape: in place on a GPU, where CUDA graphs hold its address."""
        if self._packed is None and self._transposed is not None:
            with torch.inference_mode():
                self._transposed.t().copy_(weight)
        else:
            self._hold(weight.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        if self._halves is not None and x.shape[0] == 1:
            y = torch.bmm(x.expand(2, 1, -1), self._halves).view(1, -1)
            return y if self.bias is None else y.add_(self.bias)
        if self._transposed is not None and (self._packed is None or x.shape[0] == 1):
            if self.bias is None:
                return torch.mm(x, self._transposed)
            return torch.addmm(self.bias, x, self._transposed)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`: [M, out] and [M, in] -> [M, out]."""
        if self._transposed is not None and self.bias is None and (self._packed is None or x.shape[0] == 1):
            return torch.addmm(residual, x, self._transposed)
        return self(x).add_(residual)
