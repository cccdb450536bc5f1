"""Proposals: a sampled or greedy chain, or the best nodes of an EAGLE-2 tree.

EAGLE-2 (Li et al., 2024, arXiv:2406.16858): every step expands the `topk` best nodes by `topk` children each. The score
of a node is the product of the draft's probabilities along its path, and the best nodes overall are verified.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.decoding.sampling import Source, Temperatures, argmax, distribution, sample
from specrl.models.config import DraftArchitecture
from specrl.models.draft import ServingDraft
from specrl.models.kv_cache import KVCache

MAX_DRAFT_TOKENS = 64  # tokens that a plan may verify, and slots that it may draft into


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


class Start(NamedTuple):
    """Where drafting starts: the draft has read every committed token."""

    hidden: Tensor  # [B, H], the draft's state at its last slot
    slots: Tensor  # [B] int64, its next free slot
    length: int  # the largest of them
    last_tokens: Tensor  # [B] int64, the last committed token
    fixed_shapes: bool = False  # every pass looks at `length` slots, whatever is live (see fixed_shape.py)

    def reach(self, slots: int) -> int:
        """Slots that a pass looks at when it writes up to `slots` further ones."""
        return self.length if self.fixed_shapes else self.length + slots


def unsupported(plan: Plan, draft: DraftArchitecture | None) -> str | None:
    """Why a session with this draft cannot run the plan; None if it can."""
    if plan.num_steps and draft is None:
        return f"plain decoding has no draft, so its only plan is 0, but got {plan}"
    if draft is not None and plan.topk > draft.draft_vocab_size:
        return f"topk must be at most the draft's vocabulary of {draft.draft_vocab_size} tokens, but got {plan}"
    if max(plan.num_draft_tokens, (plan.num_steps - 1) * plan.topk) > MAX_DRAFT_TOKENS:
        return f"a plan may draft and verify at most {MAX_DRAFT_TOKENS} tokens per request, but got {plan}"
    return None


def propose(
    draft: ServingDraft,
    cache: KVCache,
    start: Start,
    plan: Plan,
    vocab_size: int,
    temperatures: Temperatures | None,
    source: Source,
) -> Proposal:
    """Draft a chain or a tree; arguments as in `propose_chain`. Trees are always deterministic."""
    if plan.is_chain:
        return propose_chain(draft, cache, start, plan.num_steps, vocab_size, temperatures, source)
    return propose_tree(draft, cache, start, plan)


def propose_chain(
    draft: ServingDraft,
    cache: KVCache,
    start: Start,
    steps: int,
    vocab_size: int,
    temperatures: Temperatures | None,
    source: Source,
) -> Proposal:
    """Draft `steps` tokens one after the other.

    Args:
        draft, cache, start: the draft, its cache, and where it starts.
        steps: at least 1.
        vocab_size: of the target, V.
        temperatures: sample each token from the draft at these (for rejection sampling); None: take the best token.
        source: of the samples.
    """
    hidden, tokens, distributions = start.hidden, [start.last_tokens], []
    ids = draft.target_ids
    for step in range(steps):
        if step:
            slots = (start.slots + (step - 1))[:, None]
            hidden = draft.decode(tokens[-1][:, None], hidden[:, None], cache, slots, length=start.reach(step))[:, 0]
        logits = draft.logits(hidden)  # [B, Vd]
        if temperatures is None or temperatures.all_greedy:
            best = argmax(logits)
        else:
            q = distribution(logits, temperatures)
            best = sample(q, source)
            if ids is not None:
                q = q.new_zeros(q.shape[0], vocab_size).index_copy_(1, ids, q)
            distributions.append(q)
        tokens.append(best if ids is None else ids[best])
    proposed = torch.stack(tokens, 1)  # [B, s + 1]
    parents = torch.arange(-1, steps, device=proposed.device).expand(proposed.shape)
    return Proposal(proposed, parents, distributions=torch.stack(distributions, 1) if distributions else None)


def propose_tree(draft: ServingDraft, cache: KVCache, start: Start, plan: Plan) -> Proposal:
    """Expand `topk` nodes per step and keep the best `num_draft_tokens - 1` by cumulative score."""
    topk, steps = plan.topk, plan.num_steps
    batch, device = len(start.slots), start.hidden.device

    def expand(hidden: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """The topk best continuations of each node: scores and target ids [B, nodes, topk]."""
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
    own = torch.eye(topk, dtype=torch.bool, device=device).expand(batch, topk, topk)
    first_row = 1 + topk
    for step in range(1, steps):
        above = torch.cat([above, own], -1)  # [B, k, step * k]
        offset = (step - 1) * topk
        slots = start.slots[:, None] + torch.arange(offset, offset + topk, device=device)
        length = start.reach(offset + topk)
        hidden = draft.decode(
            beam_token,
            beam_hidden,
            cache,
            slots,
            length=length,
            positions=(start.slots + (step - 1))[:, None].expand(slots.shape),
            attention_mask=tree_mask(above, start.slots, length, start.fixed_shapes),
        )
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
    everything = torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents, 1)
    return _best(plan.num_draft_tokens, start.last_tokens, *everything)


def tree_mask(inside: Tensor, starts: Tensor, length: int, fixed_shapes: bool = False) -> Tensor:
    """Attention mask [B, q, length] bool: `inside [B, q, m] bool` from slot `starts [B]` on, and all slots before.

    With `fixed_shapes`, the padding rows of a batch may start beyond `length`; they attend to everything.
    """
    batch, queries, width = inside.shape
    before = torch.arange(length, device=inside.device) < starts[:, None]  # [B, length]
    mask = before[:, None].repeat(1, queries, 1)
    columns = starts[:, None] + torch.arange(width, device=inside.device)
    if fixed_shapes:
        columns.clamp_(max=length - 1)
    return mask.scatter_(2, columns[:, None].expand(batch, queries, width), inside)


def _best(nodes: int, last_tokens: Tensor, scores: Tensor, tokens: Tensor, parents: Tensor) -> Proposal:
    """Keep the best `nodes - 1` of all drafted nodes [B, N]; the score of a parent is never below that of its child."""
    batch, device = len(last_tokens), last_tokens.device
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, : nodes - 1]
    rows = order.sort(-1).values + 1  # rows of the full tree, level by level: parents before children
    zero = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    kept = torch.cat([zero, rows], 1)  # [B, n]
    renamed = torch.zeros(batch, scores.shape[1] + 1, dtype=torch.int64, device=device)
    renamed.scatter_(1, kept, torch.arange(nodes, device=device).expand(batch, nodes))
    parent = renamed.gather(1, parents.gather(1, rows - 1))  # [B, n - 1]
    parent = torch.cat([zero - 1, parent], 1)
    mask = torch.eye(nodes, dtype=torch.bool, device=device).repeat(batch, 1, 1)
    every = torch.arange(batch, device=device)
    for node in range(1, nodes):
        mask[:, node] |= mask[every, parent[:, node]]
    return Proposal(torch.cat([last_tokens[:, None], tokens.gather(1, rows - 1)], 1), parent, mask)
