"""Checkpoints are read tensor by tensor, and written whole or not at all."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models_help import change_tensors, hf_logits, hf_model, token_ids
from safetensors.torch import save_file
from torch import Tensor

import specrl
from specrl.models.checkpoint import (
    check_tensors,
    expected_target_tensors,
    read_tensors,
    recover,
    save_tensors,
    write_atomic,
)
from specrl.models.hf_config import read_target_config

INDEX = "model.safetensors.index.json"


def ones(*names: str) -> dict[str, Tensor]:
    return {name: torch.ones(2) for name in names}


def shards(directory: Path, weight_map: object, **files: dict[str, Tensor]) -> Path:
    for name, tensors in files.items():
        save_file(tensors, directory / f"{name}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def test_one_file_and_shards_are_read(tmp_path: Path) -> None:
    save_file({"a": torch.arange(3.0), "ids": torch.arange(3)}, tmp_path / "model.safetensors")
    found = read_tensors(tmp_path)
    assert torch.equal(found["a"], torch.arange(3.0)) and found["ids"].dtype == torch.int64
    shards(tmp_path, {"b": "x.safetensors", "c": "y.safetensors"}, x=ones("b"), y=ones("c"))
    assert set(read_tensors(tmp_path)) == {"b", "c"}  # the index counts


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": "x.safetensors", "b": "gone.safetensors"},
            "file 'gone.safetensors' is missing from .*download it again",
        ),
        ({"a": "x.safetensors", "b": "x.safetensors"}, "names tensors that its shards do not hold: b; download it"),
        ({"a": "y.safetensors"}, "must name the shard of every tensor, but c of y.safetensors is not so named"),
        ({"a": "../x.safetensors"}, r"must name shards beside it, but got \['../x.safetensors'\]"),
        ({"a": 3}, r"must name shards beside it, but got \[3\]"),
        ({}, "must name shards beside it, but got none"),
        ("a", "must be JSON with a 'weight_map'"),
        (None, "must be JSON with a 'weight_map'"),
    ],
)
def test_an_index_must_fit_its_shards(weight_map: object, message: str, tmp_path: Path) -> None:
    shards(tmp_path, weight_map, x=ones("a"), y=ones("c"))
    with pytest.raises(ValueError, match=message):
        read_tensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(
        ValueError, match=f"{INDEX}' must be JSON with a 'weight_map', but it is not; download it again"
    ):
        read_tensors(tmp_path)


def test_what_is_not_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a directory, but .*nowhere' is not one"):
        read_tensors(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold model.safetensors or .* has neither$"):
        read_tensors(tmp_path)
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"file 'model.safetensors' is missing"):
        read_tensors(tmp_path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    torch.save(ones("a"), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"found pytorch_model.bin: pickles are never loaded; convert it to safetensors"
    ):
        read_tensors(tmp_path)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * len(data)])
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(ones("a"), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model.safetensors' must be a whole safetensors file, .*; fetch it again"):
        read_tensors(tmp_path)


NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("drop", "changes", "message"),
    [
        ((NORM,), {}, rf"these are missing: {NORM}$"),
        ((), {"model__layers__9__mlp": torch.ones(2)}, r"these are extra: model\.layers\.9\.mlp$"),
        ((), {QUERY + "_scale": torch.ones(1)}, r"these are extra: .*q_proj\.weight_scale$"),
        ((), {NORM: torch.ones(31)}, rf"shapes must fit its config.json, but {NORM} is \(31,\) instead of \(32,\)"),
        ((), {QUERY: torch.ones(32, 33)}, rf"{QUERY} is \(32, 33\) instead of \(32, 32\)"),
        ((), {NORM: torch.full((32,), torch.nan)}, rf"these hold NaN or infinity: {NORM}$"),
        ((), {QUERY: torch.full((32, 32), -torch.inf)}, rf"must be finite, .*: {QUERY}$"),
        ((), {NORM: torch.ones(32, dtype=torch.int8)}, rf"{NORM} is torch.int8; quantised checkpoints are not support"),
    ],
)
def test_a_targets_wrong_tensors_are_named(
    drop: tuple[str, ...], changes: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    change_tensors(tmp_path, drop, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        specrl.load_target(tmp_path)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"target {tmp_path}: ")


def test_at_most_five_names_are_told() -> None:
    with pytest.raises(ValueError, match=r"these are missing: t0, t1, t2, t3, t4 and 2 more$"):
        check_tensors({}, {f"t{i}": (1,) for i in range(7)}, what="this")
    check_tensors({}, {"t": (1,)}, what="this", optional=("t",))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}])
def test_expected_tensors_are_those_that_transformers_writes(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {} if family == "qwen2" else {k: v for k, v in changes.items() if family == "llama" or k != "mlp_bias"}
    hf_model(family, **changes).save_pretrained(tmp_path)
    found = {name: tuple(tensor.shape) for name, tensor in read_tensors(tmp_path).items()}
    assert expected_target_tensors(read_target_config(tmp_path)) == found


def test_half_precision_checkpoints_are_computed_in_float32(tmp_path: Path) -> None:
    hf_model("llama").bfloat16().save_pretrained(tmp_path)
    model, ids = hf_model("llama"), token_ids(1, 8)
    for weight in model.parameters():
        weight.data = weight.bfloat16().float()
    torch.testing.assert_close(specrl.load_target(tmp_path)(ids), hf_logits(model, ids), atol=1e-4, rtol=0.0)


def writer(text: str) -> Callable[[Path], None]:
    def write(into: Path) -> None:
        (into / "first").write_text(text)
        (into / "inner").mkdir()
        (into / "inner" / "second").write_text(text)

    return write


def contents(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"first": text, "inner/second": text}


def test_a_directory_is_replaced_whole(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "run"
    for text in ("old", "new"):
        write_atomic(directory, writer(text))
        assert contents(directory) == whole(text)
    (directory / "stale").write_text("")
    write_atomic(directory, writer("newer"))
    assert contents(directory) == whole("newer")
    assert [path.name for path in directory.parent.iterdir()] == ["run"]


def test_a_failure_while_writing_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "run", writer("old"))

    def fail(into: Path) -> None:
        writer("new")(into)
        raise OSError("disk full")

    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            write_atomic(tmp_path / "run", fail)
        assert contents(tmp_path / "run") == whole("old")
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "other", fail)
    assert not (tmp_path / "other").exists()


class Crash(BaseException):
    """The process is gone: nothing after this runs."""


def crash_at_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the renames before this one happen, and nothing be cleaned up after it if it is a crash."""
    real, count = os.rename, 0

    def rename(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == number:
            raise error
        real(*args)

    monkeypatch.setattr(os, "rename", rename)
    if isinstance(error, Crash):
        real_rmtree = specrl.models.checkpoint.shutil.rmtree
        monkeypatch.setattr(
            specrl.models.checkpoint.shutil,
            "rmtree",
            lambda path, **keywords: None if count >= number else real_rmtree(path, **keywords),
        )


@pytest.mark.parametrize("number", [1, 2])
def test_after_a_crash_at_either_rename_the_old_directory_is_found(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    write_atomic(directory, writer("old"))
    with monkeypatch.context() as patch:
        crash_at_rename(patch, number, Crash())
        with pytest.raises(Crash):
            write_atomic(directory, writer("new"))
    assert directory.exists() == (number == 1)
    recover(directory)
    assert contents(directory) == whole("old")
    write_atomic(directory, writer("new"))
    assert contents(directory) == whole("new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_after_a_crash_the_next_write_needs_no_recovery_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    write_atomic(directory, writer("old"))
    with monkeypatch.context() as patch:
        crash_at_rename(patch, 2, Crash())
        with pytest.raises(Crash):
            write_atomic(directory, writer("new"))

    def fail(into: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(directory, fail)
    assert contents(directory) == whole("old")


def test_a_crash_before_the_old_directory_was_removed_keeps_the_new_one(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    write_atomic(directory, writer("new"))
    (tmp_path / ".run.old").mkdir()
    recover(directory)
    assert contents(directory) == whole("new")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    recover(tmp_path / "nothing")  # nothing to do


def test_a_failing_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "run"
    write_atomic(directory, writer("old"))
    with monkeypatch.context() as patch:
        crash_at_rename(patch, 2, OSError("no permission"))
        with pytest.raises(OSError, match="no permission"):
            write_atomic(directory, writer("new"))
    assert contents(directory) == whole("old")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_is_followed_and_a_file_refused(tmp_path: Path) -> None:
    write_atomic(tmp_path / "real", writer("old"))
    (tmp_path / "link").symlink_to("real")
    for text in ("new", "newer"):
        write_atomic(tmp_path / "link", writer(text))
        assert contents(tmp_path / "real") == whole(text) and (tmp_path / "link").is_symlink()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="file' is a file"):
        write_atomic(tmp_path / "file", writer("new"))
    assert (tmp_path / "file").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "file"}


def test_tensors_are_written_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    strided = torch.arange(6.0).view(2, 3).t().requires_grad_()
    save_tensors(path, {"a": strided, "b": torch.tensor([True])}, {"format": "pt"})
    path.rename(tmp_path / "model.safetensors")
    found = read_tensors(tmp_path)
    assert torch.equal(found["a"], strided) and torch.equal(found["b"], torch.tensor([True]))
    assert b'"format":"pt"' in (tmp_path / "model.safetensors").read_bytes()[:200]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_an_oserror_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, ones("a"))
    before = path.read_bytes()
    with disk_of(4096), pytest.raises(OSError):
        save_tensors(path, {"a": torch.zeros(100_000)})
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_where_nothing_can_be_written_there_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "nowhere" / "x.safetensors", tmp_path / "file" / "x.safetensors"):
        with pytest.raises(OSError):
            save_tensors(path, ones("a"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_an_oserror(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OSError):
        save_tensors(closed / "x.safetensors", ones("a"))
    with pytest.raises(OSError):
        write_atomic(closed / "run", writer("new"))
    assert not list(closed.iterdir())


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    device = Path("/dev/full")
    if not device.is_char_device():
        pytest.skip("this machine has no /dev/full")
    with pytest.raises(OSError, match="must be written to a file, but '/dev/full' is not one"):
        save_tensors(device, ones("a"))
    with pytest.raises(OSError, match="is not one"):
        save_tensors(tmp_path, ones("a"))
    assert device.is_char_device() and tmp_path.is_dir()
