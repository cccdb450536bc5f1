"""Requests in flight: each an HTTP call in a thread of its own, followed token by token through the plugin."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from specrl.core.clock import WallClock
from specrl.core.interfaces import Request
from specrl.sglang.client.errors import ServerError, ServerSilent
from specrl.sglang.client.http import Client
from specrl.sglang.plugin.traces import OPT_OUT

_LONGEST_S = 6 * 3600.0  # of a request, which lasts as long as whoever chooses plans takes to choose them


@dataclass
class Flight:
    """A request on a server.

    Attributes:
        number: in its session.
        request: what is asked.
        said: tokens that it has put out, as far as we heard.
        earlier: those of them that were put out before it was parked.
        rid: by which the server knows it.
    """

    number: int
    request: Request
    rid: str
    said: list[int] = field(default_factory=list)
    earlier: int = 0

    @property
    def context(self) -> int:
        """Tokens known of it; the prefill adds one."""
        return len(self.request.prompt) + max(len(self.said), self.earlier + 1)

    @property
    def text(self) -> list[int]:
        """Its prompt and what it has put out."""
        return [*self.request.prompt, *self.said]

    def body(self) -> dict[str, Any]:
        """What /generate is asked: what is left of it."""
        request = self.request
        sampling: dict[str, Any] = {
            "temperature": request.temperature,
            "max_new_tokens": request.max_new_tokens - self.earlier,
            "ignore_eos": request.ignore_eos,
        }
        if not request.learn:
            sampling["custom_params"] = {OPT_OUT: False}
        return {"rid": self.rid, "input_ids": self.text, "sampling_params": sampling}


class Flights:
    """Sends requests and takes their answers.

    Args:
        client: of the server.
    """

    def __init__(self, client: Client) -> None:
        self._client, self._clock = client, WallClock()
        self._answers: dict[str, dict[str, Any]] = {}
        self._failures: dict[str, ServerError] = {}
        self._changed = Condition()

    def send(self, flight: Flight) -> None:
        """Ask for it; its answer waits for `take`."""
        body = flight.body()
        Thread(target=self._ask, args=(flight.rid, body), name=f"specrl-{flight.rid}", daemon=True).start()

    def check(self) -> None:
        """Raise what went wrong with one of them."""
        failed = next(iter(self._failures.values()), None)
        if failed is not None:
            raise failed

    def take(self, rid: str, timeout_s: float) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            ServerError: it failed, or there is no answer in time.
        """
        limit = self._clock.now() + timeout_s
        with self._changed:
            while rid not in self._answers:
                self.check()
                left = limit - self._clock.now()
                if left <= 0.0:
                    raise ServerSilent(
                        f"{self._client.url} must answer request {rid} within {timeout_s:g} s; see its log"
                    )
                self._changed.wait(min(left, 1.0))
            return self._answers.pop(rid)

    def any(self, timeout_s: float) -> str:
        """The name of a request whose answer is there.

        Raises:
            ServerError: one failed, or there is no answer in time.
        """
        limit = self._clock.now() + timeout_s
        with self._changed:
            while not self._answers:
                self.check()
                left = limit - self._clock.now()
                if left <= 0.0:
                    raise ServerSilent(f"{self._client.url} must answer a request within {timeout_s:g} s; see its log")
                self._changed.wait(min(left, 1.0))
            return next(iter(self._answers))

    def abort(self, rid: str) -> None:
        """Have the server end requests whose name begins so, at the end of their round."""
        self._client.post("/abort_request", {"rid": rid})

    def forget(self, rid: str) -> None:
        """Neither its answer nor its failure matters any more."""
        with self._changed:
            self._answers.pop(rid, None)
            self._failures.pop(rid, None)

    def _ask(self, rid: str, body: dict[str, Any]) -> None:
        try:
            answer = self._client.post("/generate", body, timeout_s=_LONGEST_S)
        except ServerError as error:
            with self._changed:
                self._failures[rid] = error
                self._changed.notify_all()
        else:
            with self._changed:
                self._answers[rid] = answer
                self._changed.notify_all()
