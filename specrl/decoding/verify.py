"""Lossless acceptance of a proposal, of the two kinds that SGLang has.

For any draft, committed tokens are distributed as the target's own. Everything except `Verified` runs on the device
without waiting for it, so that CUDA graphs can capture it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Ints
from specrl.decoding.propose import Proposal
from specrl.decoding.sampling import Source, Temperatures, argmax, choose, distribution, sample, uniform

_TINY = 1e-30  # selects the target's own distribution where the residual is numerically empty


class Accepted(NamedTuple):
    """Result of an acceptance for B requests."""

    correct_drafts: Tensor  # [B] int64, accepted drafts
    bonus: Tensor  # [B] int64, the target's own token after them
    path: Tensor  # [B, s + 1] int64, the accepted rows in order, beginning with 0; -1 after the last


class Verified(NamedTuple):
    """Result of verifying a proposal."""

    correct_drafts: Ints  # [B] int64
    tokens: list[list[int]]  # of each request, the accepted drafts and the bonus token
    path: Tensor  # [B, s + 1] int64, as in `Accepted`
    logits: Tensor  # [B, n, V] float32
    hidden_states: Tensor | None  # [B, n, 3H], the target's aux hidden states; None if there are no aux layers

    @classmethod
    def read(cls, outcome: Ints, path: Tensor, logits: Tensor, hidden_states: Tensor | None) -> Verified:
        """Make it from an `outcome [B, s + 2]` that was copied to the host."""
        tokens = [[*row[2 : 2 + row[0]], row[1]] for row in outcome.tolist()]
        return cls(outcome[:, 0].copy(), tokens, path, logits, hidden_states)


def accept(plan: Plan, proposal: Proposal, logits: Tensor, temperatures: Temperatures, source: Source) -> Accepted:
    """Accept a proposal of `plan`: by rejection sampling if it was sampled from distributions, else target-only."""
    if plan.num_steps == 0:
        bonus = choose(logits[:, 0], temperatures, source)
        none = torch.zeros_like(bonus)
        return Accepted(none, bonus, none[:, None])
    drafted = proposal.tokens[:, 1:] if proposal.drafted is None else proposal.drafted
    if proposal.distributions is not None:
        return reject_chain(logits, drafted, proposal.distributions, temperatures, source)
    chosen = choose(logits, temperatures, source)  # [B, n]
    if proposal.attention_mask is None:
        return accept_chain(chosen, drafted)
    return accept_tree(chosen, proposal.tokens, proposal.parents, proposal.attention_mask, plan.num_steps)


def outcome(proposal: Proposal, accepted: Accepted) -> Tensor:
    """Return the result for the host [B, s + 2] int64: correct drafts, bonus, tokens of the accepted rows."""
    correct, bonus, path = accepted
    if path.shape[1] == 1:
        return torch.cat([path, bonus[:, None]], 1)  # plan 0, where the path is 0
    drafts = proposal.tokens[:, 1:]
    if proposal.attention_mask is not None:
        drafts = proposal.tokens.gather(1, path[:, 1:].clamp(min=0))
    return torch.cat([correct[:, None], bonus[:, None], drafts], 1)


def accept_chain(chosen: Tensor, drafted: Tensor) -> Accepted:
    """Target-only acceptance of a chain: a draft is accepted if the target itself chose it.

    Args:
        chosen: [B, s + 1] int64, the target's token after each verified token (sampled or greedy).
        drafted: [B, s] int64, -1 where nothing was drafted.
    """
    correct = _leading(chosen[:, :-1] == drafted)
    return _accepted_chain(correct, chosen.gather(1, correct[:, None])[:, 0], drafted.shape[1])


def accept_tree(chosen: Tensor, tokens: Tensor, parents: Tensor, attention_mask: Tensor, num_steps: int) -> Accepted:
    """Target-only acceptance of a tree: a node is accepted if the target chose it and all its ancestors.

    Args:
        chosen: [B, n] int64, the target's token after each node.
        tokens, parents, attention_mask: as in `Proposal`; siblings have different tokens.
        num_steps: depth of the tree, s.
    """
    count = tokens.shape[1]
    rows = torch.arange(count, device=tokens.device)
    agrees = (chosen.gather(1, parents.clamp(min=0)) == tokens) | (parents < 0)
    accepted = (agrees[:, None] >= attention_mask).all(-1)  # [B, n], at most one node at each depth
    deepest = (accepted * rows).max(1, keepdim=True).values  # children have larger rows than their parents
    path = torch.where(accepted, rows, count).sort(1).values[:, : num_steps + 1]
    return Accepted(accepted.sum(1) - 1, chosen.gather(1, deepest)[:, 0], path.masked_fill(path == count, -1))


def reject_chain(
    logits: Tensor, drafted: Tensor, distributions: Tensor, temperatures: Temperatures, source: Source
) -> Accepted:
    """Rejection sampling of a chain (Leviathan et al., 2023, algorithm 1; Chen et al., 2023).

    Draft x_i, sampled from q_i, is accepted with probability min(1, p_i(x_i) / q_i(x_i)). The first rejected one is
    replaced by a sample of norm(max(0, p_i - q_i)); if all are accepted, a sample of p is added.

    Args:
        logits: [B, s + 1, V] float32, the target's.
        drafted: [B, s] int64, -1 where nothing was drafted, which is replaced by a sample of p.
        distributions: [B, s, V] float32, q (one-hot for greedy requests, 0 where nothing was drafted).
        temperatures: temperatures of the requests.
        source: source of the uniform numbers for acceptance and samples.
    """
    batch, steps = drafted.shape
    if temperatures.all_greedy:
        return accept_chain(argmax(logits), drafted)
    p = distribution(logits, temperatures)
    index = drafted.clamp(min=0)[..., None]
    coins = uniform((batch, steps), source, logits.device)
    passes = coins * distributions.gather(-1, index)[..., 0] < p[:, :-1].gather(-1, index)[..., 0]
    passes &= drafted >= 0
    correct = _leading(passes)
    rows = torch.arange(batch, device=logits.device)
    target = p[rows, correct]  # [B, V]
    rejected = (correct < steps)[:, None]
    draft = distributions[rows, correct.clamp(max=steps - 1)] * rejected
    residual = torch.add((target - draft).clamp_min_(0.0), target, alpha=_TINY)
    return _accepted_chain(correct, sample(residual, source), steps)


def _leading(passes: Tensor) -> Tensor:
    """Count the true entries of `passes [B, s] bool` before the first false one: [B] int64."""
    return passes.long().cumprod(-1).sum(-1)


def _accepted_chain(correct: Tensor, bonus: Tensor, steps: int) -> Accepted:
    rows = torch.arange(steps + 1, device=correct.device)
    return Accepted(correct, bonus, torch.where(rows <= correct[:, None], rows, -1))
