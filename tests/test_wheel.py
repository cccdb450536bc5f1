"""The source archive builds a wheel, and the wheel holds the whole package and works."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("specrl", "envs", "agents", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("build", "setuptools")), reason="needs build and setuptools"
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a wheel that was built from a source archive."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = place.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(place / "unpacked")
    return place / "unpacked"


def test_the_wheel_holds_every_file_of_the_package(unpacked: Path) -> None:
    folders = {"specrl": ROOT / "specrl", "specrl/envs": ROOT / "envs", "specrl/agents": ROOT / "agents"}
    expected = {
        str(Path(folder) / path.relative_to(top))
        for folder, top in folders.items()
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {str(path.relative_to(unpacked)) for path in (unpacked / "specrl").rglob("*") if path.is_file()}
    assert packed == expected
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"specrl"}


def test_the_package_works_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = """
import gymnasium, specrl, specrl.agents.choosers.adaptive, specrl.agents.draft.learner, specrl.sglang.plugin.entry
assert specrl.__file__.startswith(PLACE), specrl.__file__
env = gymnasium.make("SpecRL/Simulated-v0")
env.reset(seed=0)
env.step(env.action_space.sample())
from specrl.models.target import load_target
load_target("embedded")
from specrl.cli import main
raise SystemExit(main(["--version"]))
"""
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    words = [sys.executable, "-c", f"PLACE = {str(unpacked)!r}\n{code}"]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("specrl ")
