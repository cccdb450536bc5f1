"""The online learner of a draft: traces in, versioned weights out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from contextlib import ExitStack
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from specrl.agents.draft.config import LearnerConfig, product_dtype
from specrl.agents.draft.divergence_guard import Guard
from specrl.agents.draft.losses import PlanCost
from specrl.agents.draft.objective import Objective
from specrl.agents.draft.sequences import Assembler, Rejected, Replay, Sequence, uniform_hash
from specrl.core.clock import Clock
from specrl.core.round import Trace
from specrl.models.draft import Draft
from specrl.models.target import check_device

__all__ = ["LearnerConfig", "OnlineLearner", "product_dtype"]

_HELD_OUT = 64  # sequences kept for a gate
_LOST = ("skipped", "passed_over", "opted_out")  # counted by the assembler
_Held = TypeVar("_Held", Sequence, Rejected)


class Shared(Protocol):
    """Gradients that several processes come to together."""

    def gradients(self, parameters: Mapping[str, Tensor], sequences: list[Sequence]) -> dict[str, float]:
        """Add them to those of `parameters`; the loss, and the mean α of every pass."""
        ...


class OnlineLearner:
    """Learns a draft from the target's own traffic (see `DraftLearner` in `specrl.core.interfaces`).

    It computes on `config.device`, in turns with serving where that is the target's own. On a GPU the replay is there
    too: 2 bytes x (vocabulary + 3 hidden sizes) for each token held. Weights are handed out, and sequences held out,
    on the target's device.

    Args:
        draft: where to start from.
        embedding: [V, H] the target's embedding, which the draft shares and never changes, on the target's device.
        config: how.
        seed: of the draws from the replay, and of which requests are sampled and held out.
        clock: for the learner's own speed; None: it is not reported.
        gated: somebody else says which weights are good (`keep`); else all are whose updates were finite.

    Raises:
        ValueError: weights that are not finite, or a device that is not there.
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
        self.device = self._home if config.device is None else _named(config.device)
        self._half = product_dtype(config.dtype, self.device) == torch.bfloat16
        there = Draft(draft.config, {n: t.to(self.device) for n, t in draft.tensors.items()})
        with self._computing():
            fixed_dtype = replace(config, dtype="bfloat16" if self._half else "float32")
            self._objective = Objective(there, embedding.to(self.device), fixed_dtype)
        self._shared: Shared | None = None
        fixed = ("d2t", "t2d")
        self._fixed = {n: t for n, t in draft.tensors.items() if n in fixed}
        self.parameters = {
            n: t.to(self.device, copy=True).requires_grad_() for n, t in draft.tensors.items() if n not in fixed
        }
        self._served = {n: t.detach().clone() for n, t in self.parameters.items()}
        matrices = [p for p in self.parameters.values() if p.ndim == 2]
        vectors = [p for p in self.parameters.values() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self._assembler = Assembler(sample=config.sample, seed=seed, rejected=config.rejected > 0)
        self.replay = Replay(config.replay, config.half_life, seed, config.stale_half_life)
        self.held_out: deque[Sequence] = deque(maxlen=_HELD_OUT)
        self.updates = self.requests = 0
        self._owed, self._seed, self._clock, self._gated = 0.0, seed, clock, gated
        self._guard = Guard(self.parameters, self._served, self.optimizer, config.patience)

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Take traces, make the updates their finished requests are due.

        Returns:
            Means over the good updates of loss, gradient_norm, alpha_k (mean Σ min(p, q) of pass k - 1) and staleness
            (draft versions since a sequence was served); updates tried; and `counts`.
        """
        self.take(traces)
        seen: dict[str, list[float]] = {}
        count, tokens, bad = 0, 0, self._guard.bad
        began = 0.0 if self._clock is None else self._clock.now()
        while self._owed >= 1.0 and len(self.replay):
            self._owed -= 1.0
            count += 1
            drawn = self.replay.draw(self.config.batch_size, self.version)
            behind = sum(self.version - s.draft_version for s in drawn) / len(drawn)
            tokens += sum(len(s.tokens) for s in drawn)
            for name, value in {**self.update(drawn), "staleness": behind}.items():
                seen.setdefault(name, []).append(value)
        if not self._gated and count and self._guard.bad == bad:
            self.keep()
        metrics = {name: sum(values) / len(values) for name, values in seen.items()}
        if self._clock is not None and tokens:
            metrics["tokens_per_s"] = tokens / max(self._clock.now() - began, 1e-9)
        return {**metrics, "updates": float(count), **self.counts()}

    def take(self, traces: Iterable[Trace]) -> None:
        """Take traces, and leave the updates that they are due to the next `learn`."""
        self.take_sequences(self._assembler.add(traces))

    def take_sequences(self, sequences: Iterable[Sequence]) -> None:
        """The same where somebody else has joined the traces; those of one token are passed over."""
        kept: list[Sequence] = []
        for sequence in sequences:
            if len(sequence.tokens) > 1:
                self.requests += 1
                apart = self.config.held_out and uniform_hash(self.requests, self._seed + 1) < self.config.held_out
                if apart:
                    self.held_out.append(sequence)
                else:
                    kept.append(_moved(sequence, self.device))
        self.replay.extend(kept)
        self._owed += len(kept) * self.config.updates_per_request

    def end_session(self) -> None:
        """Throw away what was seen of unfinished requests: their session is over, and ids begin anew."""
        self._assembler.forget()

    def forget(self) -> None:
        """Throw away all finished requests, those held out too, and the updates that they are due."""
        self.replay.clear()
        self.held_out.clear()
        self._owed = 0.0

    def counts(self) -> dict[str, float]:
        """What is held and what was lost so far.

        held, held_out, open: sequences to draw from, for a gate, and being assembled. dropped: pushed out of the
        replay. skipped: not seen from their prefill on, or not finite. passed_over, opted_out: by sampling, by request.
        bad_updates, rollbacks: not finite, and returns to good weights.
        """
        assembler, guard = self._assembler, self._guard
        return {
            "held": float(len(self.replay)),
            "held_out": float(len(self.held_out)),
            "open": float(assembler.open),
            "dropped": float(self.replay.dropped),
            "skipped": float(assembler.skipped),
            "passed_over": float(assembler.passed_over),
            "opted_out": float(assembler.opted_out),
            "bad_updates": float(guard.bad),
            "rollbacks": float(guard.rollbacks),
        }

    @property
    def version(self) -> int:
        """Of the weights: good updates and rollbacks so far."""
        return self.updates + self._guard.rollbacks

    @property
    def skipped(self) -> int:
        """Requests left out so far: not seen from their prefill on, or not finite."""
        return self._assembler.skipped

    def opt_out(self, requests: Iterable[int]) -> None:
        """Learn nothing more from these requests, by id; what is not finished yet is thrown away."""
        self._assembler.opt_out(requests)

    def keep(self) -> None:
        """Remember the weights of now as good."""
        self._guard.keep()

    def good(self) -> Mapping[str, Tensor]:
        """The weights remembered last, by SGLang's names."""
        return self._handed_out(self._guard.good)

    def roll_back(self) -> None:
        """Go back to the weights remembered last; the optimiser begins anew."""
        self._guard.roll_back()

    def replace_objective(self, objective: Shared) -> None:
        """Learn with other processes: their common gradients instead of one's own."""
        self._shared = objective

    @property
    def prices(self) -> bool:
        """Whether the loss counts seconds, and so wants to be told what they cost (`price`)."""
        return "seconds_saved" in self._objective.mixture.chain

    def price(self, costs: Many[PlanCost], speedup: float = 1.0) -> None:
        """What the loss 'seconds_saved' counts with from now on; until told, it is the accept length of the chain."""
        self._objective.price(costs, speedup)

    def update(self, sequences: list[Sequence]) -> dict[str, float]:
        """One optimiser step on a batch of sequences of at least two tokens; fewer passes where all are short.

        Nothing changes, and nothing is returned, where the loss or the gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with self._computing():
            here = [_moved(sequence, self.device) for sequence in sequences]
            metrics = (self._shared or self._objective).gradients(self.parameters, here)
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip))
        if not self._guard.admits(metrics["loss"], norm):
            self.optimizer.zero_grad(set_to_none=True)
            return {}
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            keep = min(self.config.average, self.updates / (self.updates + 10.0))
            for name, served in self._served.items():
                served.lerp_(self.parameters[name], 1.0 - keep)
        alphas = {name: value for name, value in metrics.items() if name != "loss"}
        return {"loss": metrics["loss"], "gradient_norm": norm, **alphas}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on, but sequences (`replay`, `held_out`): tensors, and JSON-able numbers."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameters.{name}"] = parameter.detach()
            tensors[f"served.{name}"] = self._served[name]
            if self._gated:
                tensors[f"good.{name}"] = self._guard.good[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        numbers = {
            "updates": self.updates,
            "requests": self.requests,
            "owed": self._owed,
            "bad_updates": self._guard.bad,
            "rollbacks": self._guard.rollbacks,
            "rng": self.replay.rng.bit_generator.state,
            "lost": [self.replay.dropped, *(getattr(self._assembler, name) for name in _LOST)],
        }
        return tensors, numbers

    def load_state(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            ValueError: it was made by a learner of another draft.
        """
        for name, parameter in self.parameters.items():
            found = tensors.get(f"parameters.{name}")
            if found is None or found.shape != parameter.shape:
                got = "none" if found is None else tuple(found.shape)
                raise ValueError(
                    f"a learner's state must fit its draft: {name} is {tuple(parameter.shape)}, but got {got}"
                )
        with torch.no_grad():
            for name, served in self._served.items():
                served.copy_(tensors.get(f"good.{name}", tensors[f"served.{name}"]))
            self._guard.keep()
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameters.{name}"])
                self._served[name].copy_(tensors[f"served.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state.pop(parameter, None)
                if f"step.{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        key: tensors[f"{key}.{name}"].to(self.device, copy=True) for key in keys
                    }
        self.updates, self.requests = int(numbers["updates"]), int(numbers["requests"])
        self._owed = float(numbers["owed"])
        self.replay.rng.bit_generator.state = numbers["rng"]
        self._guard.bad, self._guard.rollbacks = numbers.get("bad_updates", 0), numbers.get("rollbacks", 0)
        if "lost" in numbers:
            self.replay.dropped, *lost = numbers["lost"]
            for name, count in zip(_LOST, lost, strict=True):
                setattr(self._assembler, name, count)

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Version and the weights to serve, by SGLang's names; later updates do not touch them."""
        return self.version, self._handed_out(self._served)

    def _handed_out(self, learnt: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of these weights, and of those that never change, on the target's device."""
        return {name: t.to(self._home, copy=True) for name, t in {**learnt, **self._fixed}.items()}

    def _computing(self) -> ExitStack:
        """On a GPU: what is made anew inside is there, and products are in their dtype."""
        inside = ExitStack()
        if self.device.type != "cpu":
            inside.enter_context(self.device)
            inside.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half))
        return inside


def _named(device: str) -> torch.device:
    """A device of this machine, with its index."""
    try:
        check_device(device)
    except ValueError as error:
        raise ValueError(f"learner.{error}") from error
    return torch.empty(0, device=device).device


def _moved(held: _Held, device: torch.device) -> _Held:
    """The same with every tensor on a device; to a GPU without waiting for it."""
    moved: dict[str, Any] = {}
    for field in fields(held):
        value = getattr(held, field.name)
        if isinstance(value, Rejected):
            moved[field.name] = _moved(value, device)
        elif isinstance(value, Tensor) and value.device != device:
            moved[field.name] = value.to(device, non_blocking=device.type == "cuda")
    return replace(held, **moved) if moved else held
