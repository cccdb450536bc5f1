"""Configurations of targets and drafts, read from config.json; what is not supported is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeGuard

from specrl.models.rope import RopeConfig

Family = Literal["llama", "qwen2", "qwen3"]
_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Keys that do not change what a forward pass computes.
_HARMLESS = frozenset(
    """_name_or_path add_cross_attention architectures attention_dropout bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size dtype eos_token_id finetuning_task id2label initializer_range is_decoder
    is_encoder_decoder is_llama_config label2id max_window_layers model_type output_attentions output_hidden_states
    pad_token_id problem_type return_dict tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache""".split()
)
_READ = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings attention_bias
    mlp_bias sliding_window layer_types quantization_config""".split()
)
# Keys that may be set to one value only; absent and null mean the same.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
}
# What a draft may set besides, at the top or in its eagle_config.
_ONLY_IN_DRAFTS: dict[str, Any] = {
    "num_hidden_layers": 1,
    "attention_bias": False,
    "bias": False,
    "fc_norm": False,
    "mlp_bias": False,
    "norm_before_fc": False,
    "norm_before_residual": False,
    "num_fc_norms": 0,
    "parallel_draft_step": 1,
    "tie_word_embeddings": False,
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
}
_TAPS = "eagle_aux_hidden_state_layer_ids"
# What each kind of rope scaling must set, and may set.
_ROPE_KEYS: dict[Any, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset({"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"}),
    ),
}


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """The shape of a target."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k, v
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """The shape of an EAGLE3 draft.

    `taps` are layers of the target whose INPUT is read (SGLang's default numbering; explicit ids in config.json are
    one less).
    """

    vocab_size: int  # the target's
    draft_vocab_size: int
    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    taps: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(self)
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be in [1, vocab_size={self.vocab_size}], but got {self.draft_vocab_size}"
            )
        if len(self.taps) != 3 or not 1 <= self.taps[0] < self.taps[1] < self.taps[2]:
            raise ValueError(
                f"taps must be three different layers of the target, ascending from 1 on, but got {self.taps}"
            )


def _check_sizes(config: TargetConfig | DraftConfig) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (not _is_whole(value) or value < 1):
            raise ValueError(f"{field.name} must be a positive whole number, but got {value!r}")
    if config.num_heads % config.num_kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, but got {config.num_heads} and "
            f"{config.num_kv_heads}"
        )
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even, but got {config.head_dim}")
    if not 0 < config.rms_norm_eps < 1:
        raise ValueError(f"rms_norm_eps must be in (0, 1), but got {config.rms_norm_eps}")


def read_target_config(directory: Path) -> TargetConfig:
    """Read a Hugging Face config.json (and generation_config.json's end-of-sequence tokens).

    Raises:
        ValueError: no such file, or anything in it that would change the computation and is not supported, by name.
    """
    config = _read_json(Path(directory) / "config.json")
    name = _architecture(config)
    if name not in _FAMILIES:
        raise ValueError(f"config.json: architectures must be one of {', '.join(_FAMILIES)}, but got {name!r}")
    family = _FAMILIES[name]
    _refuse(config, family, "config.json", _ONLY)
    eos = config.get("eos_token_id")
    generation = Path(directory) / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id", eos)
    bias = _flag(config, "attention_bias")
    bos = _token_ids(config.get("bos_token_id"), "bos_token_id")
    return TargetConfig(
        family=family,
        **_shared(config, head_dim=128 if family == "qwen3" else None),
        num_layers=_count(config, "num_hidden_layers"),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=bias or family == "qwen2",
        attention_output_bias=bias and family != "qwen2",
        mlp_bias=_flag(config, "mlp_bias") and family == "llama",
        qk_norm=family == "qwen3",
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=_token_ids(eos, "eos_token_id"),
    )


def _architecture(config: Mapping[str, Any]) -> object:
    """The only entry of `architectures`; anything else as it stands."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else repr(names)


def _refuse(
    config: Mapping[str, Any], family: Family, where: str, only: Mapping[str, Any], known: frozenset[str] = frozenset()
) -> None:
    """Refuse by name what would change the computation."""
    layers, window = config.get("layer_types") or (), config.get("sliding_window")
    full = isinstance(layers, list | tuple) and all(layer == "full_attention" for layer in layers)
    rules = [(key, _is(config.get(key), value), json.dumps(value)) for key, value in only.items()]
    rules += [
        ("model_type", config.get("model_type") in (None, family), f"{family!r}, as its architecture is"),
        ("layer_types", full, "'full_attention' in every layer"),
        ("sliding_window", window is None or family != "llama", "absent"),  # Qwen's is off by use_sliding_window
        ("quantization_config", not config.get("quantization_config"), "absent"),
    ]
    for key, fine, rule in rules:
        if not fine:
            raise ValueError(f"{where}: {key} must be {rule}, but got {config.get(key)!r}, which is not supported")
    unknown = sorted(key for key in set(config) - _HARMLESS - _READ - set(only) - known if config[key] is not None)
    if unknown:
        raise ValueError(
            f"{where}: only keys whose meaning is known may be set, but got {', '.join(unknown)}; "
            "remove those that do not change what the model computes; with others it is not supported"
        )


def _is(value: object, wanted: object) -> bool:
    """Whether a value is absent or the wanted one: neither 0 nor 1 is a truth value."""
    return value is None or (value == wanted and isinstance(value, bool) == isinstance(wanted, bool))


def _shared(config: Mapping[str, Any], head_dim: int | None = None) -> dict[str, Any]:
    """What targets and drafts state alike; `head_dim` is the family's default, None: the heads share hidden_size."""
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    if head_dim is None and config.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"config.json: without head_dim, hidden_size must be a multiple of num_attention_heads, but got {hidden} "
            f"and {heads}"
        )
    return {
        "vocab_size": _count(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _count(config, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": _count(config, "num_key_value_heads", heads),
        "head_dim": _count(config, "head_dim", head_dim or hidden // heads),
        "rms_norm_eps": _number(config, "rms_norm_eps", 1e-6),
        "rope": _read_rope(config),
        "max_position_embeddings": _count(config, "max_position_embeddings"),
    }


def _read_rope(config: Mapping[str, Any]) -> RopeConfig:
    """The older spelling (rope_theta, rope_scaling) and the newer (rope_parameters), which must not disagree."""
    said: dict[str, Any] = {}
    if config.get("rope_theta") is not None:
        said["rope_theta"] = config["rope_theta"]
    for where in ("rope_scaling", "rope_parameters"):
        part = config.get(where) or {}
        if not isinstance(part, dict):
            raise ValueError(f"config.json: {where} must be an object or absent, but got {part!r}")
        for key, value in part.items():
            key = "rope_type" if key == "type" else key
            if value is not None and said.setdefault(key, value) != value:
                raise ValueError(
                    f"config.json: {key} must be said once, but got {said[key]!r} and, in {where}, {value!r}"
                )
    theta = _number(said, "rope_theta", 10000.0)
    kind = said.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ValueError(f"config.json: rope_type must be one of {', '.join(_ROPE_KEYS)}, but got {kind!r}")
    must, may = _ROPE_KEYS[kind]
    values = {key: value for key, value in said.items() if key not in ("rope_type", "rope_theta")}
    if values.get("partial_rotary_factor") == 1.0:
        del values["partial_rotary_factor"]
    missing, unknown = sorted(must - set(values)), sorted(set(values) - must - may)
    if missing:
        raise ValueError(f"config.json: a {kind} rope scaling must set {', '.join(missing)}, but it does not")
    if unknown:
        raise ValueError(
            f"config.json: a {kind} rope scaling may set {', '.join(sorted(must | may)) or 'nothing'}, but got "
            f"{', '.join(unknown)}, which is not supported"
        )
    if "original_max_position_embeddings" in may:
        values.setdefault("original_max_position_embeddings", _count(config, "max_position_embeddings"))
    return RopeConfig(theta, kind, **values)  # type: ignore[arg-type]


def default_taps(num_layers: int) -> tuple[int, ...]:
    """SGLang's default taps [2, n // 2, n - 3]: layers whose inputs an EAGLE3 draft reads.

    Raises:
        ValueError: they are not three different layers.
    """
    taps = (2, num_layers // 2, num_layers - 3)
    if len(set(taps)) != 3 or taps[2] < 1:
        raise ValueError(
            f"the default taps [2, n // 2, n - 3] must be three different layers, but a target of {num_layers} layers "
            f"gives {list(taps)}; name taps yourself"
        )
    return taps


def read_draft_config(directory: Path) -> DraftConfig:
    """Read an EAGLE3 draft's config.json as SGLang does.

    Raises:
        ValueError: no such file, another architecture, or a variant that is not supported, by name.
    """
    config, where = _read_json(Path(directory) / "config.json"), "draft config.json"
    name = _architecture(config)
    if name != "LlamaForCausalLMEagle3":
        raise ValueError(f"{where}: architectures must be LlamaForCausalLMEagle3, but got {name!r}")
    eagle = config.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise ValueError(f"{where}: eagle_config must be an object, but got {eagle!r}")
    only = _ONLY | _ONLY_IN_DRAFTS
    _refuse(config, "llama", where, only, frozenset({"draft_vocab_size", "target_hidden_size", "eagle_config"}))
    for key, value in eagle.items():
        if key != _TAPS and (key not in only or not _is(value, only[key])):
            rule = json.dumps(only[key]) if key in only else "absent"
            raise ValueError(f"{where}: eagle_config's {key} must be {rule}, but got {value!r}, which is not supported")
    if config.get("draft_vocab_size") is None:
        raise ValueError(f"{where}: draft_vocab_size must be there (SGLang reads it), but it is not; write vocab_size")
    ids = eagle.get(_TAPS)
    if ids is None:
        raise ValueError(
            f"{where}: eagle_config.{_TAPS} must name the three taps (each one less than the layer whose input is "
            "read), but it is absent; write the target's defaults [1, n//2 - 1, n - 4]"
        )
    if not isinstance(ids, list) or not all(_is_whole(i) for i in ids):
        raise ValueError(f"{where}: eagle_config.{_TAPS} must be a list of three layers, but got {ids!r}")
    return DraftConfig(
        **_shared(config),
        draft_vocab_size=_count(config, "draft_vocab_size"),
        target_hidden_size=_count(config, "target_hidden_size", config["hidden_size"]),
        taps=tuple(i + 1 for i in ids),
    )


def write_draft_config(config: DraftConfig, directory: Path, dtype: str = "float32") -> None:
    """Write config.json as SGLang reads it, the taps explicitly; `dtype` is that of the weights beside it."""
    c, r = config, config.rope
    out: dict[str, Any] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "draft_vocab_size": c.draft_vocab_size,
        "hidden_size": c.hidden_size,
        "target_hidden_size": c.target_hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_theta": r.theta,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "eagle_config": {
            "use_aux_hidden_state": True,
            _TAPS: [tap - 1 for tap in c.taps],
        },
    }
    if r.kind != "default":
        out["rope_scaling"] = _rope_scaling(r)
    (Path(directory) / "config.json").write_text(json.dumps(out, indent=2) + "\n", encoding="utf-8")


def _rope_scaling(rope: RopeConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        if rope.attention_factor is not None:
            out["attention_factor"] = rope.attention_factor
    if rope.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_max_position_embeddings
    return out


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"a checkpoint directory must hold {path.name}, but {str(path.parent)!r} does not")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} must be JSON, but it is not ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} must be a JSON object, but it is a {type(found).__name__}")
    return found


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _count(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not _is_whole(value) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive whole number, but got {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {key} must be a positive number, but got {value!r}")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    value = False if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key} must be true or false, but got {value!r}")
    return value


def _token_ids(value: object, key: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(_is_whole(i) and i >= 0 for i in ids):
        raise ValueError(f"config.json: {key} must be a token id or a list of them, but got {value!r}")
    return tuple(ids)
