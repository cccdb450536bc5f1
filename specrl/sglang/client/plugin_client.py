"""Our end of the plugin's sockets: leave for rounds, what they were, and the plans that they follow."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.sglang.client.errors import ServerFailed, ServerGone, ServerSilent

_SLICE_S = 0.05  # between two looks at what else may have gone wrong
_CHUNK = 1 << 16


class Lines:
    """Lines of JSON to and from a local socket, with a deadline on each.

    Args:
        path: of the socket.
        check: called while we wait; raises where waiting is in vain.

    Raises:
        ServerGone: nobody listens there.
    """

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        self._path, self._check, self._clock = path, check, WallClock()
        self._socket = socket.socket(socket.AF_UNIX)
        self._rest = bytearray()
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ServerGone(f"the plugin must listen on {path}, but {error}; is its server running?") from error

    def close(self) -> None:
        """Hang up; idempotent."""
        self._socket.close()

    def say(self, said: object) -> None:
        """Send a line."""
        try:
            self._socket.settimeout(5.0)
            self._socket.sendall(json.dumps(said).encode() + b"\n")
        except OSError as error:
            raise self._gone() from error

    def hear(self, timeout_s: float) -> dict[str, Any]:
        """The next line.

        Raises:
            ServerSilent: none came in time.
            ServerGone: the other side hung up.
        """
        limit = self._clock.now() + timeout_s
        while b"\n" not in self._rest:
            left = limit - self._clock.now()
            if left <= 0.0:
                raise ServerSilent(
                    f"the plugin must say something on {self._path} within {timeout_s:g} s, but did not; see the "
                    "server's log, or allow a longer timeout_s"
                )
            self._read(min(left, _SLICE_S))
        line, _, rest = self._rest.partition(b"\n")
        self._rest = rest
        said = json.loads(line)
        if not isinstance(said, dict):
            raise ServerFailed(f"the plugin must say JSON objects, but said {line[:80]!r}; is it of this version?")
        return said

    def heard(self) -> list[dict[str, Any]]:
        """Every line that has come by now."""
        out: list[dict[str, Any]] = []
        while True:
            if b"\n" in self._rest:
                out.append(self.hear(1.0))
            elif not self._read(0.0):
                return out

    def _read(self, seconds: float) -> bool:
        """Whether anything came."""
        try:
            self._socket.settimeout(seconds)
            part = self._socket.recv(_CHUNK)
        except (TimeoutError, BlockingIOError):
            self._check()
            return False
        except OSError as error:
            raise self._gone() from error
        if not part:
            raise self._gone()
        self._rest += part
        return True

    def _gone(self) -> Exception:
        try:
            self._check()
        except OSError as error:
            return error
        return ServerGone(f"the server hung up on {self._path}; is it running? see its log")


class Rounds:
    """What the server's rounds were, and leave for the next.

    Args:
        path: of the socket.
        check: as in `Lines`.
        timeout_s: for a round.
    """

    def __init__(self, path: Path, check: Callable[[], None], timeout_s: float) -> None:
        self._lines, self._timeout_s = Lines(path, check), timeout_s
        self.dropped = 0  # lines that the server could not keep for us
        self.lockstep_s = float(self.next()["lockstep"])  # that a round waits at most for leave; 0: none waits

    def close(self) -> None:
        """Hang up; the server goes on by itself."""
        self._lines.close()

    def hold(self) -> None:
        """Let no round go without leave from now on, as long as we are connected."""
        self.go(0, ())
        while self.next()["kind"] != "held":
            pass

    def go(self, count: int, requests: Sequence[str]) -> None:
        """Let `count` rounds go, once these requests are there."""
        self._lines.say({"go": count, "requests": list(requests)})

    def next(self) -> dict[str, Any]:
        """The next 'round' or 'prefill'.

        Raises:
            ServerError: there is none.
        """
        return self._take(self._lines.hear(self._timeout_s))

    def past(self) -> list[dict[str, Any]]:
        """Those that have come by now."""
        return [self._take(said) for said in self._lines.heard()]

    def _take(self, said: dict[str, Any]) -> dict[str, Any]:
        if said.get("kind") == "error":
            raise ServerFailed(f"the plugin hung up: {said.get('error')}")
        self.dropped = int(said["dropped"])
        return said


class Plans:
    """The plan that the server's rounds follow.

    Args:
        path: of the socket.
        check: as in `Lines`.
        timeout_s: for an answer.
    """

    def __init__(self, path: Path, check: Callable[[], None], timeout_s: float) -> None:
        self._lines, self._timeout_s = Lines(path, check), timeout_s
        self._given: Plan | None = None

    def close(self) -> None:
        """Hang up; the last plan stays in force."""
        self._lines.close()

    def give(self, plan: Plan) -> None:
        """Let the next rounds follow it.

        Raises:
            ValueError: the server has no buffers for it.
            ServerError: no answer.
        """
        if plan == self._given:
            return
        self._lines.say({"plans": {"1": str(plan)}})
        answer = self._lines.hear(self._timeout_s)
        if "error" in answer:
            raise ValueError(f"the server must be able to run {plan}, but {answer['error']}")
        self._given = plan
