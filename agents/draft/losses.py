"""What a draft may minimise: losses of one slot, mixtures of them, and the accept length of a whole chain.

Letters: p the target's distribution, q the draft's, both at one temperature; α = Σ_v min(p_v, q_v) the odds that a
draft sampled from q stands (Leviathan et al., 2023, arXiv:2211.17192, corollary 3.6); P_k the odds that the first k
stand. A loss of one slot takes

    logq  [N, Vd]  log q, over the draft's vocabulary, with gradients
    p     [N, Vd]  p on the same tokens, not normalised anew: its sum is the mass that the draft can say
    token [N]      int64, what came next, as a draft id; -1: outside the draft's vocabulary

and gives [N]. **Mass outside the draft's vocabulary**, where q is 0: total variation, LK and accept length count it
as lost, which it is. KL(p‖q) would be infinite, so its sum is over the draft's vocabulary alone, as if p were
normalised there and the slot weighted by the mass inside; the next token's cross-entropy is its one-sample form and
leaves such tokens out. KL(q‖p) differs by a constant, whether p is normalised anew or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SlotLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
_FLOOR = 1e-8  # of p inside a logarithm: a token that the target never says costs 18 nats, not infinity
_TINY = 1e-30  # of α inside a logarithm, and of p to divide by


def acceptance(q: Tensor, p: Tensor) -> Tensor:
    """α = Σ_v min(p_v, q_v): q, p [N, Vd] -> [N]."""
    return torch.minimum(p, q).sum(-1)


def forward_kl(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """-Σ p log q = KL(p‖q) + H(p): the target's entropy, which no weight of the draft changes, is left in."""
    return -(p * logq).sum(-1)


def reverse_kl(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """KL(q‖p) = Σ q (log q - log p), p floored at 1e-8."""
    return (logq.exp() * (logq - p.clamp_min(_FLOOR).log())).sum(-1)


def next_token(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """-log q(x) of the token x that came next; 0 where it is outside the draft's vocabulary."""
    known = token >= 0
    return -logq.gather(-1, token.clamp_min(0)[:, None])[:, 0] * known


def total_variation(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """TV(p, q) = ½ Σ |p - q| over the target's whole vocabulary = 1 - α."""
    return 1.0 - acceptance(logq.exp(), p)


def lk(logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
    """-log α (LK losses, arXiv:2602.23881): total variation, with the gradient divided by α."""
    return -acceptance(logq.exp(), p).clamp_min(_TINY).log()


SLOT_LOSSES: dict[str, SlotLoss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "next_token": next_token,
    "total_variation": total_variation,
    "lk": lk,
}
CHAIN_LOSSES = ("accept_length", "seconds_saved")


class Mixture(NamedTuple):
    """Weights of the losses by name; a chain's are of the whole training-time test, not of a slot."""

    slot: dict[str, float]
    chain: dict[str, float]

    def __call__(self, logq: Tensor, p: Tensor, token: Tensor) -> Tensor:
        """The weighted sum of the slot losses: [N]."""
        (name, weight), *rest = self.slot.items()
        total = SLOT_LOSSES[name](logq, p, token)
        total = total if weight == 1.0 else weight * total
        for name, weight in rest:
            total = total + weight * SLOT_LOSSES[name](logq, p, token)
        return total


def parse_loss(text: str) -> Mixture:
    """Read 'forward_kl' or 'forward_kl:0.7+lk:0.3' (weights are 1 unless given, and used as they are).

    Raises:
        ValueError: an unknown name, one named twice, or a weight that is not finite and above 0.
    """
    weights: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, number = (piece.strip() for piece in part.partition(":"))
        if name not in SLOT_LOSSES and name not in CHAIN_LOSSES:
            known = ", ".join([*SLOT_LOSSES, *CHAIN_LOSSES])
            raise ValueError(f"a loss must be one of {known}, or some with weights as 'lk:0.3+…', but got {text!r}")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = math.nan
        if not 0.0 < weight < math.inf or name in weights:
            raise ValueError(
                f"a loss must be named once and have a finite weight above 0, but got {part!r} in {text!r}"
            )
        weights[name] = weight
    slot = {name: weight for name, weight in weights.items() if name in SLOT_LOSSES}
    return Mixture(slot, {name: weight for name, weight in weights.items() if name in CHAIN_LOSSES})


def top_k_of(p: Tensor, k: int) -> Tensor:
    """The k most likely tokens of p [N, Vd], normalised anew, the rest 0: what is learnt after a rejected token."""
    best = p.topk(min(k, p.shape[-1]), -1)
    kept = torch.zeros_like(p).scatter_(-1, best.indices, best.values)
    return kept / kept.sum(-1, keepdim=True).clamp_min(_TINY)


class Step(NamedTuple):
    """One draft of a chain, on the path that the target took; both of one shape, in [0, 1]."""

    stands: Tensor  # the odds, given that the target's x came next, that x was drafted and accepted (see `survival`)
    accepted: Tensor  # the odds that whatever is drafted here is accepted


def sampled_step(q: Tensor, p: Tensor, token: Tensor) -> Step:
    """A draft sampled from q under rejection sampling, exactly: min(1, q(x) / p(x)) and α.

    Args:
        q, p: [N, Vd] probabilities.
        token: [N] int64 draft ids, -1 outside.
    """
    at = token.clamp_min(0)[:, None]
    ours, theirs = q.gather(-1, at)[:, 0], p.gather(-1, at)[:, 0]
    can = (token >= 0) & (theirs > _TINY)  # less is a token of another temperature: 1 / p would not be finite
    stands = (ours / torch.where(can, theirs, 1.0)).clamp_max(1.0) * can
    return Step(stands, acceptance(q, p))


def greedy_step(q: Tensor, p: Tensor, token: Tensor, sharpness: float = math.inf) -> Step:
    """The draft's best token d under target-only acceptance: 1[x = d] and p(d), exactly, at infinite sharpness.

    A finite sharpness β is the differentiable surrogate: a draft sampled from s = q^β / Σ q^β and accepted where the
    target itself chooses it, s(x) and Σ s p. It is the exact value for such drafts, and tends to that of d as β grows.
    """
    if sharpness == math.inf:
        s = torch.zeros_like(q).scatter_(-1, q.argmax(-1, keepdim=True), 1.0)
    else:
        s = torch.softmax(sharpness * q.clamp_min(_TINY).log(), -1)
    return Step(s.gather(-1, token.clamp_min(0)[:, None])[:, 0] * (token >= 0), (s * p).sum(-1))


def survival(steps: Sequence[Step], starts: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over the starting slots of each request of the estimates of P_k, and their number: [B, K] and [B, K].

    P_k = Σ_x Π_{i≤k} min(p_i, q_i)(x_i) = E_{x~p}[Π_{i<k} min(1, q_i(x_i) / p_i(x_i)) · α_k]. Draft i of the chain
    that starts at slot s is pass i - 1 of the training-time test at slot s + i - 1. The mean is unbiased where the
    tokens were sampled from p, at the temperature of p. The product of the α_i along that path is not: for
    p = (.5, .5), q = (.9, .1), α_2 = (1, 0) it is .3, and P_2 is .5.

    Args:
        steps: of pass 0 .. K - 1, each [B, T].
        starts: [B, T] bool, slots from which a chain may start: their next token was sampled from p.
        inside: [B, T] bool, slots that p and q are of; padding, on the right, is outside.
    """
    reach, valid = starts.to(steps[0].accepted.dtype), starts & inside
    sums, counts = [], []
    for k, step in enumerate(steps):
        if k:
            reach, valid = _later(reach * steps[k - 1].stands), _later(valid) & inside
        sums.append(torch.where(valid, reach * step.accepted, 0.0).sum(-1))
        counts.append(valid.sum(-1))
    return torch.stack(sums, -1), torch.stack(counts, -1)


def _later(x: Tensor) -> Tensor:
    """[B, T] moved one slot later, zeros before."""
    return torch.nn.functional.pad(x[:, :-1], (1, 0))


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a chain of `num_steps` costs at a batch size, and how often the traffic is there.

    Args:
        batch_size: live requests.
        num_steps: of the plan; 0 proposes nothing.
        plain_s: t₀(B), seconds of a plain round without any draft.
        round_s: T(B, plan), seconds of a round.
        share: of the rounds that run this plan at this batch size; any scale.

    Raises:
        ValueError: a number out of range.
    """

    batch_size: int
    num_steps: int
    plain_s: float
    round_s: float
    share: float = 1.0

    def __post_init__(self) -> None:
        good = all(math.isfinite(x) and x > 0 for x in (self.plain_s, self.round_s)) and 0 <= self.share < math.inf
        if not good or self.batch_size < 1 or self.num_steps < 0:
            raise ValueError(
                f"a plan's cost needs seconds above 0 and counts and a share of at least 0, but got {self}"
            )


def accept_length(survived: Tensor, num_steps: int) -> Tensor:
    """E[τ] = 1 + Σ_{k ≤ num_steps} P_k of `survived [K]`; steps beyond K count as never reached."""
    return 1.0 + survived[:num_steps].sum()


def seconds_saved(survived: Tensor, costs: Sequence[PlanCost], *, speedup: float = 1.0, best: bool = True) -> Tensor:
    """Σ_B share · (t₀(B) · E[τ] - λ · T(B, plan)) ÷ Σ_B share · t₀(B): plain rounds saved per round.

    T does not depend on the draft's weights: at fixed plans the clock enters through the weights of the P_k alone.
    With `best`, each batch size runs the plan of its greatest term, and by the envelope theorem the gradient is that
    at this plan. λ = 1 gives seconds saved per round, which favours long rounds; λ = the run's own speedup
    ΣN·t₀/B ÷ ΣΔt makes it the objective itself (Dinkelbach, 1967).

    Where plan 0 is the best one, as it is while a draft is random, the gradient with `best` is zero: such a draft
    learns nothing. Begin with another loss, mix one in, or leave `best` off.

    Args:
        survived: [K], P_k.
        costs: of the plans on offer at each batch size; with `best`, a batch size weighs what its plans do together.
        speedup: λ.
        best: the best plan of each batch size; else each plan by its own share.

    Raises:
        ValueError: no costs, or none with a share.
    """
    whole = sum(cost.share * cost.plain_s for cost in costs)
    if not whole > 0:
        raise ValueError(f"seconds saved need at least one plan's cost with a share above 0, but got {list(costs)}")
    total = torch.zeros((), dtype=survived.dtype)
    for batch in dict.fromkeys(cost.batch_size for cost in costs):
        here = [cost for cost in costs if cost.batch_size == batch]
        saved = [cost.plain_s * accept_length(survived, cost.num_steps) - speedup * cost.round_s for cost in here]
        if best:
            at = max(range(len(here)), key=lambda i: float(saved[i].detach()))
            total = total + sum(cost.share for cost in here) * saved[at]
        else:
            for cost, value in zip(here, saved, strict=True):
                total = total + cost.share * value
    return total / whole
