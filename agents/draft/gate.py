"""Whether a candidate draft may replace the draft that serves. There are two checks, and it must pass both.

`Gate.compare` computes the accept length of both drafts on held-out sequences, without serving. `judge_trial` compares
speeds measured in turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from specrl.agents.draft.fused_head import head_steps
from specrl.agents.draft.losses import greedy_step, sampled_step
from specrl.agents.draft.objective import collate
from specrl.agents.draft.sequences import TrainingSequence
from specrl.agents.draft.unroll import unroll
from specrl.core.statistics import Interval, mean_interval, paired_speedup
from specrl.models.config import DraftArchitecture
from specrl.models.draft import vocabulary_ids

_MIN_SAMPLES = 8  # sequences or pairs that a check needs
_BATCH = 8  # sequences that are computed together
_GREEDY_TEMPERATURE = 1e-3  # at which the largest float16 logits have all the mass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may serve, and the reason."""

    passed: bool
    reason: str
    interval: Interval | None = None  # of the gain in accept length, or of the ratio of speeds
    harmful: bool = False  # significantly worse: the learner should restore good weights

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'refused'}: {self.reason}"


class Gate:
    """Compares two drafts of one shape on the same sequences, paired by sequence.

    Args:
        shape: of the drafts.
        embedding: [V, H], the target's.
        num_steps: number of drafts at which accept lengths are compared.
        sampled: drafts are sampled and accepted by rejection sampling; otherwise they are the most likely tokens.
        min_gain: in tokens per round; a candidate passes if the 95 % interval of its gain is above it. A value a
            little below 0 also accepts candidates that are equally good.
        seed: of the bootstrap in each comparison.
    """

    def __init__(
        self,
        shape: DraftArchitecture,
        embedding: Tensor,
        *,
        num_steps: int = 3,
        sampled: bool = True,
        min_gain: float = -0.02,
        seed: int = 0,
    ) -> None:
        self._shape, self._num_steps, self._sampled, self._min_gain = shape, num_steps, sampled, min_gain
        self._embedding, self._seed = embedding.detach().float(), seed

    def compare(
        self, serving: Mapping[str, Tensor], candidate: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]
    ) -> Verdict:
        """Compare the weights `candidate` with `serving`, by SGLang's names, on sequences that trained neither."""
        broken = [n for n, t in candidate.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            return Verdict(False, f"the candidate's {broken[0]} is not finite", harmful=True)
        usable = [s for s in sequences if len(s.tokens) > max(s.prompt_tokens, self._num_steps + 1)]
        if len(usable) < _MIN_SAMPLES:
            return Verdict(False, f"{len(usable)} held-out sequences are fewer than the required {_MIN_SAMPLES}")
        before, after = (self.accept_lengths(weights, usable) for weights in (serving, candidate))
        if not np.isfinite(after).all():
            return Verdict(False, "the candidate's accept length is not finite", harmful=True)
        gain = mean_interval(after - before, rng=np.random.default_rng(self._seed))
        passed = gain.low > self._min_gain
        reason = (
            f"accept length {before.mean():.3f} -> {after.mean():.3f}, gain {gain} over {len(usable)} sequences, "
            f"{'above' if passed else 'not significantly above'} {self._min_gain:g}"
        )
        return Verdict(passed, reason, gain, harmful=gain.high < min(self._min_gain, 0.0))

    @torch.no_grad()
    def accept_lengths(self, weights: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]) -> np.ndarray:
        """Return [n] float64: tokens after prefill over the expected number of rounds, given the tokens."""
        parts = [sequences[start : start + _BATCH] for start in range(0, len(sequences), _BATCH)]
        with self._embedding.device:  # device of new tensors
            return torch.cat([self._accept_lengths(weights, part) for part in parts]).double().cpu().numpy()

    def _accept_lengths(self, weights: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]) -> Tensor:
        temperatures = [max(s.temperature, _GREEDY_TEMPERATURE) for s in sequences]
        batch = collate(sequences, temperatures, vocabulary_ids(weights, self._shape))
        slots, matched = torch.arange(len(batch.targets.tokens)), []
        make_step, head = sampled_step if self._sampled else greedy_step, weights["lm_head.weight"]
        embeddings, features = self._embedding[batch.tokens], batch.features.float()
        for state in unroll(weights, self._shape, embeddings, features, self._num_steps):
            step = head_steps(state[batch.inside], head, batch.targets, slots, make_step)
            matched.append(torch.zeros(batch.inside.shape).masked_scatter_(batch.inside, step.matched))
        rounds = expected_rounds(matched, batch.inside)
        # A slot predicts the token after the next one, and prefill yields the first token of the answer.
        first = (batch.prompt_tokens - 1).clamp_min(0)
        return (batch.inside.sum(1) - first[:, 0]) / rounds.gather(1, first)[:, 0]


def expected_rounds(matched: Sequence[Tensor], inside: Tensor) -> Tensor:
    """Return the expected number of rounds from each slot to the end, given the tokens: [B, T].

    R(t) = 1 + Σ_j P(exactly j drafts are accepted) R(t + j + 1), as a round commits j drafts and one token more.

    Args:
        matched: for each of K drafts, `losses.Step.matched` [B, T]; 0 where the token is not known.
        inside: [B, T] bool, not padding.
    """
    batch, length = inside.shape
    rounds = torch.zeros(batch, length + len(matched) + 1)
    for t in reversed(range(length)):
        reach, total = torch.ones(batch), torch.ones(batch)
        for k, probability in enumerate(matched[: length - t]):
            accepted = reach * probability[:, t + k]
            total = total + (reach - accepted) * rounds[:, t + k + 1]
            reach = accepted
        rounds[:, t] = (total + reach * rounds[:, t + len(matched) + 1]) * inside[:, t]
    return rounds[:, :length]


def judge_trial(
    serving: ArrayLike, candidate: ArrayLike, *, min_ratio: float = 0.95, rng: np.random.Generator
) -> Verdict:
    """Judge speeds [n], tokens per second of paired blocks of rounds, by their mean ratio and its 95 % interval.

    The candidate passes if the interval is above `min_ratio`, and is harmful if it is below. Speeds that are not paired
    or, of the serving draft, not finite and above 0 raise a ValueError.
    """
    old, new = np.asarray(serving, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if len(old) < _MIN_SAMPLES:
        return Verdict(False, f"{len(old)} pairs are fewer than the required {_MIN_SAMPLES}")
    if not (np.isfinite(new).all() and (new > 0).all()):
        return Verdict(False, "the candidate's speed is not always finite and above 0", harmful=True)
    ratio = paired_speedup(new, old, rng=rng)  # a ratio of seconds, so the arguments are exchanged
    passed, harmful = ratio.low > min_ratio, ratio.high < min_ratio
    position = "above" if passed else "below" if harmful else "not significantly above"
    return Verdict(passed, f"speed ratio {ratio} over {len(old)} pairs, {position} {min_ratio:g}", ratio, harmful)
