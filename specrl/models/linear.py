"""Linear maps for decoding: few rows at a time, where reading the weights is most of the work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACK_FOR_ROWS = 16


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

    On CPUs with oneDNN the weight is held in its blocked layout, which streams from cache and memory faster
    than the plain one from a single row on (docs/decisions/0001-cpu-decoding.md).

    Args:
        weight: [out, in], any floating dtype.
        bias: [out] or None.
    """

    __slots__ = ("_packed", "_transposed", "bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: bool = True) -> None:
        weight = weight.contiguous()
        self.bias = bias
        self._packed = _packed(weight) if pack else None
        self.weight = weight if self._packed is None else None
        self._transposed = None if self.weight is None else self.weight.t()

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)  # type: ignore[arg-type]

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`: [M, out] and [M, in] -> [M, out]."""
        if self._packed is None and self.bias is None:
            return torch.addmm(residual, x, self._transposed)  # type: ignore[arg-type]
        return self(x).add_(residual)
