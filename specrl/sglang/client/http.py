"""HTTP to an SGLang server: JSON in, JSON out, and a deadline on every call."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from specrl.core.clock import WallClock
from specrl.sglang.client.errors import ServerBusy, ServerError, ServerFailed, ServerGone, ServerSilent, of_status

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_CHUNK = 1 << 16


class Client:
    """Asks a server. It may be used by many threads at once.

    Args:
        url: of the server, 'http://host:port'.
        api_key: sent with every call; None: none.
        timeout_s: that a call takes at most, tries again after 429 included.

    Raises:
        ValueError: the URL is not one, or the time is not positive.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server is named http://host:port, but got {url!r}")
        if not timeout_s > 0.0:
            raise ValueError(f"timeout_s must be above 0, but got {timeout_s}")
        self.url, self.timeout_s, self.api_key = url.rstrip("/"), timeout_s, api_key
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._clock = WallClock()

    @property
    def headers(self) -> dict[str, str]:
        """Sent with every call."""
        return dict(self._headers)

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The answer to a GET.

        Raises:
            ServerError: there is none; its class says why.
        """
        return self._call("GET", path, None, timeout_s)

    def post(self, path: str, body: object, *, timeout_s: float | None = None) -> Any:
        """The answer to a POST of JSON; None where it is empty.

        Raises:
            ServerError: there is none; its class says why.
        """
        return self._call("POST", path, json.dumps(body).encode(), timeout_s)

    def stream(self, path: str, body: object, *, timeout_s: float | None = None) -> Iterator[Any]:
        """The answers to a POST as they come (server-sent events), all of them within the time.

        Raises:
            ServerError: there are none; its class says why.
        """
        limit = self._clock.now() + (self.timeout_s if timeout_s is None else timeout_s)
        connection = self._connect(self._host, self._port, timeout=self._left(path, limit))
        try:
            connection.request("POST", self._path + path, json.dumps(body).encode(), self._headers)
            assert connection.sock is not None
            stream = connection.sock
            stream.settimeout(self._left(path, limit))
            with connection.getresponse() as answer:
                if answer.status != 200:
                    raise of_status(answer.status, self.url + path, answer.read().decode("utf-8", "replace"))
                while line := answer.readline():
                    said = line.removeprefix(b"data:").strip()
                    if said == b"[DONE]":
                        return
                    if said:
                        yield json.loads(said)
                    stream.settimeout(self._left(path, limit))
        except TimeoutError as error:
            raise self._silent(path) from error
        except ServerError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            why = str(error) or type(error).__name__
            raise ServerGone(f"{self.url} must answer {path}, but {why}; is it running? see its log") from error
        finally:
            connection.close()
        raise ServerGone(f"{self.url} must answer {path} to the end, but it hung up; is it running? see its log")

    def _call(self, method: str, path: str, body: bytes | None, timeout_s: float | None) -> Any:
        limit = self._clock.now() + (self.timeout_s if timeout_s is None else timeout_s)
        pause = _FIRST_PAUSE_S
        while True:
            try:
                return self._once(method, path, body, limit)
            except ServerBusy:
                if self._clock.now() + pause >= limit:
                    raise
            Event().wait(pause)
            pause = min(2.0 * pause, _LONGEST_PAUSE_S)

    def _once(self, method: str, path: str, body: bytes | None, limit: float) -> Any:
        connection = self._connect(self._host, self._port, timeout=self._left(path, limit))
        try:
            connection.request(method, self._path + path, body, self._headers)
            assert connection.sock is not None
            connection.sock.settimeout(self._left(path, limit))
            stream = connection.sock
            parts = bytearray()
            with connection.getresponse() as answer:
                while not answer.isclosed():
                    stream.settimeout(self._left(path, limit))
                    part = answer.read1(_CHUNK)
                    if not part:
                        break
                    parts += part
                missing = answer.length
        except TimeoutError as error:
            raise self._silent(path) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, ServerError):
                raise
            why = str(error) or type(error).__name__
            raise ServerGone(f"{self.url} must answer {path}, but {why}; is it running? see its log") from error
        finally:
            connection.close()
        if missing:
            raise ServerGone(f"{self.url} must answer {path} to the end, but it hung up; is it running? see its log")
        text = parts.decode("utf-8", "replace")
        if answer.status != 200:
            raise of_status(answer.status, self.url + path, text)
        try:
            return json.loads(text) if text.strip() else None
        except ValueError as error:
            raise ServerFailed(
                f"{self.url} must answer {path} in JSON, but said {text[:80]!r}; is it SGLang?"
            ) from error

    def _left(self, path: str, limit: float) -> float:
        left = limit - self._clock.now()
        if left <= 0.0:
            raise self._silent(path)
        return left

    def _silent(self, path: str) -> ServerSilent:
        return ServerSilent(
            f"{self.url} must answer {path} in time, but did not; see its log, or allow a longer timeout_s"
        )
