"""A lock on a device: one timed environment decodes on it at a time."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # without POSIX file locks nothing is locked
    fcntl = None  # type: ignore[assignment]


class DeviceLock:
    """Exclusive use of a device for timed rounds, among all processes of the user; released when the process ends.

    Args:
        device: the device, by torch's name; None: nothing is locked.
        folder: folder of the lock files; None: the system's folder for temporary files.
    """

    def __init__(self, device: str | None, folder: Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else 0
        self.device = device
        self._path = (folder or Path(tempfile.gettempdir())) / f"specrl-{user}-{str(device).replace(':', '')}.lock"
        self._file: int | None = None

    def acquire(self) -> None:
        """Hold the device, if this lock does not already; raises ValueError if another environment holds it."""
        if self.device is None or self._file is not None or fcntl is None:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode()
            os.close(file)
            where = "in this process" if holder == str(os.getpid()) else f"in process {holder or '?'}"
            raise ValueError(
                f"device {self.device!r} must be used by one timed environment at a time, but another one, {where}, "
                "is in an episode; close it, enter its paused_timer(), train in parallel on 'SpecRL/Simulated-v0', "
                "or pass allow_parallel=True (rewards are then unreliable)"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        self._file = file

    def release(self) -> None:
        """Release the device; does nothing if this lock does not hold it."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # releases copies in forked processes too
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        self.release()
