"""The learner as a Ray actor: it takes traces of many engines and publishes versioned weights.

Weights are published after the checkpoint that holds them is written. A learner that restarts from its checkpoint is
therefore never behind the weights that serve, and a version never names two different drafts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import TrainingSequence as Traced
from specrl.core.clock import WallClock
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
    def pack(cls, sequences: Sequence[Traced]) -> SentTraces:
        """Sequences as they are sent."""
        tensors, notes = pack(sequences)
        return cls(to_bytes(tensors), json.dumps(notes))

    def unpack(self) -> list[Traced]:
        """The sequences."""
        tensors = load(self.tensors)
        return [unpack(i, tensors, note) for i, note in enumerate(json.loads(self.notes))]


class Published(NamedTuple):
    """The learner's answer.

    Attributes:
        version: of the weights published last.
        weights: their safetensors bytes, as a list of one reference to Ray's object store.
        metrics: of the learner's last call, and 'restored', how often it restarted from its checkpoint.
    """

    version: int
    weights: list[Any]
    metrics: dict[str, float]


class LearnerActor:
    """An `OnlineLearner` for `ray.remote`; Ray runs its calls one after the other.

    Args:
        target: whose embedding the draft shares, as `load_target` takes it.
        first: directory of the draft to start from if there is no checkpoint.
        config: of the learner.
        directory: of its checkpoint; to restart on another node, the learner needs a shared one.
        publish_every: sequences between two publications.
        seed: of the learner.

    Raises:
        ValueError: `publish_every` below 1, or a checkpoint of another target.
    """

    def __init__(
        self, target: str, first: str, config: LearnerConfig, directory: str, *, publish_every: int, seed: int
    ) -> None:
        if publish_every < 1:
            raise ValueError(f"publish_every must be at least 1 sequence, but got {publish_every}")
        self._checkpoint, self._target = Path(directory) / CHECKPOINT, target
        embedding = load_target(target).embedding
        self._learner = OnlineLearner(load_draft(first), embedding, config, seed=seed, clock=WallClock())
        self._taken: Counter[str] = Counter()
        self._publish_every, self._unpublished, self._restored = publish_every, 0, 0
        self._metrics: dict[str, float] = {}
        if self._checkpoint.exists():
            self._restore()
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
        """The weights published last."""
        return Published(self._version, [self._weights], {**self._metrics, "restored": float(self._restored)})

    def taken(self) -> dict[int, int]:
        """Sequences taken from each engine."""
        return {int(engine): count for engine, count in sorted(self._taken.items())}

    def publish(self) -> None:
        """Write a checkpoint, then publish its weights."""
        import ray

        state = {"target": self._target, "taken": self._taken, "restored": self._restored}
        save_checkpoint(self._checkpoint, "cluster", Checkpoint({**state, "learner": self._learner.state_dict()}))
        self._version, weights = self._learner.weights()
        self._weights = ray.put(to_bytes(weights))
        self._unpublished = 0

    def _restore(self) -> None:
        state = load_checkpoint(self._checkpoint, "cluster").state
        if state["target"] != self._target:
            raise ValueError(f"a learner's checkpoint must be of {self._target!r}, but got {state['target']!r}")
        self._learner.load_state_dict(state["learner"])
        self._taken.update(state["taken"])
        self._restored = int(state["restored"]) + 1


def newest_weights(learner: Any) -> tuple[Published, dict[str, Tensor]]:
    """The learner's last publication and its weights; waits for a learner that restarts.

    Args:
        learner: handle of a `LearnerActor`.

    Raises:
        RuntimeError: the weights were lost again and again.
    """
    import ray

    for _ in range(RESTARTS):
        found = Published(*ray.get(learner.newest.options(max_task_retries=RESTARTS).remote()))
        try:
            return found, load(ray.get(found.weights[0]))
        except ray.exceptions.ObjectLostError:  # the learner was killed in between
            continue
    raise RuntimeError(f"the learner's weights were lost {RESTARTS} times before they arrived")


def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors."""
    return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
