"""HTTP to an SGLang server, on httpx: JSON, a deadline on every call, and errors with remedies."""

from __future__ import annotations

import json
import ssl
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import httpx

from specrl.core.checks import require
from specrl.core.clock import WallClock

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0
_KEEP_ALIVE_S = 2.0  # less than the server's 5 s, so that it does not close a connection that is about to be used
_NO_MEMORY = ("out of memory", "outofmemory", "not enough memory", "memory capacity", "no available memory")
MORE_MEMORY = "lower --max-running-requests or --context-length, or set --mem-fraction-static for what the device has"


class ServerError(OSError):
    """A call to a server failed."""


class ServerGone(ServerError):
    """The server does not run, or closed the connection."""


class ServerSilent(ServerError):
    """The server did not answer in time."""


class ServerRefuses(ServerError):
    """The server needs another API key."""


class ServerBusy(ServerError):
    """The server had no room for a request until the deadline."""


class ServerOutOfMemory(ServerError):
    """The server, or its device, has no memory left."""


class ServerFailed(ServerError):
    """The server answered with an error."""


class SwapError(ServerError):
    """The server did not load new draft weights; it continues with its old ones."""


def is_out_of_memory(text: str) -> bool:
    """Whether a message is about lack of memory."""
    return any(sign in text.lower() for sign in _NO_MEMORY)


def error_for_status(status: int, url: str, body: str) -> ServerError:
    """Return the error for an HTTP status other than 200."""
    details = f"{status}: {' '.join(body.split())[:300] or 'no details'}"
    if status in (401, 403):
        return ServerRefuses(f"{url} needs a valid API key (status {status}); pass api_key=, its --api-key")
    if status == 429:
        return ServerBusy(f"{url} had no room for a request in time ({details}); wait, or send fewer at once")
    if is_out_of_memory(body):
        return ServerOutOfMemory(f"{url} is out of memory ({details}); {MORE_MEMORY}")
    if status < 500:
        return ServerFailed(f"{url} must accept the request, but got {details}; is it SGLang, with its flags?")
    return ServerFailed(f"{url} failed ({details}); see its log, then start it again")


class Client:
    """Calls a server. Many threads may use it at once. Without an answer, methods raise a subclass of ServerError.

    Args:
        url: URL of the server, 'http://host:port'.
        api_key: sent with every call; None: none.
        timeout_s: seconds that a call may take, including new tries after status 429. If an answer comes piece by
            piece, the last piece may take as long again.

    Raises:
        ValueError: the URL is not one, or the time is not positive.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        try:
            valid = url.startswith(("http://", "https://")) and bool(httpx.URL(url).host)
        except httpx.InvalidURL:
            valid = False
        require(valid, "url", "http://host:port", url)
        require(timeout_s > 0.0, "timeout_s", "above 0", timeout_s)
        self.url, self.timeout_s, self.api_key = url.rstrip("/"), timeout_s, api_key
        self.headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self._clock = WallClock()
        self._http = httpx.Client(
            headers=self.headers,
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_KEEP_ALIVE_S),
            trust_env=False,  # no proxies
            verify=ssl.create_default_context() if url.startswith("https://") else False,
        )
        weakref.finalize(self, self._http.close)  # not before: threads may still wait for answers

    def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        """Return the answer to a GET."""
        return self._call("GET", path, None, timeout_s)

    def post(self, path: str, body: object, *, timeout_s: float | None = None) -> Any:
        """Return the answer to a POST of JSON; None if it is empty."""
        return self._call("POST", path, json.dumps(body).encode(), timeout_s)

    def stream(self, path: str, body: object) -> Iterator[Any]:
        """Yield the answers to a POST as they arrive (server-sent events)."""
        limit = self._limit(None)
        with self._send("POST", path, json.dumps(body).encode(), limit) as response:
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if data:
                    yield self._parse(path, data)
                self._left(path, limit)
        raise self._gone(path, "the connection was closed before the end")

    @contextmanager
    def upload(self, path: str, body: bytes, *, timeout_s: float) -> Iterator[Callable[[], Any]]:
        """Send a POST except for its last byte; the yielded function sends the last byte and returns the answer."""
        sent, last, canceled = Event(), Event(), Event()

        def content() -> Iterator[bytes]:
            yield body[:-1]
            sent.set()
            if not last.wait(timeout_s) or canceled.is_set():
                raise TimeoutError("the upload was canceled")
            yield body[-1:]

        def finish() -> Any:
            last.set()
            return answer.result()

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(self._once, "POST", path, content(), self._limit(timeout_s), len(body))
            answer.add_done_callback(lambda _: sent.set())
            try:
                sent.wait()
                if answer.done():  # it failed
                    answer.result()
                yield finish
            finally:
                canceled.set()
                last.set()

    def _call(self, method: str, path: str, body: bytes | None, timeout_s: float | None) -> Any:
        limit, pause = self._limit(timeout_s), _FIRST_PAUSE_S
        while True:
            try:
                return self._once(method, path, body, limit)
            except ServerBusy:
                if self._clock.now() + pause >= limit:
                    raise
            Event().wait(pause)
            pause = min(2.0 * pause, _LONGEST_PAUSE_S)

    def _once(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None, limit: float, length: int | None = None
    ) -> Any:
        with self._send(method, path, body, limit, length) as response:
            text = self._read(response, path, limit)
        return self._parse(path, text) if text.strip() else None

    @contextmanager
    def _send(
        self, method: str, path: str, body: bytes | Iterator[bytes] | None, limit: float, length: int | None = None
    ) -> Iterator[httpx.Response]:
        """Yield a response with status 200 and an unread body; httpx's errors become ours."""
        headers = {} if length is None else {"Content-Length": str(length)}
        try:
            timeout = self._left(path, limit)
            with self._http.stream(method, self.url + path, content=body, headers=headers, timeout=timeout) as response:
                if response.status_code != 200:
                    text = self._read(response, path, limit)
                    raise error_for_status(response.status_code, self.url + path, text)
                yield response
        except httpx.TimeoutException as error:
            raise self._silent(path) from error
        except httpx.TransportError as error:
            raise self._gone(path, str(error) or type(error).__name__) from error

    def _read(self, response: httpx.Response, path: str, limit: float) -> str:
        parts = bytearray()
        for part in response.iter_bytes():
            parts += part
            self._left(path, limit)
        return parts.decode("utf-8", "replace")

    def _parse(self, path: str, text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServerFailed(f"{self.url}{path} must answer JSON, but got {text[:80]!r}; is it SGLang?") from error

    def _limit(self, timeout_s: float | None) -> float:
        return self._clock.now() + (self.timeout_s if timeout_s is None else timeout_s)

    def _left(self, path: str, limit: float) -> float:
        """Return the seconds until the limit; raise a ServerSilent after it."""
        left = limit - self._clock.now()
        if left <= 0.0:
            raise self._silent(path)
        return left

    def _gone(self, path: str, reason: str) -> ServerGone:
        return ServerGone(f"{self.url} must answer {path}, but {reason}; is it running? see its log")

    def _silent(self, path: str) -> ServerSilent:
        return ServerSilent(f"{self.url} must answer {path} in time, but did not; see its log, or raise timeout_s")
