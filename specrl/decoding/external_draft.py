"""Drafts made outside the session (see `specrl.core.interfaces.ProposalSession`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.decoding.propose import MAX_DRAFT_TOKENS, Proposal

_SUM_TOLERANCE = 1e-3  # of a distribution's sum


@dataclass(frozen=True)
class ExternalDraft:
    """Chains for the live requests.

    Args:
        drafted: [B, s] int64, -1 after the end of a shorter chain.
        distributions: [B, s, V] float32 that the tokens were sampled from; None: unknown.
    """

    drafted: Tensor
    distributions: Tensor | None = None

    @property
    def plan(self) -> Plan:
        """The plan of these chains."""
        return Plan(self.drafted.shape[1])

    def validate(self, batch_size: int, vocab_size: int) -> None:
        """Check against the session.

        Raises:
            ValueError: a shape, dtype, token or distribution is wrong, or a token follows the end of its chain.
        """
        drafted = self.drafted
        if drafted.dtype != torch.int64 or drafted.ndim != 2 or len(drafted) != batch_size:
            got = f"{drafted.dtype} {list(drafted.shape)}"
            raise ValueError(f"drafted must be int64 [{batch_size}, num_steps], a row per live request, but got {got}")
        steps = drafted.shape[1]
        if steps >= MAX_DRAFT_TOKENS:
            raise ValueError(f"a proposal may draft at most {MAX_DRAFT_TOKENS - 1} tokens per request, but got {steps}")
        if steps == 0:
            return
        if not -1 <= int(drafted.min()) <= int(drafted.max()) < vocab_size:
            raise ValueError(
                f"drafted tokens must be in [0, {vocab_size}), or -1 where a draft ends, but got "
                f"{int(drafted.min())}..{int(drafted.max())}"
            )
        if bool(((drafted[:, 1:] >= 0) & (drafted[:, :-1] < 0)).any()):
            raise ValueError("a draft that has ended must not go on, but got a token after -1; pad with -1 at the end")
        if self.distributions is not None:
            _check_distributions(drafted, self.distributions, vocab_size)

    def proposal(self, last_tokens: Tensor) -> Proposal:
        """The chains, at least one token long, after the last committed tokens [B], on their device."""
        drafted = self.drafted.to(last_tokens.device)
        tokens = torch.cat([last_tokens[:, None], drafted.clamp(min=0)], 1)
        parents = torch.arange(-1, drafted.shape[1], device=tokens.device).expand(tokens.shape)
        q = None
        if self.distributions is not None:
            q = self.distributions.to(tokens.device).masked_fill((drafted < 0)[..., None], 0.0)
        return Proposal(tokens, parents, distributions=q, drafted=drafted)


def _check_distributions(drafted: Tensor, distributions: Tensor, vocab_size: int) -> None:
    """Raise a ValueError unless `drafted [B, s]` can be a sample of `distributions [B, s, V]`.

    Rows without a token (-1) are not read.
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
    if off > _SUM_TOLERANCE:
        raise ValueError(f"a proposal's distributions must sum to 1 within {_SUM_TOLERANCE}, but one is {off:.3g} off")
    if bool((rows.gather(-1, tokens[:, None]) == 0).any()):
        raise ValueError("a drafted token must be possible under the distribution it was drawn from, but got odds of 0")
