"""Models and caches that do not fit are refused before they are allocated; the error names sizes that fit."""

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
from specrl.models import memory
from specrl.models.config import TargetArchitecture
from specrl.models.draft import ServingDraft
from specrl.models.embedded import embedded_directory
from specrl.models.hf_config import read_target_config
from specrl.models.memory import Room, cache_bytes, check_room, check_weights, free_bytes, weight_bytes


@pytest.fixture
def large() -> TargetArchitecture:
    """The shape of Qwen3-8B."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12288, "num_layers": 36, "num_heads": 32, "num_kv_heads": 8}
    embedded: Any = read_target_config(embedded_directory())
    return replace(embedded, family="qwen3", vocab_size=151936, head_dim=128, qk_norm=True, **sizes)


def test_bytes_of_a_model_of_eight_billion(large: TargetArchitecture) -> None:
    """8.19 billion parameters as published, the head once more; 147,456 bytes of cache per token, in bfloat16."""
    assert weight_bytes(large, torch.bfloat16) == 2 * (8_190_735_360 + 151936 * 4096)
    assert cache_bytes(large, torch.bfloat16) == 147_456 == cache_bytes(large, torch.float32) // 2


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bytes_are_those_of_the_tensors(family: str, tied: bool, tmp_path: Path) -> None:
    model = hf_model(family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = specrl.load_target(tmp_path)
    weights = sum(weight.numel() for weight in model.parameters())
    assert weight_bytes(loaded.config, torch.float32) == 4 * (weights + loaded.embedding.numel())
    draft = specrl.new_draft(loaded, aux_layers=(1, 2, 3))
    nbytes = sum(model.new_cache(3, 20).data.nbytes for model in (loaded, ServingDraft(draft, loaded)))
    assert cache_bytes(loaded.config, torch.float32, draft.config) * 3 * 20 == nbytes


def test_the_named_sizes_fit_and_one_more_does_not(large: TargetArchitecture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(free: int, batch_size: int = 64) -> str:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        with pytest.raises(ValueError, match="must fit the memory") as caught:
            check_room(per_token, "cuda:0", batch_size, 8192, draft_headroom=65)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    per_token = cache_bytes(large, torch.bfloat16)
    sizes = re.search(r"has 40.0 GiB free; use max_context=(\d+) at .* or a batch size of (\d+)", refusal(40 * 2**30))
    assert sizes is not None
    context, batch = int(sizes[1]), int(sizes[2])
    check_room(per_token, "cuda:0", 64, context, draft_headroom=65)
    check_room(per_token, "cuda:0", batch, 8192, draft_headroom=65)
    room = Room(per_token, 40 * 2**30, draft_headroom=65)
    assert min(room.needed(64, context + 1), room.needed(batch + 1, 8192)) > room.free
    assert refusal(2**20).endswith("free memory, or use a smaller target or dtype")
    assert refusal(2**30, batch_size=1).endswith("at this batch size")


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    large: TargetArchitecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 24 * 2**30)
    check_weights(large, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"in float32 they take 32.8 GiB and cpu has 24.0 GiB free"):
        check_weights(large, torch.float32, "cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr("specrl.models.target.Checkpoint", None)
    with pytest.raises(ValueError, match="weights must fit the memory"):
        specrl.load_target("embedded", dtype="bfloat16")


def test_an_engine_refuses_sessions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = specrl.load_target("embedded")
    engine = specrl.LocalEngine(loaded, specrl.new_draft(loaded, draft_vocab_size=64, intermediate_size=64))
    workload: Any = SimpleNamespace(requests=lambda seed: iter(()))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 64 << 20)
    with pytest.raises(ValueError, match="caches .* must fit the memory, but 16 of max_context=1024"):
        engine.start(workload, batch_size=1, max_batch_size=16, seed=0)


def test_free_memory_of_a_cpu_is_the_least_of_machine_and_container(tmp_path: Path) -> None:
    meminfo, nowhere = tmp_path / "meminfo", tmp_path / "nowhere"
    meminfo.write_text("MemTotal:       24000 kB\nMemFree:  1000 kB\nMemAvailable:    9000 kB\n")
    assert free_bytes("cpu", meminfo, nowhere) == 9000 * 1024
    for name, text in (("max", "5000000\n"), ("current", "4000000\n"), ("stat", "active_file 7\ninactive_file 3\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes("cpu", meminfo, tmp_path) == 1_000_010
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes("cpu", meminfo, tmp_path) == 9000 * 1024
    assert free_bytes("cpu", nowhere, nowhere) is None is free_bytes("meta", meminfo, tmp_path)


def test_free_memory_of_a_gpu_includes_unused_memory_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 50), ("memory_allocated", 20)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes("cuda:0") == 130
