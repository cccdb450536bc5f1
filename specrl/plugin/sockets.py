"""Local Unix sockets that only this user may connect to."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Condition


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


def admit(
    listener: socket.socket,
    changed: Condition,
    *,
    wanted: Callable[[], bool],
    leave: Callable[[], None],
    take: Callable[[socket.socket], None],
) -> None:
    """Take in one peer after another, until nobody is wanted any more.

    Args:
        listener: where they connect.
        changed: held while `wanted` is asked and `take` runs, so that one who connects while all is being closed is
            hung up on and not forgotten.
        wanted: whether anybody is.
        leave: parts with the peer before.
        take: the peer that came.
    """
    while wanted():
        try:
            peer, _ = listener.accept()
        except OSError:  # closed
            return
        leave()
        with changed:
            welcome = wanted()
            if welcome:
                take(peer)
        if not welcome:
            hang_up(peer)


def hang_up(end: socket.socket) -> None:
    """Close a socket, and wake whoever waits at it."""
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
