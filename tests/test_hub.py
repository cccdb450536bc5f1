"""Targets by their Hugging Face id: from the hub's cache, downloaded, or refused with one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from models_help import hf_model

import specrl
from specrl.core.plan import Plan
from specrl.export.serving_flags import Serving
from specrl.models.embedded import target_directory
from specrl.models.hub import HubId, hub_directory, hub_id, served_as

COMMIT, OTHER = "1" * 40, "2" * 40


def store(home: Path, name: str, commit: str, ref: str) -> Path:
    """Store a snapshot in the layout of the hub's cache: refs/<ref> names the commit, snapshots/<commit> its files."""
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / ref).write_text(commit)
    hf_model("qwen3").save_pretrained(snapshot, max_shard_size="20KB")
    return snapshot


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HF_HOME of a machine without network. Every test uses other ids: a process finds an id once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_an_id_is_read_from_the_cache_at_its_revision(home: Path) -> None:
    main, tried = store(home, "some/Tiny-3.1", COMMIT, "main"), store(home, "some/Tiny-3.1", OTHER, "tried")
    assert hub_directory("some/Tiny-3.1") == target_directory("some/Tiny-3.1") == main
    assert hub_directory("some/Tiny-3.1@tried") == hub_directory(f"some/Tiny-3.1@{OTHER}") == tried
    assert specrl.load_target("some/Tiny-3.1@tried").config.family == "qwen3"


def test_hf_home_and_offline_mode_of_the_environment_count(tmp_path: Path) -> None:
    store(tmp_path, "some/tiny", COMMIT, "main")
    code = "import specrl; print(specrl.load_target('some/tiny').config.family); specrl.load_target('some/gone')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if key != "HF_HUB_CACHE"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert run.stdout == "qwen3\n"
    last = run.stderr.strip().splitlines()[-1]
    assert "'some/gone' is no directory" in last and last.endswith("give a directory, or run: hf download some/gone")


def test_without_cache_network_or_weights_one_line_says_what_to_do(home: Path) -> None:
    for shard in store(home, "some/half", COMMIT, "main").glob("*.safetensors"):
        shard.unlink()
    for target, words in {
        "some/gone": "is no directory.* run: hf download some/gone",
        "some/gone@v2": "is no directory.* run: hf download some/gone --revision v2",
        "some/half": r"lacks model\*\.safetensors; .* hf download some/half",
    }.items():
        with pytest.raises(ValueError, match=f"^a target must be .*{words}$"):
            hub_directory(target)


def test_only_needed_files_are_downloaded_and_no_pickle(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, object]] = []
    snapshot = store(home, "some/large", COMMIT, "main")

    def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        calls.append((name, revision))
        needed = (
            "model-00001-of-00002.safetensors model.safetensors.index.json chat_template.jinja tokenizer.json "
            "additional_chat_templates/rag.jinja tokenizer_config.json config.json vocab.json merges.txt"
        ).split()
        others = "pytorch_model.bin original/consolidated.00.pth optimizer.pt model.bin run.py x.pkl".split()
        allowed = [name for name in needed + others if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        assert allowed == needed
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_directory("some/large@v1") == hub_directory("some/large@v1") == snapshot
    assert calls == [("some/large", "v1")], "once per process, so that all parts are of one commit"


def test_ids_are_distinguished_from_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id("Qwen/Qwen3-8B") == HubId("Qwen/Qwen3-8B")
    assert hub_id("Qwen/Qwen3-8B@refs/pr/1") == HubId("Qwen/Qwen3-8B", "refs/pr/1")
    for other in ("embedded", "Qwen3-8B", "/models/Qwen3-8B", "./a/b", "../a/b", "a/b/c", "a/b@", str(tmp_path)):
        assert hub_id(other) is None and hub_directory(other) == Path(other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert hub_id("Qwen/Qwen3-8B") is None, "an existing directory comes first"


def test_sglang_gets_the_id_itself() -> None:
    assert served_as("Qwen/Qwen3-8B") == {"model-path": "Qwen/Qwen3-8B"}
    assert served_as("/models/x@y/z") == {"model-path": "/models/x@y/z"}
    flags = Serving(None, Plan(3)).flags("Qwen/Qwen3-8B@v1")
    assert (flags["model-path"], flags["revision"]) == ("Qwen/Qwen3-8B", "v1")
    assert json.loads(json.dumps(flags)) == flags
