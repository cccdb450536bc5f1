"""The shapes of targets and drafts. `specrl.models.hf_config` reads them from config.json."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

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

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, slots=True)
class DraftArchitecture:
    """The shape of an EAGLE3 draft.

    Args:
        vocab_size: of the target.
        aux_layers: three layers of the target whose input the draft reads, counted from 0. config.json names the layers
            whose output that is, one less each.
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
        if not 1 <= size <= vocab_size:
            raise ValueError(f"draft_vocab_size must be in [1, vocab_size={vocab_size}], but got {size}")
        if len(layers) != 3 or not 1 <= layers[0] < layers[1] < layers[2]:
            raise ValueError(
                f"aux_layers must be three different layers of the target, ascending from 1 on, but got {layers}"
            )


def _check_sizes(config: TargetArchitecture | DraftArchitecture) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{field.name} must be a positive whole number, but got {value!r}")
        if field.type == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be true or false, but got {value!r}")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % kv_heads:
        rule = "num_attention_heads must be a multiple of num_key_value_heads"
        raise ValueError(f"{rule}, but got {heads} and {kv_heads}")
    if config.head_dim % 2:
        raise ValueError(f"head_dim must be even, but got {config.head_dim}")
    if not 0 < config.rms_norm_eps < 1:
        raise ValueError(f"rms_norm_eps must be in (0, 1), but got {config.rms_norm_eps}")


def default_aux_layers(num_layers: int) -> tuple[int, ...]:
    """SGLang's default aux layers [2, n // 2, n - 3]: the layers whose inputs an EAGLE3 draft reads.

    Raises:
        ValueError: they are not three different layers.
    """
    layers = (2, num_layers // 2, num_layers - 3)
    if len(set(layers)) != 3 or layers[2] < 1:
        raise ValueError(
            "the default aux_layers [2, n // 2, n - 3] must be three different layers, but a target of "
            f"{num_layers} layers gives {list(layers)}; name aux_layers yourself"
        )
    return layers
