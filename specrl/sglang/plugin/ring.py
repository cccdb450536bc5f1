"""A bounded ring between serving, which never waits, and one subscriber, who may be slow, dead, or back again."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.peer import OnePeer
from specrl.sglang.plugin.wire import Frame, encode

_IDLE_S = 0.05  # between two looks at what has ended, while nothing is served
Late = Callable[[], Frame]  # finishes a frame outside the serving thread


class Ring(OnePeer[Late]):
    """Hands frames to whoever is connected, from a thread of its own.

    Without a subscriber nothing is kept. With one, up to `capacity` frames wait for it; what comes while the ring is
    full is dropped and counted, and every frame tells how many were. A subscriber that went is noticed when it is
    written to or when the next one comes, and what waited for it is thrown away.

    Args:
        path: of the Unix socket.
        capacity: frames that may wait.
        between: frames to send while the ring is empty; called from the ring's thread, before each look at the ring.
        safe: switched off where the thread fails.
    """

    def __init__(self, path: Path, capacity: int, between: Callable[[], Sequence[Frame]], safe: Failsafe) -> None:
        self.dropped = self.sent = 0
        self._capacity, self._between = capacity, between
        super().__init__(path, safe, "specrl-traces")

    @property
    def wanted(self) -> bool:
        """Whether anybody is connected."""
        return self._peer is not None

    def room(self) -> bool:
        """Whether a frame would be taken now; if somebody is connected and it would not, it counts as dropped."""
        if self._peer is None:
            return False
        if len(self._waiting) < self._capacity:
            return True
        self.dropped += 1
        return False

    def put(self, frame: Late) -> None:
        """Let a frame wait for the subscriber; after `room` said yes, from the same thread."""
        with self._changed:
            self._waiting.append(frame)
            self._changed.notify()

    def _send(self) -> None:
        while self._safe.on:
            ended = self._between()  # first, so that all that belongs to what has ended is in the ring by now
            with self._changed:
                if not self._waiting and not ended:
                    self._changed.wait(_IDLE_S)
                waiting, peer = len(self._waiting), self._peer
            for _ in range(waiting):
                with self._changed:
                    late = self._waiting.popleft() if self._waiting and self._peer is peer else None
                if late is not None:
                    self._write(late(), peer)
            for frame in ended:
                self._write(frame, peer)

    def _write(self, frame: Frame, peer: socket.socket | None) -> None:
        if peer is None:
            return
        try:
            peer.sendall(encode(Frame({**frame.said, "dropped": self.dropped}, frame.tensors)))
            self.sent += 1
        except OSError:
            self._leave(peer)
