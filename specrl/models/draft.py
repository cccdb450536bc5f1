"""The EAGLE3 draft: its weights as SGLang reads them, and the form that serves.

EAGLE-3 (Li et al., 2025, arXiv:2503.01840): one decoder layer that reads the target's hidden states at three
depths, fused by `fc`, next to the embedding of the following token. After that it reads its own output.

Slot t of a request holds (hidden states of token t, embedding of token t + 1) and predicts token t + 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specrl.core.checks import require
from specrl.models.attention import CachedAttention, KVCache, TokenSlots
from specrl.models.checkpoint import check_tensors, expected_draft_tensors, read_tensors, save_tensors, write_atomic
from specrl.models.config import DraftArchitecture, default_aux_layers
from specrl.models.hf_config import read_draft_config, write_draft_config
from specrl.models.layer import DecoderLayer, GatedMLP, Norm, interleave
from specrl.models.linear import Linear
from specrl.models.rope import rope_table
from specrl.models.target import DRAFT_POSITIONS, Target

_INIT_STD = 0.02
_VOCABULARY = ("d2t", "t2d")  # integer tensors


class Draft:
    """An EAGLE3 draft's weights by SGLang's names, float32, on the CPU unless moved by their owner.

    Args:
        config: its shape.
        tensors: every tensor of `expected_draft_tensors(config)`.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen or not finite, or `d2t` does not map into the vocabulary.
    """

    def __init__(self, config: DraftArchitecture, tensors: Mapping[str, Tensor]) -> None:
        check_tensors(tensors, expected_draft_tensors(config), what="draft", optional=("t2d",))
        self.config = config
        self.tensors = {name: t if name in _VOCABULARY else t.float() for name, t in tensors.items()}
        if "d2t" in self.tensors:
            self.tensors["d2t"] = self.tensors["d2t"].to(torch.int64)
            self.tensors["t2d"] = _membership(self.tensors["d2t"], config)
        self.target_ids = vocabulary_ids(self.tensors, config)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor by its SGLang name (no copies)."""
        return dict(self.tensors)

    def save(self, directory: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and model.safetensors atomically, without the target's embedding.

        Raises:
            ValueError: the directory holds other files, which would be lost.
        """
        others = sorted({path.name for path in Path(directory).glob("*")} - {"config.json", "model.safetensors"})
        if others:
            rule = f"a draft must be saved to its own directory, but {str(directory)!r} holds {others[0]!r}"
            raise ValueError(f"{rule}, which would be lost; use another directory")
        tensors = {n: t if n in _VOCABULARY else t.to(dtype) for n, t in self.tensors.items()}

        def write(into: Path) -> None:
            write_draft_config(self.config, into, str(dtype).removeprefix("torch."))
            save_tensors(into / "model.safetensors", tensors)

        write_atomic(Path(directory), write)


def vocabulary_ids(tensors: Mapping[str, Tensor], config: DraftArchitecture) -> Tensor | None:
    """Return the target ids of the draft's vocabulary [Vd] int64 (`i + d2t[i]`); None: the target's vocabulary."""
    if "d2t" not in tensors:
        return None
    offsets = tensors["d2t"].to(torch.int64)
    return torch.arange(config.draft_vocab_size, device=offsets.device) + offsets


def _membership(d2t: Tensor, config: DraftArchitecture) -> Tensor:
    """Return t2d [V] bool, the members of the vocabulary of offsets d2t."""
    ids, vocab_size = torch.arange(len(d2t)) + d2t.cpu(), config.vocab_size
    valid = int(ids.min()) >= 0 and int(ids.max()) < vocab_size and len(ids.unique()) == len(ids)
    rule = f"offsets, so that the target ids i + d2t[i] are different and in [0, {vocab_size})"
    require(valid, "d2t", rule, d2t[:5].tolist())
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)


def new_draft(
    target: Target,
    *,
    draft_vocab_size: int | None = None,
    vocabulary: Tensor | None = None,
    intermediate_size: int | None = None,
    aux_layers: tuple[int, ...] | None = None,
    seed: int = 0,
) -> Draft:
    """Make a draft for `target` with random weights; only the head starts as a copy of the target's rows.

    Args:
        target: the model whose embedding the draft will share and whose hidden states it will read.
        draft_vocab_size: entries of the draft's vocabulary; None: as many as the target has.
        vocabulary: [Vd] int64 target ids, ascending; None: the first `draft_vocab_size`.
        intermediate_size: width of the MLP; None: the target's.
        aux_layers: layers of the target whose inputs the draft reads; None: SGLang's default [2, n // 2, n - 3].
        seed: of the initialisation.

    Raises:
        ValueError: a size, the vocabulary or a layer does not fit the target.
    """
    t = target.config
    if vocabulary is None:
        size = t.vocab_size if draft_vocab_size is None else draft_vocab_size
        require(1 <= size <= t.vocab_size, "draft_vocab_size", f"in [1, {t.vocab_size}]", size)
        vocabulary = torch.arange(size)
    ids, size = vocabulary.cpu(), len(vocabulary)
    require(draft_vocab_size in (None, size), "draft_vocab_size", f"the length of vocabulary, {size}", draft_vocab_size)
    valid = ids.dtype == torch.int64 and ids.ndim == 1 and size > 0 and 0 <= int(ids[0]) <= int(ids[-1]) < t.vocab_size
    rule = f"ascending token ids in [0, {t.vocab_size}), int64 [Vd]"
    require(valid and bool((ids.diff() > 0).all()), "vocabulary", rule, ids.flatten()[:5].tolist())
    config = DraftArchitecture(
        vocab_size=t.vocab_size,
        draft_vocab_size=size,
        hidden_size=t.hidden_size,
        target_hidden_size=t.hidden_size,
        intermediate_size=t.intermediate_size if intermediate_size is None else intermediate_size,
        num_heads=t.num_heads,
        num_kv_heads=t.num_kv_heads,
        head_dim=t.head_dim,
        rms_norm_eps=t.rms_norm_eps,
        rope=t.rope,
        max_position_embeddings=t.max_position_embeddings,
        aux_layers=default_aux_layers(t.num_layers) if aux_layers is None else aux_layers,
    )
    _check_aux_layers(config, target)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in expected_draft_tensors(config).items():
        matrix = len(shape) > 1
        tensors[name] = torch.randn(shape, generator=generator) * _INIT_STD if matrix else torch.ones(shape)
    if size < t.vocab_size:
        tensors["d2t"] = ids - torch.arange(size)
        del tensors["t2d"]  # `Draft` derives it
    tensors["lm_head.weight"] = target.head_weight.float().cpu()[ids].clone()
    tensors["norm.weight"] = target.norm_weight.float().cpu().clone()
    return Draft(config, tensors)


def load_draft(path: str | Path) -> Draft:
    """Load an EAGLE3 draft directory in SGLang's layout (config.json, model.safetensors).

    Raises:
        ValueError: the configuration or a tensor, which the message names, is not supported.
    """
    return Draft(read_draft_config(Path(path)), read_tensors(Path(path)))


def _check_aux_layers(config: DraftArchitecture, target: Target) -> None:
    count = target.config.num_layers
    require(max(config.aux_layers) < count, "aux_layers", f"layers of the target, below {count}", config.aux_layers)


class ServingDraft:
    """A draft's weights, fused for decoding on the target's device with its embedding and dtype.

    Raises:
        ValueError: the draft was made for a target of another shape.
    """

    def __init__(self, draft: Draft, target: Target) -> None:
        c, t = draft.config, target.config
        sizes = {"vocab_size": t.vocab_size, "hidden_size": t.hidden_size, "target_hidden_size": t.hidden_size}
        for name, size in sizes.items():
            require(getattr(c, name) == size, f"the draft's {name}", f"the target's, {size}", getattr(c, name))
        _check_aux_layers(c, target)
        self.config, self.device, self.dtype = c, target.device, target.dtype
        self._norm = Norm(c.hidden_size, c.rms_norm_eps, self.dtype, self.device)
        self._embedding = self._norm(target.embedding)  # [V, H], normalised once
        positions = c.max_position_embeddings + DRAFT_POSITIONS
        self._rotary_table = rope_table(c.rope, c.head_dim, positions).to(self.device)
        self.target_ids = None if draft.target_ids is None else draft.target_ids.to(self.device)
        self._maps: list[Linear] = []
        self.load(draft.tensors, version=0)
        self._fc, qkv, output, gate_up, down, self._lm_head = self._maps
        self._layer = DecoderLayer(qkv, output, GatedMLP(gate_up, down, c.intermediate_size), self._norm)

    def load(self, tensors: Mapping[str, Tensor], *, version: int) -> None:
        """Fuse and serve these weights.

        Raises:
            ValueError: a tensor is missing, unknown, misshapen or not finite, or the vocabulary differs. The old
                weights still serve then.
        """
        check_tensors(tensors, expected_draft_tensors(self.config), what=f"draft version {version}", optional=("t2d",))
        ids = vocabulary_ids(tensors, self.config)
        if ids is not None and not torch.equal(ids.to(self.device), self.target_ids):  # type: ignore[arg-type]
            raise ValueError("d2t must stay the same while a draft serves, but it differs; start another engine")
        c, gain = self.config, self._norm.gain

        def read(name: str) -> Tensor:
            return tensors[name + ".weight"].detach().to(self.device, torch.float32)

        query, key, value = (read(f"midlayer.self_attn.{n}_proj") for n in "qkv")
        qkv = torch.cat([interleave(query, c.head_dim) * c.head_dim**-0.5, interleave(key, c.head_dim), value])
        qkv_norm = torch.cat([read("midlayer.input_layernorm"), read("midlayer.hidden_norm")])
        gate_up = torch.cat([read("midlayer.mlp.gate_proj"), read("midlayer.mlp.up_proj")])
        fused = [
            read("fc"),
            qkv * qkv_norm * gain,
            read("midlayer.self_attn.o_proj"),
            gate_up * read("midlayer.post_attention_layernorm") * gain,
            read("midlayer.mlp.down_proj"),
            read("lm_head") * read("norm") * gain,
        ]
        if not self._maps:  # copies: no map may share the caller's memory
            self._maps = [Linear(weight.to(self.dtype, copy=True)) for weight in fused]
        else:
            for linear, weight in zip(self._maps, fused, strict=True):
                linear.load(weight.to(self.dtype))
        self.version = version

    def new_cache(self, batch: int, capacity: int, fused: bool | None = None) -> KVCache:
        """Return an empty cache for `batch` requests of up to `capacity` tokens; `fused` as in `KVCache`."""
        c = self.config
        return KVCache(1, batch, capacity, c.num_kv_heads, c.head_dim, self.dtype, self.device, fused)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Map the target's hidden states [b, q, 3H] to the draft's first hidden states [b, q, H] (EAGLE-3's g)."""
        return self._fc(aux_hidden_states.flatten(0, 1)).view(*aux_hidden_states.shape[:2], -1)

    def decode(self, tokens: Tensor, hidden: Tensor, cache: KVCache, where: TokenSlots) -> Tensor:
        """Run the layer over q slots of each of b requests: new hidden states [b, q, H].

        Args:
            tokens: [b, q] int64, the token after each slot's own.
            hidden: [b, q, H], fused hidden states of the target or the layer's own earlier output.
            cache: written at the slots.
            where: the slots.
        """
        attention = CachedAttention(cache, where, self._rotary_table, self.config.num_heads)
        residual = hidden.flatten(0, 1)
        x = torch.cat([self._embedding.index_select(0, tokens.flatten()), self._norm(residual)], -1)  # [M, 2H]
        return self._layer.forward(x, residual, attention).view(*tokens.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [m, H] to logits [m, Vd] float32 over the draft's vocabulary."""
        return self._lm_head(self._norm(hidden)).float()
