"""Configurations of targets and drafts, read from config.json; what is not supported is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from specrl.models.rope import RopeConfig

Family = Literal["llama", "qwen2", "qwen3"]
_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Keys that do not change what a forward pass computes.
_HARMLESS = frozenset(
    """_name_or_path architectures attention_dropout bos_token_id chunk_size_feed_forward dtype eos_token_id
    finetuning_task id2label initializer_range is_decoder is_encoder_decoder label2id max_window_layers model_type
    output_attentions output_hidden_states pad_token_id problem_type return_dict sliding_window tf_legacy_loss
    tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache
    add_cross_attention cross_attention_hidden_size unsloth_fixed unsloth_version""".split()
)
_READ = frozenset(
    """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    hidden_act rms_norm_eps rope_theta rope_scaling rope_parameters max_position_embeddings tie_word_embeddings
    attention_bias mlp_bias use_sliding_window layer_types pretraining_tp partial_rotary_factor
    quantization_config""".split()
)


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
        _check_heads(self.num_heads, self.num_kv_heads, self.head_dim)

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
        _check_heads(self.num_heads, self.num_kv_heads, self.head_dim)
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be in [1, vocab_size={self.vocab_size}], but got {self.draft_vocab_size}"
            )
        if len(self.taps) != 3 or len(set(self.taps)) != 3 or min(self.taps) < 1:
            raise ValueError(f"taps must be three different layers of the target from 1 on, but got {self.taps}")


def _check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_attention_heads must be a multiple of num_key_value_heads, but got {heads} and {kv_heads}"
        )
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be even, but got {head_dim}")


def read_target_config(directory: Path) -> TargetConfig:
    """Read a Hugging Face config.json (and generation_config.json's end-of-sequence tokens).

    Raises:
        ValueError: no such file, or anything in it that would change the computation and is not supported, by name.
    """
    config = _read_json(Path(directory) / "config.json")
    names = config.get("architectures") or [None]
    if names[0] not in _FAMILIES:
        raise ValueError(f"architectures must be one of {', '.join(_FAMILIES)}, but got {names[0]!r}")
    family = _FAMILIES[names[0]]
    _refuse(config)
    eos = config.get("eos_token_id")
    generation = Path(directory) / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id", eos)
    hidden, heads = _need(config, "hidden_size"), _need(config, "num_attention_heads")
    bias = bool(config.get("attention_bias", False))
    bos = config.get("bos_token_id")
    return TargetConfig(
        family=family,
        vocab_size=_need(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_need(config, "intermediate_size"),
        num_layers=_need(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config),
        max_position_embeddings=_need(config, "max_position_embeddings"),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias or family == "qwen2",
        attention_output_bias=bias and family != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        bos_token_id=bos if isinstance(bos, int) else None,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _refuse(config: Mapping[str, Any]) -> None:
    """Refuse by name what would change the computation."""
    act = config.get("hidden_act", "silu")
    rules = {
        "hidden_act": (act == "silu", "'silu'"),
        "use_sliding_window": (not config.get("use_sliding_window"), "false"),
        "layer_types": (set(config.get("layer_types") or ()) <= {"full_attention"}, "'full_attention' in every layer"),
        "quantization_config": (not config.get("quantization_config"), "absent"),
        "pretraining_tp": (config.get("pretraining_tp", 1) == 1, "1"),
        "partial_rotary_factor": (config.get("partial_rotary_factor", 1.0) == 1.0, "1.0"),
    }
    for key, (fine, rule) in rules.items():
        if not fine:
            raise ValueError(f"config.json: {key} must be {rule}, but got {config.get(key)!r}, which is not supported")
    if config.get("sliding_window") and config.get("model_type") not in ("qwen2", "qwen3"):
        raise ValueError(f"config.json: sliding_window must be absent, but got {config['sliding_window']!r}")
    unknown = sorted(set(config) - _HARMLESS - _READ)
    changing = [key for key in unknown if config[key] not in (None, False)]
    if changing:
        raise ValueError(
            f"config.json: only keys whose meaning is known may be set, but got {', '.join(changing)}; "
            "a model with them is not supported"
        )


def _read_rope(config: Mapping[str, Any]) -> RopeConfig:
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    said = {**old, **new}
    theta = float(said.get("rope_theta", config.get("rope_theta") or 10000.0))
    kind = said.get("rope_type", said.get("type", "default"))
    keys = {
        "default": set(),
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        "yarn": {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
        },
    }
    if kind not in keys:
        raise ValueError(f"config.json: rope_type must be one of {', '.join(keys)}, but got {kind!r}")
    values = {k: v for k, v in said.items() if k not in ("rope_type", "type", "rope_theta") and v is not None}
    if values.get("partial_rotary_factor", 1.0) == 1.0:
        values.pop("partial_rotary_factor", None)
    unknown = sorted(set(values) - keys[kind])
    if kind != "default" and unknown or "partial_rotary_factor" in values:
        raise ValueError(
            f"config.json: a {kind} rope scaling may set {sorted(keys[kind])}, but got {', '.join(unknown)}"
        )
    if kind == "default":
        return RopeConfig(theta)
    if "factor" not in values:
        raise ValueError(f"config.json: a {kind} rope scaling must set its factor, but it does not")
    values.setdefault("original_max_position_embeddings", config.get("max_position_embeddings", 8192))
    return RopeConfig(theta, kind, **values)


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
    config = _read_json(Path(directory) / "config.json")
    names = config.get("architectures") or [None]
    if names[0] not in ("LlamaForCausalLMEagle3", "LlamaForCausalLMEagle"):
        raise ValueError(f"a draft's architectures must be LlamaForCausalLMEagle3, but got {names[0]!r}")
    eagle = dict(config.get("eagle_config") or {})
    for key, want in (
        ("num_hidden_layers", 1),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("norm_before_residual", False),
        ("norm_before_fc", False),
        ("fc_norm", False),
        ("num_fc_norms", 0),
    ):
        got = config.get(key, eagle.get(key, want))
        if got not in (want, None):
            raise ValueError(f"draft config.json: {key} must be {want!r}, but got {got!r}, which is not supported")
    if "draft_vocab_size" not in config:
        raise ValueError("draft config.json: draft_vocab_size must be there (SGLang reads it), but it is not")
    if eagle.get("use_aux_hidden_state", True) is not True:
        raise ValueError("draft config.json: eagle_config.use_aux_hidden_state must be true, but got false")
    ids = eagle.get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        raise ValueError(
            "draft config.json: eagle_config.eagle_aux_hidden_state_layer_ids must name the three taps (each one less "
            "than the layer whose input is read), but it is absent; write the target's defaults [1, n//2 - 1, n - 4]"
        )
    hidden, heads = _need(config, "hidden_size"), _need(config, "num_attention_heads")
    return DraftConfig(
        vocab_size=_need(config, "vocab_size"),
        draft_vocab_size=int(config["draft_vocab_size"]),
        hidden_size=hidden,
        target_hidden_size=int(config.get("target_hidden_size") or hidden),
        intermediate_size=_need(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_read_rope(config),
        max_position_embeddings=_need(config, "max_position_embeddings"),
        taps=tuple(int(i) + 1 for i in ids),
    )


def write_draft_config(config: DraftConfig, directory: Path) -> None:
    """Write config.json as SGLang reads it, the taps explicitly."""
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
        "torch_dtype": "float32",
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [tap - 1 for tap in c.taps],
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


def _need(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} must be a positive whole number, but got {value!r}")
    return value
