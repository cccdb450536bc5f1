"""Rotary tables are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_help import LLAMA3, YARN, hf_config, rope
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from specrl.models.hf_config import read_target_config
from specrl.models.rope import RopeConfig, rope_frequencies, rope_table

KINDS: dict[str, dict[str, Any]] = {
    "default": rope("default"),
    "default of Llama 3": rope("default", 500000.0),
    "linear": rope("linear", factor=2.5),
    "llama3 of Llama 3.1": rope("llama3", 500000.0, **{**LLAMA3, "original_max_position_embeddings": 8192}),
    "llama3 of Llama 3.2": rope("llama3", 5e5, **{**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}),
    "llama3, few positions": rope("llama3", **LLAMA3),
    "llama3, all positions": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
    "yarn of Qwen": rope("yarn", 1e6, factor=4.0, original_max_position_embeddings=32768),
    "yarn, few positions": rope("yarn", **YARN),
    "yarn, all positions": rope("yarn", factor=3.0),
    "yarn, temperature": rope("yarn", attention_factor=0.7, **YARN),
    "yarn, ramp": rope("yarn", beta_fast=8.0, beta_slow=2.0, **YARN),
    "yarn, not truncated": rope("yarn", truncate=False, **YARN),
    "yarn, not stretched": rope("yarn", **{**YARN, "factor": 1.0}),
}


def read(config: Any, directory: Path) -> RopeConfig:
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(directory)
    return read_target_config(directory).rope


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "made"), [("llama", LlamaRotaryEmbedding), ("qwen3", Qwen3RotaryEmbedding)])
def test_tables_equal_those_of_transformers(family: str, made: Any, kind: str, head_dim: int, tmp_path: Path) -> None:
    config = hf_config(family, head_dim=head_dim, max_position_embeddings=1024, **KINDS[kind])
    table = rope_table(read(config, tmp_path), head_dim, 1500)
    assert table.shape == (1500, head_dim // 2) and table.dtype == torch.complex64
    cos, sin = made(config)(torch.zeros(1), torch.arange(1500)[None])
    halves = torch.complex(cos[0], sin[0]).view(1500, 2, head_dim // 2)
    for half in halves.unbind(1):
        torch.testing.assert_close(table, half, atol=1e-5, rtol=0.0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("default")])
def test_frequencies_and_temperatures_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = hf_config("llama", head_dim=64, max_position_embeddings=1024, **KINDS[kind])
    theirs, temperature = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")
    rope = read(config, tmp_path)
    ours, factor = rope_frequencies(rope, 64)
    torch.testing.assert_close(ours, theirs, atol=0.0, rtol=1e-6)
    assert factor == pytest.approx(temperature, rel=1e-12)
    unscaled, _ = rope_frequencies(RopeConfig(rope.theta), 64)
    assert torch.equal(ours, unscaled) == (rope.factor == 1.0)  # else the comparison shows little


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        *(("theta", value, "default") for value in (0.0, float("inf"))),
        *(("factor", value, "linear") for value in (-1.0, "8", None)),
        ("original_max_position_embeddings", 0, "llama3"),
        ("low_freq_factor", 4.0, "llama3"),
        ("attention_factor", float("nan"), "yarn"),
        ("beta_fast", True, "yarn"),
        ("truncate", 1, "yarn"),
        ("theta", 1.0, "yarn"),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}.* must be "):
        RopeConfig(kind=kind, **{name: value})
