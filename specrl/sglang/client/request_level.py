"""A server without our plugin: what its requests say when they end, and nothing of single rounds."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from specrl.core.clock import WallClock
from specrl.core.interfaces import Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Completion, PlainSample, Round, Trace
from specrl.sglang.client.errors import ServerFailed
from specrl.sglang.client.launch import Server
from specrl.sglang.client.plain_server import PlainServer
from specrl.sglang.client.requests import Flight, Flights
from specrl.sglang.client.streamed import paused

LOST = (
    "the server has no plugin that we can reach, so that it is seen by the request only: no plan per round, no traces, "
    "no split of seconds, and it never waits for us"
)
NO_BASELINE = (
    "no speedup can be measured: the server has no plugin, and no plain_url names one without speculation on its device"
)


class CoarseSession(Session):
    """B requests on a server that runs by itself.

    What stands for a round is a stretch that ends when requests do. Its rows are all rounds of these requests, by their
    histograms, in no known order: `request_ids` repeat, `context_lengths` are each request's mean. Its seconds are
    those that we waited. Over many stretches, tokens over seconds is what the server does.

    Args:
        server: of which HTTP is all we have.
        workload: where requests come from.
        batch_size: live requests.
        most: that it may be resized to.
        seed: of the requests' order.
        plan: that it was launched with.
        version: gives the draft that serves.
        timeout_s: for a request to end.
        plain: measures decoding without speculation, while this server is paused; None: nobody does.
    """

    def __init__(
        self,
        server: Server,
        workload: Workload,
        *,
        batch_size: int,
        most: int,
        seed: int,
        plan: Plan,
        version: Callable[[], int],
        timeout_s: float,
        plain: PlainServer | None = None,
    ) -> None:
        if not 1 <= batch_size <= most:
            raise ValueError(f"batch_size must be from 1 to max_batch_size, but got {batch_size} and {most}")
        self._source, self._most, self._plan = workload.requests(seed), most, plan
        self._version, self._timeout_s, self._clock = version, timeout_s, WallClock()
        self._server, self._plain = server, plain
        self._flights = Flights(server.client)
        self._name = f"specrl-{secrets.token_hex(4)}"
        self._count, self._closed = 0, False
        self._live: dict[str, Flight] = {}
        self._wanted = batch_size
        self._fill()

    @property
    def batch_size(self) -> int:
        """Live requests wanted."""
        return self._wanted

    @property
    def context_lengths(self) -> Sequence[int]:
        """Tokens of each prompt and half of what is to come: how far it has come is not known."""
        return [len(_halfway(flight)) for flight in self._live.values()][: self._wanted]

    def resize(self, batch_size: int) -> None:
        """More are sent at once; of too many, those that end are not replaced."""
        if not 1 <= batch_size <= self._most:
            raise ValueError(f"batch_size must be from 1 to {self._most} (max_batch_size), but got {batch_size}")
        self._wanted = batch_size
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
        rows: list[tuple[int, int, int, int]] = []  # request, tokens, correct drafts, context
        ended: list[Completion] = []
        while not rows:
            rid = self._flights.any(self._timeout_s)
            flight, answer = self._live.pop(rid), self._flights.take(rid, self._timeout_s)
            ended.append(Completion(flight.number, flight.request.prompt, tuple(answer["output_ids"])))
            rows += _rows(flight, answer, self._plan)
            self._fill()
        numbers, tokens, correct, contexts = (np.array(column) for column in zip(*rows, strict=True))
        seconds = max(self._clock.now() - began, 1e-9)
        return Round(plan, numbers, tokens, correct, contexts, 0.0, 0.0, seconds, 0.0, self._version(), tuple(ended))

    def measure_plain(self) -> PlainSample | None:
        """A step of the server without speculation, at half-way contexts; this one is paused meanwhile."""
        if self._plain is None:
            return None
        with paused(self._server):
            return self._plain.measure([_halfway(flight) for flight in self._live.values()][: self._wanted])

    def drain(self) -> list[Trace]:
        """Nothing: there are no traces without our plugin."""
        return []

    def close(self) -> None:
        """End what is in flight; idempotent."""
        if not self._closed:
            self._closed = True
            try:
                self._flights.abort(self._name)
                for rid in self._live:  # whoever comes next is not to meet them
                    self._flights.take(rid, self._timeout_s)
            except OSError:  # it is gone, and they with it
                pass

    def _fill(self) -> None:
        while len(self._live) < self._wanted:
            flight = Flight(self._count, next(self._source), f"{self._name}-{self._count:08d}")
            self._count += 1
            self._live[flight.rid] = flight
            self._flights.send(flight)


def _halfway(flight: Flight) -> list[int]:
    """A text as long as the request's own is on average; to plain decoding it does not matter what it says."""
    prompt = list(flight.request.prompt)
    length = len(prompt) + max(flight.request.max_new_tokens // 2, 1)
    return (prompt * (length // len(prompt) + 1))[:length]


def _rows(flight: Flight, answer: dict[str, Any], plan: Plan) -> list[tuple[int, int, int, int]]:
    """The rounds of a request by its histogram; the first token is its prefill's."""
    meta = answer.get("meta_info", {})
    count = len(answer["output_ids"])
    histogram = meta.get("spec_correct_drafts_histogram")
    if histogram is None and plan.num_steps:
        raise ServerFailed(
            "an answer must tell how many drafts stood (spec_correct_drafts_histogram), but does not; is it SGLang "
            "0.5.23, with a draft?"
        )
    if histogram is None:
        histogram = [count - 1]
    if len(histogram) > plan.num_steps + 1:
        raise ServerFailed(f"a round of {plan} may not have {len(histogram) - 1} drafts stand; does the server adapt?")
    context = len(flight.request.prompt) + count // 2
    left, rows = count - 1, []
    for correct, rounds in enumerate(histogram):
        for _ in range(rounds):
            kept = min(correct + 1, left)  # what followed its end was dropped
            left -= kept
            rows.append((flight.number, kept, correct, context))
    return rows
