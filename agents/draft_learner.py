"""The online learner of a draft: traces in, versioned weights out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from specrl.agents.sequences import Assembler, Replay, Sequence, collate
from specrl.agents.unroll import unroll
from specrl.models.draft import Draft
from specrl.models.rope import rope_table
from specrl.rounds import Trace


@dataclass(frozen=True)  # no slots: the command line reads its defaults from __dict__
class LearnerConfig:
    """How a draft learns online.

    Args:
        learning_rate: of AdamW.
        weight_decay: of AdamW, on matrices.
        betas: of AdamW.
        clip: largest gradient norm.
        batch_size: sequences per update.
        passes: length of the training-time test, at least 1.
        pass_decay: weight of pass k is pass_decay ** k.
        updates_per_request: updates for every finished request.
        temperature: at which target and draft distributions are compared; None: each request's own (1 if greedy).
        average: decay per update of the weights' running average, which is what serves; 0: the latest weights.
        replay: sequences kept.
        half_life: how many requests back the weight of a draw halves.
        dtype: of the matrix products; 'auto' is bfloat16 where the processor has such products, else float32.
            Weights and optimiser state are float32 always.

    Raises:
        ValueError: a number out of range, or another dtype.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    batch_size: int = 4
    passes: int = 3
    pass_decay: float = 0.8
    updates_per_request: float = 1.5
    temperature: float | None = 1.0
    average: float = 0.98
    replay: int = 512
    half_life: float = 64.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip", "updates_per_request", "half_life"):
            if not getattr(self, name) > 0:
                raise ValueError(f"learner.{name} must be above 0, but got {getattr(self, name)}")
        for name in ("batch_size", "passes", "replay"):
            if getattr(self, name) < 1:
                raise ValueError(f"learner.{name} must be at least 1, but got {getattr(self, name)}")
        if not 0 <= self.average < 1 or not 0 < self.pass_decay <= 1 or not self.weight_decay >= 0:
            raise ValueError(
                "learner.average must be in [0, 1), pass_decay in (0, 1] and weight_decay at least 0, but got "
                f"{self.average}, {self.pass_decay} and {self.weight_decay}"
            )
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(
                f"learner.temperature must be above 0 or null (each request's own), but got {self.temperature}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"learner.betas must be in [0, 1), but got {self.betas}")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"learner.dtype must be 'auto', 'float32' or 'bfloat16', but got {self.dtype!r}")


def product_dtype(name: str) -> torch.dtype:
    """The dtype of matrix products that `name` stands for on this machine."""
    if name == "auto":
        native = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return torch.bfloat16 if native.get("avx512_bf16") or native.get("amx_bf16") else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


class OnlineLearner:
    """Learns a draft from the target's own traffic (see `DraftLearner` in `specrl.agents.base`).

    Args:
        draft: where to start from.
        embedding: [V, H] the target's embedding, which the draft shares and never changes.
        config: how.
        seed: of the draws from the replay.
    """

    def __init__(self, draft: Draft, embedding: Tensor, config: LearnerConfig, seed: int = 0) -> None:
        self.config, self._shape = config, draft.config
        self._embedding = embedding.detach().float()
        fixed = ("d2t", "t2d")
        self._fixed = {n: t for n, t in draft.tensors.items() if n in fixed}
        self.parameters = {n: t.clone().requires_grad_() for n, t in draft.tensors.items() if n not in fixed}
        self._served = {n: t.detach().clone() for n, t in self.parameters.items()}
        matrices = [p for p in self.parameters.values() if p.ndim == 2]
        vectors = [p for p in self.parameters.values() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self._rotation = rope_table(self._shape.rope, self._shape.head_dim, self._shape.max_position_embeddings)
        self._target_ids = draft.target_ids
        self._assembler, self.replay = Assembler(), Replay(config.replay, config.half_life, seed)
        self.updates = self.requests = 0
        self._owed = 0.0
        self._dtype = product_dtype(config.dtype)

    def learn(self, traces: list[Trace]) -> Mapping[str, float]:
        """Take traces, make the updates their finished requests are due; means over those updates.

        Requests that cannot be learnt from (see `Assembler`) are left out, and counted by `skipped`.
        """
        new = [sequence for sequence in self._assembler.add(traces) if len(sequence.tokens) > 1]
        self.replay.extend(new)
        self.requests += len(new)
        self._owed += len(new) * self.config.updates_per_request
        seen: dict[str, list[float]] = {}
        count = 0
        while self._owed >= 1.0 and len(self.replay):
            self._owed -= 1.0
            count += 1
            for name, value in self.update(self.replay.draw(self.config.batch_size)).items():
                seen.setdefault(name, []).append(value)
        means = {name: sum(values) / len(values) for name, values in seen.items()}
        return {**means, "updates": float(count)}

    @property
    def skipped(self) -> int:
        """Requests left out so far: not seen from their prefill on, or not finite."""
        return self._assembler.skipped

    def update(self, sequences: list[Sequence]) -> dict[str, float]:
        """One optimiser step on a batch of sequences of at least two tokens; fewer passes where all are short."""
        c = self.config
        tokens, features, logits, valid = collate(sequences)
        embeddings = self._embedding[tokens[:, 1:]]
        targets = logits[:, 1:].float()  # slot t predicts token t + 2, which logits[t + 1] speak of
        inside = valid[:, 1:]
        heat = self._temperatures(sequences)
        p = torch.softmax(targets / heat, -1)
        if self._target_ids is not None:
            p = p[..., self._target_ids]
        passes = min(c.passes, inside.shape[1])  # pass k begins at slot k
        loss, accept = torch.zeros(()), torch.zeros(passes)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            drafts = unroll(self.parameters, self._shape, embeddings, features[:, :-1].float(), self._rotation, passes)
            for k, drafted in enumerate(drafts):
                here = inside.clone()
                here[:, :k] = False
                drafted, wanted = drafted[here].float(), p[here]
                logq = torch.log_softmax(drafted / heat.expand(*inside.shape, 1)[here], -1)
                loss = loss - c.pass_decay**k * (wanted * logq).sum(-1).mean()
                with torch.no_grad():
                    accept[k] = torch.minimum(wanted, logq.exp()).sum(-1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), c.clip)
        self.optimizer.step()
        self.updates += 1
        with torch.no_grad():
            keep = min(c.average, self.updates / (self.updates + 10.0))
            for name, served in self._served.items():
                served.lerp_(self.parameters[name], 1.0 - keep)
        return {
            "loss": loss.item(),
            "gradient_norm": float(norm),
            **{f"alpha_{k + 1}": a for k, a in enumerate(accept.tolist())},
        }

    def _temperatures(self, sequences: list[Sequence]) -> Tensor:
        own = [s.temperature or 1.0 for s in sequences]
        return torch.tensor(own if self.config.temperature is None else [self.config.temperature] * len(own))[
            :, None, None
        ]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on, but the replay: tensors, and JSON-able numbers."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"parameters.{name}"] = parameter.detach()
            tensors[f"served.{name}"] = self._served[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key}.{name}"] = value
        numbers = {
            "updates": self.updates,
            "requests": self.requests,
            "owed": self._owed,
            "rng": self.replay.rng.bit_generator.state,
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
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"parameters.{name}"])
                self._served[name].copy_(tensors[f"served.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"step.{name}" in tensors:
                    self.optimizer.state[parameter] = {key: tensors[f"{key}.{name}"].clone() for key in keys}
        self.updates, self.requests = int(numbers["updates"]), int(numbers["requests"])
        self._owed = float(numbers["owed"])
        self.replay.rng.bit_generator.state = numbers["rng"]

    def weights(self) -> tuple[int, Mapping[str, Tensor]]:
        """Version (the updates made) and the weights to serve, by SGLang's names; later updates do not touch them."""
        return self.updates, {name: t.clone() for name, t in {**self._served, **self._fixed}.items()}
