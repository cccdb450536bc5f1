"""A socket with one peer at a time, the last that came, and what waits to be sent to it."""

from __future__ import annotations

import socket
from collections import deque
from pathlib import Path
from threading import Condition, Thread
from typing import Generic, TypeVar

from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.sockets import hang_up, listen

T = TypeVar("T")


class OnePeer(Generic[T]):
    """Takes peers in by one thread, and sends what waits by another.

    For a class to inherit that says how to send, in `_send`, and may take note of who comes and goes. Both threads
    start here: whatever `_send` needs must be there before.

    Args:
        path: of the Unix socket; only this user may connect.
        safe: switched off where a thread fails.
        name: that its threads' names begin with.
    """

    def __init__(self, path: Path, safe: Failsafe, name: str) -> None:
        self._safe = safe
        self._waiting: deque[T] = deque()
        self._changed = Condition()  # held by whoever changes the peer, or takes what waits
        self._peer: socket.socket | None = None
        self._listener = listen(path)
        for work in (self._accept, self._send):
            Thread(target=safe.call, args=(work,), name=f"{name}{work.__name__}", daemon=True).start()

    def close(self) -> None:
        """Listen and send no more."""
        with self._changed:
            self._safe.on = False
            self._changed.notify_all()
        hang_up(self._listener)
        self._leave(self._peer)

    def _accept(self) -> None:
        while self._safe.on:
            try:
                peer, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._leave(self._peer)
            with self._changed:
                welcome = self._safe.on  # one who connects while all is being closed is not forgotten
                if welcome:
                    self._peer = peer
                    self._came(peer)
                    self._changed.notify_all()
            if not welcome:
                hang_up(peer)

    def _leave(self, peer: socket.socket | None) -> None:
        """This peer is gone, and what waited for it."""
        with self._changed:
            if peer is not None and self._peer is peer:
                self._peer = None
                self._waiting.clear()
                self._went()
                self._changed.notify_all()
        if peer is not None:
            hang_up(peer)

    def _came(self, peer: socket.socket) -> None:
        """There is a new peer; called with the lock held."""

    def _went(self) -> None:
        """There is none any more; called with the lock held."""

    def _send(self) -> None:
        """Send what waits, until `safe` is off."""
        raise NotImplementedError
