"""config.json as `transformers` reads it, converted to the shapes that this package computes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specrl.core.checks import require
from specrl.models.config import DraftArchitecture, TargetArchitecture
from specrl.models.rope import RopeConfig

_TARGETS = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DRAFTS = {"llama": "LlamaForCausalLMEagle3"}
_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"

# Keys of config.json that targets and drafts share, and the fields that hold them, except head_dim and rope.
_KEYS = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}
_KEYS |= {key: key for key in ("vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")}
_KEYS["max_position_embeddings"] = "max_position_embeddings"

# Supported values. A missing key or null is supported too, and every entry of a list is checked. transformers has
# filled in its default values and renamed old keys before. Other keys change nothing in its models.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "is_causal": (True,),
    "layer_types": ("full_attention",),
    "quantization_config": (),
    "sliding_window": (),
}
# Variants of EAGLE3, set at the top level or in `eagle_config`.
_SUPPORTED_DRAFTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_hidden_layers", "parallel_draft_step"), (1,)),
    **dict.fromkeys(("attention_bias", "bias", "fc_norm", "mlp_bias", "norm_before_fc"), (False,)),
    **dict.fromkeys(("norm_before_residual", "tie_word_embeddings", "use_mtp_layernorm"), (False,)),
    **dict.fromkeys(("use_aux_hidden_state", "use_input_layernorm_in_first_layer", "use_last_layernorm"), (True,)),
    "num_fc_norms": (0,),
}
# The rope types that specrl.models.rope computes, and their parameters.
_ROPE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
}
_SUPPORTED_ROPE: dict[str, tuple[Any, ...]] = {"rope_type": tuple(_ROPE_PARAMETERS), "partial_rotary_factor": (1.0,)}


def read_target_config(directory: str | Path) -> TargetArchitecture:
    """Read a target's config.json, and the end-of-sequence tokens of its generation_config.json if there is one.

    Raises:
        ValueError: a file is missing or damaged, or the model is one that this package does not compute.
    """
    file = Path(directory, "config.json")
    config = _load(file, _TARGETS)
    family, bias = config.model_type, getattr(config, "attention_bias", False)
    eos_token_ids = _eos_token_ids(file, config)
    with _reading(file):
        return TargetArchitecture(
            family=family,
            **_shape(config),
            num_layers=config.num_hidden_layers,
            tie_word_embeddings=config.tie_word_embeddings,
            attention_bias=bias or family == "qwen2",
            attention_output_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and config.mlp_bias,
            qk_norm=family == "qwen3",
            bos_token_id=config.bos_token_id,
            eos_token_ids=eos_token_ids,
        )


def read_draft_config(directory: str | Path) -> DraftArchitecture:
    """Read an EAGLE3 draft's config.json as SGLang does.

    Raises:
        ValueError: the file is missing or damaged, or the draft is one that this package does not compute.
    """
    file = Path(directory, "config.json")
    config = _load(file, _DRAFTS)
    values = config.to_dict()
    eagle = values.get("eagle_config") or {}
    _require(file, isinstance(eagle, dict), "eagle_config", "an object", eagle)
    unknown = {key: () for key in eagle if key != _AUX_LAYERS}
    _check(file, values, _SUPPORTED_DRAFTS)
    _check(file, eagle, unknown | _SUPPORTED_DRAFTS, "eagle_config.")
    layers: Any = eagle.get(_AUX_LAYERS)
    listed = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    rule = "a list of three layers, such as SGLang's default [1, n//2 - 1, n - 4] for n layers"
    _require(file, listed, f"eagle_config.{_AUX_LAYERS}", rule, layers)
    hidden_size = values.get("target_hidden_size")
    with _reading(file):
        return DraftArchitecture(
            **_shape(config),
            draft_vocab_size=values.get("draft_vocab_size"),  # SGLang reads it, so it must be there
            target_hidden_size=config.hidden_size if hidden_size is None else hidden_size,
            aux_layers=tuple(layer + 1 for layer in layers),
        )


def write_draft_config(config: DraftArchitecture, directory: Path, dtype: str = "float32") -> None:
    """Write config.json as SGLang reads it, with explicit aux layers; `dtype` is that of the weights beside it."""
    rope = config.rope
    out: dict[str, Any] = {
        "architectures": [_DRAFTS["llama"]],
        "model_type": "llama",
        **{key: getattr(config, name) for key, name in _KEYS.items()},
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        "num_hidden_layers": 1,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": rope.theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "eagle_config": {"use_aux_hidden_state": True, _AUX_LAYERS: [layer - 1 for layer in config.aux_layers]},
    }
    if rope.kind != "default":
        values = {name: getattr(rope, name) for name in _ROPE_PARAMETERS[rope.kind]}
        out["rope_scaling"] = {"rope_type": rope.kind} | {n: v for n, v in values.items() if v is not None}
    Path(directory, "config.json").write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")


def _load(file: Path, architectures: Mapping[str, str]) -> Any:
    """Read the file as a `PreTrainedConfig` of one of the architectures, which are named by model_type."""
    from transformers import AutoConfig, PreTrainedConfig

    if not file.is_file():
        raise ValueError(f"a checkpoint must hold config.json, but {str(file.parent)!r} does not; give its directory")
    with _reading(file):
        content, _ = PreTrainedConfig.get_config_dict(str(file.parent), local_files_only=True)
        model = (content.get("architectures"), content.get("model_type"))
    supported = [([name], kind) for kind, name in architectures.items()]
    _require(file, model in supported, "architectures and model_type", " or ".join(map(str, supported)), model)
    with _reading(file):
        config = AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
    _check(file, config.to_dict(), _SUPPORTED)
    rope = config.rope_parameters
    known = ("rope_theta", "type", *_SUPPORTED_ROPE, *_ROPE_PARAMETERS.get(str(rope["rope_type"]), ()))
    _check(file, rope, _SUPPORTED_ROPE | {name: () for name in rope if name not in known}, "rope_parameters.")
    return config


def _shape(config: Any) -> dict[str, Any]:
    """Return the fields that targets and drafts share."""
    shape = {name: getattr(config, key) for key, name in _KEYS.items()}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {**shape, "head_dim": head_dim, "rope": _rope(config.rope_parameters)}


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
    optional = ("attention_factor", "beta_fast", "beta_slow")  # transformers computes these if they are null
    names = [name for name in _ROPE_PARAMETERS[parameters["rope_type"]] if name in parameters]
    values = {name: parameters[name] for name in names if parameters[name] is not None or name not in optional}
    return RopeConfig(parameters["rope_theta"], parameters["rope_type"], **values)


def _eos_token_ids(file: Path, config: Any) -> tuple[int, ...]:
    from transformers import GenerationConfig

    ids = config.eos_token_id
    generation = file.with_name("generation_config.json")
    if generation.is_file():
        with _reading(generation):
            generated = GenerationConfig.from_pretrained(str(file.parent), local_files_only=True).eos_token_id
        ids = ids if generated is None else generated
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def _check(file: Path, values: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Require that each key is absent or has supported values only."""
    for key, allowed in supported.items():
        value = values.get(key)
        entries = value if isinstance(value, list) else [value] if value not in (None, {}) else []
        rule = " or ".join(map(json.dumps, allowed)) or "absent"
        _require(file, all(entry in allowed for entry in entries), prefix + key, rule, value)


def _require(file: Path, condition: bool, key: str, rule: str, value: object) -> None:
    """Raise the error for a configuration that can be read but not computed, unless a condition holds."""
    require(condition, f"{file}: {key}", f"{rule} (other values are not supported)", value)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise a ValueError that names the file, on one line, whatever goes wrong inside."""
    try:
        yield
    except Exception as error:  # the type depends on the file: OSError, ValueError, TypeError and others
        rule, reason = f"{file} must be a valid configuration, but it is not", " ".join(str(error).split())
        raise ValueError(f"{rule} ({reason}); correct it or download it again") from error
