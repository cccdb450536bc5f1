"""Local Unix sockets that only this user may connect to."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path


def listen(path: Path) -> socket.socket:
    """A listening stream socket at `path`; one that nobody listens on any more is replaced.

    Raises:
        ValueError: something else is there, or somebody listens already.
    """
    if path.exists():
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise ValueError(f"a socket must not take a file's place, but {str(path)!r} is one; name another path")
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise ValueError(f"only one may listen on a socket, but {str(path)!r} is in use; name another path")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(4)
    except OSError as error:
        listener.close()
        raise ValueError(f"a socket must be made at {str(path)!r}, but it cannot: {error}") from error
    return listener


def hang_up(end: socket.socket) -> None:
    """Close a socket, and wake whoever waits at it."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
