"""Padded batches of training sequences, with the target's distributions on the draft's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specrl.agents.draft.losses import top_k_of
from specrl.agents.draft.sequences import TrainingSequence

PIECE = 1 << 20  # numbers of one piece in float32: 4 MiB, about the size of a processor's cache


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
    target_ids: Tensor | None,
    top_k: int | None = None,
) -> Targets:
    """Targets of several sequences, concatenated.

    Args:
        logits: [n, V] for each sequence.
        temperatures: one for each sequence.
        next_tokens: [n] int64 target ids for each sequence, -1 where they are not known.
        target_ids: [Vd] int64, the target id of each draft id; None: they are the same.
        top_k: see `Targets`.
    """
    temperature = torch.cat([torch.full((len(x), 1), float(t)) for x, t in zip(logits, temperatures, strict=True)])
    tokens = torch.cat(list(next_tokens))
    if target_ids is None:
        kept, mass = list(logits), torch.ones_like(temperature)
    else:
        draft_ids = torch.full((logits[0].shape[-1],), -1).scatter_(0, target_ids, torch.arange(len(target_ids)))
        tokens = torch.where(tokens >= 0, draft_ids[tokens.clamp_min(0)], tokens)
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


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences, padded on the right; slot t of T holds features t and token t + 1, and predicts token t + 2."""

    tokens: Tensor  # [B, T] int64, the token that each slot reads
    features: Tensor  # [B, T, 3H]
    inside: Tensor  # [B, T] bool, not padding
    prompt_tokens: Tensor  # [B, 1] int64
    targets: Targets  # of the slots that are inside, in order


def collate(sequences: Sequence[TrainingSequence], temperatures: Sequence[float], target_ids: Tensor | None) -> Batch:
    """Sequences of at least two tokens as a batch; other arguments as of `make_targets`. Logits are not padded."""
    next_tokens = [torch.nn.functional.pad(s.tokens[2:], (0, 1), value=-1) for s in sequences]  # the last is not known
    slots = torch.tensor([[len(s.tokens) - 1] for s in sequences])
    return Batch(
        pad_sequence([s.tokens[1:] for s in sequences], batch_first=True),
        pad_sequence([s.features[:-1] for s in sequences], batch_first=True),
        torch.arange(int(slots.max())) < slots,
        torch.tensor([[s.prompt_tokens] for s in sequences]),
        make_targets([s.logits[1:] for s in sequences], temperatures, next_tokens, target_ids),
    )
