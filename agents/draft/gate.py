"""Whether a candidate draft may replace the draft that serves. There are two tests, and it must pass both.

`Gate.compare` computes the accept length of both drafts on recent held-out sequences; this serves nothing and gives
small intervals. `judge_trial` compares speeds measured in turns; it does not depend on recorded traces.
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

_LEAST = 8  # sequences or pairs that a test needs
_BATCH = 8  # sequences that are computed together
_GREEDY_TEMPERATURE = 1e-3  # the best of float16 logits has all the mass then, or shares it with its equals


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may serve, and the reason."""

    passed: bool
    reason: str
    interval: Interval | None = None  # of the gain in accept length, or of the ratio of speeds
    harmful: bool = False  # significantly worse: the learner should restore weights that served

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'refused'}: {self.reason}"


class Gate:
    """Compares two drafts of one shape on the same sequences, paired by sequence.

    Args:
        shape: the shape of the drafts.
        embedding: [V, H], the target's.
        num_steps: number of drafts at which accept lengths are compared.
        sampled: drafts are sampled and accepted by rejection sampling; otherwise they are the draft's best tokens.
        least_gain: in tokens per round; a candidate passes if the 95 % interval of its gain is above it. A value a
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
        least_gain: float = -0.02,
        seed: int = 0,
    ) -> None:
        self.shape, self.num_steps, self.sampled, self.least_gain = shape, num_steps, sampled, least_gain
        self._embedding, self._seed = embedding.detach().float(), seed

    def compare(
        self, serving: Mapping[str, Tensor], candidate: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]
    ) -> Verdict:
        """Compare the weights `candidate` with `serving`, by SGLang's names, on sequences that neither learnt from."""
        broken = [n for n, t in candidate.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            return Verdict(False, f"the candidate's {broken[0]} is not finite", harmful=True)
        usable = [s for s in sequences if len(s.tokens) > max(s.prompt_tokens, self.num_steps + 1)]
        if len(usable) < _LEAST:
            return Verdict(False, f"{len(usable)} held-out sequences are fewer than the required {_LEAST}")
        before, after = (self.accept_lengths(weights, usable) for weights in (serving, candidate))
        if not np.isfinite(after).all():
            return Verdict(False, "the candidate's accept length is not finite", harmful=True)
        gain = mean_interval(after - before, rng=np.random.default_rng(self._seed))
        passed = gain.low > self.least_gain
        reason = (
            f"accept length {before.mean():.3f} -> {after.mean():.3f}, gain {gain} over {len(usable)} sequences, "
            f"{'above' if passed else 'not significantly above'} {self.least_gain:g}"
        )
        return Verdict(passed, reason, gain, harmful=gain.high < min(self.least_gain, 0.0))

    @torch.no_grad()
    def accept_lengths(self, weights: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]) -> np.ndarray:
        """The number of tokens after prefill over the expected number of rounds given the tokens: [n] float64."""
        parts = [sequences[start : start + _BATCH] for start in range(0, len(sequences), _BATCH)]
        with self._embedding.device:  # of new tensors, as of weights and sequences
            return torch.cat([self._accept_lengths(weights, part) for part in parts]).double().cpu().numpy()

    def _accept_lengths(self, weights: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]) -> Tensor:
        temperatures = [max(s.temperature, _GREEDY_TEMPERATURE) for s in sequences]
        batch = collate(sequences, temperatures, vocabulary_ids(weights, self.shape))
        slots, matched = torch.arange(len(batch.targets.tokens)), []
        embeddings, features = self._embedding[batch.tokens], batch.features.float()
        for state in unroll(weights, self.shape, embeddings, features, self.num_steps):
            rows, head = state[batch.inside], weights["lm_head.weight"]
            step = head_steps(rows, head, batch.targets, slots, sampled_step if self.sampled else greedy_step)
            matched.append(torch.zeros(batch.inside.shape).masked_scatter_(batch.inside, step.matched))
        rounds = expected_rounds(matched, batch.inside)
        # A slot predicts the token after the next one, and prefill yields the first token of the answer.
        first = (batch.prompt_tokens - 1).clamp_min(0)
        return (batch.inside.sum(1) - first[:, 0]) / rounds.gather(1, first)[:, 0]


def expected_rounds(matched: Sequence[Tensor], inside: Tensor) -> Tensor:
    """The expected number of rounds from each slot to the end, given the tokens: [B, T].

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
    serving: ArrayLike, candidate: ArrayLike, *, least_ratio: float = 0.95, rng: np.random.Generator
) -> Verdict:
    """Judge speeds that were measured in turns by the geometric mean of candidate / serving and its 95 % interval.

    Args:
        serving, candidate: [n] tokens per second of paired rounds or blocks of rounds.
        least_ratio: the candidate passes if the interval is above this ratio, and is harmful if it is below.
        rng: of the bootstrap.

    Raises:
        ValueError: the speeds are not paired, or the serving draft's are not finite and above 0.
    """
    ours, theirs = np.asarray(serving, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if len(ours) < _LEAST:
        return Verdict(False, f"{len(ours)} pairs are fewer than the required {_LEAST}")
    if not (np.isfinite(theirs).all() and (theirs > 0).all()):
        return Verdict(False, "the candidate's speed is not always finite and above 0", harmful=True)
    ratio = paired_speedup(theirs, ours, rng=rng)  # seconds a/b = speeds b/a
    passed, worse = ratio.low > least_ratio, ratio.high < least_ratio
    verdict = "above" if passed else "below" if worse else "not significantly above"
    return Verdict(passed, f"speed ratio {ratio} over {len(ours)} pairs, {verdict} {least_ratio:g}", ratio, worse)
