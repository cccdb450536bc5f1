"""Reading and writing checkpoints: only safetensors, every tensor is checked, and every write is atomic."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specrl.core.checks import require
from specrl.models.config import DraftArchitecture, TargetArchitecture

Shapes = dict[str, tuple[int, ...]]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_INTEGERS = ("d2t", "t2d")  # the vocabulary maps


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory, read one by one. A tensor is mapped from its file until it is deleted.

    Args:
        directory: holds one safetensors file, or an index and its shards.
        what: name of the checkpoint in messages.

    Raises:
        ValueError: no safetensors, a missing or damaged file, or an index that does not fit its shards; on reading a
            tensor, that it is not finite.
    """

    def __init__(self, directory: Path, what: str = "checkpoint") -> None:
        self._what, self._files = what, _locate(Path(directory))
        self.layout = {name: _read(file, name).to("meta") for name, file in self._files.items()}  # shapes, dtypes

    def __getitem__(self, name: str) -> Tensor:
        tensor = _read(self._files[name], name)
        _check_finite(self._what, name, tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint directory, unchecked (see `check_tensors`).

    Raises:
        ValueError: as of `Checkpoint`, except for tensors that are not finite.
    """
    return {name: _read(file, name) for name, file in _locate(Path(directory)).items()}


def _locate(directory: Path) -> dict[str, Path]:
    """Return the file of every tensor."""
    index = directory / _INDEX
    require(directory.is_dir(), "a checkpoint", "a directory", str(directory))
    if not index.exists():
        if not (directory / _SINGLE).exists():
            rule = f"a checkpoint must hold {_SINGLE} or {_INDEX}, but {str(directory)!r} has neither"
            raise ValueError(f"{rule}; convert other files to safetensors, because pickles are never loaded")
        return dict.fromkeys(_names(directory / _SINGLE), directory / _SINGLE)
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        valid = bool(shards) and all(Path(shard).name == shard for shard in shards.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    require(valid, str(index), "JSON with a 'weight_map' from tensors to files beside it", "another content")
    held = {name: shard for shard in sorted(set(shards.values())) for name in _names(directory / shard)}
    wrong = sorted({name for name, _ in held.items() ^ shards.items()})
    require(not wrong, str(index), "a list of all tensors in its shards", f"a wrong shard for {_some(wrong)}")
    return {name: directory / shard for name, shard in held.items()}


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        rule = f"{str(path)!r} must be a whole safetensors file, but it is not"
        raise ValueError(f"{rule} ({error}); download it again") from error


def _read(path: Path, name: str) -> Tensor:
    """Read a tensor through a separate mapping, so that its memory is freed with it."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def check_tensors(tensors: Mapping[str, Tensor], expected: Shapes, *, what: str, optional: Container[str] = ()) -> None:
    """Refuse tensors of other names, shapes or dtypes than expected (see `check_layout`), or that are not finite.

    Raises:
        ValueError: the message starts with `what` and names the tensor.
    """
    check_layout(tensors, expected, what=what, optional=optional)
    for name, tensor in tensors.items():
        _check_finite(what, name, tensor)


def check_layout(tensors: Mapping[str, Tensor], expected: Shapes, *, what: str, optional: Container[str] = ()) -> None:
    """Refuse tensors of other names, shapes or dtypes than expected; their entries are not read.

    Weights must have a floating dtype of 16 bits or more, and vocabulary maps an integer dtype.

    Raises:
        ValueError: the message starts with `what` and names the tensors.
    """
    wrong = [f"{name} is missing" for name in expected if name not in tensors and name not in optional]
    for name, tensor in tensors.items():
        if name not in expected:
            wrong.append(f"{name} is extra")
        elif tuple(tensor.shape) != expected[name]:
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {expected[name]}")
        elif not _dtype_fits(name, tensor.dtype):
            wrong.append(f"{name} is {tensor.dtype}, which is not supported")
    if wrong:
        raise ValueError(f"{what}: tensors must fit config.json, but {_some(wrong)}; use the files of one checkpoint")


def _dtype_fits(name: str, dtype: torch.dtype) -> bool:
    if name in _INTEGERS:
        return not dtype.is_floating_point and not dtype.is_complex
    return dtype.is_floating_point and dtype.itemsize >= 2


def _check_finite(what: str, name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity; the extremes are NaN if one entry is, and need no memory."""
    if tensor.is_floating_point() and not torch.stack(tensor.detach().aminmax()).isfinite().all():
        raise ValueError(f"{what}: every weight must be finite, but got NaN or infinity: {name}")


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def expected_target_tensors(config: TargetArchitecture) -> Shapes:
    """Return the names and shapes of a target's tensors in the Hugging Face layout."""
    c, h = config, config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (c.vocab_size, h), "model.norm.weight": (h,)}
    shapes["lm_head.weight"] = (c.vocab_size, h)
    bias = dict.fromkeys(("q_proj", "k_proj", "v_proj"), c.attention_bias) | {"o_proj": c.attention_output_bias}
    for i in range(c.num_layers):
        layer = f"model.layers.{i}."
        for name, shape in _projections(c, h).items():
            shapes[f"{layer}{name}.weight"] = shape
            if bias.get(name.removeprefix("self_attn."), c.mlp_bias):
                shapes[f"{layer}{name}.bias"] = shape[:1]
        if c.qk_norm:
            shapes |= {f"{layer}self_attn.{n}_norm.weight": (c.head_dim,) for n in "qk"}
        shapes |= {f"{layer}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    return shapes


def expected_draft_tensors(config: DraftArchitecture) -> Shapes:
    """Return the names and shapes of an EAGLE3 draft's tensors as SGLang's LlamaForCausalLMEagle3 reads them."""
    c, h = config, config.hidden_size
    shapes: Shapes = {"fc.weight": (h, 3 * c.target_hidden_size)}
    shapes |= {f"midlayer.{name}.weight": shape for name, shape in _projections(c, 2 * h).items()}
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes |= {f"midlayer.{name}.weight": (h,) for name in norms}
    shapes |= {"norm.weight": (h,), "lm_head.weight": (c.draft_vocab_size, h)}
    if c.draft_vocab_size < c.vocab_size:
        shapes |= {"d2t": (c.draft_vocab_size,), "t2d": (c.vocab_size,)}
    return shapes


def _projections(c: TargetArchitecture | DraftArchitecture, width: int) -> Shapes:
    """Return the shapes of the linear maps of a layer whose attention reads `width` entries per token."""
    h, q, kv, inner = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    attention: Shapes = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (h, q)}
    mlp: Shapes = {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file of torch's format atomically.

    Raises:
        OSError: it cannot be written; an older file is kept.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"tensors must be written to a file, but {str(path)!r} is not one")
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, beside, {"format": "pt"})
        _sync(beside)
        os.replace(beside, path)
    except SafetensorError as error:
        raise OSError(f"{str(path)!r} could not be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def write_atomic(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new directory that then replaces `directory`; a link is followed.

    If the process dies between the two renames, the next call or `recover` puts the old directory back.

    Raises:
        ValueError: `directory` is a file.
        OSError: it cannot be written; an older directory is kept.
    """
    directory = Path(directory).resolve()
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"a directory can only take a directory's place, but {str(directory)!r} is a file")
    recover(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = _beside(directory, "new"), _beside(directory, "old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
        for path in fresh.rglob("*"):
            if path.is_file():
                _sync(path)
        if directory.exists():
            os.rename(directory, old)
        os.rename(fresh, directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        recover(directory)


def recover(directory: Path) -> None:
    """Put back the old directory if `write_atomic` died before the new one was in its place; else remove it."""
    directory = Path(directory).resolve()
    old = _beside(directory, "old")
    if old.exists() and not directory.exists():
        os.rename(old, directory)
    shutil.rmtree(old, ignore_errors=True)


def _beside(directory: Path, word: str) -> Path:
    return directory.with_name(f".{directory.name}.{word}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
