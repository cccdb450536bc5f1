"""The settings of the online learner, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from specrl.agents.draft.losses import parse_loss


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
        pass_decay: weight of pass k is pass_decay ** k,
        pass_weights: unless they are given here, one for each pass.
        loss: 'forward_kl', 'reverse_kl', 'next_token', 'total_variation', 'lk' (a slot each), 'accept_length' or
            'seconds_saved' (a chain of `passes` drafts; by itself it teaches a random draft nothing, for drafting
            does not pay yet), or a mixture such as 'forward_kl:0.7+lk:0.3'; their formulas stand in
            `specrl.agents.draft.losses`.
        drafts: how drafts are proposed and accepted, for the losses of a chain: 'sampled' (rejection sampling) or
            'greedy' (the draft's best token, under target-only acceptance: a surrogate). They are unbiased where
            `temperature` is that of the requests (null, if they differ).
        rejected: weight of what the target says after drafts that it rejected, forward KL on its `rejected_top_k`
            most likely tokens; 0: rejected drafts are not kept.
        rejected_top_k: tokens of that distribution that are learnt from.
        updates_per_request: updates for every finished request.
        temperature: at which target and draft distributions are compared; None: each request's own (1 if greedy).
        average: decay per update of the weights' running average, which is what serves; 0: the latest weights.
        replay: sequences kept.
        half_life: how many requests back the weight of a draw halves.
        stale_half_life: how many draft versions back it halves as well; null: staleness is only reported.
        sample: the share of requests that is learnt from or held out, by a hash of their ids.
        held_out: the share of those that is never learnt from, for a gate; the last 64 are kept.
        patience: updates in a row with a loss or gradient that is not finite after which the last good weights return.
        dtype: of the matrix products; 'auto' is bfloat16 where the processor or GPU has such products, else float32.
            Weights and optimiser state are float32 always.
        device: where it learns, and keeps the replay: 'cpu' or a CUDA device; null: where the target is, in turns with
            serving.

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
    pass_weights: tuple[float, ...] | None = None
    loss: str = "forward_kl"
    drafts: Literal["sampled", "greedy"] = "sampled"
    rejected: float = 0.0
    rejected_top_k: int = 8
    updates_per_request: float = 1.5
    temperature: float | None = 1.0
    average: float = 0.98
    replay: int = 512
    half_life: float = 64.0
    stale_half_life: float | None = None
    sample: float = 1.0
    held_out: float = 0.0
    patience: int = 3
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip", "updates_per_request", "half_life"):
            if not getattr(self, name) > 0:
                raise ValueError(f"learner.{name} must be above 0, but got {getattr(self, name)}")
        for name in ("batch_size", "passes", "replay", "rejected_top_k", "patience"):
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
        if self.pass_weights is not None and (
            len(self.pass_weights) != self.passes or not all(0 <= w < math.inf for w in self.pass_weights)
        ):
            raise ValueError(
                f"learner.pass_weights must be {self.passes} numbers of at least 0, one for each pass, but got "
                f"{self.pass_weights}"
            )
        if not 0 < self.sample <= 1 or not 0 <= self.held_out < 1 or not 0 <= self.rejected < math.inf:
            raise ValueError(
                "learner.sample must be in (0, 1], held_out in [0, 1) and rejected at least 0, but got "
                f"{self.sample}, {self.held_out} and {self.rejected}"
            )
        if self.stale_half_life is not None and not self.stale_half_life > 0:
            raise ValueError(f"learner.stale_half_life must be above 0 or null, but got {self.stale_half_life}")
        if self.drafts not in ("sampled", "greedy"):
            raise ValueError(f"learner.drafts must be 'sampled' or 'greedy', but got {self.drafts!r}")
        try:
            parse_loss(self.loss)
        except ValueError as error:
            raise ValueError(f"learner.loss: {error}") from error
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"learner.dtype must be 'auto', 'float32' or 'bfloat16', but got {self.dtype!r}")

    def weights_of(self, passes: int) -> tuple[float, ...]:
        """Weights of the first `passes` passes."""
        if self.pass_weights is not None:
            return self.pass_weights[:passes]
        return tuple(self.pass_decay**k for k in range(passes))


def product_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of matrix products that `name` stands for on a device of this machine."""
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(torch.device(device)) else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


def _has_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are native there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(native.get("avx512_bf16") or native.get("amx_bf16"))
