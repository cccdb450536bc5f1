"""Sessions on a server without our plugin, which report whole requests only."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import cycle, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.core.round import Completion, Round
from specrl.sglang.client.http import ServerFailed
from specrl.sglang.client.plain_server import paused
from specrl.sglang.client.session import ServerSession


class RequestLevelSession(ServerSession):
    """B requests on a server that runs by itself.

    A `Round` ends when a request ends. Its rows are all rounds of the requests that ended, by their histograms, in
    unknown order: `request_ids` repeat, `context_lengths` are each request's mean, and its seconds are the seconds that
    we waited. Over many of them, tokens over seconds is the server's speed. `resize` to fewer requests does not replace
    those that end.
    """

    @property
    def context_lengths(self) -> Sequence[int]:
        """Tokens of each prompt and half of its output: how far each request has come is not known."""
        return [len(text) for text in self._texts()]

    def _waiting(self) -> AbstractContextManager[None]:
        return paused(self._server)

    def _fill(self) -> None:
        joining = [self._new() for _ in range(self._batch_size - len(self._live))]
        self._live += joining
        self._send(joining)

    def _round(self, plan: Plan) -> Round:
        """Wait until a request ends."""
        server, clock = self._server, WallClock()
        began = clock.now()
        correct, ended = np.zeros(0, np.int64), list[Completion]()
        while not len(correct):
            rid = self._requests.any(server.timeout_s)
            (live,) = (live for live in self._live if live.rid == rid)
            self._live.remove(live)
            answer = self._requests.take(rid, server.timeout_s)
            ended.append(Completion(live.number, live.request.prompt, tuple(answer["output_ids"])))
            correct = _correct_drafts(answer, plan)
            self._fill()
        length = len(ended[-1].tokens)
        tokens = np.diff(np.minimum(np.cumsum(correct + 1), length - 1), prepend=0)  # the prefill adds the first one
        ids = np.full_like(correct, ended[-1].request_id)
        contexts = np.full_like(correct, len(ended[-1].prompt) + length // 2)
        seconds = max(clock.now() - began, 1e-9)
        return Round(plan, ids, tokens, correct, contexts, 0.0, 0.0, seconds, 0.0, server.draft_version, tuple(ended))

    def _texts(self) -> list[list[int]]:
        """Return repeated prompts of the mean length of each request; plain decoding takes as long for any tokens."""
        requests = [live.request for live in self._live[: self._batch_size]]
        lengths = [len(request.prompt) + max(request.max_new_tokens // 2, 1) for request in requests]
        return [list(islice(cycle(r.prompt), length)) for r, length in zip(requests, lengths, strict=True)]


def _correct_drafts(answer: dict[str, Any], plan: Plan) -> NDArray[np.int64]:
    """Return the number of correct drafts in each round of a request, by its histogram: [rounds] int64, ascending."""
    histogram = answer.get("meta_info", {}).get("spec_correct_drafts_histogram")
    if histogram is None and plan.num_steps:
        raise ServerFailed(
            "an answer must have spec_correct_drafts_histogram, but has not; is it SGLang 0.5.23, with a draft?"
        )
    if histogram is None:
        histogram = [len(answer["output_ids"]) - 1]
    if len(histogram) > plan.num_steps + 1:
        raise ServerFailed(
            f"a round of {plan} must not accept {len(histogram) - 1} drafts; does the server change its plan?"
        )
    return np.repeat(np.arange(len(histogram)), histogram)
