"""Losses of a draft: losses of single tokens, mixtures of them, and losses of a whole chain.

Notation: p is the target's distribution, q the draft's, both at one temperature; α = Σ_v min(p_v, q_v) is the
probability that a draft sampled from q is accepted (Leviathan et al., 2023, arXiv:2211.17192, corollary 3.6); P_k is
the probability that the first k drafts are accepted. A loss of single tokens returns [N] from

    logq  [N, Vd]  log q, over the draft's vocabulary, with gradients
    p     [N, Vd]  p on the same tokens, not normalised: its sum is the mass in the draft's vocabulary
    token [N]      int64, the next token as a draft id; -1: not in the draft's vocabulary

q is 0 outside the draft's vocabulary. Total variation, LK and accept length count the mass of p there as rejected.
KL(p‖q) would be infinite, so its sum is over the draft's vocabulary only; `next_token`, its one-sample form, ignores
other tokens. KL(q‖p) changes only by a constant if p is normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specrl.core.checks import require, require_known
from specrl.core.interfaces import PlanCost

_FLOOR = 1e-8  # of p inside a logarithm: an impossible token costs 18 nats, not infinity
_TINY = 1e-30  # lower bound of α inside a logarithm, and of divisors


def acceptance(q: Tensor, p: Tensor) -> Tensor:
    """Return α = Σ_v min(p_v, q_v) [N] of q, p [N, Vd]."""
    return torch.minimum(p, q).sum(-1)


def forward_kl(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """-Σ p log q = KL(p‖q) + H(p); the target's entropy H(p) does not depend on the draft."""
    return -(p * logq).sum(-1)


def reverse_kl(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q - log p), p floored at 1e-8."""
    return (logq.exp() * (logq - p.clamp_min(_FLOOR).log())).sum(-1)


def next_token(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """-log q(x) of the next token x; 0 if it is not in the draft's vocabulary."""
    known = token >= 0
    return -logq.gather(-1, token.clamp_min(0)[:, None])[:, 0] * known


def total_variation(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """TV(p, q) = ½ Σ |p - q| over the target's vocabulary = 1 - α."""
    return 1.0 - acceptance(logq.exp(), p)


def lk(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """-log α (LK losses, arXiv:2602.23881): its gradient is that of total variation divided by α."""
    return -acceptance(logq.exp(), p).clamp_min(_TINY).log()


SLOT_LOSSES = {loss.__name__: loss for loss in (forward_kl, reverse_kl, next_token, total_variation, lk)}
CHAIN_LOSSES = ("accept_length", "seconds_saved")


class Mixture(NamedTuple):
    """Weights of the losses by name: of losses of single tokens (`slot`), and of losses of a whole chain."""

    slot: dict[str, float]
    chain: dict[str, float]

    def __call__(self, logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
        """Return the weighted sum of the losses of single tokens: [N]."""
        return torch.stack([w * SLOT_LOSSES[name](logq, p, token) for name, w in self.slot.items()]).sum(0)


def parse_loss(text: str) -> Mixture:
    """Parse 'forward_kl' or 'forward_kl:0.7+lk:0.3'; weights are 1 unless given, and are not normalised.

    Raises:
        ValueError: an unknown name, one named twice, or a weight that is not finite and above 0.
    """
    mixture = Mixture({}, {})
    for part in text.split("+"):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        require_known("learner.loss", name, [*SLOT_LOSSES, *CHAIN_LOSSES], ", or a mixture such as 'lk:0.3+…'")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        weights = mixture.slot if name in SLOT_LOSSES else mixture.chain
        valid = 0.0 < weight < math.inf and name not in weights
        require(valid, "learner.loss", "losses that appear once, with finite weights above 0", text)
        weights[name] = weight
    return mixture


def top_k_of(p: Tensor, k: int) -> Tensor:
    """Normalise the k most likely tokens of p [N, Vd], and set the others to 0."""
    best = p.topk(min(k, p.shape[-1]), -1)
    truncated = torch.zeros_like(p).scatter_(-1, best.indices, best.values)
    return truncated / truncated.sum(-1, keepdim=True).clamp_min(_TINY)


class Step(NamedTuple):
    """One draft of a chain along the target's own tokens; both fields have one shape and values in [0, 1]."""

    matched: Tensor  # probability that the target's next token was drafted and accepted
    accepted: Tensor  # probability that the draft is accepted, whatever it is


MakeStep = Callable[[Tensor, Tensor, Tensor], Step]
"""A step from q, p [N, Vd] and the next tokens [N] int64, as draft ids (-1: not in the draft's vocabulary)."""


def sampled_step(q: Tensor, p: Tensor, token: Tensor) -> Step:
    """Return the step of a draft sampled from q, with rejection sampling: min(1, q(x) / p(x)) and α, exactly."""
    index = token.clamp_min(0)[:, None]
    q_token, p_token = q.gather(-1, index)[:, 0], p.gather(-1, index)[:, 0]
    possible = (token >= 0) & (p_token > _TINY)  # the token may come from another temperature, where p is 0
    matched = (q_token / torch.where(possible, p_token, 1.0)).clamp_max(1.0) * possible
    return Step(matched, acceptance(q, p))


def greedy_step(q: Tensor, p: Tensor, token: Tensor, sharpness: float = math.inf) -> Step:
    """Return the step of the draft's most likely token d, accepted if the target chooses it: 1[x = d] and p(d).

    A finite sharpness β gives a differentiable surrogate that converges to these values: a draft sampled from
    s = q^β / Σ q^β and accepted if the target chooses it, s(x) and Σ s p.
    """
    if sharpness == math.inf:
        s = torch.zeros_like(q).scatter_(-1, q.argmax(-1, keepdim=True), 1.0)
    else:
        s = torch.softmax(sharpness * q.clamp_min(_TINY).log(), -1)
    return Step(s.gather(-1, token.clamp_min(0)[:, None])[:, 0] * (token >= 0), (s * p).sum(-1))


def survival(steps: Sequence[Step], starts: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums over starting slots of estimates of P_k, and the number of estimates: [B, K] and [B, K].

    P_k = Σ_x Π_{i≤k} min(p_i, q_i)(x_i) = E_{x~p}[Π_{i<k} min(1, q_i(x_i) / p_i(x_i)) · α_k]. Draft i of the chain
    that starts at slot s is step i - 1 of the training-time test at slot s + i - 1. The mean is unbiased if the tokens
    were sampled from p, at the temperature of p. The product of the α_i along the path is biased: for p = (.5, .5),
    q = (.9, .1), α_2 = (1, 0) it is .3, but P_2 is .5.

    Args:
        steps: steps 0 .. K - 1 of the training-time test, each [B, T].
        starts: [B, T] bool, slots where a chain may start: their next token was sampled from p.
        inside: [B, T] bool, not padding; padding is on the right.
    """
    reach, valid = starts.to(steps[0].accepted.dtype), starts & inside
    sums, counts = [], []
    for step in steps:
        sums.append(torch.where(valid, reach * step.accepted, 0.0).sum(-1))
        counts.append(valid.sum(-1))
        # The next draft is one slot later.
        reach = torch.nn.functional.pad((reach * step.matched)[:, :-1], (1, 0))
        valid = torch.nn.functional.pad(valid[:, :-1], (1, 0)) & inside
    return torch.stack(sums, -1), torch.stack(counts, -1)


def accept_length(survived: Tensor, num_steps: int) -> Tensor:
    """Return E[τ] = 1 + Σ_{k ≤ num_steps} P_k of `survived [K]`; P_k is 0 beyond K."""
    return 1.0 + survived[:num_steps].sum()


def seconds_saved(survived: Tensor, costs: Sequence[PlanCost], *, speedup: float = 1.0) -> Tensor:
    """Return Σ_B share · (t0(B) · E[τ] - λ · T(B, plan)) ÷ Σ_B share · t0(B): plain decoding steps saved per round.

    Each batch size runs the plan with the largest term. T does not depend on the draft's weights, so by the envelope
    theorem the gradient is that of this plan's E[τ]; it is zero if the plan is 0, as for an untrained draft. Start with
    another loss then, or use a mixture. λ = 1 gives seconds saved per round, which favours long rounds; with λ = the
    speedup of the run, ΣN·t0/B ÷ ΣΔt, maximising it maximises the speedup (Dinkelbach, 1967).

    Args:
        survived: [K], P_k.
        costs: of the plans at each batch size; its share is the sum of the shares of its plans.
        speedup: λ.

    Raises:
        ValueError: no costs, or none with a share.
    """
    plain_s = sum(cost.share * cost.plain_s for cost in costs)
    require(plain_s > 0, "costs", "those of a plan with a share above 0", list(costs))
    total = torch.zeros((), dtype=survived.dtype)
    for batch in dict.fromkeys(cost.batch_size for cost in costs):
        of_batch = [cost for cost in costs if cost.batch_size == batch]
        saved = [cost.plain_s * accept_length(survived, cost.num_steps) - speedup * cost.round_s for cost in of_batch]
        total = total + sum(cost.share for cost in of_batch) * torch.stack(saved).max()
    return total / plain_s
