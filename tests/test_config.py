"""Configurations are read in every spelling, and what is not supported is refused by name."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from models_help import LLAMA3, YARN, hf_config, rope, write_config

from specrl.models.config import (
    DraftConfig,
    TargetConfig,
    default_taps,
    read_draft_config,
    read_target_config,
    write_draft_config,
)
from specrl.models.rope import RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
QWEN2 = {**LLAMA, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16}
DRAFT = DraftConfig(64, 24, 32, 32, 48, 4, 2, 8, 1e-5, RopeConfig(10000.0), 128, (2, 4, 5))


def read(directory: Path, config: dict[str, Any]) -> TargetConfig:
    return read_target_config(write_config(directory, config))


def refusal(directory: Path, config: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        read(directory, config)
    message = str(caught.value)
    assert "\n" not in message and re.search("must|may", message)  # one line, with its rule
    return message


def test_shapes_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA) == TargetConfig("llama", 64, 32, 48, 8, 4, 2, 8, 1e-5, RopeConfig(10000.0), 128)
    assert read(tmp_path, {**LLAMA, "num_key_value_heads": None}).num_kv_heads == 4
    assert read(tmp_path, {**LLAMA, "head_dim": None}).head_dim == 8
    assert read(tmp_path, {**LLAMA, "head_dim": 20}).head_dim == 20
    assert read(tmp_path, {**QWEN3, "head_dim": None}).head_dim == 128  # the family's default
    assert read(tmp_path, LLAMA).group == 2


def test_biases_and_norms_follow_the_family(tmp_path: Path) -> None:
    biased = read(tmp_path, {**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert (biased.attention_bias, biased.attention_output_bias, biased.mlp_bias, biased.qk_norm) == (True,) * 3 + (
        False,
    )
    qwen2, qwen3 = read(tmp_path, QWEN2), read(tmp_path, QWEN3)
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.attention_bias, qwen3.attention_output_bias, qwen3.qk_norm) == (False, False, True)
    assert read(tmp_path, {**QWEN3, "attention_bias": True}).attention_output_bias


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_transformers_writes_is_read(family: str, tmp_path: Path) -> None:
    config = hf_config(family, tie_word_embeddings=True, **rope("yarn", 5e5, **YARN))
    config.architectures = [f"{family.capitalize()}ForCausalLM"]
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"rope_parameters"' in text and '"rope_scaling"' not in text
    ours = read_target_config(tmp_path)
    assert ours.family == family and ours.tie_word_embeddings
    assert ours.rope == RopeConfig(5e5, "yarn", 4.0, original_max_position_embeddings=32)


@pytest.mark.parametrize(
    ("old", "new", "rope"),
    [
        ({}, {}, RopeConfig(10000.0)),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5, "rope_type": "default"}, RopeConfig(5e5)),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
            RopeConfig(1e4, "linear", 2.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3},
            RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64),
        ),
        (
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "rope_type": "yarn", **YARN}},
            {"rope_theta": 1e6, "rope_type": "yarn", "attention_factor": None, **YARN},
            RopeConfig(1e6, "yarn", 4.0, original_max_position_embeddings=32),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_type": "yarn", "factor": 4.0},
            RopeConfig(1e4, "yarn", 4.0, original_max_position_embeddings=128),  # max_position_embeddings
        ),
    ],
)
def test_the_older_and_the_newer_spelling_of_rope_mean_the_same(
    old: dict[str, Any], new: dict[str, Any], rope: RopeConfig, tmp_path: Path
) -> None:
    assert read(tmp_path, {**LLAMA, **old}).rope == rope
    newer = {key: value for key, value in LLAMA.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    assert read(tmp_path, {**newer, "rope_parameters": new}).rope == rope
    assert read(tmp_path, {**LLAMA, **old, "rope_parameters": new}).rope == rope  # both, in agreement


@pytest.mark.parametrize(
    ("config", "generation", "tokens"),
    [
        ({}, None, ()),
        ({"eos_token_id": 2}, None, (2,)),
        ({"eos_token_id": [2, 3]}, None, (2, 3)),
        ({"eos_token_id": 2}, {"temperature": 0.7}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 2]}, (5, 2)),
    ],
)
def test_end_of_sequence_tokens(
    config: dict[str, Any], generation: dict[str, Any] | None, tokens: tuple[int, ...], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert read(tmp_path, {**LLAMA, **config}).eos_token_ids == tokens


REFUSED: list[tuple[str, Any, str]] = [
    ("architectures", ["MistralForCausalLM"], "LlamaForCausalLM, Qwen2.*'MistralForCausalLM'"),
    ("architectures", None, "architectures must be one of .* 'None'"),
    ("architectures", "LlamaForCausalLM", "architectures must be one of"),
    ("architectures", ["LlamaForCausalLM", "Other"], "architectures must be one of .*Other"),
    ("model_type", "mistral", "model_type must be 'llama', .* got 'mistral'"),
    ("hidden_act", "gelu", "hidden_act must be \"silu\", but got 'gelu'"),
    ("use_sliding_window", True, "use_sliding_window must be false, but got True"),
    ("sliding_window", 4096, "sliding_window must be absent, but got 4096"),
    ("layer_types", ["full_attention", "sliding_attention"], "layer_types must be 'full_attention' in every layer"),
    ("layer_types", "sliding_attention", "layer_types must be"),
    ("layer_types", 3, "layer_types must be"),
    ("quantization_config", {"quant_method": "fp8"}, "quantization_config must be absent, but got .*fp8"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor must be 1.0, but got 0.5"),
    ("pretraining_tp", 2, "pretraining_tp must be 1, but got 2"),
    ("use_mrope", True, "use_mrope must be false"),
    ("rope_interleaved", True, "rope_interleaved must be false"),
    ("num_experts", 8, "may be set, but got num_experts; remove"),
    ("num_local_experts", 8, "num_local_experts"),
    ("logit_scale", 0.5, "logit_scale"),
    ("residual_multiplier", 0, "residual_multiplier"),
    ("is_causal", False, "is_causal"),
    ("original_max_position_embeddings", 32, "original_max_position_embeddings"),
    ("hidden_size", "32", "hidden_size must be a positive whole number, but got '32'"),
    ("hidden_size", None, "hidden_size must be a positive whole number, but got None"),
    ("hidden_size", 34, "hidden_size must be a multiple of num_attention_heads, but got 34 and 4"),
    ("vocab_size", 64.0, "vocab_size must be a positive whole number, but got 64.0"),
    ("intermediate_size", 0, "intermediate_size must be a positive whole number, but got 0"),
    ("num_hidden_layers", True, "num_hidden_layers must be a positive whole number, but got True"),
    ("num_attention_heads", -4, "num_attention_heads must be a positive whole number, but got -4"),
    ("num_key_value_heads", 3, "num_attention_heads must be a multiple of num_key_value_heads, but got 4 and 3"),
    ("num_key_value_heads", 0, "num_key_value_heads must be a positive whole number, but got 0"),
    ("head_dim", 7, "head_dim must be even, but got 7"),
    ("head_dim", "8", "head_dim must be a positive whole number, but got '8'"),
    ("max_position_embeddings", None, "max_position_embeddings must be a positive whole number, but got None"),
    ("rms_norm_eps", "1e-6", "rms_norm_eps must be a positive number, but got '1e-6'"),
    ("rms_norm_eps", 2.0, "rms_norm_eps must be in"),
    ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false, but got 1"),
    ("attention_bias", "no", "attention_bias must be true or false, but got 'no'"),
    ("mlp_bias", [], "mlp_bias must be true or false"),
    ("eos_token_id", "</s>", "eos_token_id must be a token id or a list of them, but got '</s>'"),
    ("bos_token_id", 1.5, "bos_token_id must be a token id"),
    ("rope_theta", "1e4", "rope_theta must be a positive number, but got '1e4'"),
    ("rope_theta", -1.0, "rope_theta must be a positive number, but got -1.0"),
    ("rope_scaling", [1], "rope_scaling must be an object or absent"),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type must be one of default, .* got 'dynamic'"),
    ("rope_scaling", {"type": "longrope", "factor": 2.0}, "got 'longrope'"),
    ("rope_scaling", {"type": ["yarn"], "factor": 2.0}, "rope_type must be one of"),
    ("rope_scaling", {"factor": 2.0}, "a default rope scaling may set nothing, but got factor"),
    ("rope_scaling", {"type": "default", "mrope_section": [1, 1, 2]}, "mrope_section"),
    ("rope_scaling", {"type": "linear"}, "a linear rope scaling must set factor"),
    ("rope_scaling", {"type": "linear", "factor": "2"}, "factor must be a positive number, but got '2'"),
    ("rope_scaling", {"type": "linear", "rope_type": "yarn", "factor": 2.0}, "rope_type must be said once, .*yarn"),
    ("rope_scaling", {"type": "llama3", "factor": 8.0}, "must set high_freq_factor, low_freq_factor"),
    ("rope_scaling", {"type": "yarn", "mscale": 1.0, **YARN}, "yarn rope scaling may set .*got mscale"),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}, "got partial_rotary_factor"),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}, "got full_attention"),
    ("rope_parameters", {"rope_type": "proportional"}, "got 'proportional'"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(key: str, value: Any, message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(tmp_path, {**LLAMA, key: value}))


@pytest.mark.parametrize("family", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_sliding_windows_of_qwen_are_refused_only_where_they_are_on(family: dict[str, Any], tmp_path: Path) -> None:
    off = {**family, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    assert read(tmp_path, off) == read(tmp_path, family)
    message = refusal(tmp_path, {**off, "use_sliding_window": True})
    assert "use_sliding_window must be false, but got True, which is not supported" in message
    message = refusal(tmp_path, {**off, "layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 4})
    assert "layer_types must be 'full_attention' in every layer" in message


def test_the_two_places_of_rope_must_not_disagree(tmp_path: Path) -> None:
    theta = {**LLAMA, "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}
    assert "rope_theta must be said once, but got 10000.0 and, in rope_parameters, 500000.0" in refusal(tmp_path, theta)
    kinds = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}
    assert "rope_type must be said once" in refusal(tmp_path, kinds)


def test_harmless_keys_are_let_through(tmp_path: Path) -> None:
    extra = {"initializer_range": 0.02, "unsloth_fixed": True, "pad_token_id": 3, "transformers.js_config": {"a": 1}}
    unset = {"use_mrope": False, "rope_interleaved": False, "pretraining_tp": 1, "num_experts": None}
    assert read(tmp_path, {**LLAMA, **extra, **unset}) == read(tmp_path, LLAMA)


@pytest.mark.parametrize("read_it", [read_target_config, read_draft_config])
def test_a_missing_or_damaged_file_is_named(read_it: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold config.json, but .* does not"):
        read_it(tmp_path)
    for text, message in (("{", "must be JSON"), ("[1]", "must be a JSON object, but it is a list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json' {message}"):
            read_it(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="must be JSON"):
        read_it(tmp_path)


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("no")
    assert "generation_config.json' must be JSON" in refusal(tmp_path, LLAMA)


ROPES = [
    RopeConfig(5e5),
    RopeConfig(1e4, "linear", 2.0),
    RopeConfig(5e5, "llama3", 8.0, 2.0, 5.0, 64),
    RopeConfig(1e6, "yarn", 4.0, original_max_position_embeddings=32),
    RopeConfig(1e6, "yarn", 4.0, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0, truncate=False),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("changes", [{}, {"target_hidden_size": 40, "head_dim": 20, "num_kv_heads": 1}])
def test_a_draft_configuration_reads_back_as_it_was_written(
    rope: RopeConfig, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(DRAFT, rope=rope, **changes)
    write_draft_config(config, tmp_path)
    assert read_draft_config(tmp_path) == config


def test_a_draft_configuration_has_the_keys_that_sglang_reads(tmp_path: Path) -> None:
    write_draft_config(replace(DRAFT, rope=RopeConfig(5e5)), tmp_path, "bfloat16")
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": 64,
        "draft_vocab_size": 24,
        "hidden_size": 32,
        "target_hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 3, 4]},  # input - 1
    }


@pytest.fixture
def draft(tmp_path: Path) -> dict[str, Any]:
    write_draft_config(DRAFT, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert isinstance(found, dict)
    return found


TAPS = "eagle_aux_hidden_state_layer_ids"


def test_drafts_of_other_makers_are_read(draft: dict[str, Any], tmp_path: Path) -> None:
    theirs = {
        **draft,
        "target_hidden_size": None,
        "norm_before_residual": False,
        "num_fc_norms": 0,
        "pretraining_tp": 1,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "eagle_config": {**draft["eagle_config"], "use_last_layernorm": True, "parallel_draft_step": 1},
    }
    assert read_draft_config(write_config(tmp_path, theirs)) == DRAFT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLMEagle3, but got 'LlamaForCausalLM'"),
        ({"architectures": ["LlamaForCausalLMEagle"]}, "LlamaForCausalLMEagle3, but got 'LlamaForCausalLMEagle'"),
        ({"architectures": None}, "LlamaForCausalLMEagle3, but got 'None'"),
        ({"model_type": "llama4_text"}, "model_type must be 'llama'.*'llama4_text'"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be 1, but got 2, which is not supported"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
        ({"attention_bias": True}, "attention_bias must be false"),
        ({"mlp_bias": True}, "mlp_bias must be false"),
        ({"bias": True}, "bias must be false"),
        ({"norm_before_residual": True}, "norm_before_residual must be false"),
        ({"norm_before_fc": True}, "norm_before_fc must be false"),
        ({"fc_norm": True}, "fc_norm must be false"),
        ({"num_fc_norms": 3}, "num_fc_norms must be 0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be absent"),
        ({"sliding_window": 64}, "sliding_window must be absent"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"num_experts": 4}, "may be set, but got num_experts"),
        ({"draft_vocab_size": None}, r"draft_vocab_size must be there \(SGLang reads it\).*write vocab_size"),
        ({"draft_vocab_size": 65}, r"draft_vocab_size must be in \[1, vocab_size=64\], but got 65"),
        ({"draft_vocab_size": "24"}, "draft_vocab_size must be a positive whole number, but got '24'"),
        ({"target_hidden_size": 0}, "target_hidden_size must be a positive whole number, but got 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'"),
        ({"eagle_config": None}, r"must name the three taps .*absent; write .*\[1, n//2 - 1, n - 4\]"),
        ({"eagle_config": [1, 3, 4]}, r"eagle_config must be an object, but got \[1, 3, 4\]"),
        ({"eagle_config": {TAPS: [1, 3]}}, r"taps must be three different layers .*\(2, 4\)"),
        ({"eagle_config": {TAPS: [1, 3, 3]}}, r"taps must be three different layers .*\(2, 4, 4\)"),
        ({"eagle_config": {TAPS: [3, 1, 4]}}, r"taps must be .* ascending .*\(4, 2, 5\)"),
        ({"eagle_config": {TAPS: [-1, 3, 4]}}, r"ascending from 1 on, but got \(0, 4, 5\)"),
        ({"eagle_config": {TAPS: ["1", 3, 4]}}, "must be a list of three layers"),
        ({"eagle_config": {TAPS: [1, 3, 4], "use_aux_hidden_state": False}}, "use_aux_hidden_state must be true"),
        ({"eagle_config": {TAPS: [1, 3, 4], "norm_before_fc": True}}, "eagle_config's norm_before_fc must be false"),
        ({"eagle_config": {TAPS: [1, 3, 4], "use_last_layernorm": False}}, "use_last_layernorm must be true"),
        ({"eagle_config": {TAPS: [1, 3, 4], "surprise": 1}}, "eagle_config's surprise must be absent, but got 1"),
    ],
)
def test_other_drafts_are_refused_by_name(
    changes: dict[str, Any], message: str, draft: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_draft_config(write_config(tmp_path, {**draft, **changes}))
    assert "\n" not in str(caught.value)


def test_default_taps_are_those_of_sglang() -> None:
    assert default_taps(32) == (2, 16, 29)
    assert default_taps(8) == (2, 4, 5)
    for layers in (4, 5, 6, 7):
        if len({2, layers // 2, layers - 3}) < 3:
            with pytest.raises(ValueError, match=f"a target of {layers} layers gives .*; name taps yourself"):
                default_taps(layers)
