"""Tells whoever is connected of every round, a line of JSON each, and takes leave for the next ones in lock-step.

To the client: {"kind": "hello", "lockstep": seconds}, then {"kind": "round", …} and {"kind": "prefill", …} (see
`specrl.sglang.plugin.rounds`), or {"kind": "error", …} before it hangs up. From the client, where it wants lock-step:
{"go": 0, "requests": []}: no round without leave from now on, answered by {"kind": "held"}; then
{"go": 1, "requests": ["id", …]}: one round, once these requests are there.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.peer import OnePeer

_LONGEST = 1 << 20  # bytes of a line


class RoundSocket(OnePeer[bytes]):
    """One client at a time, the last that came. Lines wait in a bounded ring; what it cannot hold is counted.

    Args:
        path: of the Unix socket; only this user may connect.
        capacity: lines that may wait.
        hello: said first to everyone who connects.
        safe: switched off where a thread fails.
    """

    def __init__(self, path: Path, capacity: int, hello: Mapping[str, Any], safe: Failsafe) -> None:
        self.dropped = 0
        self.paced = False  # whether the client sets the pace
        self.left = 0  # rounds that may go
        self.wanted: frozenset[str] = frozenset()  # requests that must be there first
        self._capacity = capacity
        self._hello = json.dumps({**hello, "kind": "hello", "dropped": 0}).encode() + b"\n"
        super().__init__(path, safe, "specrl-rounds")

    def put(self, said: Mapping[str, Any]) -> None:
        """Let a line wait for the client; never blocks."""
        if self._peer is None:
            return
        if len(self._waiting) >= self._capacity:
            self.dropped += 1
            return
        line = json.dumps({**said, "dropped": self.dropped}).encode() + b"\n"
        with self._changed:
            self._waiting.append(line)
            self._changed.notify_all()

    def used(self) -> None:
        """A round has run."""
        with self._changed:
            self.left = max(self.left - 1, 0)

    def wait(self, seconds: float) -> None:
        """Until the client says something, or so long."""
        with self._changed:
            if self._peer is not None and not self.left:
                self._changed.wait(seconds)

    def refuse(self, why: str) -> None:
        """Tell the client, and hang up."""
        peer = self._peer
        if peer is not None:
            try:
                peer.settimeout(1.0)
                peer.sendall(json.dumps({"kind": "error", "error": why, "dropped": self.dropped}).encode() + b"\n")
            except OSError:
                pass
            self._leave(peer)

    def _came(self, peer: socket.socket) -> None:
        self._waiting.append(self._hello)
        Thread(target=self._safe.call, args=(self._read, peer), name="specrl-rounds-peer", daemon=True).start()

    def _went(self) -> None:
        self.paced, self.left, self.wanted = False, 0, frozenset()

    def _read(self, peer: socket.socket) -> None:
        try:
            with peer.makefile("rb") as lines:
                while line := lines.readline(_LONGEST):
                    try:
                        said = json.loads(line)
                        count, wanted = int(said["go"]), frozenset(map(str, said["requests"]))
                    except (ValueError, KeyError, TypeError) as error:
                        return self.refuse(f'leave is given as {{"go": 1, "requests": []}}, but got {error!r}')
                    with self._changed:
                        if self._peer is peer:
                            if not self.paced:
                                self._waiting.append(b'{"kind": "held", "dropped": 0}\n')
                            self.paced, self.left, self.wanted = True, count, wanted
                            self._changed.notify_all()
        except (OSError, ValueError):  # it went
            pass
        finally:
            self._leave(peer)

    def _send(self) -> None:
        while self._safe.on:
            with self._changed:
                if not self._waiting:
                    self._changed.wait(1.0)
                peer, lines = self._peer, b"".join(self._waiting)
                self._waiting.clear()
            if peer is None or not lines:
                continue
            try:
                peer.sendall(lines)
            except OSError:
                self._leave(peer)
