"""The package is put together as pyproject.toml, CHANGELOG.md and the links say."""

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
def test_envs_and_agents_import_under_their_mapped_name_only(name: str) -> None:
    assert importlib.import_module(f"specrl.{name}").__name__ == f"specrl.{name}"
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None and spec.loader is not None
    with pytest.raises(ImportError, match=f"imported as 'specrl.{name}', but got '{name}'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize("name", ["envs", "agents"])
def test_links_are_relative(name: str) -> None:
    assert (ROOT / "specrl" / name).readlink() == Path("..") / name


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## \[?(\d[^\] ]*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None and newest.group(1) == specrl.__version__
    try:
        installed = version("specrl")
    except PackageNotFoundError:
        return  # run from the tree, without an installation
    assert installed == specrl.__version__, "the installation is older than the tree; run 'make clean setup'"


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "specrl").rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not missing, "without __init__.py these are left out of the wheel"


def test_every_data_file_of_the_package_goes_into_the_wheel() -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packed = set()
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            packed.update((ROOT / package.replace(".", "/")).glob(pattern))
    files = {path for path in (ROOT / "specrl").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert files <= packed, "name these in pyproject.toml's package-data"
