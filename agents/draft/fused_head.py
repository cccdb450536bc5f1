"""The draft's head and its loss in one function, without the logits of more than a block of slots in memory.

The logits of a block are computed, replaced by the gradient of the loss in pieces that fit into the cache, and
multiplied into the gradients of the states and of the head. Besides the two gradients, the peak memory is `BLOCK`
numbers of the product dtype and about ten times `PIECE` float32 numbers, for any vocabulary and number of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specrl.agents.draft.losses import Mixture, Step, acceptance, greedy_step, sampled_step, top_k_of

BLOCK = 1 << 26  # numbers of one block of logits: 128 MiB in bfloat16
PIECE = 1 << 20  # numbers of one piece in float32: 4 MiB, about the size of a processor's cache
SHARPNESS = 4.0  # of the surrogate for greedy drafts, see `losses.greedy_step`


@dataclass(frozen=True, slots=True)
class Targets:
    """The target's distributions p at M slots, on the draft's vocabulary; p is computed when it is needed.

    p = mass · softmax(logits / temperature). It sums to less than 1 if the draft's vocabulary lacks likely tokens.
    """

    logits: Tensor  # [M, Vd], as in the traces
    mass: Tensor  # [M, 1] float32, the target's probability of the draft's vocabulary
    temperature: Tensor  # [M, 1] float32, above 0
    tokens: Tensor  # [M] int64, the next token as a draft id; -1: not in the draft's vocabulary, or not known
    top_k: int | None = None  # keep the most likely tokens only

    def p(self, slots: Tensor) -> Tensor:
        """[n, Vd] float32 at `slots [n]`."""
        scores = self.logits.index_select(0, slots).float().div_(self.temperature[slots])
        p = torch.softmax(scores, -1).mul_(self.mass[slots])
        return p if self.top_k is None else top_k_of(p, self.top_k)


def make_targets(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    next_tokens: Sequence[Tensor],
    draft_ids: Tensor | None,
    target_ids: Tensor | None,
    top_k: int | None = None,
) -> Targets:
    """Targets of several sequences, concatenated.

    Args:
        logits: [n, V] for each sequence.
        temperatures: one for each sequence.
        next_tokens: [n] int64 target ids for each sequence, -1 where they are not known.
        draft_ids: [V] int64, the draft id of each target id, -1 if it has none; None: they are the same.
        target_ids: [Vd] int64, the target id of each draft id; None: they are the same.
        top_k: see `Targets`.
    """
    temperature = torch.cat([torch.full((len(x), 1), float(t)) for x, t in zip(logits, temperatures, strict=True)])
    tokens = torch.cat(list(next_tokens))
    if draft_ids is not None:
        tokens = torch.where(tokens >= 0, draft_ids[tokens.clamp_min(0)], tokens)
    if target_ids is None:
        kept, mass = list(logits), torch.ones_like(temperature)
    else:
        kept = [x.index_select(-1, target_ids) for x in logits]
        pairs = zip(logits, kept, temperatures, strict=True)
        mass = torch.cat([(_log_norm(y, t) - _log_norm(x, t)).exp_() for x, y, t in pairs])
        for y, none in zip(kept, (mass == 0).split([len(y) for y in kept]), strict=True):
            if bool(none.any()):
                y.masked_fill_(none, 0.0)  # any finite distribution; its mass is 0
    return Targets(kept[0] if len(kept) == 1 else torch.cat(kept), mass, temperature, tokens, top_k)


def _log_norm(logits: Tensor, temperature: float) -> Tensor:
    """log Σ exp(logits / temperature) in float32: [n, V] -> [n, 1]."""
    parts = logits.split(max(1, PIECE // logits.shape[-1]))
    return torch.cat([(part.float() / temperature).logsumexp(-1, keepdim=True) for part in parts])


class HeadLoss(NamedTuple):
    """The result of `head_loss`."""

    loss: Tensor  # [], weight · Σ of the losses
    alpha: Tensor  # [], mean α
    grad_rows: Tensor  # [N, H], the gradient of `loss` with respect to `rows`


def head_loss(
    rows: Tensor,
    head: Tensor,
    targets: Targets,
    slots: Tensor,
    mixture: Mixture,
    weight: float,
    grad_head: Tensor,
    head_t: Tensor | None = None,
) -> HeadLoss:
    """weight · Σ_n loss(softmax(rows · headᵀ / temperature), p), and its gradients.

    Args:
        rows: [N, H] states without gradients, N at least 1.
        head: [Vd, H] without gradients, in the dtype of the products.
        targets: the target's distributions.
        slots: [N] int64, the slot of `targets` for each row.
        mixture: of losses of single tokens.
        weight: of each row.
        grad_head: [Vd, H] float32; the gradient of the head is added to it.
        head_t: [H, Vd] contiguous, the transposed head; it makes the product faster if the head is used more than once.
    """
    head_t = head.t() if head_t is None else head_t
    vocab_size = head.shape[0]
    loss, alpha = torch.zeros(()), torch.zeros(())
    grad_rows, x = torch.empty_like(rows), rows.to(head.dtype)
    size, piece = max(1, BLOCK // vocab_size), max(1, PIECE // vocab_size)
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), size):
            block = slice(start, start + size)
            grad = F.linear(x[block], head)  # [n, Vd], the logits, which are replaced by their gradient below
            for part, here in zip(grad.split(piece), slots[block].split(piece), strict=True):
                temperature = targets.temperature[here]
                found = _token_losses(part.float() / temperature, targets.p(here), targets.tokens[here], mixture)
                loss += found.loss
                alpha += found.alpha
                part.copy_(found.grad.mul_(weight / temperature))
            grad_rows[block] = F.linear(grad, head_t)
            _add_product(grad_head, grad, x[block])
    return HeadLoss(loss * weight, alpha / len(rows), grad_rows)


class _TokenLosses(NamedTuple):
    """The losses of a piece."""

    loss: Tensor  # [], the sum
    alpha: Tensor  # [], Σ α
    grad: Tensor  # [n, Vd], the gradient of `loss` with respect to the scores


def _token_losses(scores: Tensor, p: Tensor, token: Tensor, mixture: Mixture) -> _TokenLosses:
    """The losses of q = softmax(scores). Forward KL alone has the gradient q Σ p - p, which is computed in place."""
    if mixture.slot == {"forward_kl": 1.0}:
        q, mass = torch.softmax(scores, -1), p.sum(-1, keepdim=True)
        log_norm = scores.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()
        loss = (mass * log_norm).sum() - scores.mul_(p).sum()
        return _TokenLosses(loss, acceptance(q, p).sum(), q.mul_(mass).sub_(p))
    with torch.enable_grad():
        logq = torch.log_softmax(scores.requires_grad_(), -1)
        total = mixture(logq, p, token).sum()
    (grad,) = torch.autograd.grad(total, scores)
    return _TokenLosses(total.detach(), acceptance(logq.detach().exp(), p).sum(), grad)


def _add_product(grad_head: Tensor, grad: Tensor, x: Tensor) -> None:
    """grad_head += gradᵀ · x, without a second [Vd, H] if the dtypes differ."""
    if grad.dtype == grad_head.dtype:
        grad_head.addmm_(grad.t(), x)
        return
    size = max(1, 2 * PIECE // x.shape[-1])
    for start in range(0, len(grad_head), size):
        grad_head[start : start + size] += grad[:, start : start + size].t() @ x


def head_steps(
    rows: Tensor, head: Tensor, targets: Targets, slots: Tensor, sampled: bool, sharpness: float = SHARPNESS
) -> Step:
    """Each row as a step of a chain (see `losses.survival`), with gradients; the backward pass recomputes logits.

    Args:
        rows: [N, H].
        head: [Vd, H] in the dtype of the products.
        targets, slots: as in `head_loss`.
        sampled: drafts are sampled and accepted by rejection sampling; otherwise they are the draft's best tokens,
        sharpness: or, if this is finite, their surrogate.
    """

    def step(rows: Tensor, head: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(head.dtype), head).float()
            q, p, token = torch.softmax(logits / targets.temperature[here], -1), targets.p(here), targets.tokens[here]
            return sampled_step(q, p, token) if sampled else greedy_step(q, p, token, sharpness)

    size = max(1, BLOCK // 4 // head.shape[0])
    steps = [
        checkpoint(step, x, head, here, use_reentrant=False)
        for x, here in zip(rows.split(size), slots.split(size), strict=True)
    ]
    return Step(*(torch.cat(list(parts)) for parts in zip(*steps, strict=True)))
