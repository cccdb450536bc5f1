"""What does not fit is refused before it is allocated, with what would fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models_help import hf_model

import specrl
from specrl.models import memory, target
from specrl.models.config import TargetArchitecture
from specrl.models.embedded import embedded_directory
from specrl.models.hf_config import read_target_config
from specrl.models.memory import Room, cache_bytes, check_room, check_weights, free_bytes, weight_bytes

QWEN3_8B: dict[str, Any] = {
    "family": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_layers": 36,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "qk_norm": True,
}


@pytest.fixture
def large() -> TargetArchitecture:
    return replace(read_target_config(embedded_directory()), **QWEN3_8B)


def test_bytes_of_a_model_of_eight_billion(large: TargetArchitecture) -> None:
    """8.19 billion parameters as published, the head once more; 147,456 bytes of cache a token, in bfloat16."""
    head = 151936 * 4096
    assert weight_bytes(large, torch.bfloat16) == 2 * (8_190_735_360 + head)
    assert cache_bytes(large, torch.bfloat16) == 2 * 2 * 36 * 8 * 128 == 147_456
    assert cache_bytes(large, torch.float32) == 2 * 147_456


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bytes_are_those_of_the_tensors(family: str, tied: bool, tmp_path: Path) -> None:
    model = hf_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = specrl.load_target(tmp_path)
    weights = sum(weight.numel() for weight in model.parameters())
    assert weight_bytes(loaded.config, torch.float32) == 4 * (weights + loaded.embedding.numel())
    draft = specrl.new_draft(loaded, aux_layers=(1, 2, 3))
    serving = specrl.models.draft.ServingDraft(draft, loaded)
    held = loaded.new_cache(3, 20).data.nbytes + serving.new_cache(3, 20).data.nbytes
    assert cache_bytes(loaded.config, torch.float32, draft.config) * 3 * 20 == held


def test_what_is_said_to_fit_fits_and_one_more_does_not(large: TargetArchitecture) -> None:
    room = Room(cache_bytes(large, torch.bfloat16), 40 * 2**30, draft_headroom=65)
    context, batch = room.largest_context(32), room.largest_batch(4096)
    assert room.needed(32, context) <= room.free < room.needed(32, context + 1)
    assert room.needed(batch, 4096) <= room.free < room.needed(batch + 1, 4096)


def free_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: size)


def test_the_refusal_names_what_fits(large: TargetArchitecture, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"batch_size": 64, "max_context": 8192, "draft_headroom": 65}
    gpu = (large, None, torch.bfloat16, "cuda:0")
    free_memory(monkeypatch, 40 * 2**30)
    with pytest.raises(ValueError, match=r"64 of max_context=8192 take 72.6 GiB \(147456 bytes a token\)") as caught:
        check_room(*gpu, **asked)
    said = re.search(r"cuda:0 has 40.0 GiB free; max_context=(\d+) at .* or a batch size of (\d+)", str(caught.value))
    assert said is not None and "\n" not in str(caught.value)
    check_room(*gpu, **{**asked, "max_context": int(said[1])})
    check_room(*gpu, **{**asked, "batch_size": int(said[2])})
    free_memory(monkeypatch, 2**20)
    with pytest.raises(ValueError, match="free; free memory, or use a smaller target or dtype$"):
        check_room(*gpu, **asked)
    free_memory(monkeypatch, 2**30)
    with pytest.raises(ValueError, match=r"free; max_context=\d+ at this batch size would fit$"):
        check_room(*gpu, **{**asked, "batch_size": 1})


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    large: TargetArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory(monkeypatch, 24 * 2**30)
    with pytest.raises(
        ValueError, match=r"in float32 they take 32.8 GiB and cpu has 24.0 GiB free; .*\(bfloat16 takes"
    ):
        check_weights(large, torch.float32, "cpu")
    check_weights(large, torch.bfloat16, "cpu")
    free_memory(monkeypatch, 2**20)
    monkeypatch.setattr(target, "Checkpoint", None)
    with pytest.raises(ValueError, match="a target's weights must fit the memory, but in bfloat16 they take"):
        specrl.load_target("embedded", dtype="bfloat16")


def test_an_engine_refuses_sessions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = specrl.load_target("embedded")
    engine = specrl.LocalEngine(loaded, specrl.new_draft(loaded, draft_vocab_size=64, intermediate_size=64))
    workload: Any = SimpleNamespace(requests=lambda seed: iter(()))
    free_memory(monkeypatch, 64 << 20)
    with pytest.raises(ValueError, match="^the caches of all requests must fit the memory, but 16 of max_context=1024"):
        engine.start(workload, batch_size=1, max_batch_size=16, seed=0)


def test_free_memory_is_what_the_machine_and_the_container_leave(tmp_path: Path) -> None:
    meminfo, nowhere = tmp_path / "meminfo", tmp_path / "nowhere"
    meminfo.write_text("MemTotal:       24000 kB\nMemFree:  1000 kB\nMemAvailable:    9000 kB\n")
    assert free_bytes("cpu", meminfo, nowhere) == 9000 * 1024
    for name, text in (
        ("max", "5000000\n"),
        ("current", "4000000\n"),
        ("stat", "anon 1\nactive_file 7\ninactive_file 3\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes("cpu", meminfo, tmp_path) == 1_000_010
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu", meminfo, tmp_path) == 9000 * 1024
    assert free_bytes("cpu", nowhere, nowhere) is None is free_bytes("meta", meminfo, tmp_path)


def test_free_memory_of_this_machine() -> None:
    found = free_bytes("cpu")
    assert found is None or 2**20 < found < 2**50


def test_free_memory_of_a_gpu_counts_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes("cuda:0") == 130
