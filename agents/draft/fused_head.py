"""The draft's head and its losses, with the logits of one block of slots at a time in memory.

The logits of a block are replaced by the gradient of the loss, piece by piece, and multiplied into the gradients of the
states and of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from specrl.agents.draft.losses import MakeStep, Mixture, Step, acceptance, top_k_of

BLOCK = 1 << 26  # numbers of one block of logits: 128 MiB in bfloat16
PIECE = 1 << 20  # numbers of one piece in float32: 4 MiB, about a processor's cache; about ten exist at a time


@dataclass(frozen=True, slots=True)
class Targets:
    """The target's distributions at M slots, on the draft's vocabulary: p = mass · softmax(logits / temperature)."""

    logits: Tensor  # [M, Vd], as in the traces
    mass: Tensor  # [M, 1] float32, the target's probability of the draft's vocabulary
    temperature: Tensor  # [M, 1] float32, above 0
    tokens: Tensor  # [M] int64, the next token as a draft id; -1: not in the draft's vocabulary, or not known
    top_k: int | None = None  # number of most likely tokens to which p is restricted; None: all

    def p(self, slots: Tensor) -> Tensor:
        """Compute p [n, Vd] float32 at `slots [n]`."""
        scores = self.logits.index_select(0, slots).float().div_(self.temperature[slots])
        p = torch.softmax(scores, -1).mul_(self.mass[slots])
        return p if self.top_k is None else top_k_of(p, self.top_k)


def make_targets(
    logits: Sequence[Tensor],
    temperatures: Sequence[float],
    next_tokens: Sequence[Tensor],
    target_ids: Tensor | None,
    top_k: int | None = None,
) -> Targets:
    """Concatenate the targets of several sequences, with logits [n, V] and a temperature for each.

    Args:
        next_tokens: [n] int64 target ids for each sequence, -1 where they are not known.
        target_ids: [Vd] int64, the target id of each draft id; None: they are the same.
    """
    temperature = torch.cat([torch.full((len(x), 1), float(t)) for x, t in zip(logits, temperatures, strict=True)])
    tokens = torch.cat(list(next_tokens))
    if target_ids is None:
        joined = logits[0] if len(logits) == 1 else torch.cat(list(logits))
        return Targets(joined, torch.ones_like(temperature), temperature, tokens, top_k)
    draft_ids = torch.full((logits[0].shape[-1],), -1).scatter_(0, target_ids, torch.arange(len(target_ids)))
    tokens = torch.where(tokens >= 0, draft_ids[tokens.clamp_min(0)], tokens)
    parts = [x.index_select(-1, target_ids) for x in logits]
    triples = zip(logits, parts, temperatures, strict=True)
    mass = torch.cat([(_log_norm(y, t) - _log_norm(x, t)).exp_() for x, y, t in triples])
    joined = torch.cat(parts)
    joined[mass[:, 0] == 0] = 0.0  # any finite distribution; its mass is 0
    return Targets(joined, mass, temperature, tokens, top_k)


def _log_norm(logits: Tensor, temperature: float) -> Tensor:
    """Return log Σ exp(logits / temperature) in float32: [n, V] -> [n, 1]."""
    parts = logits.split(max(1, PIECE // logits.shape[-1]))
    return torch.cat([(part.float() / temperature).logsumexp(-1, keepdim=True) for part in parts])


class FusedHead:
    """The draft's head, `weight` [Vd, H] float32, with products in `dtype`, and the sum of its losses."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.cast = weight.to(dtype)  # with gradients
        self._weight, self._grad = weight, torch.zeros_like(weight)
        self._loss = torch.zeros(())
        self._outputs: list[tuple[Tensor, Tensor | None]] = []  # with their gradients

    @cached_property
    def _transposed(self) -> Tensor:
        return self.cast.detach().t().contiguous()  # [H, Vd], for faster products

    def add_token_losses(
        self, rows: Tensor, targets: Targets, slots: Tensor, mixture: Mixture, weight: float
    ) -> Tensor:
        """Add weight · Σ_n loss(softmax(rows · headᵀ / temperature), p); return the mean α [].

        Args:
            rows: [N, H] states, N at least 1.
            targets, slots: the target's distributions, and the slot [N] int64 of each row in them.
            mixture: of losses of single tokens.
            weight: of each row.
        """
        head, vocab_size = self.cast.detach(), len(self.cast)
        x, grad_rows = rows.detach().to(head.dtype), torch.empty_like(rows)
        loss_and_alpha = torch.zeros(2)
        size, piece = max(1, BLOCK // vocab_size), max(1, PIECE // vocab_size)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(rows), size):
                block = slice(start, start + size)
                grad = F.linear(x[block], head)  # [n, Vd], the logits, which are replaced by their gradient below
                for part, here in zip(grad.split(piece), slots[block].split(piece), strict=True):
                    temperature, p, token = targets.temperature[here], targets.p(here), targets.tokens[here]
                    sums, part_grad = _token_losses(part.float() / temperature, p, token, mixture)
                    loss_and_alpha += sums
                    part.copy_(part_grad.mul_(weight / temperature))
                grad_rows[block] = F.linear(grad, self._transposed)
                _add_product(self._grad, grad, x[block])
        self._loss += loss_and_alpha[0] * weight
        self._outputs.append((rows, grad_rows))
        return loss_and_alpha[1] / len(rows)

    def add_loss(self, loss: Tensor) -> None:
        """Add a loss [] with a graph."""
        self._loss += loss.detach()
        self._outputs.append((loss, None))

    def backward(self) -> float:
        """Add the gradients of all losses to those of the parameters of the draft; return the sum of the losses."""
        outputs, grads = zip(*self._outputs, strict=True)
        torch.autograd.backward(list(outputs), list(grads))
        self._weight.grad = self._grad if self._weight.grad is None else self._weight.grad.add_(self._grad)
        return float(self._loss)


def _token_losses(scores: Tensor, p: Tensor, token: Tensor, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """Return Σ loss and Σ α of q = softmax(scores) [2], and the gradient of the former by `scores` [n, Vd]."""
    if mixture.slot == {"forward_kl": 1.0}:  # has the gradient q Σ p - p, which is computed in place
        q, mass = torch.softmax(scores, -1), p.sum(-1, keepdim=True)
        log_norm = scores.amax(-1, keepdim=True) - q.amax(-1, keepdim=True).log()
        loss = (mass * log_norm).sum() - scores.mul_(p).sum()
        return torch.stack([loss, acceptance(q, p).sum()]), q.mul_(mass).sub_(p)
    with torch.enable_grad():
        logq = torch.log_softmax(scores.requires_grad_(), -1)
        loss = mixture(logq, p, token).sum()
    (grad,) = torch.autograd.grad(loss, scores)
    return torch.stack([loss.detach(), acceptance(logq.detach().exp(), p).sum()]), grad


def _add_product(grad_head: Tensor, grad: Tensor, x: Tensor) -> None:
    """Add gradᵀ · x to `grad_head`, without a second [Vd, H] if the dtypes differ."""
    if grad.dtype == grad_head.dtype:
        grad_head.addmm_(grad.t(), x)
        return
    size = max(1, 2 * PIECE // x.shape[-1])
    for start in range(0, len(grad_head), size):
        grad_head[start : start + size] += grad[:, start : start + size].t() @ x


def head_steps(rows: Tensor, head: Tensor, targets: Targets, slots: Tensor, make_step: MakeStep) -> Step:
    """Return each row as a step of a chain (see `losses.survival`); the backward pass recomputes the logits.

    `rows` [N, H], `targets` and `slots` are those of `FusedHead.add_token_losses`; `head` [Vd, H] has the dtype of the
    products.
    """

    def step(rows: Tensor, head: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(rows.device.type, enabled=False):
            logits = F.linear(rows.to(head.dtype), head).float()
            q = torch.softmax(logits / targets.temperature[here], -1)
            return make_step(q, targets.p(here), targets.tokens[here])

    size = max(1, BLOCK // 4 // head.shape[0])
    steps = [
        checkpoint(step, x, head, here, use_reentrant=False)
        for x, here in zip(rows.split(size), slots.split(size), strict=True)
    ]
    return Step(*(torch.cat(list(parts)) for parts in zip(*steps, strict=True)))
