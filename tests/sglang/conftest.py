"""What the tests with SGLang share. They run in an environment of its own: `make test-sglang`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from learned import learn_draft
from server import Server, serve

from specrl.models.draft import Draft
from specrl.models.target import Target, load_target


def pytest_configure() -> None:
    if importlib.util.find_spec("sgl_kernel") is None or importlib.util.find_spec("sglang.srt") is None:
        raise pytest.UsageError("these tests need SGLang and its stand-in kernels; run them with 'make test-sglang'")


@pytest.fixture(scope="session")
def target() -> Target:
    return load_target("embedded")


@pytest.fixture(scope="session")
def draft(target: Target) -> Draft:
    """A draft that learned for some seconds: it accepts some tokens and misses others."""
    return learn_draft(target)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve`; its servers end with the test."""
    with ExitStack() as servers:
        yield lambda *flags, **options: servers.enter_context(serve(*flags, log=tmp_path / "server.log", **options))
