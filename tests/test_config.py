"""Configurations are read as transformers reads them, and unsupported ones are refused by key."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models_help import LLAMA3, YARN, read_config, write_config

from specrl.models.config import DraftArchitecture, TargetArchitecture, default_aux_layers
from specrl.models.hf_config import read_draft_config, read_target_config, write_draft_config
from specrl.models.rope import RopeConfig

LLAMA: dict[str, Any] = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32},
    **{"intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"rms_norm_eps": 1e-5, "max_position_embeddings": 128, "torch_dtype": "bfloat16"},
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
DRAFT = DraftArchitecture(64, 24, 32, 32, 48, 4, 2, 8, 1e-5, RopeConfig(10000.0), 128, (2, 4, 5))
LAYERS = "eagle_aux_hidden_state_layer_ids"


def read(directory: Path, config: dict[str, Any]) -> TargetArchitecture:
    return read_target_config(write_config(directory, config))


def test_shapes_and_the_default_values_of_transformers(tmp_path: Path) -> None:
    llama = TargetArchitecture("llama", 64, 32, 48, 8, 4, 2, 8, 1e-5, RopeConfig(10000.0), 128)
    assert read(tmp_path, LLAMA) == replace(llama, bos_token_id=1, eos_token_ids=(2,))
    assert read(tmp_path, {**LLAMA, "num_key_value_heads": None}).num_kv_heads == 4
    assert read(tmp_path, {**LLAMA, "head_dim": 20}).head_dim == 20
    assert read(tmp_path, {k: v for k, v in QWEN3.items() if k != "head_dim"}).head_dim == 128
    assert read(tmp_path, {k: v for k, v in LLAMA.items() if k != "hidden_size"}).hidden_size == 4096
    ignored = {"use_cache": True, "pad_token_id": 3, "num_experts": None, "logit_scale": 0.5, "unsloth_fixed": True}
    assert read(tmp_path, {**LLAMA, **ignored, "auto_map": {"AutoConfig": "x.Y"}}) == read(tmp_path, LLAMA)


def test_biases_and_norms_follow_the_family(tmp_path: Path) -> None:
    def biases(config: dict[str, Any]) -> tuple[bool, ...]:
        found = read(tmp_path, config)
        return found.attention_bias, found.attention_output_bias, found.mlp_bias, found.qk_norm

    assert biases({**LLAMA, "attention_bias": True, "mlp_bias": True}) == (True, True, True, False)
    assert biases(QWEN2) == (True, False, False, False)
    assert biases(QWEN3) == (False, False, False, True)
    assert biases({**QWEN3, "attention_bias": True}) == (True, True, False, True)


@pytest.mark.parametrize(
    ("old", "new", "rope"),
    [
        ({}, {"rope_type": "default"}, RopeConfig(10000.0)),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}, RopeConfig(5e5)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "partial_rotary_factor": 1.0},
            {"rope_type": "linear", "factor": 2.0},
            RopeConfig(1e4, "linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}},
            {"rope_theta": 1e6, "rope_type": "yarn", "attention_factor": None, "beta_fast": None, **YARN},
            RopeConfig(1e6, "yarn", 4.0, original_max_position_embeddings=32),
        ),
        (  # max_position_embeddings by default
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "factor": 4.0},
            RopeConfig(1e4, "yarn", 4.0, original_max_position_embeddings=128),
        ),
    ],
)
def test_old_and_new_keys_of_rope_mean_the_same(
    old: dict[str, Any], new: dict[str, Any], rope: RopeConfig, tmp_path: Path
) -> None:
    assert read(tmp_path, {**LLAMA, **old}).rope == rope
    newer = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    assert read(tmp_path, {**newer, "rope_parameters": new}).rope == rope


@pytest.mark.parametrize(
    ("config", "generation", "tokens"),
    [
        ({"eos_token_id": None}, None, ()),
        ({"eos_token_id": 0}, None, (0,)),
        ({"eos_token_id": [2, 3]}, None, (2, 3)),
        ({"eos_token_id": 2}, {"temperature": 0.7}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 2]}, (5, 2)),
    ],
)
def test_end_of_sequence_tokens(config: Any, generation: Any, tokens: tuple[int, ...], tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read(tmp_path, {**LLAMA, **config}).eos_token_ids == tokens


UNSUPPORTED: list[tuple[str, Any, str]] = [  # key, value, and the name in the error
    *(("architectures", value, "architectures") for value in (["MistralForCausalLM"], None, "LlamaForCausalLM")),
    ("architectures", ["LlamaForCausalLM", "Other"], "architectures"),
    *(("model_type", value, "model_type") for value in ("mistral", "qwen2", "unheard_of", None)),
    *((key, value, key) for key, value in (("hidden_act", "gelu"), ("is_causal", False), ("sliding_window", 4096))),
    ("layer_types", ["full_attention", "sliding_attention"] * 4, "layer_types"),
    ("quantization_config", {"quant_method": "fp8"}, "quantization_config"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type"),
    ("rope_parameters", {"rope_type": "proportional"}, "rope_type"),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "full_attention"),
    ("rope_scaling", {"type": "default", "mrope_section": [1, 1, 2]}, "mrope_section"),
    ("rope_scaling", {"factor": 2.0}, "factor"),
    ("rope_scaling", {"type": "yarn", "mscale": 1.0, **YARN}, "mscale"),
]
INVALID: list[tuple[str, Any, str]] = [
    *(("hidden_size", value, "hidden_size") for value in ("32", None)),
    ("num_hidden_layers", 0, "num_layers"),
    *((key, value, key) for key, value in (("num_key_value_heads", 3), ("head_dim", 3), ("rms_norm_eps", 2.0))),
    *((key, value, key) for key, value in (("tie_word_embeddings", "no"), ("eos_token_id", "</s>"))),
    ("rope_theta", -1.0, "theta"),
    ("rope_scaling", [1], "rope_parameters"),
    *(("rope_scaling", {"type": kind}, "factor") for kind in ("linear", "llama3", "yarn")),
    ("rope_scaling", {"type": "yarn", "factor": None}, "factor"),
]


@pytest.mark.parametrize(("key", "value", "named"), UNSUPPORTED + INVALID)
def test_other_targets_are_refused_by_key(key: str, value: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config.json.*\b{named}\b") as caught:
        read(tmp_path, {**LLAMA, key: value})
    message = str(caught.value)
    assert "must be" in message and "\n" not in message
    assert ("not supported" in message) == ((key, value, named) in UNSUPPORTED)


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_sliding_windows_of_qwen_are_refused_only_if_they_are_used(family: dict[str, Any], tmp_path: Path) -> None:
    off = {**family, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    assert read(tmp_path, off) == read(tmp_path, family)
    with pytest.raises(ValueError, match="layer_types must be"):
        read(tmp_path, {**off, "use_sliding_window": True})


@pytest.mark.parametrize("reader", [read_target_config, read_draft_config])
def test_missing_and_damaged_files_are_named(reader: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold config.json"):
        reader(tmp_path)
    for content in (b"{", b"[1]", b"", b"\xff\xfe{}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config.json must be a valid configuration"):
            reader(tmp_path)
    (tmp_path / "generation_config.json").write_text("no")
    with pytest.raises(ValueError, match=r"generation_config.json must be a valid configuration"):
        read(tmp_path, LLAMA)


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(5e5),
        RopeConfig(1e4, "linear", 2.0),
        RopeConfig(5e5, "llama3", 8.0, 2.0, 5.0, 64),
        RopeConfig(1e6, "yarn", 4.0, original_max_position_embeddings=32),
        RopeConfig(1e6, "yarn", 4.0, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0, truncate=False),
    ],
    ids=lambda rope: rope.kind,
)
@pytest.mark.parametrize("changes", [{}, {"target_hidden_size": 40, "head_dim": 20, "num_kv_heads": 1}])
def test_a_draft_is_read_back_as_it_was_written(rope: RopeConfig, changes: dict[str, Any], tmp_path: Path) -> None:
    config = replace(DRAFT, rope=rope, **changes)
    write_draft_config(config, tmp_path)
    assert read_draft_config(tmp_path) == config


@pytest.fixture
def draft(tmp_path: Path) -> dict[str, Any]:
    write_draft_config(DRAFT, tmp_path, "bfloat16")
    return read_config(tmp_path)


def test_a_draft_has_the_keys_that_sglang_reads(draft: dict[str, Any], tmp_path: Path) -> None:
    layers = {"eagle_config": {"use_aux_hidden_state": True, LAYERS: [1, 3, 4]}}  # one less than aux_layers
    sizes = {"draft_vocab_size": 24, "target_hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    others = {"hidden_act": "silu", "rope_theta": 1e4, "tie_word_embeddings": False}
    assert draft == {**LLAMA, "architectures": ["LlamaForCausalLMEagle3"], **sizes, **others, **layers}
    ignored = {"target_hidden_size": None, "norm_before_residual": False, "num_fc_norms": 0, "eos_token_id": [2, 3]}
    eagle = {**draft["eagle_config"], "use_last_layernorm": True, "parallel_draft_step": 1}
    assert read_draft_config(write_config(tmp_path, {**draft, **ignored, "eagle_config": eagle})) == DRAFT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("architectures", value) for value in (["LlamaForCausalLM"], ["LlamaForCausalLMEagle"], None)),
        *(("model_type", "llama4_text"), ("num_hidden_layers", 2), ("hidden_act", "gelu"), ("num_fc_norms", 3)),
        *((key, True) for key in ("attention_bias", "mlp_bias", "bias", "norm_before_residual", "norm_before_fc")),
        *((key, True) for key in ("fc_norm", "tie_word_embeddings")),
        *(("quantization_config", {"bits": 4}), ("sliding_window", 64), ("target_hidden_size", 0)),
        *(("draft_vocab_size", value) for value in (None, 65, "24")),
        *(("eagle_config", value) for value in (None, [1, 3, 4])),
        *(("eagle_config", {LAYERS: layers}) for layers in ([1, 3], [1, 3, 3], [3, 1, 4], [-1, 3, 4], ["1", 3, 4])),
        *(("eagle_config", {LAYERS: [1, 3, 4], key: False}) for key in ("use_aux_hidden_state", "use_last_layernorm")),
        *(("eagle_config", {LAYERS: [1, 3, 4], key: True}) for key in ("norm_before_fc", "surprise")),
    ],
)
def test_other_drafts_are_refused_by_key(key: str, value: Any, draft: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"config.json.*\b({key}|aux_layers)\b.*must be") as caught:
        read_draft_config(write_config(tmp_path, {**draft, key: value}))
    assert "\n" not in str(caught.value)


def test_default_aux_layers_are_those_of_sglang() -> None:
    assert default_aux_layers(32) == (2, 16, 29) and default_aux_layers(8) == (2, 4, 5)
    for layers in (4, 5, 6):
        with pytest.raises(ValueError, match=f"aux_layers .* a target of {layers} layers"):
            default_aux_layers(layers)
