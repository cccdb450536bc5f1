"""Settings that must hold before torch and matplotlib are imported, and what all tests share."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_help import Serve, answering
from own_locks import own_locks  # noqa: F401 - used by all tests

for name in [name for name in os.environ if name.startswith("SPECRL_")]:
    del os.environ[name]  # what this user asks of commands and of the plugin
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only wait for each other
os.environ.setdefault("MPLBACKEND", "agg")  # no display
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests make or ship their data, and download none


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name leaves room for that of a Unix socket (108 bytes)."""
    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        yield Path(name)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A function that starts an HTTP server (see `http_help.answering`)."""
    with answering() as start:
        yield start
