"""Requests in flight: each one is an HTTP call in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from specrl.core.clock import WallClock
from specrl.core.interfaces import Request
from specrl.sglang.client.http import Client, ServerError, ServerSilent
from specrl.sglang.plugin.traces import OPT_OUT

_MAX_REQUEST_S = 6 * 3600.0  # in lock-step a request lasts as long as an agent thinks


@dataclass
class LiveRequest:
    """A request on a server.

    Attributes:
        number: its number in the session.
        request: what is asked.
        rid: its id on the server.
        output: its tokens so far, as far as they were reported.
        resumed: how many of them were generated before it was parked.
    """

    number: int
    request: Request
    rid: str
    output: list[int] = field(default_factory=list)
    resumed: int = 0

    @property
    def context(self) -> int:
        """Known tokens of it, with the one that its prefill adds."""
        return len(self.request.prompt) + max(len(self.output), self.resumed + 1)

    @property
    def text(self) -> list[int]:
        """Its prompt and its output."""
        return [*self.request.prompt, *self.output]

    def body(self) -> dict[str, Any]:
        """The body for /generate, which asks for the rest of it."""
        request = self.request
        sampling: dict[str, Any] = {
            "temperature": request.temperature,
            "max_new_tokens": request.max_new_tokens - self.resumed,
            "ignore_eos": request.ignore_eos,
        }
        if not request.learn:
            sampling["custom_params"] = {OPT_OUT: False}
        return {"rid": self.rid, "input_ids": self.text, "sampling_params": sampling}


class LiveRequests:
    """Sends requests and takes their answers.

    Args:
        client: calls the server.
    """

    def __init__(self, client: Client) -> None:
        self._client, self._clock = client, WallClock()
        self._answers: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, ServerError] = {}
        self._changed = Condition()

    def send(self, request: LiveRequest) -> None:
        """Send a request; `take` returns its answer."""
        body = request.body()
        Thread(target=self._ask, args=(request.rid, body), name=f"specrl-{request.rid}", daemon=True).start()

    def check(self) -> None:
        """Raise the error of a request that failed."""
        failed = next(iter(self._failures.values()), None)
        if failed is not None:
            raise failed

    def take(self, rid: str, timeout_s: float) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            ServerError: a request failed, or there is no answer in time.
        """
        with self._changed:
            self._wait(lambda: rid in self._answers, f"request {rid}", timeout_s)
            return self._answers.pop(rid)

    def any(self, timeout_s: float) -> str:
        """Return the id of a request that was answered.

        Raises:
            ServerError: a request failed, or there is no answer in time.
        """
        with self._changed:
            self._wait(lambda: bool(self._answers), "a request", timeout_s)
            return next(iter(self._answers))

    def abort(self, rid: str) -> None:
        """Let the server end all requests whose id begins so, at the end of their round."""
        self._client.post("/abort_request", {"rid": rid})

    def _wait(self, answered: Callable[[], bool], what: str, timeout_s: float) -> None:
        limit = self._clock.now() + timeout_s
        while not answered():
            self.check()
            left = limit - self._clock.now()
            if left <= 0.0:
                raise ServerSilent(f"{self._client.url} must answer {what} within {timeout_s:g} s; see its log")
            self._changed.wait(min(left, 1.0))

    def _ask(self, rid: str, body: dict[str, Any]) -> None:
        try:
            answer = self._client.post("/generate", body, timeout_s=_MAX_REQUEST_S)
        except ServerError as error:
            with self._changed:
                self._failures[rid] = error
                self._changed.notify_all()
        else:
            with self._changed:
                self._answers[rid] = answer
                self._changed.notify_all()
