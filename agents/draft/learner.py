"""The online learner of a draft: traces in, versioned weights out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specrl.agents.draft.config import LearnerConfig, product_dtype
from specrl.agents.draft.objective import Objective
from specrl.agents.draft.sequences import Assembler, Replay, TrainingSequence, uniform_hash
from specrl.agents.draft.weights import LearnedWeights
from specrl.core.clock import Clock
from specrl.core.interfaces import DraftLearner, PlanCost
from specrl.core.round import Trace
from specrl.models.draft import Draft
from specrl.models.target import check_device

__all__ = ["LearnerConfig", "OnlineLearner", "product_dtype"]

_HOLDOUT_CAPACITY = 64  # the newest held-out sequences


class OnlineLearner(DraftLearner):
    """Learns a draft from the traffic of its target.

    It computes on `config.device`, where its replay buffer is: 2 bytes x (vocabulary + 3 hidden sizes) per token.
    Served weights and held-out sequences are on the target's device.

    Args:
        draft: the draft to start from.
        embedding: [V, H] the target's embedding, on the target's device; it never changes.
        config: how to learn.
        seed: of draws from the replay buffer, and of the choice of requests to sample and to hold out.
        clock: measures `tokens_per_s`; None: it is not reported.
        gated: only `snapshot` decides which weights are good; otherwise all weights after finite updates are.

    Attributes:
        parameters, optimizer: the trained weights, by SGLang's names, float32, and their optimiser.
        replay, held_out: sequences to learn from and to compare drafts on.
        requests: number of finished requests added.

    Raises:
        ValueError: a device that does not exist.
    """

    def __init__(
        self,
        draft: Draft,
        embedding: Tensor,
        config: LearnerConfig,
        seed: int = 0,
        *,
        clock: Clock | None = None,
        gated: bool = False,
    ) -> None:
        self.config, self._home = config, embedding.device
        self.device = self._home if config.device is None else _device(config.device)
        self._objective = Objective(draft, embedding.to(self.device), config)
        self.wants_plan_costs = "seconds_saved" in self._objective.mixture.chain
        self._vocabulary_maps = {n: t for n, t in draft.tensors.items() if not t.is_floating_point()}
        trained = {n: t.to(self.device) for n, t in draft.tensors.items() if t.is_floating_point()}
        self._weights = LearnedWeights(trained, config)
        self.parameters, self.optimizer = self._weights.parameters, self._weights.optimizer
        keep_rejected = config.rejected_weight > 0
        self._assembler = Assembler(sample_rate=config.request_sample_rate, seed=seed, keep_rejected=keep_rejected)
        self.replay = Replay(config.replay_capacity, config.replay_half_life, seed, config.stale_half_life)
        self.held_out: deque[TrainingSequence] = deque(maxlen=_HOLDOUT_CAPACITY)
        self.requests = 0
        self._updates_due, self._seed, self._clock, self._gated = 0.0, seed, clock, gated

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Take traces, and make the updates that are due for finished requests.

        Returns:
            Means over the updates of loss, gradient_norm, alpha_k (mean Σ min(p, q) of step k) and staleness (draft
            versions since a sequence was served); number of updates; tokens_per_s if there is a clock; and `counts`.
        """
        self.take(traces)
        metrics: dict[str, list[float]] = {}
        updates, tokens, bad_updates = 0, 0, self._weights.bad_updates
        began = 0.0 if self._clock is None else self._clock.now()
        while self._updates_due >= 1.0 and len(self.replay):
            self._updates_due -= 1.0
            updates += 1
            batch = self.replay.draw(self.config.batch_size, self.version)
            staleness = sum(self.version - s.draft_version for s in batch) / len(batch)
            tokens += sum(len(s.tokens) for s in batch)
            for name, value in {**self.update(batch), "staleness": staleness}.items():
                metrics.setdefault(name, []).append(value)
        if not self._gated and updates and self._weights.bad_updates == bad_updates:
            self.snapshot()
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        if self._clock is not None and tokens:
            means["tokens_per_s"] = tokens / max(self._clock.now() - began, 1e-9)
        return {**means, "updates": float(updates), **self.counts()}

    def update(self, sequences: list[TrainingSequence]) -> dict[str, float]:
        """Make one optimiser step on sequences of at least two tokens, on `device`; metrics {} if it is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self._objective.backward(self.parameters, sequences)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm))
        if not self._weights.admits(metrics["loss"], norm):
            self.optimizer.zero_grad(set_to_none=True)
            return {}
        self._weights.step()
        return {**metrics, "gradient_norm": norm}

    def take(self, traces: Iterable[Trace]) -> None:
        """Add traces; the next `learn` makes the updates that are due for them."""
        self.take_sequences(self._assembler.add(traces))

    def take_sequences(self, sequences: Iterable[TrainingSequence]) -> None:
        """Add assembled sequences; those of one token are ignored."""
        to_replay: list[TrainingSequence] = []
        for sequence in sequences:
            if len(sequence.tokens) > 1:
                self.requests += 1
                if uniform_hash(self.requests, self._seed + 1) < self.config.holdout_fraction:
                    self.held_out.append(sequence)
                else:
                    to_replay.append(sequence.to(self.device))
        self.replay.extend(to_replay)
        self._updates_due += len(to_replay) * self.config.updates_per_request

    def end_session(self) -> None:
        """Discard unfinished requests: the session is over, and ids start again."""
        self._assembler.forget()

    def forget(self) -> None:
        """Discard all sequences, including those held out, and the updates that are due for them."""
        self.replay.clear()
        self.held_out.clear()
        self._updates_due = 0.0

    def opt_out(self, requests: Iterable[int]) -> None:
        """Learn nothing from these requests, by id; unfinished ones are discarded."""
        self._assembler.opt_out(requests)

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float = 1.0) -> None:
        """See `DraftLearner`; before the first call, the loss 'seconds_saved' is the accept length."""
        self._objective.set_plan_costs(costs, speedup)

    @property
    def updates(self) -> int:
        """Number of good updates."""
        return self._weights.updates

    @property
    def version(self) -> int:
        """Version of the weights: the number of good updates and rollbacks."""
        return self._weights.updates + self._weights.rollbacks

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Return the version and a copy of the weights to serve, by SGLang's names."""
        return self.version, self._copy(self._weights.averages)

    def snapshot(self) -> None:
        """Save the present weights as good ones, for `roll_back`."""
        self._weights.snapshot()

    def snapshot_weights(self) -> Mapping[str, Tensor]:
        """Return a copy of the weights of the last `snapshot`, by SGLang's names."""
        return self._copy(self._weights.good)

    def roll_back(self) -> None:
        """Restore the weights of the last `snapshot` and clear the optimiser's state."""
        self._weights.roll_back()

    def counts(self) -> dict[str, float]:
        """Return numbers of sequences and updates; see `Assembler`, `Replay` and `LearnedWeights`."""
        numbers = {
            "held": len(self.replay),
            "held_out": len(self.held_out),
            "open": self._assembler.open,
            "dropped": self.replay.dropped,
            **self._assembler.counts,
            "bad_updates": self._weights.bad_updates,
            "rollbacks": self._weights.rollbacks,
        }
        return {name: float(number) for name, number in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state without sequences (`replay`, `held_out`): 'tensors' by name, other values JSON-able."""
        return {
            **self._weights.state_dict(good=self._gated),
            "requests": self.requests,
            "due": self._updates_due,
            "replay": self.replay.state_dict(),
            "left_out": dict(self._assembler.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`; raise a ValueError if it is of another draft."""
        self._weights.load_state_dict(state)
        self.requests, self._updates_due = state["requests"], state["due"]
        self.replay.load_state_dict(state["replay"])
        self._assembler.counts.update(state["left_out"])

    def load_sequences(self, replay: Iterable[TrainingSequence], held_out: Iterable[TrainingSequence]) -> None:
        """Restore the sequences; no updates become due for them."""
        self.replay.extend(sequence.to(self.device) for sequence in replay)
        self.held_out.extend(sequence.to(self._home) for sequence in held_out)

    def _copy(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy these weights and the vocabulary maps to the target's device."""
        return {name: t.to(self._home, copy=True) for name, t in {**trained, **self._vocabulary_maps}.items()}


def _device(name: str) -> torch.device:
    """Return a device of this machine, with its index."""
    try:
        check_device(name)
    except ValueError as error:
        raise ValueError(f"learner.{error}") from error
    return torch.empty(0, device=name).device
