"""The gate: whether a candidate draft may replace the draft that serves.

There are two tests, and a candidate must pass both. `Gate.compare` computes the accept length of both drafts on recent
held-out sequences; this needs no clock, gives small intervals and serves nothing. `judge_trial` compares speeds that
were measured with both drafts serving in turns; it does not depend on recorded traces, which may be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from specrl.agents.draft.fused_head import head_steps, make_targets
from specrl.agents.draft.objective import draft_ids
from specrl.agents.draft.sequences import TrainingSequence, collate, next_tokens
from specrl.agents.draft.unroll import unroll_states
from specrl.core.statistics import Interval, mean_interval, paired_speedup
from specrl.models.config import DraftArchitecture
from specrl.models.rope import rope_table

_BATCH = 8  # sequences
_GREEDY_TEMPERATURE = 1e-3  # the best of float16 logits has all the mass then, or shares it with its equals


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a candidate may serve, and the reason.

    `harmful`: it is significantly worse, so that the learner should restore weights that served.
    """

    passed: bool
    reason: str
    interval: Interval | None = None  # of the gain in accept length, or of the ratio of speeds
    harmful: bool = False

    def __str__(self) -> str:
        return f"{'passed' if self.passed else 'refused'}: {self.reason}"


class Gate:
    """Compares two drafts of one shape on the same sequences, paired by sequence.

    Args:
        shape: the shape of the drafts.
        embedding: [V, H], the target's.
        num_steps: number of drafts at which accept lengths are compared.
        sampled: drafts are sampled and accepted by rejection sampling; otherwise they are the draft's best tokens,
            accepted if the target chooses them.
        least_gain: in tokens per round; a candidate passes if the lower end of the interval of its gain is above it. A
            value a little below 0 also accepts candidates that are equally good; 0 requires a significant gain.
        least: smallest number of sequences.
        level: of the interval.
        seed: of the bootstrap in each comparison.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        shape: DraftArchitecture,
        embedding: Tensor,
        *,
        num_steps: int = 3,
        sampled: bool = True,
        least_gain: float = -0.02,
        least: int = 8,
        level: float = 0.95,
        seed: int = 0,
    ) -> None:
        if num_steps < 1 or least < 2:
            raise ValueError(f"num_steps must be at least 1 and least at least 2, but got {num_steps} and {least}")
        if not -num_steps < least_gain < num_steps or not 0 < level < 1:
            raise ValueError(
                f"least_gain must be in (-{num_steps}, {num_steps}) and level in (0, 1), but got {least_gain}, {level}"
            )
        self.shape, self.num_steps, self.sampled = shape, num_steps, sampled
        self.least_gain, self.least, self.level = least_gain, least, level
        self._embedding = embedding.detach().float()
        self._rotation = rope_table(shape.rope, shape.head_dim, shape.max_position_embeddings).to(embedding.device)
        self._seed = seed

    def compare(
        self, serving: Mapping[str, Tensor], candidate: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]
    ) -> Verdict:
        """Compare the weights `candidate` with `serving`, by SGLang's names, on sequences that neither learnt from."""
        broken = [n for n, t in candidate.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            return Verdict(False, f"the candidate's {broken[0]} is not finite", harmful=True)
        usable = [s for s in sequences if len(s.tokens) > max(s.prompt_tokens, self.num_steps + 1)]
        if len(usable) < self.least:
            return Verdict(False, f"{len(usable)} held-out sequences are fewer than the required {self.least}")
        before, after = (self.accept_lengths(weights, usable) for weights in (serving, candidate))
        if not np.isfinite(after).all():
            return Verdict(False, "the candidate's accept length is not finite", harmful=True)
        gain = mean_interval(after - before, level=self.level, rng=np.random.default_rng(self._seed))
        passed = gain.low > self.least_gain
        reason = (
            f"accept length {before.mean():.3f} -> {after.mean():.3f}, gain {gain} over {len(usable)} sequences, "
            f"{'above' if passed else 'not significantly above'} {self.least_gain:g}"
        )
        return Verdict(passed, reason, gain, harmful=gain.high < min(self.least_gain, 0.0))

    @torch.no_grad()
    def accept_lengths(self, weights: Mapping[str, Tensor], sequences: Sequence[TrainingSequence]) -> np.ndarray:
        """The number of tokens after prefill over the expected number of rounds with `num_steps` drafts: [n] float64.

        The expectation is exact given the tokens, because the probability of acceptance is known at each of them.
        """
        out = []
        for start in range(0, len(sequences), _BATCH):
            with self._embedding.device:  # of new tensors, as of weights and sequences
                out.append(self._accept_lengths(weights, list(sequences[start : start + _BATCH])))
        return torch.cat(out).double().cpu().numpy()

    def _accept_lengths(self, weights: Mapping[str, Tensor], sequences: list[TrainingSequence]) -> Tensor:
        tokens, features, valid = collate(sequences)
        inside = valid[:, 1:]  # [B, T - 1] slots
        ids = torch.arange(self.shape.draft_vocab_size) + weights["d2t"] if "d2t" in weights else None
        back = None if ids is None else draft_ids(ids, self.shape.vocab_size)
        temperatures = [max(s.temperature, _GREEDY_TEMPERATURE) for s in sequences]
        targets = make_targets([s.logits[1:] for s in sequences], temperatures, next_tokens(sequences), back, ids)
        every, head, matched = torch.arange(len(targets.tokens)), weights["lm_head.weight"], []
        states = unroll_states(
            weights,
            self.shape,
            self._embedding[tokens[:, 1:]],
            features[:, :-1].float(),
            self._rotation,
            self.num_steps,
        )
        for state in states:
            step = head_steps(state[inside], head, targets, every, self.sampled, sharpness=math.inf)
            matched.append(torch.zeros(inside.shape).masked_scatter_(inside, step.matched))
        rounds = expected_rounds(matched, inside)
        # A slot predicts the token after the next one, and prefill yields the first token of the answer.
        first = torch.tensor([[max(0, s.prompt_tokens - 1)] for s in sequences])
        return (inside.sum(1) - first[:, 0]) / rounds.gather(1, first)[:, 0]


def expected_rounds(matched: Sequence[Tensor], inside: Tensor) -> Tensor:
    """The expected number of rounds from each slot to the end, given the tokens: [B, T].

    A round from slot t commits its accepted drafts and one token of the target:
    R(t) = 1 + Σ_j P(exactly j drafts are accepted) R(t + j + 1).

    Args:
        matched: for each of K drafts, [B, T], the probability that the next token was drafted and accepted
            (`losses.Step`); 0 where the token is not known.
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
    serving: ArrayLike,
    candidate: ArrayLike,
    *,
    least_ratio: float = 0.95,
    least: int = 8,
    level: float = 0.95,
    groups: ArrayLike | None = None,
    rng: np.random.Generator,
) -> Verdict:
    """Judge speeds that were measured in turns by the geometric mean of candidate / serving and its interval.

    The candidate passes if the interval is above `least_ratio`, and is harmful if the interval is below. Otherwise the
    trial was too short, and the candidate does not pass.

    Args:
        serving, candidate: [n] tokens per second of paired rounds or blocks of rounds.
        least_ratio: the ratio that the interval must be above.
        least: smallest number of pairs.
        level: of the interval.
        groups: [n] pairs with equal values are resampled together, such as those of one prompt.
        rng: of the bootstrap.

    Raises:
        ValueError: the speeds are not paired, the serving draft's are not finite and above 0, or least is below 2.
    """
    ours, theirs = np.asarray(serving, dtype=np.float64), np.asarray(candidate, dtype=np.float64)
    if least < 2 or ours.shape != theirs.shape:
        raise ValueError(f"a trial needs least >= 2 and pairs, but got {least}, {ours.shape} and {theirs.shape}")
    if not (np.isfinite(ours).all() and (ours > 0).all()):
        raise ValueError("the serving draft's speeds must be finite and above 0; leave out rounds without tokens")
    if len(ours) < least:
        return Verdict(False, f"{len(ours)} pairs are fewer than the required {least}")
    if not (np.isfinite(theirs).all() and (theirs > 0).all()):
        return Verdict(False, "the candidate's speed is not always finite and above 0", harmful=True)
    ratio = paired_speedup(theirs, ours, groups=groups, level=level, rng=rng)  # seconds a/b = speeds b/a
    passed, worse = ratio.low > least_ratio, ratio.high < least_ratio
    verdict = "above" if passed else "below" if worse else "not significantly above"
    return Verdict(passed, f"speed ratio {ratio} over {len(ours)} pairs, {verdict} {least_ratio:g}", ratio, worse)
