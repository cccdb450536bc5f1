"""The gradient of a draft's loss on a batch of sequences: unrolled, weighted by pass, and the head never whole."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor

from specrl.agents.draft.config import LearnerConfig, product_dtype
from specrl.agents.draft.fused_head import Targets, head_loss, head_steps, make_targets
from specrl.agents.draft.losses import Mixture, PlanCost, Step, accept_length, parse_loss, seconds_saved, survival
from specrl.agents.draft.sequences import Sequence, chosen_by_target, collate, next_tokens
from specrl.agents.draft.unroll import unroll_states
from specrl.models.draft import Draft
from specrl.models.rope import rope_table

_AFTER_REJECTION = Mixture({"forward_kl": 1.0}, {})


class Objective:
    """What a learner minimises.

    Args:
        draft: whose shape and vocabulary it is.
        embedding: [V, H], the target's.
        config: the loss, its weights, temperature and dtype.
    """

    def __init__(self, draft: Draft, embedding: Tensor, config: LearnerConfig) -> None:
        self.config, self._shape = config, draft.config
        self.mixture, self.dtype = parse_loss(config.loss), product_dtype(config.dtype)
        self._embedding = embedding.detach().float()
        c = draft.config
        self._rotation = rope_table(c.rope, c.head_dim, c.max_position_embeddings)
        self._target_ids = ids = draft.target_ids
        self._draft_ids = None if ids is None else draft_ids(ids, c.vocab_size)
        self._costs: tuple[PlanCost, ...] = ()
        self._speedup = 1.0

    def price(self, costs: Many[PlanCost], speedup: float) -> None:
        """What 'seconds_saved' counts with from now on (see `losses.seconds_saved`)."""
        self._costs, self._speedup = tuple(costs), speedup

    def gradients(
        self, parameters: Mapping[str, Tensor], sequences: list[Sequence], share: Share | None = None
    ) -> dict[str, float]:
        """Add the loss's gradients to those of `parameters`; the loss, and the mean α of every pass.

        Each pass's gradient by what the head read is known as soon as the pass is; the rest of the draft is
        differentiated once, from all of them. A batch has at least one sequence of two tokens. With a `share`, these
        sequences are a part of a batch: the mean over its parts is then what the whole would have given.
        """
        c, batch = self.config, self._batch(sequences)
        head = parameters["lm_head.weight"]
        cast_head = head.to(self.dtype)
        of_head, fixed_head = torch.zeros_like(head), cast_head.detach()
        turned = fixed_head.t().contiguous() if self.mixture.slot or c.rejected else None
        loss, metrics = torch.zeros(()), {}
        ends: list[Tensor] = []
        slopes: list[Tensor | None] = []
        steps: list[Step] = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            states = unroll_states(
                parameters,
                self._shape,
                self._embedding[batch.tokens],
                batch.features,
                self._rotation,
                batch.passes,
                None if batch.fallen is None else self._embedding[batch.fallen.tokens],
            )
            for k, weight in enumerate(c.weights_of(batch.passes)):
                here = batch.inside.clone()
                here[:, :k] = False  # pass k begins at slot k
                rows, at = next(states)[here], batch.slots[here]
                if self.mixture.slot:
                    each = weight / (len(at) if share is None else share.slots(k))
                    done = head_loss(rows.detach(), fixed_head, batch.targets, at, self.mixture, each, of_head, turned)
                    loss += done.loss
                    ends.append(rows)
                    slopes.append(done.of_rows)
                    metrics[f"alpha_{k + 1}"] = float(done.alpha)
                if self.mixture.chain:
                    step = head_steps(rows, cast_head, batch.targets, at, c.drafts == "sampled")
                    metrics.setdefault(f"alpha_{k + 1}", float(step.accepted.detach().mean()))
                    steps.append(Step(*(torch.zeros(here.shape).masked_scatter(here, x) for x in step)))
            if batch.fallen is not None:
                state, fallen = next(states), batch.fallen
                rows, at = state[fallen.here], torch.arange(int(fallen.here.sum()))
                each = c.rejected / max(1, len(at))
                done = head_loss(rows.detach(), fixed_head, fallen.targets, at, _AFTER_REJECTION, each, of_head, turned)
                loss += done.loss
                ends.append(rows)
                slopes.append(done.of_rows)
        if steps:
            chain = self._chain_loss(steps, batch)
            loss += chain.detach()
            ends.append(chain)
            slopes.append(None)
        torch.autograd.backward(ends, slopes)
        head.grad = of_head if head.grad is None else head.grad.add_(of_head)
        return {"loss": float(loss), **metrics}

    def _chain_loss(self, steps: list[Step], batch: Batch) -> Tensor:
        """Minus the accept length, and minus the plain rounds saved: []."""
        sums, counts = survival(steps, batch.starts, batch.inside)
        survived, total = sums.sum(0) / counts.sum(0).clamp_min(1), torch.zeros(())
        for name, weight in self.mixture.chain.items():
            if name == "seconds_saved" and self._costs:
                total = total - weight * seconds_saved(survived, self._costs, speedup=self._speedup)
            else:
                total = total - weight * accept_length(survived, len(steps))
        return total

    def _batch(self, sequences: list[Sequence]) -> Batch:
        c = self.config
        tokens, features, valid = collate(sequences)
        inside = valid[:, 1:]
        heats = [(s.temperature or 1.0) if c.temperature is None else c.temperature for s in sequences]
        targets = make_targets(
            [s.logits[1:] for s in sequences], heats, next_tokens(sequences), self._draft_ids, self._target_ids
        )
        slots = torch.zeros(inside.shape, dtype=torch.int64)
        slots[inside] = torch.arange(len(targets.tokens))
        fallen = self._fallen(sequences, heats, inside.shape[1]) if c.rejected else None
        passes = min(c.passes, inside.shape[1])
        starts = chosen_by_target(sequences, inside)
        return Batch(tokens[:, 1:], features[:, :-1].to(self.dtype), inside, slots, starts, targets, passes, fallen)

    def _fallen(self, sequences: list[Sequence], heats: list[float], length: int) -> Fallen | None:
        """What was rejected at slots 1 and later; None if nothing was."""
        tokens = torch.zeros(len(sequences), length, dtype=torch.int64)
        here = torch.zeros(tokens.shape, dtype=torch.bool)
        logits = []
        for b, sequence in enumerate(sequences):
            assert sequence.rejected is not None
            at = sequence.rejected.positions
            kept = (at >= 1) & (at < len(sequence.tokens) - 1)
            tokens[b, at[kept]], here[b, at[kept]] = sequence.rejected.tokens[kept], True
            logits.append(sequence.rejected.logits[kept])
        if not here.any():
            return None
        unknown = [torch.full((len(x),), -1) for x in logits]
        top_k = self.config.rejected_top_k
        return Fallen(
            tokens, here, make_targets(logits, heats, unknown, self._draft_ids, self._target_ids, top_k=top_k)
        )


@dataclass(frozen=True, slots=True)
class Share:
    """A batch that `parts` processes share, by the number of tokens of each of its sequences."""

    lengths: tuple[int, ...]
    parts: int

    def slots(self, k: int) -> float:
        """Slots of pass k (from 0 on) in the whole batch, by the number of parts."""
        return sum(max(0, length - 1 - k) for length in self.lengths) / self.parts


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences side by side; slot t of T holds features t and token t + 1, and predicts token t + 2."""

    tokens: Tensor  # [B, T] int64, the token each slot reads
    features: Tensor  # [B, T, 3H] in the dtype of the products
    inside: Tensor  # [B, T] bool, no padding
    slots: Tensor  # [B, T] int64, where `targets` holds each slot
    starts: Tensor  # [B, T] bool, the target chose the token that the slot predicts
    targets: Targets
    passes: int
    fallen: Fallen | None


@dataclass(frozen=True, slots=True)
class Fallen:
    """Rejected drafts: read by slot t in place of its own token."""

    tokens: Tensor  # [B, T] int64
    here: Tensor  # [B, T] bool, slots that have one
    targets: Targets  # of those slots, in order


def draft_ids(target_ids: Tensor, vocab_size: int) -> Tensor:
    """The draft id of each target id, -1 where it has none: [Vd] int64 -> [V] int64."""
    return torch.full((vocab_size,), -1).scatter_(0, target_ids, torch.arange(len(target_ids)))
