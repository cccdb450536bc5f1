"""The folders envs/ and agents/ belong to the package `specrl`, and the version is the same everywhere."""

from __future__ import annotations

import importlib
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import specrl

ROOT = Path(__file__).parent.parent


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
