"""A connection to a server for a hot swap: calls that share a deadline, and an upload that waits for its last byte."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from specrl.core.clock import WallClock
from specrl.sglang.client import watchdog_process as guard
from specrl.sglang.client.errors import SwapError


def headers(api_key: str | None) -> dict[str, str]:
    """Of a call with JSON."""
    key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"Content-Type": "application/json", **key}


class Line:
    """One connection to a server, and the time that is left."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ValueError(f"a server's url must be like http://127.0.0.1:30000, but got {url!r}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s must be above 0, but got {timeout_s}")
        self.url, self.headers, self.timeout_s, self.clock = url, headers(api_key), timeout_s, WallClock()
        self._ends, self._root = self.clock.now() + timeout_s, urlsplit(url).path.rstrip("/")
        self._connection: http.client.HTTPConnection | None = None

    def close(self) -> None:
        """Hang up; the next `ask` opens another connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def ask(self, method: str, path: str, said: object = None) -> dict[str, Any]:
        """The answer, within the time that is left.

        Raises:
            SwapError: there is none, or a refusal.
        """
        body = None if said is None else json.dumps(said).encode()
        try:
            connection = self._open()
            connection.request(method, self._root + path, body, self.headers)
            return self._answer(connection, path)
        except SwapError:
            raise
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._failure(path, error) from error

    @contextmanager
    def upload(self, path: str, body: bytes) -> Iterator[Any]:
        """Send all of a POST but its last byte; what it yields sends that, too, and takes the answer."""
        connection = guard.connect(self.url, self._left(path))
        try:
            connection.putrequest("POST", self._root + path)
            for name, value in {**self.headers, "Content-Length": str(len(body))}.items():
                connection.putheader(name, value)
            connection.endheaders()
            connection.send(body[:-1])

            def finish() -> None:
                try:
                    assert connection.sock is not None
                    connection.sock.settimeout(self._left(path))
                    connection.send(body[-1:])
                    self._answer(connection, path)
                except SwapError:
                    raise
                except (OSError, http.client.HTTPException) as error:
                    raise self._failure(path, error) from error

            yield finish
        except SwapError:
            raise
        except (OSError, http.client.HTTPException) as error:
            raise self._failure(path, error) from error
        finally:
            connection.close()

    def checksums(self) -> tuple[dict[str, str], str]:
        """The server's hash of each tensor of its draft, by its own names, and of all of them."""
        said = self.ask("POST", "/weights_checker", {"action": "checksum", "selector": "draft"})
        rank = said["ranks"][0]
        return {name.removeprefix("draft."): h for name, h in rank["checksums"].items()}, rank["per_gpu_checksum"]

    def _left(self, path: str) -> float:
        left = self._ends - self.clock.now()
        if left <= 0:
            raise SwapError(f"a swap must end within {self.timeout_s} s, but {path} is still due; allow it more")
        return left

    def connect(self) -> None:
        """Have a connection for the next `ask`.

        Raises:
            SwapError: there is none to be had.
        """
        try:
            self._open()
        except OSError as error:
            self.close()
            raise self._failure("", error) from error

    def _open(self) -> http.client.HTTPConnection:
        left = self._left("the next call")
        if self._connection is None:
            self._connection = guard.connect(self.url, left)
            self._connection.connect()
        assert self._connection.sock is not None
        self._connection.sock.settimeout(left)
        return self._connection

    def _answer(self, connection: http.client.HTTPConnection, path: str) -> dict[str, Any]:
        answer = connection.getresponse()
        text = answer.read()
        try:
            said: dict[str, Any] = json.loads(text)
        except ValueError:
            said = {}
        if answer.status != 200 or said.get("success") is False:
            why = said.get("message") or text[:200].decode(errors="replace")
            remedy = "give its API key" if answer.status in (401, 403) else "see its log"
            raise SwapError(f"{self.url}{path} must answer 200, but answers {answer.status}: {why}; {remedy}")
        return said

    def _failure(self, path: str, error: Exception) -> SwapError:
        return SwapError(f"{self.url}{path} must answer within {self.timeout_s} s, but {error!r}; is the server up?")
