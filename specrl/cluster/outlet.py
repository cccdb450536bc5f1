"""An engine's end of the way to the learner: bounded, and serving never waits for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from specrl.agents.draft.sequences import Assembler
from specrl.cluster.learner import Published
from specrl.cluster.weights import SentTraces, from_bytes
from specrl.core.round import Trace


class Outlet:
    """Stands for the remote learner in an engine's loop (`specrl.core.interfaces.DraftLearner`).

    Finished requests are handed over; while `in_flight` calls are not answered, further ones are dropped and counted.
    Answers name the newest weights, which are taken once they have arrived here. A learner that is gone for a while
    costs what was on its way to it, and nothing else.

    Args:
        learner: handle of a `LearnerActor`.
        engine: number of this engine.
        first: version and weights that serve now.
        assembler: of traces into sequences.
        in_flight: calls that may wait for their answers, at least 1.

    Attributes:
        sent: requests handed over and answered for.
        dropped: finished while there was no room.
        lost: handed over to a learner that went before it answered.
    """

    def __init__(
        self,
        learner: Any,
        engine: int,
        first: tuple[int, Mapping[str, Tensor]],
        assembler: Assembler,
        *,
        in_flight: int = 2,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, but got {in_flight}; to learn from nothing, do not learn")
        self._learner, self._engine, self._assembler, self._most = learner, engine, assembler, in_flight
        self._version, self._weights = first
        self._waiting: dict[Any, int] = {}  # answers to come -> requests of the call
        self._arriving: tuple[int, Any] | None = None  # version and reference of weights on their way here
        self.refusing: list[int] = []  # requests that nothing may be learnt from, by id
        self.sent = self.dropped = self.lost = 0
        self.metrics: dict[str, float] = {}

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Hand over the requests that these traces finish, or drop them."""
        self._assembler.opt_out(self.refusing)
        self.refusing.clear()
        found = [sequence for sequence in self._assembler.add(traces) if len(sequence.tokens) > 1]
        self.look()
        if found and len(self._waiting) >= self._most:
            self.dropped += len(found)
        elif found:
            self._waiting[self._learner.learn.remote(self._engine, SentTraces.of(found))] = len(found)
        return {**self.metrics, **self.counts()}

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """The newest weights that have arrived."""
        return self._version, self._weights

    def counts(self) -> dict[str, float]:
        """Requests sent, dropped and lost, and calls not answered yet."""
        numbers = {"sent": self.sent, "dropped": self.dropped, "lost": self.lost, "in_flight": len(self._waiting)}
        return {name: float(value) for name, value in numbers.items()}

    def look(self, timeout_s: float = 0.0) -> None:
        """Take what has arrived; with a timeout, wait so long for all answers and the weights that they name."""
        import ray

        if self._waiting:
            ready, _ = ray.wait(list(self._waiting), num_returns=len(self._waiting), timeout=timeout_s)
            for answer in ready:
                self._answered(answer, self._waiting.pop(answer))
        if self._arriving is not None:
            version, reference = self._arriving
            if ray.wait([reference], timeout=timeout_s, fetch_local=True)[0]:
                self._arriving = None
                try:
                    self._version, self._weights = version, from_bytes(ray.get(reference))
                except ray.exceptions.RayError:  # gone with its learner; the next answer names others
                    pass

    def end_session(self) -> None:
        """Throw away what was seen of unfinished requests."""
        self._assembler.forget()

    def _answered(self, answer: Any, requests: int) -> None:
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
