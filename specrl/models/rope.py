"""Rotary position embeddings, with the scalings that Llama and Qwen checkpoints ship."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary settings of a checkpoint.

    Args:
        theta: the base.
        kind: of scaling.
        factor: by which positions are stretched (linear, llama3, yarn).
        low_freq_factor, high_freq_factor: llama3's band limits.
        original_max_position_embeddings: the positions the model was first trained for (llama3, yarn).
        attention_factor: yarn's temperature; None: 0.1 ln(factor) + 1.
        beta_fast, beta_slow: yarn's ramp.
        truncate: whether yarn rounds the ramp's ends to whole dimensions.

    Raises:
        ValueError: a value that is not a number in its range.
    """

    theta: float = 10000.0
    kind: Kind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("kind", "truncate") or (value is None and field.name == "attention_factor"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"rope: {field.name} must be a positive number, but got {value!r}")
        if not isinstance(self.truncate, bool):
            raise ValueError(f"rope: truncate must be true or false, but got {self.truncate!r}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.kind == "llama3" and not low < high:
            raise ValueError(f"rope: low_freq_factor < high_freq_factor must hold, but got {low} and {high}")
        if self.kind == "yarn" and not self.theta > 1:
            raise ValueError(f"rope: yarn's theta must be above 1, but got {self.theta}")


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angular frequency of each pair [head_dim / 2] float32, and the factor on the embeddings' magnitude.

    Sources: RoPE (Su et al., 2021); position interpolation (Chen et al., 2023); Llama 3.1's banded scaling;
    YaRN (Peng et al., 2023), section 3.
    """
    inverse = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        return inverse / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, inverse), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, inverse, head_dim)
    return inverse, 1.0


def _llama3(rope: RopeConfig, inverse: Tensor) -> Tensor:
    """Slow pairs stretched, fast ones kept, a smooth ramp between."""
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = (1 - smooth) * inverse / rope.factor + smooth * inverse
    stretched = torch.where(wavelength > original / rope.low_freq_factor, inverse / rope.factor, ramp)
    return torch.where(wavelength < original / rope.high_freq_factor, inverse, stretched)


def _yarn(rope: RopeConfig, inverse: Tensor, head_dim: int) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        """Where a pair makes this many rotations over the original positions."""
        turns = math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    factor = rope.attention_factor
    if factor is None:
        factor = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    return inverse / rope.factor * (1 - kept) + inverse * kept, factor


def rope_table(rope: RopeConfig, head_dim: int, positions: int) -> Tensor:
    """Rotations by position [positions, head_dim / 2] complex64."""
    inverse, factor = rope_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(positions).float(), inverse)
    return torch.polar(torch.full_like(angles, factor), angles)
