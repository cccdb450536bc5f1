"""Live requests on a server: each one is an HTTP call in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Condition, Thread
from typing import Any

from specrl.core.interfaces import Request
from specrl.sglang.client.http import Client, ServerError, ServerSilent
from specrl.sglang.plugin.traces import OPT_OUT


@dataclass
class LiveRequest:
    """A request on a server."""

    number: int  # in the session
    request: Request  # prompt and sampling parameters
    rid: str = ""  # id on the server
    output: list[int] = field(default_factory=list)  # reported tokens so far
    resumed: int = 0  # number of these tokens that were generated before it was parked

    @property
    def context(self) -> int:
        """Number of its known tokens, with the one that its prefill adds."""
        return len(self.request.prompt) + max(len(self.output), self.resumed + 1)

    @property
    def text(self) -> list[int]:
        """Its prompt and its output."""
        return [*self.request.prompt, *self.output]

    def body(self) -> dict[str, Any]:
        """The body for /generate, for the rest of its tokens."""
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
    """Sends requests and takes their answers. While waiting, methods raise a ServerError if one failed or is too late.

    A request may take `timeout_s` seconds. In lock-step, this includes the time that the agent takes for its actions.
    """

    def __init__(self, client: Client, timeout_s: float = 6 * 3600.0) -> None:
        self._client, self._timeout_s = client, timeout_s
        self._answers: dict[str, Any] = {}
        self._failures: list[ServerError] = []
        self._changed = Condition()

    def send(self, rid: str, body: Mapping[str, Any]) -> None:
        """Send a request to /generate; `take` returns its answer."""
        Thread(target=self._ask, args=(rid, body), name=f"specrl-{rid}", daemon=True).start()

    def check(self) -> None:
        """Raise the error of a request that failed."""
        if self._failures:
            raise self._failures[0]

    def take(self, rid: str, timeout_s: float) -> Any:
        """Return the answer to a request."""
        with self._changed:
            self._wait(lambda: rid in self._answers, f"request {rid}", timeout_s)
            return self._answers.pop(rid)

    def any(self, timeout_s: float) -> str:
        """Return the id of a request that was answered."""
        with self._changed:
            self._wait(lambda: bool(self._answers), "a request", timeout_s)
            return next(iter(self._answers))

    def abort(self, rid: str) -> None:
        """Let the server end all requests whose id begins with `rid`, at the end of their round."""
        self._client.post("/abort_request", {"rid": rid})

    def _wait(self, answered: Callable[[], bool], requests: str, timeout_s: float) -> None:
        if not self._changed.wait_for(lambda: answered() or self._failures, timeout_s):
            raise ServerSilent(f"{self._client.url} must answer {requests} within {timeout_s:g} s; see its log")
        if not answered():
            self.check()

    def _ask(self, rid: str, body: Mapping[str, Any]) -> None:
        try:
            answer = self._client.post("/generate", body, timeout_s=self._timeout_s)
            with self._changed:
                self._answers[rid] = answer
                self._changed.notify_all()
        except ServerError as error:
            with self._changed:
                self._failures.append(error)
                self._changed.notify_all()
