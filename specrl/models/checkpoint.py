"""Reading and writing checkpoints: safetensors only, every tensor checked, every write whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from specrl.models.config import DraftArchitecture, TargetArchitecture

Shapes = dict[str, tuple[int, ...]]
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WHOLE = ("d2t", "t2d")


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint directory, read from disk one by one when they are asked for, and kept by the asker.

    What is returned is mapped from its file: it costs memory while it is read, and none once it is let go.

    Args:
        directory: of the checkpoint: one safetensors file, or the shards that its index names.
        what: to call it in messages.

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
        ValueError: as of `Checkpoint`, but for what is not finite.
    """
    return {name: _read(file, name) for name, file in _locate(Path(directory)).items()}


def _locate(directory: Path) -> dict[str, Path]:
    """The file of every tensor."""
    if not directory.is_dir():
        raise ValueError(f"a checkpoint must be a directory, but {str(directory)!r} is not one")
    owners = _owners(directory)
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


def _owners(directory: Path) -> dict[str, str]:
    """The shard of every tensor as the index names it; empty where there is one file."""
    index = directory / _INDEX
    if index.exists():
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
    if not (directory / _SINGLE).exists():
        pickles = [path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
        hint = f" (found {pickles[0]}: pickles are never loaded; convert it to safetensors)" if pickles else ""
        raise ValueError(f"a checkpoint must hold {_SINGLE} or {_INDEX}, but {str(directory)!r} has neither{hint}")
    return {}


def _names(path: Path) -> list[str]:
    if not path.is_file():
        raise ValueError(f"the checkpoint's file {path.name!r} is missing from {str(path.parent)!r}; download it again")
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{str(path)!r} must be a whole safetensors file, but it is not ({error}); fetch it again"
        ) from error


def _read(path: Path, name: str) -> Tensor:
    """A tensor in a mapping of its own: no byte is read before it is looked at, and none stays once it is let go."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def check_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, what: str, optional: Container[str] = ()
) -> None:
    """Refuse a checkpoint that is not exactly what is expected.

    Raises:
        ValueError: as of `check_layout`, or a tensor that is not finite; it is named.
    """
    check_layout(found, expected, what=what, optional=optional)
    bad = [n for n, t in found.items() if t.is_floating_point() and not _is_finite(t)]
    if bad:
        raise ValueError(f"{what}: every weight must be finite, but these hold NaN or infinity: {_some(bad)}")


def check_layout(
    found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, what: str, optional: Container[str] = ()
) -> None:
    """Refuse tensors of other names, shapes or dtypes than expected; what they hold is not looked at.

    Raises:
        ValueError: a tensor is missing, extra, misshapen or not of a floating dtype of 16 bits or more (the
            vocabulary maps: not of a whole one); it is named.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    if missing:
        raise ValueError(
            f"{what}: every tensor of its configuration must be there, but these are missing: {_some(missing)}"
        )
    extra = [name for name in found if name not in expected]
    if extra:
        raise ValueError(f"{what}: only tensors of its configuration may be there, but these are extra: {_some(extra)}")
    wrong = [
        f"{name} is {tuple(tensor.shape)} instead of {expected[name]}"
        for name, tensor in found.items()
        if tuple(tensor.shape) != expected[name]
    ]
    if wrong:
        raise ValueError(f"{what}: shapes must fit its config.json, but {_some(wrong)}")
    strange = [f"{n} is {t.dtype}" for n, t in found.items() if not _may_be(n, t.dtype)]
    if strange:
        raise ValueError(
            f"{what}: weights must be floating and {', '.join(_WHOLE)} whole numbers, but {_some(strange)}; "
            "quantised checkpoints are not supported"
        )


def _may_be(name: str, dtype: torch.dtype) -> bool:
    if name in _WHOLE:
        return not dtype.is_floating_point and not dtype.is_complex
    return dtype.is_floating_point and dtype.itemsize >= 2


def _is_finite(tensor: Tensor) -> bool:
    """Whether every entry is; extremes are NaN where one entry is, and need no memory."""
    return bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def expected_target_tensors(config: TargetArchitecture) -> Shapes:
    """Names and shapes of a target's tensors in the Hugging Face layout."""
    c = config
    h, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (c.vocab_size, h), "model.norm.weight": (h,)}
    shapes["lm_head.weight"] = (c.vocab_size, h)
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        attention = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
        for name, shape in attention.items():
            shapes[f"{at}self_attn.{name}_proj.weight"] = shape
            if c.attention_output_bias if name == "o" else c.attention_bias:
                shapes[f"{at}self_attn.{name}_proj.bias"] = shape[:1]
        mlp = {"gate": (c.intermediate_size, h), "up": (c.intermediate_size, h), "down": (h, c.intermediate_size)}
        for name, shape in mlp.items():
            shapes[f"{at}mlp.{name}_proj.weight"] = shape
            if c.mlp_bias:
                shapes[f"{at}mlp.{name}_proj.bias"] = shape[:1]
        if c.qk_norm:
            shapes |= {f"{at}self_attn.{n}_norm.weight": (c.head_dim,) for n in "qk"}
        shapes |= {f"{at}{n}_layernorm.weight": (h,) for n in ("input", "post_attention")}
    return shapes


def expected_draft_tensors(config: DraftArchitecture) -> Shapes:
    """Names and shapes of an EAGLE3 draft's tensors as SGLang's LlamaForCausalLMEagle3 reads them."""
    c = config
    h, q, kv = c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    at = "midlayer."
    shapes: Shapes = {
        "fc.weight": (h, 3 * c.target_hidden_size),
        f"{at}self_attn.q_proj.weight": (q, 2 * h),
        f"{at}self_attn.k_proj.weight": (kv, 2 * h),
        f"{at}self_attn.v_proj.weight": (kv, 2 * h),
        f"{at}self_attn.o_proj.weight": (h, q),
        f"{at}mlp.gate_proj.weight": (c.intermediate_size, h),
        f"{at}mlp.up_proj.weight": (c.intermediate_size, h),
        f"{at}mlp.down_proj.weight": (h, c.intermediate_size),
        f"{at}input_layernorm.weight": (h,),
        f"{at}hidden_norm.weight": (h,),
        f"{at}post_attention_layernorm.weight": (h,),
        "norm.weight": (h,),
        "lm_head.weight": (c.draft_vocab_size, h),
    }
    if c.draft_vocab_size < c.vocab_size:
        shapes |= {"d2t": (c.draft_vocab_size,), "t2d": (c.vocab_size,)}
    return shapes


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written; what stood there before still does.
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
    """Let `write` fill a directory that then takes the place of `directory`, whole.

    An older directory stands until the new one is complete; if the process dies between the two renames, the next
    call or `recover` finds the old one under its temporary name. A link is followed.

    Raises:
        ValueError: `directory` is a file.
        OSError: it cannot be written; what stood there before still does.
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
    """Put back the old directory if a `write_atomic` died after taking it away."""
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
