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
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise ValueError(f"{self._what}: every weight must be finite, but these hold NaN or infinity: {name}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory, unchecked (see `check_tensors`).

    Raises:
        ValueError: as of `Checkpoint`, except for tensors that are not finite.
    """
    return {name: _read(file, name) for name, file in _locate(Path(directory)).items()}


def _locate(directory: Path) -> dict[str, Path]:
    """The file of every tensor."""
    if not directory.is_dir():
        raise ValueError(f"a checkpoint must be a directory, but {str(directory)!r} is not one")
    owners = _read_index(directory)
    found: dict[str, Path] = {}
    for shard in sorted(set(owners.values())) or [_SINGLE]:
        for name in _names(directory / shard):
            if owners and owners.get(name) != shard:
                raise ValueError(f"{_INDEX} must name the shard of every tensor, but {name} of {shard} is not so named")
            found[name] = directory / shard
    missing = sorted(set(owners) - set(found))
    if missing:
        raise ValueError(f"{_INDEX} names tensors that its shards do not hold: {_some(missing)}; download it again")
    return found


def _read_index(directory: Path) -> dict[str, str]:
    """The shard of every tensor; empty if there is one file and no index."""
    index = directory / _INDEX
    if not index.exists():
        if (directory / _SINGLE).exists():
            return {}
        pickles = [path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f" (found {pickles[0]}: pickles are never loaded; convert it to safetensors)" if pickles else ""
        raise ValueError(f"a checkpoint must hold {_SINGLE} or {_INDEX}, but {str(directory)!r} has neither{hint}")
    try:
        owners = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(index)!r} must be JSON with a 'weight_map', but it is not; download it again"
        ) from error
    strange = [shard for shard in owners.values() if not isinstance(shard, str) or Path(shard).name != shard]
    if strange or not owners:
        raise ValueError(f"{_INDEX} must name shards beside it, but got {strange[:1] or 'none'}; download it again")
    return owners


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"the checkpoint's file {path.name!r} is missing from {str(path.parent)!r}; download it again")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        rule = f"{str(path)!r} must be a whole safetensors file, but it is not"
        raise ValueError(f"{rule} ({error}); fetch it again") from error


def _read(path: Path, name: str) -> Tensor:
    """A tensor in a mapping of its own, so that its memory is freed with it."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, what: str, optional: Container[str] = ()
) -> None:
    """Refuse a checkpoint that is not exactly as expected.

    Raises:
        ValueError: as of `check_layout`, or a tensor is not finite; the message names it.
    """
    check_layout(found, expected, what=what, optional=optional)
    bad = [n for n, t in found.items() if t.is_floating_point() and not _is_finite(t)]
    if bad:
        raise ValueError(f"{what}: every weight must be finite, but these hold NaN or infinity: {_some(bad)}")


def check_layout(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, what: str, optional: Container[str] = ()
) -> None:
    """Refuse tensors of other names, shapes or dtypes than expected; their entries are not read.

    Raises:
        ValueError: a tensor is missing, extra, misshapen or not of a floating dtype of 16 bits or more (the
            vocabulary maps: not of an integer dtype); the message names it.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    extra = [name for name in found if name not in expected]
    known = [(name, tensor) for name, tensor in found.items() if name in expected]
    shapes = [(name, tuple(tensor.shape), expected[name]) for name, tensor in known]
    wrong = [f"{name} is {shape} instead of {other}" for name, shape, other in shapes if shape != other]
    strange = [f"{name} is {tensor.dtype}" for name, tensor in known if not _dtype_fits(name, tensor.dtype)]
    for names, rule in (
        (missing, "every tensor of its configuration must be there, but these are missing: {}"),
        (extra, "only tensors of its configuration may be there, but these are extra: {}"),
        (wrong, "shapes must fit its config.json, but {}"),
        (
            strange,
            "weights must be floating and d2t, t2d whole numbers, but {}; quantised checkpoints are not supported",
        ),
    ):
        if names:
            raise ValueError(f"{what}: {rule.format(_some(names))}")


def _dtype_fits(name: str, dtype: torch.dtype) -> bool:
    if name in _INTEGERS:
        return not dtype.is_floating_point and not dtype.is_complex
    return dtype.is_floating_point and dtype.itemsize >= 2


def _is_finite(tensor: Tensor) -> bool:
    """Whether every entry is finite; the extremes are NaN if one entry is, and need no memory."""
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def expected_target_tensors(config: TargetArchitecture) -> Shapes:
    """Names and shapes of a target's tensors in the Hugging Face layout."""
    c, h = config, config.hidden_size
    shapes: Shapes = {"model.embed_tokens.weight": (c.vocab_size, h), "model.norm.weight": (h,)}
    shapes["lm_head.weight"] = (c.vocab_size, h)
    bias = dict.fromkeys(("q_proj", "k_proj", "v_proj"), c.attention_bias) | {"o_proj": c.attention_output_bias}
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        for name, shape in _projections(c, h).items():
            shapes[f"{at}{name}.weight"] = shape
            if bias.get(name.removeprefix("self_attn."), c.mlp_bias):
                shapes[f"{at}{name}.bias"] = shape[:1]
        if c.qk_norm:
            shapes |= {f"{at}self_attn.{n}_norm.weight": (c.head_dim,) for n in "qk"}
        shapes |= {f"{at}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    return shapes


def expected_draft_tensors(config: DraftArchitecture) -> Shapes:
    """Names and shapes of an EAGLE3 draft's tensors as SGLang's LlamaForCausalLMEagle3 reads them."""
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
    """Shapes of the linear maps of a layer whose attention reads `width` entries a token."""
    h, q, kv, inner = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size
    attention: Shapes = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (h, q)}
    mlp: Shapes = {"gate_proj": (inner, h), "up_proj": (inner, h), "down_proj": (h, inner)}
    return {f"self_attn.{n}": s for n, s in attention.items()} | {f"mlp.{n}": s for n, s in mlp.items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file atomically.

    Raises:
        OSError: it cannot be written; an older file is kept.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"tensors must be written to a file, but {str(path)!r} is not one")
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, beside, dict(metadata or {}))
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
        try:
            os.rename(fresh, directory)
        except OSError:
            recover(directory)
            raise
        _sync(directory.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def recover(directory: Path) -> None:
    """Put back the old directory if `write_atomic` died after renaming it."""
    directory = Path(directory).resolve()
    old = _beside(directory, "old")
    if old.exists():
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, directory)


def _beside(directory: Path, word: str) -> Path:
    return directory.with_name(f".{directory.name}.{word}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
