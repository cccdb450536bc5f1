"""The gradient of a draft's loss on a batch of sequences: the training-time test, without whole logits in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specrl.agents.draft.config import LearnerConfig, product_dtype
from specrl.agents.draft.fused_head import Targets, head_loss, head_steps, make_targets
from specrl.agents.draft.losses import Mixture, Step, accept_length, parse_loss, seconds_saved, survival
from specrl.agents.draft.sequences import TrainingSequence, chosen_by_target, collate, next_tokens
from specrl.agents.draft.unroll import unroll_states
from specrl.core.interfaces import PlanCost
from specrl.models.draft import Draft
from specrl.models.rope import rope_table

_AFTER_REJECTION = Mixture({"forward_kl": 1.0}, {})


class Objective:
    """The loss that a learner minimises.

    Args:
        draft: its shape and vocabulary are used.
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

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float) -> None:
        """Set the costs and λ of the loss 'seconds_saved' (see `losses.seconds_saved`)."""
        self._costs, self._speedup = tuple(costs), speedup

    def backward(self, parameters: Mapping[str, Tensor], sequences: list[TrainingSequence]) -> dict[str, float]:
        """Add the gradients of the loss to those of `parameters`.

        The gradient with respect to the head's input is computed together with each step's loss. The rest of the draft
        is differentiated once, from all of these.

        Args:
            parameters: the draft's tensors by SGLang's names, leaves with gradients.
            sequences: at least one, each of at least two tokens.

        Returns:
            The loss, and alpha_k, the mean α of step k of the training-time test.
        """
        c, batch = self.config, self._collate(sequences)
        tape = _Tape(parameters["lm_head.weight"], self.dtype, transpose=bool(self.mixture.slot or c.rejected_weight))
        metrics: dict[str, float] = {}
        steps: list[Step] = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            states = unroll_states(
                parameters,
                self._shape,
                self._embedding[batch.tokens],
                batch.features,
                self._rotation,
                batch.ttt_steps,
                None if batch.rejected is None else self._embedding[batch.rejected.tokens],
            )
            for k, weight in enumerate(c.step_weights(batch.ttt_steps)):
                inside = batch.inside.clone()
                inside[:, :k] = False  # step k starts at slot k
                rows, slots = next(states)[inside], batch.slots[inside]
                if self.mixture.slot:
                    alpha = tape.add_head_loss(rows, batch.targets, slots, self.mixture, weight / len(slots))
                    metrics[f"alpha_{k + 1}"] = float(alpha)
                if self.mixture.chain:
                    step = head_steps(rows, tape.cast_head, batch.targets, slots, c.draft_sampling == "sampled")
                    metrics.setdefault(f"alpha_{k + 1}", float(step.accepted.detach().mean()))
                    steps.append(Step(*(torch.zeros(inside.shape).masked_scatter(inside, x) for x in step)))
            if batch.rejected is not None:
                rows = next(states)[batch.rejected.inside]
                weight = c.rejected_weight / max(1, len(rows))
                tape.add_head_loss(rows, batch.rejected.targets, torch.arange(len(rows)), _AFTER_REJECTION, weight)
        if steps:
            tape.add_loss(self._chain_loss(steps, batch))
        return {"loss": tape.backward(), **metrics}

    def _chain_loss(self, steps: list[Step], batch: Batch) -> Tensor:
        """Minus the accept length, or minus the plain decoding steps saved: []."""
        sums, counts = survival(steps, batch.starts, batch.inside)
        survived, total = sums.sum(0) / counts.sum(0).clamp_min(1), torch.zeros(())
        for name, weight in self.mixture.chain.items():
            if name == "seconds_saved" and self._costs:
                total = total - weight * seconds_saved(survived, self._costs, speedup=self._speedup)
            else:
                total = total - weight * accept_length(survived, len(steps))
        return total

    def _collate(self, sequences: list[TrainingSequence]) -> Batch:
        c = self.config
        tokens, features, valid = collate(sequences)
        inside = valid[:, 1:]
        temperatures = [(s.temperature or 1.0) if c.temperature is None else c.temperature for s in sequences]
        targets = make_targets(
            [s.logits[1:] for s in sequences], temperatures, next_tokens(sequences), self._draft_ids, self._target_ids
        )
        slots = torch.zeros(inside.shape, dtype=torch.int64)
        slots[inside] = torch.arange(len(targets.tokens))
        rejected = self._collate_rejected(sequences, temperatures, inside.shape[1]) if c.rejected_weight else None
        ttt_steps = min(c.ttt_steps, inside.shape[1])
        starts = chosen_by_target(sequences, inside)
        features = features[:, :-1].to(self.dtype)
        return Batch(tokens[:, 1:], features, inside, slots, starts, targets, ttt_steps, rejected)

    def _collate_rejected(
        self, sequences: list[TrainingSequence], temperatures: list[float], length: int
    ) -> RejectedBatch | None:
        """The rejected drafts at slots 1 and later; None if there are none."""
        tokens = torch.zeros(len(sequences), length, dtype=torch.int64)
        inside = torch.zeros(tokens.shape, dtype=torch.bool)
        logits = []
        for b, sequence in enumerate(sequences):
            assert sequence.rejected is not None
            positions = sequence.rejected.positions
            kept = (positions >= 1) & (positions < len(sequence.tokens) - 1)
            tokens[b, positions[kept]], inside[b, positions[kept]] = sequence.rejected.tokens[kept], True
            logits.append(sequence.rejected.logits[kept])
        if not inside.any():
            return None
        unknown = [torch.full((len(x),), -1) for x in logits]
        top_k = self.config.rejected_top_k
        targets = make_targets(logits, temperatures, unknown, self._draft_ids, self._target_ids, top_k=top_k)
        return RejectedBatch(tokens, inside, targets)


class _Tape:
    """The loss so far, and the tensors that the draft is differentiated from.

    Args:
        head: [Vd, H], the parameter of the head.
        dtype: of the products.
        transpose: keep the transposed head too, for `head_loss`.
    """

    def __init__(self, head: Tensor, dtype: torch.dtype, *, transpose: bool) -> None:
        self.cast_head = head.to(dtype)  # with gradients
        self._head, self._grad_head = head, torch.zeros_like(head)
        self._fixed = self.cast_head.detach()
        self._fixed_t = self._fixed.t().contiguous() if transpose else None
        self._loss = torch.zeros(())
        self._outputs: list[Tensor] = []
        self._grads: list[Tensor | None] = []

    def add_head_loss(self, rows: Tensor, targets: Targets, slots: Tensor, mixture: Mixture, weight: float) -> Tensor:
        """Add losses of single tokens (see `head_loss`); returns the mean α."""
        found = head_loss(
            rows.detach(), self._fixed, targets, slots, mixture, weight, self._grad_head, head_t=self._fixed_t
        )
        self._loss += found.loss
        self._outputs.append(rows)
        self._grads.append(found.grad_rows)
        return found.alpha

    def add_loss(self, loss: Tensor) -> None:
        """Add a loss [] with a graph."""
        self._loss += loss.detach()
        self._outputs.append(loss)
        self._grads.append(None)

    def backward(self) -> float:
        """Add all gradients to those of the parameters; returns the loss."""
        torch.autograd.backward(self._outputs, self._grads)
        self._head.grad = self._grad_head if self._head.grad is None else self._head.grad.add_(self._grad_head)
        return float(self._loss)


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded sequences; slot t of T holds features t and token t + 1, and predicts token t + 2."""

    tokens: Tensor  # [B, T] int64, the token that each slot reads
    features: Tensor  # [B, T, 3H] in the dtype of the products
    inside: Tensor  # [B, T] bool, not padding
    slots: Tensor  # [B, T] int64, the index of each slot in `targets`
    starts: Tensor  # [B, T] bool, the target chose the token that the slot predicts
    targets: Targets
    ttt_steps: int
    rejected: RejectedBatch | None


@dataclass(frozen=True, slots=True)
class RejectedBatch:
    """Rejected drafts, which slot t reads in place of its own token."""

    tokens: Tensor  # [B, T] int64
    inside: Tensor  # [B, T] bool, slots with a rejected draft
    targets: Targets  # of those slots, in order


def draft_ids(target_ids: Tensor, vocab_size: int) -> Tensor:
    """The draft id of each target id, -1 if it has none: [Vd] int64 -> [V] int64."""
    return torch.full((vocab_size,), -1).scatter_(0, target_ids, torch.arange(len(target_ids)))
