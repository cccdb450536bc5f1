"""The package: its folders and version in the tree, and a wheel that is built from a source archive."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import specrl

ROOT = Path(__file__).parent.parent
SOURCES = ("specrl", "envs", "agents", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
needs_build = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("build", "setuptools")), reason="needs build and setuptools"
)


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_envs_and_agents_import_under_the_package_only(name: str) -> None:
    assert (ROOT / "specrl" / name).readlink() == Path("..") / name
    assert importlib.import_module(f"specrl.{name}").__name__ == f"specrl.{name}"
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"specrl.{name}"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## \[?(\d[^\] ]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest.group(1) == specrl.__version__
    try:
        assert version("specrl") == specrl.__version__, "run 'make clean setup'"
    except PackageNotFoundError:
        pass  # run from the tree, without an installation


@needs_build
def test_the_wheel_holds_the_whole_package_and_works(tmp_path: Path) -> None:
    tree, unpacked = tmp_path / "tree", tmp_path / "unpacked"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(tree)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    zipfile.ZipFile(next(tmp_path.glob("*.whl"))).extractall(unpacked)

    folders = {"specrl": ROOT / "specrl", "specrl/envs": ROOT / "envs", "specrl/agents": ROOT / "agents"}
    expected = {
        str(Path(folder) / path.relative_to(top))
        for folder, top in folders.items()
        for path in top.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {str(path.relative_to(unpacked)) for path in (unpacked / "specrl").rglob("*") if path.is_file()} == expected
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"specrl"}

    code = f"""
import gymnasium, specrl, specrl.agents.choosers.adaptive, specrl.agents.draft.learner, specrl.sglang.plugin.entry
assert specrl.__file__.startswith({str(unpacked)!r}), specrl.__file__
env = gymnasium.make("SpecRL/Simulated-v0")
env.reset(seed=0)
env.step(env.action_space.sample())
specrl.load_target("embedded")
"""
    environ = {**os.environ, "PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
