"""Checkpoints are read tensor by tensor, and written completely or not at all."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_help import change_tensors, hf_model
from safetensors.torch import save_file
from torch import Tensor

import specrl
from specrl.models.checkpoint import expected_target_tensors, read_tensors, recover, save_tensors, write_atomic
from specrl.models.hf_config import read_target_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def ones(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2) for name in names}


def shards(directory: Path, index: object, **files: dict[str, Tensor]) -> None:
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    (directory / INDEX).write_text(index if isinstance(index, str) else json.dumps({"weight_map": index}))


def test_one_file_and_shards_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0), "ids": torch.arange(3)}, tmp_path / SINGLE)
    tensors = read_tensors(tmp_path)
    assert torch.equal(tensors["a"], torch.arange(3.0)) and tensors["ids"].dtype == torch.int64
    shards(tmp_path, {"b": "x.safetensors", "c": "y.safetensors"}, x=ones("b"), y=ones("c"))
    assert set(read_tensors(tmp_path)) == {"b", "c"}  # the index takes precedence


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"a": "x.safetensors", "b": "gone.safetensors"}, "gone.safetensors"),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "wrong shard for b"),
        ({"a": "y.safetensors"}, "wrong shard for a, c"),
        *((content, "weight_map") for content in ({"a": "../x.safetensors"}, {"a": 3}, {}, None, "{", "[]", "3")),
    ],
)
def test_an_index_must_fit_its_shards(index: object, named: str, tmp_path: Path) -> None:
    shards(tmp_path, index, x=ones("a"), y=ones("c"))
    with pytest.raises(ValueError, match=named):
        read_tensors(tmp_path)


def test_other_directories_are_refused_and_pickles_never_loaded(tmp_path: Path) -> None:
    torch.save(ones("a"), tmp_path / "pytorch_model.bin")
    for directory, rule in ((tmp_path / "nowhere", "must be a directory"), (tmp_path, "pickles are never loaded")):
        with pytest.raises(ValueError, match=rule):
            read_tensors(directory)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * len(data), None])
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes] | None, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    if damage is None:
        path.mkdir()
    else:
        save_file(ones("a"), path)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="whole safetensors file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("drop", "changes", "named"),
    [
        ((NORM,), {}, rf"{NORM} is missing"),
        ((), {"model__layers__9__mlp": torch.ones(2)}, r"model\.layers\.9\.mlp is extra"),
        ((), {NORM: torch.ones(31)}, rf"{NORM} is \(31,\) instead of \(32,\)"),
        ((), {QUERY: torch.ones(32, 33)}, rf"{QUERY} is \(32, 33\) instead of \(32, 32\)"),
        ((), {NORM: torch.full((32,), torch.nan)}, rf"finite.*{NORM}$"),
        ((), {QUERY: torch.full((32, 32), -torch.inf)}, rf"finite.*{QUERY}$"),
        *(
            ((), {NORM: torch.ones(32).to(dtype)}, rf"{NORM} is {dtype}, which is not supported")
            for dtype in (torch.int8, torch.float8_e4m3fn)
        ),
    ],
)
def test_wrong_tensors_of_a_target_are_named(
    drop: tuple[str, ...], changes: dict[str, Tensor], named: str, tmp_path: Path
) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    change_tensors(tmp_path, drop, **changes)
    with pytest.raises(ValueError, match=named) as caught:
        specrl.load_target(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"target {tmp_path}: ")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}])
def test_expected_tensors_are_those_that_transformers_writes(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {} if family == "qwen2" else {k: v for k, v in changes.items() if family == "llama" or k != "mlp_bias"}
    hf_model(family, **changes).save_pretrained(tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(tmp_path).items()}
    assert expected_target_tensors(read_target_config(tmp_path)) == shapes


def writer(text: str, error: OSError | None = None) -> Callable[[Path], None]:
    def write(into: Path) -> None:
        (into / "inner").mkdir()
        (into / "inner" / "file").write_text(text)
        if error is not None:
            raise error

    return write


def content(directory: Path) -> str:
    """The text of the only file that `writer` writes."""
    (file,) = (path for path in directory.rglob("*") if path.is_file())
    return file.read_text()


def test_a_directory_is_replaced_completely(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "run"
    for text in ("old", "new"):
        write_atomic(directory, writer(text))
        assert content(directory) == text
        (directory / "inner" / "file").rename(directory / "other")  # must be removed by the next write
    assert [path.name for path in directory.parent.iterdir()] == ["run"]


def test_a_failure_while_writing_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "run", writer("old"))
    for name in ("run", "run", "other"):
        with pytest.raises(OSError, match="disk full"):
            write_atomic(tmp_path / name, writer("new", OSError("disk full")))
        assert content(tmp_path / "run") == "old" and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("renamed", [False, True], ids=["before the first rename", "between the renames"])
@pytest.mark.parametrize("resume", [True, False], ids=["recovered", "written again"])
def test_after_a_crash_the_old_directory_is_found(renamed: bool, resume: bool, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_atomic(directory, writer("old"))
    write_atomic(tmp_path / ".run.new", writer("new"))
    if renamed:
        directory.rename(tmp_path / ".run.old")
    if resume:
        recover(directory)
    else:
        with pytest.raises(OSError, match="disk full"):
            write_atomic(directory, writer("newer", OSError("disk full")))
    assert content(directory) == "old"
    write_atomic(directory, writer("new"))
    assert content(directory) == "new" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_crash_before_the_old_directory_was_removed_keeps_the_new_one(tmp_path: Path) -> None:
    write_atomic(tmp_path / "run", writer("new"))
    write_atomic(tmp_path / ".run.old", writer("old"))
    recover(tmp_path / "run")
    recover(tmp_path / "nothing")
    assert content(tmp_path / "run") == "new" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_failing_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "run", writer("old"))
    real, names = os.rename, iter(["moved away", "fails"])

    def rename(source: Path, destination: Path) -> None:
        if next(names, None) == "fails":
            raise OSError("no permission")
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="no permission"):
        write_atomic(tmp_path / "run", writer("new"))
    assert content(tmp_path / "run") == "old" and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_is_followed_and_a_file_refused(tmp_path: Path) -> None:
    write_atomic(tmp_path / "real", writer("old"))
    (tmp_path / "link").symlink_to("real")
    for text in ("new", "newer"):
        write_atomic(tmp_path / "link", writer(text))
        assert content(tmp_path / "real") == text and (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("unchanged")
    with pytest.raises(ValueError, match="is a file"):
        write_atomic(tmp_path / "file", writer("new"))
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "file"}


def test_tensors_are_written_with_the_format_of_torch(tmp_path: Path) -> None:
    strided = torch.arange(6.0).view(2, 3).t().requires_grad_()
    save_tensors(tmp_path / SINGLE, {"a": strided, "b": torch.tensor([True])})
    tensors = read_tensors(tmp_path)
    assert torch.equal(tensors["a"], strided) and torch.equal(tensors["b"], torch.tensor([True]))
    assert b'"format":"pt"' in (tmp_path / SINGLE).read_bytes()[:200]


def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, ones("a"))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow beyond
    try:
        with pytest.raises(OSError):
            save_tensors(path, {"a": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_paths_that_cannot_be_written_are_an_oserror_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    closed, device = tmp_path / "closed", Path("/dev/full")
    closed.mkdir(mode=0o500)
    paths = [tmp_path / "nowhere" / "x", tmp_path / "file" / "x", tmp_path, *([device] if device.exists() else [])]
    for path in [*paths, *([closed / "x"] if os.geteuid() else [])]:  # root may write everywhere
        with pytest.raises(OSError):
            save_tensors(path, ones("a"))
    assert not list(closed.iterdir()) and not device.is_file() and tmp_path.is_dir()
