"""The gradient of a draft's loss on a batch of sequences, by the training-time test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specrl.agents.draft import losses
from specrl.agents.draft.config import LearnerConfig, product_dtype
from specrl.agents.draft.fused_head import FusedHead, Targets, head_steps, make_targets
from specrl.agents.draft.sequences import TrainingSequence
from specrl.agents.draft.unroll import unroll
from specrl.core.interfaces import PlanCost
from specrl.models.draft import Draft

SHARPNESS = 4.0  # of the surrogate for greedy drafts, see `losses.greedy_step`
_SURROGATE_STEP = partial(losses.greedy_step, sharpness=SHARPNESS)
_AFTER_REJECTION = losses.Mixture({"forward_kl": 1.0}, {})


class Objective:
    """The loss of a learner for drafts of the shape and vocabulary of `draft`.

    `embedding` [V, H] is the target's, on the device of the computation.
    """

    def __init__(self, draft: Draft, embedding: Tensor, config: LearnerConfig) -> None:
        self._config, self._shape, self._device = config, draft.config, embedding.device
        self.mixture, self.dtype = losses.parse_loss(config.loss), product_dtype(config.dtype, self._device)
        self._embedding = embedding.detach().float()
        self._target_ids = None if draft.target_ids is None else draft.target_ids.to(self._device)
        self._costs: tuple[PlanCost, ...] = ()
        self._speedup = 1.0

    def set_plan_costs(self, costs: Sequence[PlanCost], speedup: float) -> None:
        """Set the costs and λ of the loss 'seconds_saved' (see `losses.seconds_saved`)."""
        self._costs, self._speedup = tuple(costs), speedup

    def backward(self, parameters: Mapping[str, Tensor], sequences: list[TrainingSequence]) -> dict[str, float]:
        """Add the gradients of the loss to those of `parameters`.

        Args:
            parameters: the draft's tensors by SGLang's names, leaves with gradients.
            sequences: at least one, each of at least two tokens.

        Returns:
            The loss, and alpha_k, the mean α of step k of the training-time test.
        """
        with nullcontext() if self._device.type == "cpu" else self._device:  # device of new tensors
            fixed = self._config.temperature
            temperatures = [(s.temperature or 1.0) if fixed is None else fixed for s in sequences]
            batch = collate(sequences, temperatures, self._target_ids)
            rejected = self._rejected(sequences, temperatures) if self._config.rejected_weight else None
            head = FusedHead(parameters["lm_head.weight"], self.dtype)
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                metrics = self._add_losses(head, parameters, batch, rejected)
            return {"loss": head.backward(), **metrics}

    def _add_losses(
        self, head: FusedHead, parameters: Mapping[str, Tensor], batch: Batch, rejected: _Rejected | None
    ) -> dict[str, float]:
        """Add all losses to those of the head; return the metrics."""
        c = self._config
        index = torch.zeros(batch.inside.shape, dtype=torch.int64)  # index of each slot in the targets
        index[batch.inside] = torch.arange(len(batch.targets.tokens))
        ttt_steps = min(c.ttt_steps, index.shape[1])
        embeddings, features = self._embedding[batch.tokens], batch.features.to(self.dtype)
        rejected_embeddings = None if rejected is None else self._embedding[rejected.tokens]
        states = unroll(parameters, self._shape, embeddings, features, ttt_steps, rejected_embeddings)
        make_step = losses.sampled_step if c.draft_sampling == "sampled" else _SURROGATE_STEP
        metrics: dict[str, float] = {}
        steps: list[losses.Step] = []
        for k, weight in enumerate(c.step_weights(ttt_steps)):
            inside = batch.inside.clone()
            inside[:, :k] = False  # step k starts at slot k
            rows, slots = next(states)[inside], index[inside]
            if self.mixture.slot:
                alpha = head.add_token_losses(rows, batch.targets, slots, self.mixture, weight / len(slots))
                metrics[f"alpha_{k + 1}"] = float(alpha)
            if self.mixture.chain:
                step = head_steps(rows, head.cast, batch.targets, slots, make_step)
                metrics.setdefault(f"alpha_{k + 1}", float(step.accepted.detach().mean()))
                steps.append(losses.Step(*(torch.zeros(inside.shape).masked_scatter(inside, x) for x in step)))
        if rejected is not None:
            rows = next(states)[rejected.inside]
            slots = torch.arange(len(rows))
            head.add_token_losses(rows, rejected.targets, slots, _AFTER_REJECTION, c.rejected_weight / len(rows))
        if steps:
            head.add_loss(self._chain_loss(steps, batch))
        return metrics

    def _chain_loss(self, steps: list[losses.Step], batch: Batch) -> Tensor:
        """Return minus the accept length, or minus the plain decoding steps saved: []."""
        sampled = torch.arange(batch.inside.shape[1]) + 2 >= batch.prompt_tokens  # whether the target chose token t + 2
        sums, counts = losses.survival(steps, batch.inside & sampled, batch.inside)
        survived, total = sums.sum(0) / counts.sum(0).clamp_min(1), torch.zeros(())
        for name, weight in self.mixture.chain.items():
            if name == "seconds_saved" and self._costs:
                total = total - weight * losses.seconds_saved(survived, self._costs, speedup=self._speedup)
            else:
                total = total - weight * losses.accept_length(survived, len(steps))
        return total

    def _rejected(self, sequences: list[TrainingSequence], temperatures: list[float]) -> _Rejected | None:
        """Return the rejected drafts at slots 1 and later; None if there are none."""
        tokens = torch.zeros(len(sequences), max(len(s.tokens) for s in sequences) - 1, dtype=torch.int64)
        inside = torch.zeros(tokens.shape, dtype=torch.bool)
        logits = []
        for b, sequence in enumerate(sequences):
            assert sequence.rejected is not None
            positions = sequence.rejected.positions
            usable = (positions >= 1) & (positions < len(sequence.tokens) - 1)
            slots = positions[usable]
            tokens[b, slots], inside[b, slots] = sequence.rejected.tokens[usable], True
            logits.append(sequence.rejected.logits[usable])
        if not inside.any():
            return None
        next_tokens = [torch.full((len(x),), -1) for x in logits]  # not known
        targets = make_targets(logits, temperatures, next_tokens, self._target_ids, self._config.rejected_top_k)
        return _Rejected(tokens, inside, targets)


class _Rejected(NamedTuple):
    """Rejected drafts, which slot t of T reads in place of its own token."""

    tokens: Tensor  # [B, T] int64
    inside: Tensor  # [B, T] bool, slots with a rejected draft
    targets: Targets  # of those slots, in order


@dataclass(frozen=True, slots=True)
class Batch:
    """B sequences, padded on the right; slot t of T holds features t and token t + 1, and predicts token t + 2."""

    tokens: Tensor  # [B, T] int64, the token that each slot reads
    features: Tensor  # [B, T, 3H]
    inside: Tensor  # [B, T] bool, not padding
    prompt_tokens: Tensor  # [B, 1] int64
    targets: Targets  # of the slots that are inside, in order


def collate(sequences: Sequence[TrainingSequence], temperatures: Sequence[float], target_ids: Tensor | None) -> Batch:
    """Pad sequences of at least two tokens to a batch (`target_ids`: see `make_targets`). Logits are not padded."""
    next_tokens = [torch.nn.functional.pad(s.tokens[2:], (0, 1), value=-1) for s in sequences]  # the last is not known
    slots = torch.tensor([[len(s.tokens) - 1] for s in sequences])
    return Batch(
        pad_sequence([s.tokens[1:] for s in sequences], batch_first=True),
        pad_sequence([s.features[:-1] for s in sequences], batch_first=True),
        torch.arange(int(slots.max())) < slots,
        torch.tensor([[s.prompt_tokens] for s in sequences]),
        make_targets([s.logits[1:] for s in sequences], temperatures, next_tokens, target_ids),
    )
