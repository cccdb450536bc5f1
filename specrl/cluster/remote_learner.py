"""The learner as an engine sees it: calls to a remote actor, of which few are pending and none is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from safetensors.torch import load
from torch import Tensor

from specrl.agents.draft.sequences import Assembler
from specrl.cluster.learner import Published, SentTraces
from specrl.core.interfaces import DraftLearner
from specrl.core.round import Trace


class RemoteLearner(DraftLearner):
    """A draft learner that hands traces to a `LearnerActor`.

    While `max_pending_calls` calls are not answered, further finished requests are dropped and counted. Answers name
    the newest weights, which serve once they have arrived here. If the learner is killed, only the requests of pending
    calls are lost.

    Args:
        learner: handle of the actor.
        engine: number of this engine.
        first: version and weights that serve now.
        assembler: of traces into sequences.
        max_pending_calls: at least 1.

    Attributes:
        sent: requests that the learner has taken.
        dropped: requests that finished while too many calls were pending.
        lost: requests of calls that a killed learner did not answer.

    Raises:
        ValueError: `max_pending_calls` below 1.
    """

    def __init__(
        self,
        learner: Any,
        engine: int,
        first: tuple[int, Mapping[str, Tensor]],
        assembler: Assembler,
        *,
        max_pending_calls: int = 2,
    ) -> None:
        if max_pending_calls < 1:
            raise ValueError(f"max_pending_calls must be at least 1, but got {max_pending_calls}")
        self._learner, self._engine, self._assembler = learner, engine, assembler
        self._max_pending_calls = max_pending_calls
        self._version, self._weights = first
        self._pending: dict[Any, int] = {}  # reference of an answer: requests of the call
        self._arriving: tuple[int, Any] | None = None  # version and reference of weights on their way here
        self.sent = self.dropped = self.lost = 0
        self.metrics: dict[str, float] = {}

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Hand over the requests that these traces finish, or drop them."""
        finished = [sequence for sequence in self._assembler.add(traces) if len(sequence.tokens) > 1]
        self.poll()
        if finished and len(self._pending) >= self._max_pending_calls:
            self.dropped += len(finished)
        elif finished:
            call = self._learner.learn.remote(self._engine, SentTraces.pack(finished))
            self._pending[call] = len(finished)
        return {**self.metrics, **self.counts()}

    def opt_out(self, requests: Iterable[int]) -> None:
        """Hand over nothing of these requests, by id."""
        self._assembler.opt_out(requests)

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Version and weights that arrived last."""
        return self._version, self._weights

    def counts(self) -> dict[str, float]:
        """Requests sent, dropped and lost, and calls that are pending."""
        counts = {"sent": self.sent, "dropped": self.dropped, "lost": self.lost, "pending": len(self._pending)}
        return {name: float(count) for name, count in counts.items()}

    def poll(self, timeout_s: float = 0.0) -> None:
        """Take the answers and weights that have arrived; with a timeout, wait up to that long for all of them."""
        import ray

        if self._pending:
            ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=timeout_s)
            for answer in ready:
                self._take_answer(answer, self._pending.pop(answer))
        if self._arriving is not None:
            version, reference = self._arriving
            if ray.wait([reference], timeout=timeout_s, fetch_local=True)[0]:
                self._arriving = None
                try:
                    self._version, self._weights = version, load(ray.get(reference))
                except ray.exceptions.RayError:  # lost with a killed learner; the next answer names others
                    pass

    def end_session(self) -> None:
        """Discard what was seen of unfinished requests."""
        self._assembler.forget()

    def _take_answer(self, answer: Any, requests: int) -> None:
        import ray

        try:
            found = Published(*ray.get(answer))
        except ray.exceptions.RayActorError:
            self.lost += requests
            return
        self.sent += requests
        self.metrics = found.metrics
        if found.version != (self._version if self._arriving is None else self._arriving[0]):
            self._arriving = (found.version, found.weights[0])
