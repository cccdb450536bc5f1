"""Fixtures of the tests with SGLang, which have an environment of their own: `make test-sglang`."""

from __future__ import annotations

import importlib.util
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from learned import learn_draft
from own_locks import own_locks  # noqa: F401 - used by all tests
from server import Server, serve

from specrl.models.draft import Draft
from specrl.models.embedded import embedded_directory
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


@pytest.fixture(scope="session")
def sglang_runtime() -> None:
    """One process's worth of SGLang, as its scheduler sets it up before it loads a model."""
    from sglang.srt.distributed import bootstrap
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

    load_plugins()
    arguments = ServerArgs(
        model_path=str(embedded_directory()),
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        disable_cuda_graph=True,
        mem_fraction_static=0.5,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name leaves room for that of a Unix socket (108 bytes)."""
    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        yield Path(name)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """`serve`; its servers end with the test."""
    with ExitStack() as servers:
        yield lambda *flags, **options: servers.enter_context(serve(*flags, log=tmp_path / "server.log", **options))
