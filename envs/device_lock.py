"""One timed environment at a time on a device: a lock file each, held during an episode."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system: nothing is refused there
    fcntl = None  # type: ignore[assignment]


class Exclusive:
    """The right to time rounds on a device; the user's other environments, of any process, are refused meanwhile.

    Held from `take` to `give_back`, and no longer than this object or its process lives: the system itself lets go
    of the lock of a process that was killed.

    Args:
        device: as torch names it.
        folder: of the lock files; None: the system's for temporary files.
    """

    def __init__(self, device: str, folder: Path | None = None) -> None:
        user = os.getuid() if hasattr(os, "getuid") else 0
        self.device = device
        self._path = (folder or Path(tempfile.gettempdir())) / f"specrl-{user}-{device.replace(':', '')}.lock"
        self._file: int | None = None

    def take(self) -> None:
        """Hold the device from now on; nothing where it is held already.

        Raises:
            ValueError: another environment holds it.
        """
        if self._file is not None or fcntl is None:
            return
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode()
            os.close(file)
            who = "another one of this process" if holder == str(os.getpid()) else f"one of process {holder or '?'}"
            raise ValueError(
                f"one timed environment at a time may decode on {self.device!r}, but {who} is in the middle of an "
                "episode: in parallel they slow each other down, and rounds of one count as thinking of the other, so "
                "neither reward is true; end or close that one, enter its off_the_clock() meanwhile, train in parallel "
                "on 'SpecRL/Simulated-v0', or pass allow_parallel=True"
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        self._file = file

    def give_back(self) -> None:
        """Let others decode; idempotent."""
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # for copies of a forked process, too
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        """An environment that nobody holds does not run."""
        self.give_back()
