"""Sessions on a server without our plugin, which sees whole requests only."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specrl.core.clock import WallClock
from specrl.core.interfaces import Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Completion, PlainSample, Round, Trace
from specrl.sglang.client.http import ServerFailed
from specrl.sglang.client.launch import Server
from specrl.sglang.client.plain_server import PlainServer, paused
from specrl.sglang.client.requests import LiveRequest, LiveRequests

LOST = (
    "the server has no plugin that we can reach, so only whole requests are seen: no plan per round, no traces, no "
    "split of seconds, and the server never waits for us"
)
NO_BASELINE = (
    "no speedup can be measured: the server has no plugin, and no plain_url names one without speculation on its device"
)


class RequestLevelSession(Session):
    """B requests on a server that runs by itself.

    A `Round` is here the time until a request ends. Its rows are all rounds of the requests that ended, by their
    histograms, in unknown order: `request_ids` repeat, `context_lengths` are each request's mean, and its seconds are
    those that we waited. Over many of them, tokens over seconds is the server's speed.

    Args:
        server: a server that is used by HTTP alone.
        workload: source of the requests.
        batch_size: live requests.
        max_batch_size: the most live requests that it may be resized to.
        seed: seed of the requests' order.
        plan: the plan that the server was launched with.
        version: returns the version of the draft that serves.
        timeout_s: seconds until a request must end.
        plain: measures decoding without speculation while this server is paused; None: it is not measured.
    """

    def __init__(
        self,
        server: Server,
        workload: Workload,
        *,
        batch_size: int,
        max_batch_size: int,
        seed: int,
        plan: Plan,
        version: Callable[[], int],
        timeout_s: float,
        plain: PlainServer | None = None,
    ) -> None:
        self._source, self._max_batch_size, self._plan = workload.requests(seed), max_batch_size, plan
        self._version, self._timeout_s, self._clock = version, timeout_s, WallClock()
        self._server, self._plain = server, plain
        self._requests = LiveRequests(server.client)
        self._name = f"specrl-{secrets.token_hex(4)}"
        self._count, self._closed = 0, False
        self._live: dict[str, LiveRequest] = {}
        self.resize(batch_size)

    @property
    def batch_size(self) -> int:
        """Live requests."""
        return self._batch_size

    @property
    def context_lengths(self) -> Sequence[int]:
        """Tokens of each prompt and half of its output: how far each request has come is not known."""
        return [len(_halfway(flight)) for flight in self._live.values()][: self._batch_size]

    def resize(self, batch_size: int) -> None:
        """Send more requests at once, or do not replace those that end.

        Raises:
            ValueError: it is not from 1 to `max_batch_size`.
        """
        if not 1 <= batch_size <= self._max_batch_size:
            raise ValueError(
                f"batch_size must be from 1 to {self._max_batch_size} (max_batch_size), but got {batch_size}"
            )
        self._batch_size = batch_size
        self._fill()

    def round(self, plan: Plan) -> Round:
        """Wait until a request ends.

        Raises:
            ValueError: another plan than the server's, or the session is closed.
            ServerError: the server fails, or no request ends in time.
        """
        if self._closed:
            raise ValueError("the session is closed; start another one")
        if plan != self._plan:
            raise ValueError(f"without our plugin the only plan is the server's own, {self._plan}, but got {plan}")
        began = self._clock.now()
        rows = list[tuple[int, int, int, int]]()  # request, tokens, correct drafts, context
        ended = list[Completion]()
        while not rows:
            rid = self._requests.any(self._timeout_s)
            live, answer = self._live.pop(rid), self._requests.take(rid, self._timeout_s)
            ended.append(Completion(live.number, live.request.prompt, tuple(answer["output_ids"])))
            rows += _rows(live, answer, self._plan)
            self._fill()
        numbers, tokens, correct, contexts = (np.array(column) for column in zip(*rows, strict=True))
        seconds = max(self._clock.now() - began, 1e-9)
        return Round(plan, numbers, tokens, correct, contexts, 0.0, 0.0, seconds, 0.0, self._version(), tuple(ended))

    def measure_plain(self) -> PlainSample | None:
        """Time a step of the server without speculation at half-way contexts, while this one is paused."""
        if self._plain is None:
            return None
        with paused(self._server):
            return self._plain.measure([_halfway(live) for live in self._live.values()][: self._batch_size])

    def drain(self) -> list[Trace]:
        """Return nothing: there are no traces without our plugin."""
        return []

    def close(self) -> None:
        """End the live requests; idempotent."""
        if not self._closed:
            self._closed = True
            try:
                self._requests.abort(self._name)
                for rid in self._live:  # the next session starts on an idle server
                    self._requests.take(rid, self._timeout_s)
            except OSError:  # the server has gone, and they with it
                pass

    def _fill(self) -> None:
        while len(self._live) < self._batch_size:
            live = LiveRequest(self._count, next(self._source), f"{self._name}-{self._count:08d}")
            self._count += 1
            self._live[live.rid] = live
            self._requests.send(live)


def _halfway(live: LiveRequest) -> list[int]:
    """A text as long as the request's own is on average; its words do not matter to plain decoding."""
    prompt = list(live.request.prompt)
    length = len(prompt) + max(live.request.max_new_tokens // 2, 1)
    return (prompt * (length // len(prompt) + 1))[:length]


def _rows(live: LiveRequest, answer: dict[str, Any], plan: Plan) -> list[tuple[int, int, int, int]]:
    """The rounds of a request by its histogram; the first token is its prefill's."""
    meta = answer.get("meta_info", {})
    count = len(answer["output_ids"])
    histogram = meta.get("spec_correct_drafts_histogram")
    if histogram is None and plan.num_steps:
        raise ServerFailed(
            "an answer must have spec_correct_drafts_histogram, but has not; is it SGLang 0.5.23, with a draft?"
        )
    if histogram is None:
        histogram = [count - 1]
    if len(histogram) > plan.num_steps + 1:
        raise ServerFailed(
            f"a round of {plan} must not accept {len(histogram) - 1} drafts; does the server change its plan?"
        )
    context = len(live.request.prompt) + count // 2
    left, rows = count - 1, []
    for correct, rounds in enumerate(histogram):
        for _ in range(rounds):
            kept = min(correct + 1, left)  # tokens after its end were dropped
            left -= kept
            rows.append((live.number, kept, correct, context))
    return rows
