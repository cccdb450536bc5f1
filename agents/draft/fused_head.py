"""The draft's head and its loss together, without ever holding the logits of more than a block of slots.

A block's logits are made, turned into the gradient of its loss in place, a cache-sized piece at a time, and
multiplied back into the gradients of the states and of the head at once. Peak memory beside the two gradients:
`BLOCK` numbers of the product dtype and about ten times `PIECE` float32 numbers, whatever the vocabulary and the
number of slots and passes.
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specrl.agents.draft.losses import Mixture, Step, acceptance, greedy_step, sampled_step, top_k_of

BLOCK = 1 << 26  # numbers of one block of logits: 128 MiB in bfloat16
PIECE = 1 << 20  # numbers of one piece in float32: 4 MiB, about a processor's cache
SHARPNESS = 4.0  # of the surrogate for deterministic drafts, see `losses.greedy_step`


@dataclass(frozen=True, slots=True)
class Targets:
    """The target's distributions at M slots, on the draft's vocabulary, made where they are needed.

    p = mass · softmax(logits / heat): mass outside the draft's vocabulary is missing from its sum.
    """

    logits: Tensor  # [M, Vd], as the traces hold them
    mass: Tensor  # [M, 1] float32, what the target says within the draft's vocabulary at `heat`
    heat: Tensor  # [M, 1] float32, above 0
    tokens: Tensor  # [M] int64, what came next as a draft id; -1: outside, or not known
    top_k: int | None = None  # keep only the most likely tokens

    def p(self, at: Tensor) -> Tensor:
        """[n, Vd] float32 at the slots `at [n]`."""
        p = torch.softmax(self.logits.index_select(0, at).float().div_(self.heat[at]), -1).mul_(self.mass[at])
        return p if self.top_k is None else top_k_of(p, self.top_k)


def make_targets(
    logits: Many[Tensor],
    heats: Many[float],
    next_tokens: Many[Tensor],
    draft_ids: Tensor | None,
    target_ids: Tensor | None,
    top_k: int | None = None,
) -> Targets:
    """Targets of some sequences, one after the other.

    Args:
        logits: [n, V] of each sequence's slots.
        heats: temperature of each sequence.
        next_tokens: [n] int64 target ids of each, -1 where not known.
        draft_ids: [V] int64, the draft id of each target id, -1 where it has none; None: they are the same.
        target_ids: [Vd] int64, the reverse.
        top_k: see `Targets`.
    """
    heat = torch.cat([torch.full((len(x), 1), float(heat)) for x, heat in zip(logits, heats, strict=True)])
    tokens = torch.cat(list(next_tokens))
    if draft_ids is not None:
        tokens = torch.where(tokens >= 0, draft_ids[tokens.clamp_min(0)], tokens)
    if target_ids is None:
        kept, mass = list(logits), torch.ones_like(heat)
    else:
        kept = [x.index_select(-1, target_ids) for x in logits]
        pairs = zip(logits, kept, heats, strict=True)
        mass = torch.cat([(_log_norm(y, at) - _log_norm(x, at)).exp_() for x, y, at in pairs])
        for y, none in zip(kept, (mass == 0).split([len(y) for y in kept]), strict=True):
            if bool(none.any()):
                y.masked_fill_(none, 0.0)  # any distribution, none of which counts
    return Targets(kept[0] if len(kept) == 1 else torch.cat(kept), mass, heat, tokens, top_k)


def _log_norm(logits: Tensor, heat: float) -> Tensor:
    """log Σ exp(logits / heat) in float32: [n, V] -> [n, 1]."""
    parts = logits.split(max(1, PIECE // logits.shape[-1]))
    return torch.cat([(part.float() / heat).logsumexp(-1, keepdim=True) for part in parts])


class HeadLoss(NamedTuple):
    """A pass through the head."""

    loss: Tensor  # [], weight · Σ of the losses
    alpha: Tensor  # [], mean α
    of_rows: Tensor  # [N, H], the gradient of `loss`


def head_loss(
    rows: Tensor,
    head: Tensor,
    targets: Targets,
    at: Tensor,
    mixture: Mixture,
    weight: float,
    of_head: Tensor,
    turned: Tensor | None = None,
) -> HeadLoss:
    """weight · Σ_n loss(softmax(rows · headᵀ / heat), p), and its gradients, that of the head added to `of_head`.

    Args:
        rows: [N, H] states without gradients, N at least 1.
        head: [Vd, H] without gradients, in the dtype of the products.
        targets, at: what the target says, [N] int64 which of its slots the rows are.
        mixture: of slot losses.
        weight: of each slot.
        of_head: [Vd, H] float32, added to.
        turned: [H, Vd], the head with its dimensions turned round in memory, where it is read more than once: the
            product of slopes and head is faster by it.
    """
    turned = head.t() if turned is None else turned
    words = head.shape[0]
    loss, alpha = torch.zeros(()), torch.zeros(())
    of_rows, x = torch.empty_like(rows), rows.to(head.dtype)
    size, piece = max(1, BLOCK // words), max(1, PIECE // words)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            logits = F.linear(x[block], head)  # [n, Vd], from here on slowly becoming its gradient
            for part, here in zip(logits.split(piece), at[block].split(piece), strict=True):
                heat = targets.heat[here]
                found = _slot_losses(part.float() / heat, targets.p(here), targets.tokens[here], mixture)
                loss += found.loss
                alpha += found.alpha
                part.copy_(found.slope.mul_(weight / heat))
            of_rows[block] = F.linear(logits, turned)
            _add_product(of_head, logits, x[block])
    return HeadLoss(loss * weight, alpha / len(rows), of_rows)


class _SlotLosses(NamedTuple):
    """Of a piece."""

    loss: Tensor  # [], the sum
    alpha: Tensor  # [], Σ α
    slope: Tensor  # [n, Vd], the gradient of `loss` by the scores


def _slot_losses(scores: Tensor, p: Tensor, token: Tensor, mixture: Mixture) -> _SlotLosses:
    """Of q = softmax(scores); the forward KL alone, of slope q Σ p - p, in fewer passes over memory than autograd's."""
    if mixture.slot == {"forward_kl": 1.0}:
        q, mass = torch.softmax(scores, -1), p.sum(-1, keepdim=True)
        log_norm = scores.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()
        loss = (mass * log_norm).sum() - scores.mul_(p).sum()
        return _SlotLosses(loss, acceptance(q, p).sum(), q.mul_(mass).sub_(p))
    with torch.enable_grad():
        logq = torch.log_softmax(scores.requires_grad_(), -1)
        total = mixture(logq, p, token).sum()
    (slope,) = torch.autograd.grad(total, scores)
    return _SlotLosses(total.detach(), acceptance(logq.detach().exp(), p).sum(), slope)


def _add_product(of_head: Tensor, slopes: Tensor, x: Tensor) -> None:
    """of_head += slopesᵀ · x, without a second [Vd, H] where the dtypes differ."""
    if slopes.dtype == of_head.dtype:
        of_head.addmm_(slopes.t(), x)
        return
    size = max(1, 2 * PIECE // x.shape[-1])
    for start in range(0, len(of_head), size):
        of_head[start : start + size] += slopes[:, start : start + size].t() @ x


def head_steps(
    rows: Tensor, head: Tensor, targets: Targets, at: Tensor, sampled: bool, sharpness: float = SHARPNESS
) -> Step:
    """Each row as a step of a chain (see `losses.survival`), with gradients; logits are made again backwards.

    Args:
        rows: [N, H].
        head: [Vd, H] in the dtype of the products.
        targets, at: as in `head_loss`.
        sampled: drafts are sampled and rejection-sampled; else they are the draft's best token,
        sharpness: or, where this is finite, its surrogate.
    """

    def step(rows: Tensor, head: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(head.dtype), head).float()
            q, p, token = torch.softmax(logits / targets.heat[here], -1), targets.p(here), targets.tokens[here]
            return sampled_step(q, p, token) if sampled else greedy_step(q, p, token, sharpness)

    size = max(1, BLOCK // 4 // head.shape[0])
    steps = [
        checkpoint(step, x, head, here, use_reentrant=False)
        for x, here in zip(rows.split(size), at.split(size), strict=True)
    ]
    return Step(*(torch.cat(list(parts)) for parts in zip(*steps, strict=True)))
