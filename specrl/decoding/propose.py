"""Proposals: a sampled or greedy chain, the best nodes of an EAGLE-2 tree, or chains from outside the session.

EAGLE-2 (Li et al., 2024, arXiv:2406.16858): every step expands the `topk` best nodes by `topk` children each. The score
of a node is the product of the draft's probabilities along its path, and the best nodes overall are verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from specrl.core.checks import refuse, require
from specrl.core.plan import Plan
from specrl.decoding.sampling import Source, Temperatures, argmax, distribution, sample
from specrl.models.attention import KVCache, TokenSlots
from specrl.models.draft import ServingDraft

MAX_DRAFT_TOKENS = 64  # tokens that a plan may verify, and slots that it may draft into
_SUM_TOLERANCE = 1e-3  # allowed error of the sum of a distribution


class Proposal(NamedTuple):
    """The n tokens per request that are verified. Row 0 is the committed token; parents come before their children."""

    tokens: Tensor  # [B, n] int64
    parents: Tensor  # [B, n] int64, -1 for row 0
    attention_mask: Tensor | None = None  # [B, n, n] bool, ancestors and self; None: a chain
    distributions: Tensor | None = None  # [B, s, V] float32 that a chain was sampled from; None: deterministic
    drafted: Tensor | None = None  # [B, s] int64 if chains differ in length, -1 after their ends; None: see `tokens`

    @property
    def depths(self) -> Tensor:
        """[B, n] int64, distance from row 0."""
        return self.parents + 1 if self.attention_mask is None else self.attention_mask.sum(-1) - 1


@dataclass(frozen=True)
class ExternalDraft:
    """Chains made outside the session (see `specrl.core.interfaces.ProposalSession`).

    Args:
        drafted: [B, s] int64, -1 after the end of a shorter chain.
        distributions: [B, s, V] float32 that the tokens were sampled from; None: unknown. Rows of -1 are not read.
    """

    drafted: Tensor
    distributions: Tensor | None = None

    def validate(self, batch_size: int, vocab_size: int) -> None:
        """Check against the session.

        Raises:
            ValueError: a shape, dtype, token or distribution is wrong, or a token follows the end of its chain.
        """
        drafted, q = self.drafted, self.distributions
        if drafted.dtype != torch.int64 or drafted.ndim != 2 or len(drafted) != batch_size:
            rule = f"int64 [{batch_size}, num_steps], a row per live request"
            refuse("drafted", rule, f"{drafted.dtype} {list(drafted.shape)}")
        steps = drafted.shape[1]
        require(steps < MAX_DRAFT_TOKENS, "num_steps of drafted", f"below {MAX_DRAFT_TOKENS}", steps)
        if steps == 0:
            return
        ids = (int(drafted.min()), int(drafted.max()))
        require(-1 <= ids[0] <= ids[1] < vocab_size, "drafted", f"in [0, {vocab_size}), or -1 where a draft ends", ids)
        row = drafted[((drafted[:, 1:] >= 0) & (drafted[:, :-1] < 0)).any(1)][:1].tolist()
        require(not row, "drafted", "-1 after the end of a draft", row)
        if q is None or ids[1] < 0:
            return
        shape = [*drafted.shape, vocab_size]
        if q.dtype != torch.float32 or list(q.shape) != shape:
            refuse("distributions", f"float32 {shape}", f"{q.dtype} {list(q.shape)}")
        rows, tokens = q[drafted >= 0], drafted[drafted >= 0]
        low, off = float(rows.min()), float((rows.sum(-1) - 1.0).abs().max())  # NaN if an entry is NaN
        require(0 <= low and off <= _SUM_TOLERANCE, "distributions", "at least 0 and of sum 1", (low, 1.0 + off))
        chances = rows.gather(-1, tokens[:, None])
        require(bool((chances > 0).all()), "distributions", "above 0 at the drafted tokens", float(chances.min()))

    def proposal(self, last_tokens: Tensor) -> Proposal:
        """Return the chains, at least one token long, after the last committed tokens [B], on their device."""
        drafted, q = self.drafted.to(last_tokens.device), self.distributions
        tokens = torch.cat([last_tokens[:, None], drafted.clamp(min=0)], 1)
        parents = torch.arange(-1, drafted.shape[1], device=tokens.device).expand(tokens.shape)
        if q is not None:
            q = q.to(tokens.device).masked_fill((drafted < 0)[..., None], 0.0)
        return Proposal(tokens, parents, distributions=q, drafted=drafted)


class Start(NamedTuple):
    """The draft's state when it has read every committed token."""

    hidden: Tensor  # [B, H], the draft's state at its last slot
    slots: Tensor  # [B] int64, its next free slot
    length: int  # the largest of them
    last_tokens: Tensor  # [B] int64, the last committed token
    fixed_shapes: bool = False  # every pass attends to `length` slots, whatever is live (see fixed_shape.py)

    def visible(self, slots: int) -> int:
        """Return the length that a pass attends to when it writes up to `slots` further ones."""
        return self.length if self.fixed_shapes else self.length + slots


def unsupported(plan: Plan, draft: ServingDraft | None) -> str | None:
    """Return why a session with this draft cannot run the plan; None if it can."""
    if plan.num_steps and draft is None:
        return f"plain decoding has no draft, so its only plan is 0, but got {plan}"
    if draft is not None and plan.topk > draft.config.draft_vocab_size:
        size = draft.config.draft_vocab_size
        return f"topk must be at most the draft's vocabulary of {size} tokens, but got {plan}"
    if max(plan.num_draft_tokens, (plan.num_steps - 1) * plan.topk) > MAX_DRAFT_TOKENS:
        return f"a plan may draft and verify at most {MAX_DRAFT_TOKENS} tokens per request, but got {plan}"
    return None


def propose(
    draft: ServingDraft,
    cache: KVCache,
    start: Start,
    plan: Plan,
    temperatures: Temperatures | None,
    source: Source,
) -> Proposal:
    """Draft the tree of `plan`, or its chain, token by token.

    Args:
        draft, cache, start: the draft, its cache, and its state.
        plan: a plan of at least one step.
        temperatures: sample each token of a chain from the draft at these (for rejection sampling); None: take the best
            token. Trees are always deterministic.
        source: source of the samples.
    """
    if not plan.is_chain:
        return _propose_tree(draft, cache, start, plan)
    hidden, tokens, distributions = start.hidden, [start.last_tokens], []
    ids = draft.target_ids
    for step in range(plan.num_steps):
        if step:
            where = TokenSlots((start.slots + (step - 1))[:, None], start.visible(step))
            hidden = draft.decode(tokens[-1][:, None], hidden[:, None], cache, where)[:, 0]
        logits = draft.logits(hidden)  # [B, Vd]
        if temperatures is None or temperatures.all_greedy:
            best = argmax(logits)
        else:
            q = distribution(logits, temperatures)
            best = sample(q, source)
            if ids is not None:
                q = q.new_zeros(q.shape[0], draft.config.vocab_size).index_copy_(1, ids, q)
            distributions.append(q)
        tokens.append(best if ids is None else ids[best])
    proposed = torch.stack(tokens, 1)  # [B, s + 1]
    parents = torch.arange(-1, plan.num_steps, device=proposed.device).expand(proposed.shape)
    return Proposal(proposed, parents, distributions=torch.stack(distributions, 1) if distributions else None)


def _propose_tree(draft: ServingDraft, cache: KVCache, start: Start, plan: Plan) -> Proposal:
    """Expand `topk` nodes per step and keep the best `num_draft_tokens - 1` by cumulative score."""
    topk, batch, device = plan.topk, len(start.slots), start.hidden.device

    def expand(hidden: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return the topk best continuations of each node: scores and target ids [B, nodes, topk]."""
        logp = torch.log_softmax(draft.logits(hidden.flatten(0, 1)), -1).view(batch, hidden.shape[1], -1)
        best = logp.topk(topk, -1)
        ids = best.indices if draft.target_ids is None else draft.target_ids[best.indices]
        return best.values + score[..., None], ids

    score, token = expand(start.hidden[:, None], torch.zeros(batch, 1, device=device))
    scores, tokens = [score.flatten(1)], [token.flatten(1)]
    parents = [torch.zeros_like(tokens[0])]  # rows of the full tree, 0 the committed token
    beam_score, beam_token = scores[0], tokens[0]  # [B, k]
    beam_row = torch.arange(1, topk + 1, device=device).expand(batch, topk)
    beam_hidden = start.hidden[:, None].expand(-1, topk, -1)
    above = torch.zeros(batch, topk, 0, dtype=torch.bool, device=device)  # drafted slots that a beam node attends to
    itself = torch.eye(topk, dtype=torch.bool, device=device).expand(batch, topk, topk)
    first_row = 1 + topk
    for step in range(1, plan.num_steps):
        above = torch.cat([above, itself], -1)  # [B, k, step * k]
        offset = (step - 1) * topk
        slots = start.slots[:, None] + torch.arange(offset, offset + topk, device=device)
        length = start.visible(offset + topk)
        positions = (start.slots + (step - 1))[:, None].expand(slots.shape)
        mask = tree_mask(above, start.slots, length, start.fixed_shapes)
        hidden = draft.decode(beam_token, beam_hidden, cache, TokenSlots(slots, length, positions, mask))
        score, token = expand(hidden, beam_score)  # [B, k, k]
        scores.append(score.flatten(1))
        tokens.append(token.flatten(1))
        parents.append(beam_row.repeat_interleave(topk, 1))
        best = scores[-1].topk(topk, -1)
        beam_score, chosen = best.values, best.indices
        beam_token, beam_row = tokens[-1].gather(1, chosen), first_row + chosen
        parent = chosen // topk  # beam index of the node that each new one continues
        beam_hidden = hidden.gather(1, parent[..., None].expand(-1, -1, hidden.shape[-1]))
        above = above.gather(1, parent[..., None].expand(-1, -1, above.shape[-1]))
        first_row += topk * topk
    nodes = torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents, 1)
    return _best(plan.num_draft_tokens, start.last_tokens, *nodes)


def tree_mask(inside: Tensor, starts: Tensor, length: int, fixed_shapes: bool = False) -> Tensor:
    """Return the mask [B, q, length] bool: `inside [B, q, m] bool` from slot `starts [B]` on, and all slots before.

    With `fixed_shapes`, the padding rows of a batch may start beyond `length`; they attend to everything.
    """
    batch, queries, width = inside.shape
    before = torch.arange(length, device=inside.device) < starts[:, None]  # [B, length]
    mask = before[:, None].repeat(1, queries, 1)
    columns = starts[:, None] + torch.arange(width, device=inside.device)
    if fixed_shapes:
        columns.clamp_(max=length - 1)
    return mask.scatter_(2, columns[:, None].expand(batch, queries, width), inside)


def _best(count: int, last_tokens: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor) -> Proposal:
    """Take the best `count - 1` of all drafted nodes [B, N]; the score of a parent is never below that of its child."""
    batch, device = len(last_tokens), last_tokens.device
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, : count - 1]
    rows = order.sort(-1).values + 1  # rows of the full tree, level by level: parents before children
    zero = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    best = torch.cat([zero, rows], 1)  # [B, n]
    new_row = torch.zeros(batch, scores.shape[1] + 1, dtype=torch.int64, device=device)
    new_row.scatter_(1, best, torch.arange(count, device=device).expand(batch, count))
    parent = new_row.gather(1, parents.gather(1, rows - 1))  # [B, n - 1]
    parent = torch.cat([zero - 1, parent], 1)
    mask = torch.eye(count, dtype=torch.bool, device=device).repeat(batch, 1, 1)
    requests = torch.arange(batch, device=device)
    for node in range(1, count):
        mask[:, node] |= mask[requests, parent[:, node]]
    return Proposal(torch.cat([last_tokens[:, None], tokens.gather(1, rows - 1)], 1), parent, mask)
