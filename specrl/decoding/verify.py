"""Lossless acceptance: which drafts stand, and the token the target adds.

Both of SGLang's kinds. Whatever was drafted, the committed tokens are distributed as the target's own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specrl.decoding.sampling import Source, Temperatures, argmax, distribution, sample, uniform

_TINY = 1e-30  # picks the target's own distribution where the residual is numerically empty


class Accepted(NamedTuple):
    """The outcome of a verification of B requests."""

    correct: Tensor  # [B] int64, drafts accepted
    bonus: Tensor  # [B] int64, the target's own token after them


def accept_chain(chosen: Tensor, drafted: Tensor) -> Accepted:
    """Target-only acceptance of a chain: a draft stands where the target itself chose it.

    Args:
        chosen: [B, s + 1] int64, the target's token after each verified token (sampled or greedy).
        drafted: [B, s] int64; -1, where nothing was drafted, is chosen by no target.
    """
    agree = chosen[:, :-1] == drafted
    correct = agree.long().cumprod(-1).sum(-1)
    return Accepted(correct, chosen.gather(1, correct[:, None])[:, 0])


def accept_tree(chosen: list[list[int]], tokens: list[list[int]], parents: list[list[int]]) -> list[list[int]]:
    """Target-only acceptance of a tree: walk from the committed token along what the target chose.

    Args:
        chosen: per request the target's token after each of its n nodes.
        tokens: per request the n nodes' tokens, row 0 the committed one.
        parents: per request the row that each node continues, -1 for row 0.

    Returns:
        Per request the rows on the accepted path, beginning with 0.
    """
    paths = []
    for choices, nodes, above in zip(chosen, tokens, parents, strict=True):
        children = {(above[i], nodes[i]): i for i in range(len(nodes) - 1, 0, -1)}
        path = [0]
        while (following := children.get((path[-1], choices[path[-1]]))) is not None:
            path.append(following)
        paths.append(path)
    return paths


def walk_tree(chosen: Tensor, tokens: Tensor, parents: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """`accept_tree` on the device, in as many operations whatever is accepted.

    Args:
        chosen, tokens, parents: [B, n] int64, as in `accept_tree`; no two nodes of a parent have the same token.
        steps: depth of the tree.

    Returns:
        Accepted drafts [B], the target's own token after them [B], and the accepted rows [B, steps + 1], beginning
        with 0, -1 after the last; int64.
    """
    node = torch.zeros_like(tokens[:, :1])  # [B, 1]
    rows, path = torch.arange(tokens.shape[1], device=tokens.device), [node]
    going = torch.ones_like(node, dtype=torch.bool)
    for _ in range(steps):
        child = (parents == node) & (tokens == chosen.gather(1, node)) & going & (rows > 0)  # [B, n], at most one each
        going = child.any(1, keepdim=True)
        node = torch.where(going, (child * rows).sum(1, keepdim=True), node)
        path.append(torch.where(going, node, -1))
    accepted = torch.cat(path, 1)
    return (accepted[:, 1:] >= 0).sum(1), chosen.gather(1, node)[:, 0], accepted


def reject_chain(
    logits: Tensor, drafted: Tensor, proposals: Tensor, temperatures: Temperatures, source: Source
) -> Accepted:
    """Rejection sampling of a chain (Leviathan et al., 2023, algorithm 1; Chen et al., 2023).

    Draft x_i, sampled from q_i, stands with probability min(1, p_i(x_i) / q_i(x_i)); the first that falls is
    replaced by a sample of norm(max(0, p_i - q_i)), and after the last one a sample of p is added.

    Args:
        logits: [B, s + 1, V] float32, the target's.
        drafted: [B, s] int64; -1 where nothing was drafted, which falls and is replaced by a sample of p.
        proposals: [B, s, V] float32, the distributions q that the drafts were sampled from (one-hot where
            greedy, 0 where nothing was drafted).
        temperatures: of the requests.
        source: of the coins and the samples.
    """
    batch, steps = drafted.shape
    if temperatures.all_greedy:
        return accept_chain(argmax(logits), drafted)
    p = distribution(logits, temperatures)
    index = drafted.clamp(min=0)[..., None]
    coins = uniform((batch, steps), source, logits.device)
    stands = coins * proposals.gather(-1, index)[..., 0] < p[:, :-1].gather(-1, index)[..., 0]
    stands &= drafted >= 0
    correct = stands.long().cumprod(-1).sum(-1)
    rows = torch.arange(batch, device=logits.device)
    ours = p[rows, correct]  # [B, V]
    fell = (correct < steps)[:, None]
    theirs = proposals[rows, correct.clamp(max=steps - 1)] * fell
    residual = torch.add((ours - theirs).clamp_min_(0.0), ours, alpha=_TINY)
    return Accepted(correct, sample(residual, source))
