"""Linear maps: one for decoding, where reading the weights is most of the work, and one for training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_PACK_FOR_ROWS = 16
_MAX_ENTRIES_STORED_TWICE = 1 << 22
_MIN_ENTRIES_SPLIT = 1 << 17  # from here on, two threads are faster than one for a single row


class TrainableLinear:
    """A linear map without bias that gradients pass through; `weight [out, in]` of any floating dtype."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in] -> [M, out]."""
        return F.linear(x, self.weight)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """`residual + self(x)`: [M, out] and [M, in] -> [M, out]."""
        return residual + F.linear(x, self.weight)


class Linear:
    """A linear map for decoding.

    On a CPU the weight has two layouts: transposed (and in halves, for two threads) for one row, and oneDNN's blocked
    layout for more rows. A large weight has the blocked layout only (docs/decisions/0001-cpu-decoding.md).

    Args:
        weight: [out, in], any floating dtype.
        bias: [out] or None.
    """

    __slots__ = ("_halves", "_packed", "_transposed", "bias")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._lay_out(weight.contiguous())

    def _lay_out(self, weight: Tensor) -> None:
        self._packed = _packed(weight)
        self._transposed: Tensor | None = weight.t()  # [in, out]
        self._halves: Tensor | None = None  # [2, in, out / 2]: a batch of two, one for each thread
        if self._packed is None:
            return
        self._transposed = weight.t().contiguous() if weight.numel() <= _MAX_ENTRIES_STORED_TWICE else None
        if self._transposed is not None and weight.numel() >= _MIN_ENTRIES_SPLIT and not weight.shape[0] % 2:
            self._halves = self._transposed.view(weight.shape[1], 2, -1).transpose(0, 1).contiguous()
            self._transposed = None

    def load(self, weight: Tensor) -> None:
        """Replace the weight [out, in]; in place if it is not packed, because CUDA graphs use its address."""
        if self._packed is None and self._transposed is not None:
            with torch.inference_mode():
                self._transposed.t().copy_(weight)
        else:
            self._lay_out(weight.contiguous())

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


LinearMap = Linear | TrainableLinear


def _packed(weight: Tensor) -> Tensor | None:
    """Return the weight in oneDNN's blocked layout; None if oneDNN cannot do that."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACK_FOR_ROWS)
        torch.ops.mkldnn._linear_pointwise(weight[:1], packed, None, "none", [], "")
    except (RuntimeError, AttributeError):
        return None
    return packed
