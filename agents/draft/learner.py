"""The online learner of a draft: traces in, versioned weights out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from specrl.agents.draft.config import LearnerConfig, product_dtype
from specrl.agents.draft.divergence_guard import DivergenceGuard
from specrl.agents.draft.objective import Objective
from specrl.agents.draft.sequences import Assembler, Replay, TrainingSequence, uniform_hash
from specrl.core.clock import Clock
from specrl.core.interfaces import DraftLearner, PlanCost
from specrl.core.round import Trace
from specrl.models.draft import Draft
from specrl.models.target import check_device

__all__ = ["LearnerConfig", "OnlineLearner", "product_dtype"]

_HOLDOUT_CAPACITY = 64  # held-out sequences that are kept
_VOCABULARY_MAPS = ("d2t", "t2d")  # tensors that are never learnt


class OnlineLearner(DraftLearner):
    """Learns a draft from the target's own traffic.

    It computes on `config.device`, and its replay buffer is there too: 2 bytes x (vocabulary + 3 hidden sizes) for each
    token. Weights are returned, and sequences held out, on the target's device.

    Args:
        draft: the draft to start from.
        embedding: [V, H] the target's embedding, which the draft shares and never changes, on the target's device.
        config: how to learn.
        seed: of draws from the replay buffer, and of the choice of requests to sample and to hold out.
        clock: to report the learner's speed; None: it is not reported.
        gated: only `snapshot` decides which weights are good; otherwise all weights after finite updates are.

    Attributes:
        parameters: the weights that are learnt, by SGLang's names, float32.
        replay: sequences to learn from, on `device`.
        held_out: sequences to compare drafts on, on the target's device.
        updates: number of good updates.
        requests: number of finished requests taken.

    Raises:
        ValueError: weights that are not finite, or a device that does not exist.
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
        self._bfloat16 = product_dtype(config.dtype, self.device) == torch.bfloat16
        moved = Draft(draft.config, {n: t.to(self.device) for n, t in draft.tensors.items()})
        with self._computing():
            resolved = replace(config, dtype="bfloat16" if self._bfloat16 else "float32")
            self._objective = Objective(moved, embedding.to(self.device), resolved)
        self.wants_plan_costs = "seconds_saved" in self._objective.mixture.chain
        self._fixed = {n: t for n, t in draft.tensors.items() if n in _VOCABULARY_MAPS}
        learnt = {n: t for n, t in draft.tensors.items() if n not in _VOCABULARY_MAPS}
        self.parameters = {n: t.to(self.device, copy=True).requires_grad_() for n, t in learnt.items()}
        self._averages = {n: t.detach().clone() for n, t in self.parameters.items()}
        self.optimizer = _adamw(self.parameters.values(), config)
        self._guard = DivergenceGuard(self.parameters, self._averages, self.optimizer, config.max_bad_updates)
        self._assembler = Assembler(
            sample_rate=config.request_sample_rate, seed=seed, keep_rejected=config.rejected_weight > 0
        )
        self.replay = Replay(config.replay_capacity, config.replay_half_life, seed, config.stale_half_life)
        self.held_out: deque[TrainingSequence] = deque(maxlen=_HOLDOUT_CAPACITY)
        self.updates = self.requests = 0
        self._due, self._seed, self._clock, self._gated = 0.0, seed, clock, gated

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Take traces, and make the updates that are due for finished requests.

        Returns:
            Means over the good updates of loss, gradient_norm, alpha_k (mean Σ min(p, q) of step k) and staleness
            (draft versions since a sequence was served); the number of updates tried; tokens_per_s if there is a
            clock; and `counts`.
        """
        self.take(traces)
        metrics: dict[str, list[float]] = {}
        updates, tokens, bad_updates = 0, 0, self._guard.bad_updates
        began = 0.0 if self._clock is None else self._clock.now()
        while self._due >= 1.0 and len(self.replay):
            self._due -= 1.0
            updates += 1
            drawn = self.replay.draw(self.config.batch_size, self.version)
            staleness = sum(self.version - s.draft_version for s in drawn) / len(drawn)
            tokens += sum(len(s.tokens) for s in drawn)
            for name, value in {**self.update(drawn), "staleness": staleness}.items():
                metrics.setdefault(name, []).append(value)
        if not self._gated and updates and self._guard.bad_updates == bad_updates:
            self.snapshot()
        means = {name: sum(values) / len(values) for name, values in metrics.items()}
        if self._clock is not None and tokens:
            means["tokens_per_s"] = tokens / max(self._clock.now() - began, 1e-9)
        return {**means, "updates": float(updates), **self.counts()}

    def update(self, sequences: list[TrainingSequence]) -> dict[str, float]:
        """One optimiser step on sequences of at least two tokens, on the learner's device.

        If the loss or the gradient is not finite, nothing changes and nothing is returned.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self._computing():
            metrics = self._objective.backward(self.parameters, sequences)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.max_grad_norm))
        if not self._guard.admits(metrics["loss"], norm):
            self.optimizer.zero_grad(set_to_none=True)
            return {}
        self.optimizer.step()
        self.updates += 1
        self._average_weights()
        return {**metrics, "gradient_norm": norm}

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = min(self.config.ema_decay, self.updates / (self.updates + 10.0))  # smaller in the first updates
        for name, average in self._averages.items():
            average.lerp_(self.parameters[name], 1.0 - decay)

    def take(self, traces: Iterable[Trace]) -> None:
        """Take traces; the updates that are due for them are made by the next `learn`."""
        self.take_sequences(self._assembler.add(traces))

    def take_sequences(self, sequences: Iterable[TrainingSequence]) -> None:
        """Take sequences that were assembled elsewhere; those of one token are ignored."""
        kept: list[TrainingSequence] = []
        for sequence in sequences:
            if len(sequence.tokens) > 1:
                self.requests += 1
                if uniform_hash(self.requests, self._seed + 1) < self.config.holdout_fraction:
                    self.held_out.append(sequence)
                else:
                    kept.append(sequence.to(self.device))
        self.replay.extend(kept)
        self._due += len(kept) * self.config.updates_per_request

    def end_session(self) -> None:
        """Forget unfinished requests: the session is over, and ids start again."""
        self._assembler.forget()

    def forget(self) -> None:
        """Forget all finished requests, including those held out, and the updates that are due for them."""
        self.replay.clear()
        self.held_out.clear()
        self._due = 0.0

    def opt_out(self, requests: Iterable[int]) -> None:
        """Learn nothing from these requests, by id; unfinished ones are forgotten."""
        self._assembler.opt_out(requests)

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float = 1.0) -> None:
        """Set the costs for the loss 'seconds_saved'; before the first call, that loss is the accept length."""
        self._objective.set_plan_costs(costs, speedup)

    @property
    def version(self) -> int:
        """Version of the weights: the number of good updates and rollbacks."""
        return self.updates + self._guard.rollbacks

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """The version and a copy of the weights to serve, by SGLang's names."""
        return self.version, self._copy(self._averages)

    def snapshot(self) -> None:
        """Remember the present weights as good ones, for `roll_back`."""
        self._guard.snapshot()

    def snapshot_weights(self) -> Mapping[str, Tensor]:
        """A copy of the weights of the last `snapshot`, by SGLang's names."""
        return self._copy(self._guard.good)

    def roll_back(self) -> None:
        """Restore the weights of the last `snapshot` and clear the optimiser's state."""
        self._guard.roll_back()

    @property
    def skipped(self) -> int:
        """Requests without a complete trace from their prefill on, or with values that are not finite."""
        return self._assembler.skipped

    def counts(self) -> dict[str, float]:
        """Numbers of sequences and updates.

        held, held_out, open: sequences in the replay buffer, held out, and being assembled. dropped: pushed out of the
        replay buffer. skipped: see `skipped`. passed_over, opted_out: left out by sampling, and by request.
        bad_updates, rollbacks: updates that were not finite, and restorations of good weights.
        """
        numbers = {
            "held": len(self.replay),
            "held_out": len(self.held_out),
            "open": self._assembler.open,
            "dropped": self.replay.dropped,
            **self._assembler.counts(),
            "bad_updates": self._guard.bad_updates,
            "rollbacks": self._guard.rollbacks,
        }
        return {name: float(number) for name, number in numbers.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state without sequences (`replay`, `held_out`): 'tensors' by name, all other values JSON-able."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameters.{name}"] = parameter.detach()
            tensors[f"averages.{name}"] = self._averages[name]
            if self._gated:
                tensors[f"good.{name}"] = self._guard.good[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        return {
            "tensors": tensors,
            "updates": self.updates,
            "requests": self.requests,
            "due": self._due,
            "bad_updates": self._guard.bad_updates,
            "rollbacks": self._guard.rollbacks,
            "replay": self.replay.state_dict(),
            "left_out": self._assembler.counts(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`.

        Raises:
            ValueError: the state of a learner of another draft.
        """
        tensors: Mapping[str, Tensor] = state["tensors"]
        for name, parameter in self.parameters.items():
            found = tensors.get(f"parameters.{name}")
            if found is None or found.shape != parameter.shape:
                got = "none" if found is None else tuple(found.shape)
                raise ValueError(
                    f"a learner's state must fit its draft: {name} is {tuple(parameter.shape)}, but got {got}"
                )
        with torch.no_grad():
            for name, average in self._averages.items():
                average.copy_(tensors.get(f"good.{name}", tensors[f"averages.{name}"]))
            self._guard.snapshot()
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameters.{name}"])
                self._averages[name].copy_(tensors[f"averages.{name}"])
                self.optimizer.state.pop(parameter, None)
                if f"step.{name}" in tensors:
                    moments = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {
                        key: tensor.to(self.device, copy=True) for key, tensor in moments.items()
                    }
        self.updates, self.requests, self._due = state["updates"], state["requests"], state["due"]
        self._guard.bad_updates, self._guard.rollbacks = state["bad_updates"], state["rollbacks"]
        self.replay.load_state_dict(state["replay"])
        self._assembler.load_counts(state["left_out"])

    def load_sequences(self, replay: Iterable[TrainingSequence], held_out: Iterable[TrainingSequence]) -> None:
        """Restore sequences to learn from and held-out sequences; no updates become due for them."""
        self.replay.extend(sequence.to(self.device) for sequence in replay)
        self.held_out.extend(sequence.to(self._home) for sequence in held_out)

    def _copy(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of these weights and of the vocabulary maps, on the target's device."""
        return {name: t.to(self._home, copy=True) for name, t in {**learnt, **self._fixed}.items()}

    def _computing(self) -> ExitStack:
        """On a GPU, new tensors are created there and products have the dtype of the config."""
        contexts = ExitStack()
        if self.device.type != "cpu":
            contexts.enter_context(self.device)
            contexts.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bfloat16))
        return contexts


def _adamw(parameters: Iterable[Tensor], config: LearnerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    listed = list(parameters)
    groups = [
        {"params": [p for p in listed if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in listed if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _device(name: str) -> torch.device:
    """A device of this machine, with its index."""
    try:
        check_device(name)
    except ValueError as error:
        raise ValueError(f"learner.{error}") from error
    return torch.empty(0, device=name).device
