"""Targets by their Hugging Face id come from the hub's cache; without it and without a network one line says why."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from models_help import hf_model, token_ids

import specrl
from specrl.core.plan import Plan
from specrl.export.serving_flags import Serving
from specrl.models.embedded import target_directory
from specrl.models.hub import HubId, hub_directory, hub_id, served_as

COMMIT, OTHER = "1" * 40, "2" * 40


def keep(home: Path, name: str, commit: str, ref: str, seed: int = 0) -> Path:
    """A snapshot as the hub's cache lays it out: refs/<ref> names the commit, snapshots/<commit> links to blobs/."""
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / commit
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (model / "refs" / ref).write_text(commit)
    made = home / f"made-{commit}"
    hf_model("qwen3", seed=seed).save_pretrained(made, max_shard_size="20KB")
    for file in made.iterdir():
        blob = model / "blobs" / f"{commit}-{file.name}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty HF_HOME of a machine without network. Every test uses other ids: a process finds an id once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_an_id_is_read_from_the_cache_at_its_revision(home: Path) -> None:
    main = keep(home, "some-body/Tiny-3.1", COMMIT, "main")
    tried = keep(home, "some-body/Tiny-3.1", OTHER, "tried", seed=1)
    assert hub_directory("some-body/Tiny-3.1") == target_directory("some-body/Tiny-3.1") == main
    assert hub_directory("some-body/Tiny-3.1@tried") == hub_directory(f"some-body/Tiny-3.1@{OTHER}") == tried
    ids = token_ids(2, 12)
    ours = [specrl.load_target(f"some-body/Tiny-3.1{at}")(ids) for at in ("", "@tried")]
    for logits, seed in zip(ours, (0, 1), strict=True):
        with torch.inference_mode():
            torch.testing.assert_close(logits, hf_model("qwen3", seed=seed)(ids).logits, atol=1e-4, rtol=0.0)


def test_hf_home_and_offline_mode_of_the_environment_count(tmp_path: Path) -> None:
    keep(tmp_path, "some/tiny", COMMIT, "main")
    code = "import specrl; print(specrl.load_target('some/tiny').config.family); specrl.load_target('some/gone')"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if key != "HF_HUB_CACHE"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert run.stdout == "qwen3\n"
    last = run.stderr.strip().splitlines()[-1]
    assert "'some/gone' is no directory" in last and last.endswith("give a directory, or run: hf download some/gone")


@pytest.mark.parametrize(
    ("target", "command"),
    [("some/gone", "hf download some/gone"), ("some/gone@v2", "hf download some/gone --revision v2")],
)
def test_without_cache_and_network_one_line_says_what_to_do(home: Path, target: str, command: str) -> None:
    with pytest.raises(ValueError, match=r"^a target must be a checkpoint directory or an avail") as caught:
        specrl.load_target(target)
    assert str(caught.value).endswith(f"; give a directory, or run: {command}")
    assert f"but {target!r} is no directory" in str(caught.value) and "\n" not in str(caught.value)


def test_a_snapshot_without_weights_is_told(home: Path) -> None:
    for shard in keep(home, "some/half", COMMIT, "main").glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(ValueError, match=r"lacks model\*\.safetensors; .* hf download some/half$"):
        hub_directory("some/half")


def test_only_what_is_read_is_downloaded_and_never_a_pickle(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, object]] = []
    wanted = keep(home, "some/large", COMMIT, "main")

    def download(name: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, revision))
        stored = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "chat_template.jinja"]
        stored += [
            "additional_chat_templates/rag.jinja",
            "tokenizer.json",
            "tokenizer_config.json",
            "config.json",
            "vocab.json",
            "merges.txt",
        ]
        others = ["pytorch_model.bin", "original/consolidated.00.pth", "optimizer.pt", "model.bin", "run.py", "x.pkl"]
        kept = [name for name in stored + others if any(fnmatch(name, pattern) for pattern in allow_patterns)]
        assert kept == stored
        return str(wanted)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub_directory("some/large@v1") == hub_directory("some/large@v1") == wanted
    assert asked == [("some/large", "v1")], "once a process, so that all its parts mean one commit"


def test_what_is_an_id_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_id("Qwen/Qwen3-8B") == HubId("Qwen/Qwen3-8B")
    assert hub_id("Qwen/Qwen3-8B@refs/pr/1") == HubId("Qwen/Qwen3-8B", "refs/pr/1")
    for other in ("embedded", "Qwen3-8B", "/models/Qwen3-8B", "./a/b", "../a/b", "a/b/c", "a/b@", str(tmp_path)):
        assert hub_id(other) is None and hub_directory(other) == Path(other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert hub_id("Qwen/Qwen3-8B") is None, "a directory that is there comes first"


def test_sglang_is_given_the_id_itself() -> None:
    assert served_as("Qwen/Qwen3-8B") == {"model-path": "Qwen/Qwen3-8B"}
    assert served_as("/models/x@y/z") == {"model-path": "/models/x@y/z"}
    flags = Serving(None, Plan(3)).flags("Qwen/Qwen3-8B@v1")
    assert (flags["model-path"], flags["revision"]) == ("Qwen/Qwen3-8B", "v1")
    assert json.loads(json.dumps(flags)) == flags
