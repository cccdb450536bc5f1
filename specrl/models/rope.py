"""Rotary position embeddings, with the scalings that Llama and Qwen checkpoints ship."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from specrl.core.checks import require

Kind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary settings of a checkpoint.

    Args:
        theta: the base.
        kind: the kind of scaling.
        factor: stretch of positions (linear, llama3, yarn).
        low_freq_factor, high_freq_factor: band limits (llama3).
        original_max_position_embeddings: number of positions before scaling (llama3, yarn).
        attention_factor: magnitude of the rotations (yarn); None: 0.1 ln(factor) + 1.
        beta_fast, beta_slow: rotations at the ends of the ramp (yarn).
        truncate: whether the ramp's ends are rounded to whole dimensions (yarn).

    Raises:
        ValueError: a value is not a number in its range.
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
            if field.type in ("int", "float") or (field.name == "attention_factor" and value is not None):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                require(number and 0 < value < math.inf, f"rope: {field.name}", "a positive number", value)
        require(type(self.truncate) is bool, "rope: truncate", "true or false", self.truncate)
        low, high = self.low_freq_factor, self.high_freq_factor
        require(self.kind != "llama3" or low < high, "rope: low_freq_factor", f"below high_freq_factor={high}", low)
        require(self.kind != "yarn" or self.theta > 1, "rope: theta of yarn", "above 1", self.theta)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Return the angular frequency of each pair [head_dim / 2] float32, and the factor on the rotations' magnitude.

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
    """Stretch slow pairs, leave fast ones, and interpolate between them."""
    original = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = (1 - smooth) * inverse / rope.factor + smooth * inverse
    stretched = torch.where(wavelength > original / rope.low_freq_factor, inverse / rope.factor, ramp)
    return torch.where(wavelength < original / rope.high_freq_factor, inverse, stretched)


def _yarn(rope: RopeConfig, inverse: Tensor, head_dim: int) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        """Return the dimension whose pair makes this many rotations over the original positions."""
        turns = math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
        return head_dim * turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / max(high - low, 1e-3)
    unscaled = 1 - ramp.clamp(0, 1)
    factor = rope.attention_factor
    if factor is None:
        factor = 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    return inverse / rope.factor * (1 - unscaled) + inverse * unscaled, factor


def rope_table(rope: RopeConfig, head_dim: int, positions: int) -> Tensor:
    """Return rotations by position [positions, head_dim / 2] complex64."""
    inverse, factor = rope_frequencies(rope, head_dim)
    angles = torch.outer(torch.arange(positions).float(), inverse)
    return torch.polar(torch.full_like(angles, factor), angles)
