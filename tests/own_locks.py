"""For `conftest.py`: timed environments refuse to run beside each other on a device, and not beside other tests'."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def own_locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Device locks that no other test, no other run of the tests and nothing else of this user's can hold."""
    from specrl.envs import device_lock

    with tempfile.TemporaryDirectory(prefix="specrl") as folder:
        monkeypatch.setattr(device_lock, "tempfile", SimpleNamespace(gettempdir=lambda: folder))
        yield
