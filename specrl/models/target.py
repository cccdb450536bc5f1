"""The target: a decoder of Llama, Qwen2 and Qwen3 checkpoints, built for small batches of few tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from specrl.models.checkpoint import Checkpoint, check_layout, expected_target_tensors
from specrl.models.config import TargetConfig
from specrl.models.embedded import target_directory
from specrl.models.hf_config import read_target_config
from specrl.models.kv_cache import KVCache, place
from specrl.models.layer import Layer, Norm, interleave
from specrl.models.linear import Linear
from specrl.models.memory import check_weights
from specrl.models.rope import rope_table

PREFILL_CHUNK = 256  # tokens a pass; bounds the scores held at once
_FOLDED_AT_ONCE = 1 << 22  # entries, in float32
BEYOND = 128  # rotary positions past the last, for drafts that are never committed


class Decoded(NamedTuple):
    """What a forward pass over b requests of q tokens yields."""

    logits: Tensor  # [b, q, V] float32
    features: Tensor | None  # [b, q, 3H], the fused taps in tap order; None where not asked for


class Target:
    """A loaded target. `target(input_ids)` is the whole model; sessions use `decode` with a cache.

    Args:
        config: its shape.
        tensors: its weights by their Hugging Face names, checked (see `load_target`); each is read as its turn comes,
            copied, and let go before the next but one.
        device, dtype: where and in what it computes; logits are float32 always.
    """

    def __init__(
        self,
        config: TargetConfig,
        tensors: Mapping[str, Tensor],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        self._norm = Norm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.embedding = self._own(tensors["model.embed_tokens.weight"])  # [V, H]
        self.head_weight = self.embedding if config.tie_word_embeddings else self._own(tensors["lm_head.weight"])
        self.norm_weight = self._own(tensors["model.norm.weight"])  # [H]; head_weight: [V, H]
        self._head = Linear(self._fold(config.vocab_size, [self.head_weight], self.norm_weight))
        self._layers = [self._layer(tensors, f"model.layers.{i}.") for i in range(config.num_layers)]
        self.table = rope_table(config.rope, config.head_dim, config.max_position_embeddings + BEYOND).to(device)

    def _own(self, tensor: Tensor) -> Tensor:
        """A copy on the device, cast there: for a GPU the host makes none."""
        return tensor.to(self.device).to(self.dtype, copy=True)

    def _fold(self, rows: int, weights: Iterable[Tensor], norm: Tensor) -> Tensor:
        """Weights [.., H] one below the other [rows, H], times that of the norm before them; a few rows at once."""
        fused = torch.empty(rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        factor, at = norm.float() * self._norm.gain, 0
        for weight in weights:
            for block in weight.split(max(1, _FOLDED_AT_ONCE // weight.shape[1])):
                fused[at : at + len(block)] = block.float() * factor
                at += len(block)
        return fused

    def _layer(self, tensors: Mapping[str, Tensor], at: str) -> Layer:
        c = self.config
        scale = c.head_dim**-0.5  # of the attention scores, taken into the queries or into the norm over them

        def read(name: str) -> Tensor:
            return self._own(tensors[at + name])

        def bias(*names: str) -> Tensor | None:
            found = [name for name in names if at + name + ".bias" in tensors]
            return torch.cat([paired(name, read(name + ".bias")) for name in names]) if found else None

        def paired(name: str, weight: Tensor) -> Tensor:
            if name == "self_attn.q_proj":
                return interleave(weight, c.head_dim) * (1.0 if c.qk_norm else scale)
            return interleave(weight, c.head_dim) if name == "self_attn.k_proj" else weight

        def fused(rows: int, names: tuple[str, ...], norm: str) -> Linear:
            weights = (paired(name, read(name + ".weight")) for name in names)
            return Linear(self._fold(rows, weights, read(norm + ".weight")), bias(*names))

        head_norm = None
        if c.qk_norm:
            norm = Norm(c.head_dim, c.rms_norm_eps, self.dtype, self.device)
            of_query, of_key = (read(f"self_attn.{n}_norm.weight")[None] for n in "qk")
            per_head = torch.cat([of_query.expand(c.num_heads, -1), of_key.expand(c.num_kv_heads, -1)])
            weights = interleave(per_head.flatten(), c.head_dim).view(per_head.shape) * norm.gain
            weights[: c.num_heads] *= scale
            head_norm = (norm, weights)
        heads = c.num_heads + 2 * c.num_kv_heads
        return Layer(
            fused(heads * c.head_dim, tuple(f"self_attn.{n}_proj" for n in "qkv"), "input_layernorm"),
            Linear(read("self_attn.o_proj.weight"), bias("self_attn.o_proj")),
            fused(2 * c.intermediate_size, ("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
            Linear(read("mlp.down_proj.weight"), bias("mlp.down_proj")),
            self._norm,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            c.intermediate_size,
            head_norm,
        )

    def new_cache(self, batch: int, capacity: int, fused: bool | None = None) -> KVCache:
        """An empty cache for `batch` requests of up to `capacity` tokens; `fused` as in `KVCache`."""
        c = self.config
        return KVCache(c.num_layers, batch, capacity, c.num_kv_heads, c.head_dim, self.dtype, self.device, fused)

    def decode(
        self,
        tokens: Tensor,
        cache: KVCache,
        slots: Tensor,
        *,
        length: int,
        positions: Tensor | None = None,
        first: int = 0,
        seen: Tensor | None = None,
        level: bool = False,
        taps: tuple[int, ...] = (),
        last: int | None = None,
    ) -> Decoded:
        """Run q tokens of each of b requests on top of what the cache holds.

        Args:
            tokens: [b, q] int64.
            cache: written at `slots`.
            slots: [b, q] int64 cache slots.
            length: one more than the largest slot.
            positions: [b, q] int64 rotary positions; None: the slots.
            first: cache row of the first request.
            seen: [b, q, length] bool, who attends to which slot; None: all up to the token's own slot.
            level: whether all slots are known to be the same, `length - 1`.
            taps: indices of layers whose input is returned as features.
            last: logits are of so many tokens at the end of each request; None: of all.
        """
        batch, queries = tokens.shape
        turned = slots if positions is None else positions
        at = place(cache, self.table, slots, turned, length, self.config.group, first, seen, level)
        x = self.embedding.index_select(0, tokens.flatten())  # [M, H]
        taken = []
        for i, layer in enumerate(self._layers):
            if i in taps:
                taken.append(x)
            x = layer(self._norm(x), x, cache.flat[i], at, i)
        if last is not None:
            x = x.view(batch, queries, -1)[:, queries - last :].flatten(0, 1)
        logits = self._head(self._norm(x)).float().view(batch, queries if last is None else last, -1)
        features = torch.cat(taken, -1).view(batch, queries, -1) if taps else None
        return Decoded(logits, features)

    def prefill(
        self, tokens: Tensor, cache: KVCache, *, first: int = 0, taps: tuple[int, ...] = (), last: int | None = None
    ) -> Decoded:
        """Run prompts `tokens [b, T] int64` from slot 0 on, in chunks; logits at the `last` positions, or all."""
        parts, length = [], tokens.shape[1]
        for start in range(0, length, PREFILL_CHUNK):
            chunk = tokens[:, start : start + PREFILL_CHUNK]
            stop = start + chunk.shape[1]
            slots = torch.arange(start, stop, device=tokens.device).expand(chunk.shape)
            wanted = None if last is None else max(1, stop - max(start, length - last))  # of none: no kernel likes it
            parts.append(self.decode(chunk, cache, slots, length=stop, first=first, taps=taps, last=wanted))
        features = torch.cat([part.features for part in parts], 1) if taps else None  # type: ignore[misc]
        logits = torch.cat([part.logits for part in parts], 1)
        return Decoded(logits if last is None else logits[:, -last:], features)

    @torch.inference_mode()
    def __call__(self, input_ids: Tensor) -> Tensor:
        """[B, T] int64 -> logits [B, T, V] float32, without a cache to keep.

        Raises:
            ValueError: not a [B, T] tensor of token ids of this vocabulary, or longer than its positions.
        """
        most = self.config.max_position_embeddings
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not 1 <= input_ids.shape[1] <= most:
            raise ValueError(
                f"input_ids must be int64 [B, T], T in [1, {most}], but got {input_ids.dtype} {list(input_ids.shape)}"
            )
        if not 0 <= int(input_ids.min()) <= int(input_ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.config.vocab_size}), but got {input_ids.min()}..{input_ids.max()}"
            )
        return self.prefill(input_ids.to(self.device), self.new_cache(*input_ids.shape)).logits


def load_target(
    path: str | Path = "embedded", *, device: str = "cpu", dtype: str | torch.dtype = torch.float32
) -> Target:
    """Load a target from a Hugging Face checkpoint directory or id, or an embedded one by name.

    Weights are read, checked and moved to the device one by one: the host holds about one of them at a time besides.

    Args:
        path: a directory with config.json and safetensors; the id of such a model on the Hugging Face Hub,
            'owner/name' or 'owner/name@revision', from the hub's cache or downloaded into it; or 'embedded',
            'embedded-easy', 'embedded-strong'.
        device: 'cpu' or a CUDA device.
        dtype: torch dtype or its name; greedy decoding is exactly lossless in float32.

    Raises:
        ValueError: a configuration that is not supported (by name), a missing, extra, misshapen or
            non-finite tensor (by name), a device that is not there, or weights that do not fit its memory.
    """
    check_device(device)
    directory = target_directory(path)
    config, dtype = read_target_config(directory), as_dtype(dtype)
    check_weights(config, dtype, device)
    tensors, tied = Checkpoint(directory, f"target {path}"), config.tie_word_embeddings
    layout = {n: t for n, t in tensors.layout.items() if not n.endswith(".rotary_emb.inv_freq")}  # derived
    optional = ("lm_head.weight",) if tied else ()
    check_layout(layout, expected_target_tensors(config), what=f"target {path}", optional=optional)
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if tied and both[0] in layout and not torch.equal(*(tensors[name] for name in both)):
        raise ValueError(
            f"target {path}: with tie_word_embeddings, lm_head.weight must be absent or equal to "
            "model.embed_tokens.weight, but it differs; set tie_word_embeddings to false"
        )
    return Target(config, tensors, device=device, dtype=dtype)


def default_device(device: str | None = None) -> str:
    """`device`, or if it is None a GPU where there is one, else 'cpu'."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_device(device: str) -> None:
    """Raise a ValueError unless `device` is 'cpu' or a CUDA device of this machine."""
    count = torch.cuda.device_count()
    there = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in there:
        raise ValueError(f"device must be one of this machine's {', '.join(there)}, but got {device!r}")


def as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """'float32', 'bfloat16' or a floating torch dtype.

    Raises:
        ValueError: another name or dtype.
    """
    known = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if not isinstance(dtype, str) or dtype not in known:
        raise ValueError(f"dtype must be one of {', '.join(sorted(known))}, but got {dtype!r}")
    return known[dtype]
