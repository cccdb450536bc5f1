"""The learner on Ray: an actor that learns from the traces of many engines, and its client in an engine.

The actor publishes weights after it has written the checkpoint that holds them. A learner that restarts from its
checkpoint is therefore never behind the weights that serve, and a version never names two different drafts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import Assembler, TrainingSequence
from specrl.core.checks import require
from specrl.core.clock import WallClock
from specrl.core.interfaces import DraftLearner
from specrl.core.round import Trace
from specrl.models.draft import load_draft
from specrl.models.target import load_target
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from specrl.training.trace_files import pack, unpack

RESTARTS = 8  # of an actor before a run fails
CHECKPOINT = "learner"  # directory beside a run's own checkpoint/


class SentTraces(NamedTuple):
    """Sequences of finished requests on their way to the learner: safetensors and JSON, not pickled tensors."""

    tensors: bytes
    notes: str

    @classmethod
    def pack(cls, sequences: Sequence[TrainingSequence]) -> SentTraces:
        """Serialise sequences."""
        tensors, notes = pack(sequences)
        return cls(_to_bytes(tensors), json.dumps(notes))

    def unpack(self) -> list[TrainingSequence]:
        """Return the sequences."""
        tensors = load(self.tensors)
        return [unpack(i, tensors, note) for i, note in enumerate(json.loads(self.notes))]


class Published(NamedTuple):
    """The learner's answer."""

    version: int  # of the weights published last
    weights: list[Any]  # their safetensors bytes, as one reference to Ray's object store
    metrics: dict[str, float]  # of the learner's last call, and 'restored', the number of its restarts


class LearnerActor:
    """An `OnlineLearner` for `ray.remote`; Ray runs its calls one after the other.

    It starts from its checkpoint in `directory`, or from the draft in the directory `initial_draft` if there is none.
    To restart on another node, it needs a shared directory. It publishes weights every `publish_every` sequences. A
    checkpoint of another target is a ValueError.
    """

    def __init__(
        self, target: str, initial_draft: str, config: LearnerConfig, directory: str, *, publish_every: int, seed: int
    ) -> None:
        self._checkpoint, self._target = Path(directory) / CHECKPOINT, target
        draft, embedding = load_draft(initial_draft), load_target(target).embedding
        self._learner = OnlineLearner(draft, embedding, config, seed=seed, clock=WallClock())
        self._taken: Counter[str] = Counter()
        self._publish_every, self._unpublished, self._restored = publish_every, 0, 0
        self._metrics: dict[str, float] = {}
        if self._checkpoint.exists():
            state = load_checkpoint(self._checkpoint, "cluster").state
            require(state["target"] == target, "the target of a learner's checkpoint", target, state["target"])
            self._learner.load_state_dict(state["learner"])
            self._taken.update(state["taken"])
            self._restored = int(state["restored"]) + 1
        self.publish()

    def learn(self, engine: int, sent: SentTraces) -> Published:
        """Take the finished requests of an engine and learn from them."""
        sequences = sent.unpack()
        self._learner.take_sequences(sequences)
        self._metrics = dict(self._learner.learn([]))
        self._taken[str(engine)] += len(sequences)
        self._unpublished += len(sequences)
        if self._unpublished >= self._publish_every:
            self.publish()
        return self.newest()

    def newest(self) -> Published:
        """Return the weights published last."""
        return Published(self._version, [self._weights], {**self._metrics, "restored": float(self._restored)})

    def taken(self) -> dict[int, int]:
        """Return the number of sequences from each engine."""
        return {int(engine): count for engine, count in sorted(self._taken.items())}

    def publish(self) -> None:
        """Write a checkpoint, then publish its weights."""
        import ray

        state = {"target": self._target, "taken": self._taken, "restored": self._restored}
        save_checkpoint(self._checkpoint, "cluster", Checkpoint({**state, "learner": self._learner.state_dict()}))
        self._version, weights = self._learner.weights()
        self._weights = ray.put(_to_bytes(weights))
        self._unpublished = 0


class RemoteLearner(DraftLearner):
    """A draft learner that sends traces to a `LearnerActor` and never waits for it.

    While `max_pending_calls` calls are not answered, further finished requests are dropped and counted. Answers name
    the newest weights, which serve once they have arrived here. If the learner is killed, only the requests of pending
    calls are lost.

    Args:
        learner: handle of the actor.
        engine: number of this engine.
        serving: version and weights that serve now.
        assembler: makes sequences from traces.
        max_pending_calls: at least 1.
    """

    def __init__(
        self,
        learner: Any,
        engine: int,
        serving: tuple[int, Mapping[str, Tensor]],
        assembler: Assembler,
        max_pending_calls: int = 2,
    ) -> None:
        self._learner, self._engine, self._assembler = learner, engine, assembler
        self._max_pending_calls = max_pending_calls
        self._version, self._weights = serving
        self._pending: dict[Any, int] = {}  # reference of an answer: requests of the call
        self._arriving: tuple[int, Any] | None = None  # version and reference of weights on their way here
        self._counts: Counter[str] = Counter()
        self._metrics: dict[str, float] = {}

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Send the requests that these traces finish, or drop them."""
        finished = [sequence for sequence in self._assembler.add(traces) if len(sequence.tokens) > 1]
        self.poll()
        if finished and len(self._pending) >= self._max_pending_calls:
            self._counts["dropped"] += len(finished)
        elif finished:
            call = self._learner.learn.remote(self._engine, SentTraces.pack(finished))
            self._pending[call] = len(finished)
        return self.counts()

    def opt_out(self, requests: Iterable[int]) -> None:
        """Send nothing of these requests, by id."""
        self._assembler.opt_out(requests)

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return the version and the weights that arrived last."""
        return self._version, self._weights

    def counts(self) -> dict[str, float]:
        """Return the learner's last metrics, and numbers of requests and calls.

        'sent': requests that the learner has taken; 'dropped': requests that finished while too many calls were
        pending; 'lost': requests of calls that a killed learner did not answer; 'pending': calls.
        """
        counts = {name: float(self._counts[name]) for name in ("sent", "dropped", "lost")}
        return {**self._metrics, **counts, "pending": float(len(self._pending))}

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
                except ray.exceptions.RayError:  # lost with a killed learner; the next answer names newer ones
                    pass

    def end_session(self) -> None:
        """Discard the traces of unfinished requests."""
        self._assembler.forget()

    def _take_answer(self, answer: Any, requests: int) -> None:
        import ray

        try:
            published = Published(*ray.get(answer))
        except ray.exceptions.RayActorError:
            self._counts["lost"] += requests
            return
        self._counts["sent"] += requests
        self._metrics = published.metrics
        if published.version != (self._version if self._arriving is None else self._arriving[0]):
            self._arriving = (published.version, published.weights[0])


def newest_weights(learner: Any) -> tuple[Published, dict[str, Tensor]]:
    """Return the last publication of a `LearnerActor`, by its handle, and the weights; wait for a restarting learner.

    Raises:
        RuntimeError: the weights were lost again and again.
    """
    import ray

    for _ in range(RESTARTS):
        published = Published(*ray.get(learner.newest.options(max_task_retries=RESTARTS).remote()))
        try:
            return published, load(ray.get(published.weights[0]))
        except ray.exceptions.ObjectLostError:  # the learner was killed in between
            continue
    raise RuntimeError(f"the learner's weights were lost {RESTARTS} times before they arrived")


def _to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
