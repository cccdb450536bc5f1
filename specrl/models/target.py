"""The target: a decoder for Llama, Qwen2 and Qwen3 checkpoints, built for small batches of few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from specrl.core.checks import require
from specrl.models.attention import CachedAttention, KVCache, TokenSlots
from specrl.models.checkpoint import Checkpoint, check_layout, expected_target_tensors
from specrl.models.config import TargetArchitecture
from specrl.models.embedded import target_directory
from specrl.models.hf_config import read_target_config
from specrl.models.layer import DecoderLayer, GatedMLP, Norm, interleave
from specrl.models.linear import Linear
from specrl.models.memory import check_weights
from specrl.models.rope import rope_table

PREFILL_CHUNK = 256  # tokens per pass; limits the size of the attention scores
DRAFT_POSITIONS = 128  # rotary positions beyond the last one, for drafts that are not committed
_FOLD_ENTRIES = 1 << 22  # folded at once, in float32


class Decoded(NamedTuple):
    """Result of a forward pass over b requests of q tokens."""

    logits: Tensor  # [b, q, V] float32
    aux_hidden_states: Tensor | None  # [b, q, 3H], the inputs of the three aux layers; None if not asked for


class Target:
    """A loaded target. `target(input_ids)` runs the whole model; sessions call `decode` with a cache.

    Args:
        tensors: the weights by their Hugging Face names, checked (see `load_target`). They are read one by one and
            copied; at most two are held at a time.
        device, dtype: device and dtype of weights and computations; logits are always float32.
    """

    def __init__(
        self,
        config: TargetArchitecture,
        tensors: Mapping[str, Tensor],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._norm = Norm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.embedding = self._copy(tensors["model.embed_tokens.weight"])  # [V, H]
        self.head_weight = self.embedding if config.tie_word_embeddings else self._copy(tensors["lm_head.weight"])
        self.norm_weight = self._copy(tensors["model.norm.weight"])  # [H]; head_weight: [V, H]
        self._lm_head = Linear(self._fold(config.vocab_size, [self.head_weight], self.norm_weight))
        self._layers = [self._layer(tensors, i) for i in range(config.num_layers)]
        positions = config.max_position_embeddings + DRAFT_POSITIONS
        self._rotary_table = rope_table(config.rope, config.head_dim, positions).to(device)

    def _copy(self, tensor: Tensor) -> Tensor:
        """Copy to the device and cast there, so that the host makes no copy for a GPU."""
        return tensor.to(self.device).to(self.dtype, copy=True)

    def _fold(self, rows: int, weights: Iterable[Tensor], norm: Tensor) -> Tensor:
        """Stack weights [.., H] to [rows, H] and multiply them by the weight of the norm before them, in blocks."""
        folded = torch.empty(rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        factor, row = norm.float() * self._norm.gain, 0
        for weight in weights:
            for block in weight.split(max(1, _FOLD_ENTRIES // weight.shape[1])):
                folded[row : row + len(block)] = block.float() * factor
                row += len(block)
        return folded

    def _layer(self, tensors: Mapping[str, Tensor], index: int) -> DecoderLayer:
        c, prefix = self.config, f"model.layers.{index}."
        scale = c.head_dim**-0.5  # of the attention scores, folded into the queries or into their norm

        def read(name: str) -> Tensor:
            tensor = self._copy(tensors[prefix + name])
            if "q_proj" in name:
                return interleave(tensor, c.head_dim) * (1.0 if c.qk_norm else scale)
            return interleave(tensor, c.head_dim) if "k_proj" in name else tensor

        def bias(*names: str) -> Tensor | None:
            if f"{prefix}{names[0]}.bias" not in tensors:
                return None
            return torch.cat([read(name + ".bias") for name in names])

        def fused(rows: int, names: tuple[str, ...], norm: str) -> Linear:
            weights = (read(name + ".weight") for name in names)
            return Linear(self._fold(rows, weights, read(norm + ".weight")), bias(*names))

        head_norm = None
        if c.qk_norm:
            norm = Norm(c.head_dim, c.rms_norm_eps, self.dtype, self.device)
            query, key = (read(f"self_attn.{n}_norm.weight")[None] for n in "qk")
            per_head = torch.cat([query.expand(c.num_heads, -1), key.expand(c.num_kv_heads, -1)])
            weights = interleave(per_head.flatten(), c.head_dim).view(per_head.shape) * norm.gain
            weights[: c.num_heads] *= scale
            head_norm = (norm, weights)
        rows = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        qkv = fused(rows, tuple(f"self_attn.{n}_proj" for n in "qkv"), "input_layernorm")
        output = Linear(read("self_attn.o_proj.weight"), bias("self_attn.o_proj"))
        gate_up = fused(2 * c.intermediate_size, ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm")
        down = Linear(read("mlp.down_proj.weight"), bias("mlp.down_proj"))
        return DecoderLayer(qkv, output, GatedMLP(gate_up, down, c.intermediate_size), self._norm, index, head_norm)

    def new_cache(self, batch: int, capacity: int, fused: bool | None = None) -> KVCache:
        """Return an empty cache for `batch` requests of up to `capacity` tokens; `fused` as in `KVCache`."""
        c = self.config
        return KVCache(c.num_layers, batch, capacity, c.num_kv_heads, c.head_dim, self.dtype, self.device, fused)

    def decode(
        self,
        tokens: Tensor,
        cache: KVCache,
        where: TokenSlots,
        *,
        aux_layers: tuple[int, ...] = (),
        last: int | None = None,
    ) -> Decoded:
        """Run q tokens of each of b requests on top of the cache.

        Args:
            tokens: [b, q] int64.
            cache: written at the tokens' slots.
            where: these slots.
            aux_layers: indices of layers whose input is returned.
            last: return logits of the last tokens of each request only, this many; None: of all.
        """
        batch, queries = tokens.shape
        attention = CachedAttention(cache, where, self._rotary_table, self.config.num_heads)
        x = self.embedding.index_select(0, tokens.flatten())  # [M, H]
        aux = []
        for i, layer in enumerate(self._layers):
            if i in aux_layers:
                aux.append(x)
            x = layer.forward(self._norm(x), x, attention)
        if last is not None:
            x = x.view(batch, queries, -1)[:, queries - last :].flatten(0, 1)
        logits = self._lm_head(self._norm(x)).float().view(batch, queries if last is None else last, -1)
        return Decoded(logits, torch.cat(aux, -1).view(batch, queries, -1) if aux_layers else None)

    def prefill(
        self,
        tokens: Tensor,
        cache: KVCache,
        *,
        first_row: int = 0,
        aux_layers: tuple[int, ...] = (),
        last: int | None = None,
    ) -> Decoded:
        """Run prompts `tokens [b, T] int64` from slot 0 on, in chunks; options as in `decode` and `TokenSlots`."""
        parts, length = [], tokens.shape[1]
        for start in range(0, length, PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            stop = start + chunk.shape[1]
            slots = torch.arange(start, stop, device=tokens.device).expand(chunk.shape)
            wanted = None if last is None else max(1, stop - max(start, length - last))  # kernels need at least one
            where = TokenSlots(slots, stop, first_row=first_row)
            parts.append(self.decode(chunk, cache, where, aux_layers=aux_layers, last=wanted))
        aux = [part.aux_hidden_states for part in parts if part.aux_hidden_states is not None]
        logits = torch.cat([part.logits for part in parts], 1)
        return Decoded(logits if last is None else logits[:, -last:], torch.cat(aux, 1) if aux else None)

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """Map token ids [B, T] int64 to logits [B, T, V] float32, with a new cache.

        Raises:
            ValueError: `input_ids` are not [B, T] int64 token ids of this vocabulary, or too many for its positions.
        """
        positions, vocab_size = self.config.max_position_embeddings, self.config.vocab_size
        valid = input_ids.ndim == 2 and input_ids.dtype == torch.int64 and 1 <= input_ids.shape[1] <= positions
        got = f"{input_ids.dtype} {list(input_ids.shape)}"
        require(valid, "input_ids", f"int64 [B, T] with T in [1, {positions}]", got)
        ids = (int(input_ids.min()), int(input_ids.max()))
        require(0 <= ids[0] <= ids[1] < vocab_size, "input_ids", f"in [0, {vocab_size})", ids)
        return self.prefill(input_ids.to(self.device), self.new_cache(*input_ids.shape)).logits


def load_target(
    path: str | Path = "embedded", *, device: str = "cpu", dtype: str | torch.dtype = torch.float32
) -> Target:
    """Load a target from a Hugging Face checkpoint directory or id, or an embedded one by name.

    Weights are read, checked and moved to the device one by one.

    Args:
        path: a directory with config.json and safetensors; the id of such a model on the Hugging Face Hub,
            'owner/name' or 'owner/name@revision', from the hub's cache or downloaded into it; or 'embedded',
            'embedded-easy', 'embedded-strong'.
        device: 'cpu' or a CUDA device.
        dtype: torch dtype or its name; greedy decoding is exactly lossless in float32.

    Raises:
        ValueError: the configuration is not supported, a tensor is missing, unknown, misshapen or not finite, the
            device does not exist, or the weights do not fit its memory. The message names the cause.
    """
    check_device(device)
    directory = target_directory(path)
    config, dtype = read_target_config(directory), as_dtype(dtype)
    check_weights(config, dtype, device)
    what, tied, head = f"target {path}", config.tie_word_embeddings, "lm_head.weight"
    tensors = Checkpoint(directory, what)
    layout = {n: t for n, t in tensors.layout.items() if not n.endswith(".rotary_emb.inv_freq")}  # derived
    check_layout(layout, expected_target_tensors(config), what=what, optional=(head,) if tied else ())
    if tied and head in layout and not torch.equal(tensors[head], tensors["model.embed_tokens.weight"]):
        rule = f"{what}: with tie_word_embeddings, {head} must be absent or equal to model.embed_tokens.weight"
        raise ValueError(f"{rule}, but it differs; set tie_word_embeddings to false")
    return Target(config, tensors, device=device, dtype=dtype)


def default_device(device: str | None = None) -> str:
    """Return `device`; if it is None, 'cuda' on a machine with a GPU and 'cpu' elsewhere."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str) -> None:
    """Raise a ValueError unless `device` is 'cpu' or a CUDA device of this machine."""
    count = torch.cuda.device_count()
    devices = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    require(device in devices, "device", f"one of this machine's {', '.join(devices)}", device)


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of 'float32' or 'bfloat16' (short: 'fp32', 'bf16'), or of a floating torch dtype.

    Raises:
        ValueError: the name or dtype is another one.
    """
    known = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    require(dtype in known, "dtype", f"one of {', '.join(sorted(known))}", dtype)
    return known[str(dtype)]
