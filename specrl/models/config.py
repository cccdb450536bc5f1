"""The shapes of targets and drafts. `specrl.models.hf_config` reads them from config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from specrl.core.checks import require
from specrl.models.rope import RopeConfig

Family = Literal["llama", "qwen2", "qwen3"]


@dataclass(frozen=True, slots=True)
class TargetArchitecture:
    """The shape of a target model. Names follow `transformers`, with `num_` for counts."""

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
    attention_bias: bool = False  # of the query, key and value projections
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self)


@dataclass(frozen=True, slots=True)
class DraftArchitecture:
    """The shape of an EAGLE3 draft.

    Args:
        vocab_size: of the target.
        aux_layers: three layers of the target whose input the draft reads, counted from 0. config.json holds the layers
            before them, whose output that is.
    """

    vocab_size: int
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
    aux_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(self)
        vocab_size, size, layers = self.vocab_size, self.draft_vocab_size, self.aux_layers
        require(size <= vocab_size, "draft_vocab_size", f"at most vocab_size={vocab_size}", size)
        ascending = len(layers) == 3 and 1 <= layers[0] < layers[1] < layers[2]
        require(ascending, "aux_layers", "three layers of the target, ascending from 1 on", layers)


def _check_sizes(config: TargetArchitecture | DraftArchitecture) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int":
            require(type(value) is int and value >= 1, field.name, "a positive whole number", value)
        elif field.type == "bool":
            require(type(value) is bool, field.name, "true or false", value)
    heads = (config.num_heads, config.num_kv_heads)
    require(heads[0] % heads[1] == 0, "num_attention_heads", "a multiple of num_key_value_heads", heads)
    require(config.head_dim % 2 == 0, "head_dim", "even", config.head_dim)
    require(0 < config.rms_norm_eps < 1, "rms_norm_eps", "in (0, 1)", config.rms_norm_eps)


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """Return SGLang's default aux layers [2, n // 2, n - 3]: the layers whose inputs an EAGLE3 draft reads.

    Raises:
        ValueError: they are not three different layers.
    """
    layers = (2, num_layers // 2, num_layers - 3)
    rule = f"three different layers, so that a target of {num_layers} layers needs other aux_layers"
    require(len(set(layers)) == 3 and layers[2] >= 1, "the default aux_layers [2, n // 2, n - 3]", rule, layers)
    return layers
