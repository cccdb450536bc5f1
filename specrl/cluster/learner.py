"""The learner as an actor of its own: traces of many engines in, versioned weights out.

Weights are published with the checkpoint that holds them, and after it. So a learner that was killed and comes back
from its checkpoint is never behind what serves, and a version never names two different drafts.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.cluster.weights import SentTraces, to_bytes
from specrl.core.clock import WallClock
from specrl.models.draft import load_draft
from specrl.models.target import load_target
from specrl.training.checkpoint import load_checkpoint, save_checkpoint

LIVES = 8  # restarts of an actor before a run gives up
CHECKPOINT = "learner"  # beside a run's own checkpoint/, which is another thing


class Published(NamedTuple):
    """What the learner answers.

    Attributes:
        version: of the weights published last.
        weights: their safetensors bytes, as a list of one reference to Ray's object store.
        metrics: of the learner's last call, and how often it was restored.
    """

    version: int
    weights: list[Any]
    metrics: dict[str, float]


class LearnerActor:
    """An `OnlineLearner` for `ray.remote`. Its calls run one after the other.

    Args:
        target: whose embedding the draft shares, as `load_target` takes it.
        first: directory of the draft to start from, where there is no checkpoint.
        config: how it learns.
        directory: in which its checkpoint is kept; a learner that may come back on another node needs a shared one.
        publish_every: sequences taken between two publications.
        seed: of everything random.
    """

    def __init__(
        self, target: str, first: str, config: LearnerConfig, directory: str, *, publish_every: int, seed: int
    ) -> None:
        if publish_every < 1:
            raise ValueError(f"publish_every must be at least 1 sequence, but got {publish_every}")
        self._place, self._target = Path(directory) / CHECKPOINT, target
        self.learner = OnlineLearner(
            load_draft(first), load_target(target).embedding, config, seed=seed, clock=WallClock()
        )
        self._taken: Counter[str] = Counter()
        self._publish_every, self._since, self._lives = publish_every, 0, 0
        self._metrics: dict[str, float] = {}
        if self._place.exists():
            self._restore()
        self.publish()

    def learn(self, engine: int, sent: SentTraces) -> Published:
        """Take an engine's finished requests and learn from them."""
        sequences = sent.sequences()
        self.learner.take_sequences(sequences)
        self._metrics = dict(self.learner.learn([]))
        self._taken[str(engine)] += len(sequences)
        self._since += len(sequences)
        if self._since >= self._publish_every:
            self.publish()
        return self.newest()

    def newest(self) -> Published:
        """The weights published last."""
        metrics = {**self._metrics, "restored": float(self._lives)}
        return Published(self._version, [self._weights], metrics)

    def taken(self) -> dict[int, int]:
        """Sequences taken from each engine."""
        return {int(engine): count for engine, count in sorted(self._taken.items())}

    def publish(self) -> None:
        """Keep what was learnt, and let it serve from then on."""
        import ray

        tensors, numbers = self.learner.state()
        state = {"target": self._target, "learner": numbers, "taken": self._taken, "lives": self._lives}
        save_checkpoint(self._place, tensors, state)
        self._version, weights = self.learner.weights()
        self._weights = ray.put(to_bytes(weights))
        self._since = 0

    def _restore(self) -> None:
        tensors, state, _ = load_checkpoint(self._place)
        if state["target"] != self._target:
            raise ValueError(f"a learner's checkpoint must be of {self._target!r}, but got {state['target']!r}")
        self.learner.load_state(tensors, state["learner"])
        self._taken.update(state["taken"])
        self._lives = int(state["lives"]) + 1
