"""The settings of the online learner."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from specrl.agents.draft.losses import parse_loss
from specrl.core.checks import require


@dataclass(frozen=True)  # no slots: the command line reads its defaults from __dict__
class LearnerConfig:
    """How a draft learns online.

    Args:
        learning_rate: of AdamW.
        weight_decay: of AdamW, on matrices only.
        betas: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        batch_size: sequences per update.
        ttt_steps: steps of the training-time test (EAGLE-3, arXiv:2503.01840).
        ttt_decay: the loss of step k has the weight ttt_decay ** k.
        ttt_weights: weights of the steps, in place of those of ttt_decay.
        loss: of `specrl.agents.draft.losses`, or a mixture such as 'forward_kl:0.7+lk:0.3'. Losses of single
            tokens are 'forward_kl', 'reverse_kl', 'next_token', 'total_variation' and 'lk'. Losses of a chain of
            `ttt_steps` drafts are 'accept_length' and 'seconds_saved'; they have no gradient for an untrained draft, so
            combine them with 'forward_kl'.
        draft_sampling: how the losses of a chain propose and accept drafts. Rejection sampling is 'sampled'. With
            'greedy' the draft proposes its most likely token, which is accepted if it is the target's (a surrogate).
            The losses are unbiased if `temperature` is that of the requests (null if requests differ).
        rejected_weight: weight of the loss on rejected drafts; 0: they are not kept. It is the forward KL on the
            `rejected_top_k` most likely tokens of the target's distribution after a rejected draft.
        rejected_top_k: most likely tokens of the target that this loss uses.
        updates_per_request: updates for each finished request.
        temperature: of both distributions in the loss; null: each request's own. A greedy request counts as 1.
        ema_decay: decay per update of the average of the weights that serves; 0: no average.
        replay_capacity: sequences in the replay buffer.
        replay_half_life: requests after which the probability of being drawn halves.
        stale_half_life: draft versions after which it halves as well; null: never. Staleness is reported in any case.
        request_sample_rate: share of requests to learn from or hold out, by a hash of ids.
        holdout_fraction: share of these to hold out, to compare drafts. The last 64 are kept.
        max_bad_updates: updates in a row that are not finite, before the last good weights return.
        dtype: of matrix products; 'auto': bfloat16 if it is supported. Weights and optimiser state are always float32.
        device: of learner and replay buffer, 'cpu' or CUDA; null: that of the target.

    Raises:
        ValueError: a number out of range, or an unknown loss or dtype.
    """

    learning_rate: float = 5e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    batch_size: int = 4
    ttt_steps: int = 3
    ttt_decay: float = 0.8
    ttt_weights: tuple[float, ...] | None = None
    loss: str = "forward_kl"
    draft_sampling: Literal["sampled", "greedy"] = "sampled"
    rejected_weight: float = 0.0
    rejected_top_k: int = 8
    updates_per_request: float = 1.5
    temperature: float | None = 1.0
    ema_decay: float = 0.98
    replay_capacity: int = 512
    replay_half_life: float = 64.0
    stale_half_life: float | None = None
    request_sample_rate: float = 1.0
    holdout_fraction: float = 0.0
    max_bad_updates: int = 3
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str | None = None

    def __post_init__(self) -> None:
        def check(names: str, rule: str, holds: Callable[[Any], bool]) -> None:
            for name in names.split():
                value = getattr(self, name)
                require(holds(value), f"learner.{name}", rule, value)

        check("learning_rate max_grad_norm updates_per_request replay_half_life", "above 0", lambda x: x > 0)
        check("batch_size ttt_steps replay_capacity rejected_top_k max_bad_updates", "at least 1", lambda x: x >= 1)
        check("temperature stale_half_life", "above 0 or null", lambda x: x is None or x > 0)
        check("ema_decay holdout_fraction", "in [0, 1)", lambda x: 0 <= x < 1)
        check("ttt_decay request_sample_rate", "in (0, 1]", lambda x: 0 < x <= 1)
        check("weight_decay rejected_weight", "finite and at least 0", lambda x: 0 <= x < math.inf)
        check("betas", "in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas))
        if self.ttt_weights is not None:
            fits = len(self.ttt_weights) == self.ttt_steps and all(0 <= w < math.inf for w in self.ttt_weights)
            check("ttt_weights", f"ttt_steps = {self.ttt_steps} finite numbers of at least 0", lambda _: fits)
        check("draft_sampling", "'sampled' or 'greedy'", lambda x: x in ("sampled", "greedy"))
        check("dtype", "'auto', 'float32' or 'bfloat16'", lambda x: x in ("auto", "float32", "bfloat16"))
        parse_loss(self.loss)

    def step_weights(self, steps: int) -> tuple[float, ...]:
        """Return the weights of the first `steps` steps of the training-time test."""
        if self.ttt_weights is not None:
            return self.ttt_weights[:steps]
        return tuple(self.ttt_decay**k for k in range(steps))


def product_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype of matrix products for a config's `dtype` on a device of this machine."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32
