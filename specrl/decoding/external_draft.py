"""What somebody else drafted: checked, and made a proposal (see `specrl.core.interfaces.ProposalSession`)."""

from __future__ import annotations

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.decoding.propose import MOST_NODES, Proposal

_SUM_WITHIN = 1e-3  # of 1, that a given distribution must sum to


def check_given(drafted: Tensor, distributions: Tensor | None, batch_size: int, vocab_size: int) -> Plan:
    """The plan of the chain that a given proposal is.

    Raises:
        ValueError: a shape, dtype, token or distribution that is not one, or a token drafted after none.
    """
    if drafted.dtype != torch.int64 or drafted.ndim != 2 or len(drafted) != batch_size:
        got = f"{drafted.dtype} {list(drafted.shape)}"
        raise ValueError(f"drafted must be int64 [{batch_size}, num_steps], a row per live request, but got {got}")
    steps = drafted.shape[1]
    if steps >= MOST_NODES:
        raise ValueError(f"a proposal may draft at most {MOST_NODES - 1} tokens per request, but got {steps}")
    if steps == 0:
        return Plan(0)
    if not -1 <= int(drafted.min()) <= int(drafted.max()) < vocab_size:
        raise ValueError(
            f"drafted tokens must be in [0, {vocab_size}), or -1 where a draft ends, but got "
            f"{int(drafted.min())}..{int(drafted.max())}"
        )
    if bool(((drafted[:, 1:] >= 0) & (drafted[:, :-1] < 0)).any()):
        raise ValueError("a draft that has ended must not go on, but got a token after -1; pad with -1 at the end")
    if distributions is not None:
        _check_distributions(drafted, distributions, vocab_size)
    return Plan(steps)


def given_chain(drafted: Tensor, distributions: Tensor | None, last: Tensor) -> Proposal:
    """Drafts [B, s], s at least 1, after the last committed tokens [B], as a proposal on the device of those."""
    drafted = drafted.to(last.device)
    tokens = torch.cat([last[:, None], drafted.clamp(min=0)], 1)
    parents = torch.arange(-1, drafted.shape[1], device=tokens.device).expand(tokens.shape)
    q = None
    if distributions is not None:
        q = distributions.to(tokens.device).masked_fill((drafted < 0)[..., None], 0.0)
    return Proposal(tokens, parents, None, None, q, drafted)


def _check_distributions(drafted: Tensor, distributions: Tensor, vocab_size: int) -> None:
    """Raise a ValueError unless `distributions [B, s, V]` can be what `drafted [B, s]` was drawn from.

    Rows where nothing was drafted (-1) are not read.
    """
    shape = [*drafted.shape, vocab_size]
    if distributions.dtype != torch.float32 or list(distributions.shape) != shape:
        got = f"{distributions.dtype} {list(distributions.shape)}"
        raise ValueError(f"a proposal's distributions must be float32 {shape}, but got {got}")
    rows, tokens = distributions[drafted >= 0], drafted[drafted >= 0]
    if not len(rows):
        return
    if not bool(torch.isfinite(rows).all()) or bool((rows < 0).any()):
        raise ValueError("a proposal's distributions must be finite and at least 0, but got NaN, infinity or less")
    off = float((rows.sum(-1) - 1.0).abs().max())
    if off > _SUM_WITHIN:
        raise ValueError(f"a proposal's distributions must sum to 1 within {_SUM_WITHIN}, but one is {off:.3g} off")
    if bool((rows.gather(-1, tokens[:, None]) == 0).any()):
        raise ValueError("a drafted token must be possible under the distribution it was drawn from, but got odds of 0")
