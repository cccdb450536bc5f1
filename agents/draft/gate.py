"""The gate: whether a candidate draft may serve in place of the one that serves.

Two looks, each of which can only refuse. `Gate.compare` computes the accept length of both drafts on held-out recent
sequences: no clock, small intervals, nothing served. `trial` judges speeds measured with the candidate
serving in short turns: the last word, for it does not rest on recorded traces, which may be what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from specrl.agents.draft.fused_head import head_steps, make_targets
from specrl.agents.draft.objective import draft_ids
from specrl.agents.draft.sequences import Sequence, collate, next_tokens
from specrl.agents.draft.unroll import unroll_states
from specrl.core.statistics import Interval, mean_interval, paired_speedup
from specrl.models.config import DraftConfig
from specrl.models.rope import rope_table

_AT_ONCE = 8  # sequences
_GREEDY_HEAT = 1e-3  # a temperature at which the best of float16 logits has all the mass, or shares it with its equals


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the candidate may serve, and why, in one line.

    `harmful` says that it is worse, not only that too little is known: a learner should go back to weights that
    served (`OnlineLearner.roll_back`).
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
        shape: of the drafts.
        embedding: [V, H], the target's.
        num_steps: lookahead at which accept length is compared.
        sampled: drafts are sampled (rejection sampling); else the draft's best tokens, under target-only acceptance.
        least_gain: in tokens per round; a candidate passes when the lower end of its gain's interval is above it.
            A little below 0 lets through what cannot be told from the serving draft; 0 asks for a proven gain.
        least: sequences without which nothing passes.
        level: of the interval.
        seed: of its bootstrap, which every comparison begins anew.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        shape: DraftConfig,
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
        self, serving: Mapping[str, Tensor], candidate: Mapping[str, Tensor], sequences: Many[Sequence]
    ) -> Verdict:
        """Judge the weights `candidate` against `serving`, both by SGLang's names, on sequences neither learnt from."""
        broken = [n for n, t in candidate.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
        if broken:
            return Verdict(False, f"the candidate's {broken[0]} is not finite", harmful=True)
        usable = [s for s in sequences if len(s.tokens) > max(s.prompt_tokens, self.num_steps + 1)]
        if len(usable) < self.least:
            return Verdict(False, f"{len(usable)} held-out sequences are fewer than the {self.least} needed")
        before, after = (self.accept_lengths(weights, usable) for weights in (serving, candidate))
        if not np.isfinite(after).all():
            return Verdict(False, "the candidate's accept length is not finite", harmful=True)
        gain = mean_interval(after - before, level=self.level, rng=np.random.default_rng(self._seed))
        passed = gain.low > self.least_gain
        reason = (
            f"accept length {before.mean():.3f} -> {after.mean():.3f}, gain {gain} over {len(usable)} sequences, "
            f"{'above' if passed else 'not surely above'} {self.least_gain:g}"
        )
        return Verdict(passed, reason, gain, harmful=gain.high < min(self.least_gain, 0.0))

    @torch.no_grad()
    def accept_lengths(self, weights: Mapping[str, Tensor], sequences: Many[Sequence]) -> np.ndarray:
        """Tokens over expected rounds of a chain of `num_steps`, from the token after prefill on: [n] float64.

        Exact, given the tokens: what a draft would have been accepted of is known at every one of them.
        """
        out = []
        for start in range(0, len(sequences), _AT_ONCE):
            with self._embedding.device:  # where weights and sequences are: new tensors go there
                out.append(self._accept_lengths(weights, list(sequences[start : start + _AT_ONCE])))
        return torch.cat(out).double().cpu().numpy()

    def _accept_lengths(self, weights: Mapping[str, Tensor], sequences: list[Sequence]) -> Tensor:
        tokens, features, valid = collate(sequences)
        inside = valid[:, 1:]  # [B, T - 1] slots
        ids = torch.arange(self.shape.draft_vocab_size) + weights["d2t"] if "d2t" in weights else None
        back = None if ids is None else draft_ids(ids, self.shape.vocab_size)
        heats = [max(s.temperature, _GREEDY_HEAT) for s in sequences]
        targets = make_targets([s.logits[1:] for s in sequences], heats, next_tokens(sequences), back, ids)
        every, head, stands = torch.arange(len(targets.tokens)), weights["lm_head.weight"], []
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
            stands.append(torch.zeros(inside.shape).masked_scatter_(inside, step.stands))
        rounds = expected_rounds(stands, inside)
        # A slot predicts two tokens on, and the first token of an answer comes from prefill.
        first = torch.tensor([[max(0, s.prompt_tokens - 1)] for s in sequences])
        return (inside.sum(1) - first[:, 0]) / rounds.gather(1, first)[:, 0]


def expected_rounds(stands: Many[Tensor], inside: Tensor) -> Tensor:
    """How many rounds it takes from each slot to the end, given the tokens: [B, T].

    From slot t a chain walks on while its drafts stand, and the target adds a token:
    R(t) = 1 + Σ_j P(exactly j stand) R(t + j + 1).

    Args:
        stands: of pass 0 .. K - 1, [B, T], the odds that the next token was drafted and accepted (`losses.Step`);
            0 where it is not known.
        inside: [B, T] bool, no padding.
    """
    batch, length = inside.shape
    rounds = torch.zeros(batch, length + len(stands) + 1)
    for t in reversed(range(length)):
        reach, total = torch.ones(batch), torch.ones(batch)
        for k, odds in enumerate(stands[: length - t]):
            stood = reach * odds[:, t + k]
            total = total + (reach - stood) * rounds[:, t + k + 1]
            reach = stood
        rounds[:, t] = (total + reach * rounds[:, t + len(stands) + 1]) * inside[:, t]
    return rounds[:, :length]


def trial(
    serving: ArrayLike,
    candidate: ArrayLike,
    *,
    least_ratio: float = 0.95,
    least: int = 8,
    level: float = 0.95,
    groups: ArrayLike | None = None,
    rng: np.random.Generator,
) -> Verdict:
    """Judge speeds measured in turns: the geometric mean of candidate / serving, with its interval.

    Passed where the interval is above `least_ratio`, harmful where it is below; between the two the trial was too
    short, and the candidate does not pass.

    Args:
        serving, candidate: [n] tokens per second of paired rounds, or blocks of them, in interleaved order.
        least_ratio: what the ratio must surely reach.
        least: pairs without which nothing passes.
        level: of the interval.
        groups: [n] pairs that belong together, such as those of one prompt.
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
        return Verdict(False, f"{len(ours)} pairs are fewer than the {least} needed")
    if not (np.isfinite(theirs).all() and (theirs > 0).all()):
        return Verdict(False, "the candidate's speed is not always finite and above 0", harmful=True)
    ratio = paired_speedup(theirs, ours, groups=groups, level=level, rng=rng)  # seconds a/b = speeds b/a
    passed, worse = ratio.low > least_ratio, ratio.high < least_ratio
    verdict = "above" if passed else "below" if worse else "not surely above"
    return Verdict(passed, f"speed ratio {ratio} over {len(ours)} pairs, {verdict} {least_ratio:g}", ratio, worse)
