"""The results of a round: frozen values that engines return."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished request: its prompt and its generated tokens, as token ids."""

    request_id: int
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Round:
    """One draft proposal, verified and committed for every live request. Rounds with equal fields are equal.

    All seconds are device-synchronised differences of one monotonic clock.
    """

    plan: Plan
    request_ids: Ints  # [B] int64
    tokens: Ints  # [B] int64, tokens committed; tokens after the end of a request are dropped
    correct_drafts: Ints  # [B] int64, drafts accepted, without the bonus token and before tokens are dropped
    context_lengths: Ints  # [B] int64, tokens known of each request before the round
    draft_s: float  # drafting, including the catch-up of the draft's cache
    verify_s: float  # the target's forward pass and the acceptance
    other_s: float  # commit and bookkeeping
    prefill_s: float = 0.0  # after the round, for new requests; not in `seconds`
    draft_version: int = 0
    finished: tuple[Completion, ...] = ()

    def __post_init__(self) -> None:
        for name in ("tokens", "correct_drafts", "context_lengths"):
            assert getattr(self, name).shape == self.request_ids.shape, f"{name} must be [B]"
        assert (self.correct_drafts <= self.plan.num_steps).all(), "more drafts accepted than proposed"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Round) and all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    @property
    def batch_size(self) -> int:
        """Live requests in the round."""
        return len(self.request_ids)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the round, prefill excluded."""
        return self.draft_s + self.verify_s + self.other_s

    @property
    def accept_length(self) -> float:
        """Mean of `correct_drafts` + 1: tokens per request, including the bonus token."""
        return float(self.correct_drafts.sum()) / len(self.correct_drafts) + 1.0

    def histogram(self) -> Ints:
        """Count the requests by number of correct drafts: [num_steps + 1] int64."""
        return np.bincount(self.correct_drafts, minlength=self.plan.num_steps + 1)

    def reached(self) -> list[int]:
        """Count the requests whose first k drafts were accepted, for k = 0 .. num_steps: [num_steps + 1]."""
        correct = self.correct_drafts.tolist()  # plain Python is faster than NumPy on a dozen numbers
        counts = [len(correct)]
        for k in range(self.plan.num_steps):
            counts.append(counts[-1] - correct.count(k))
        return counts


@dataclass(frozen=True, slots=True)
class PlainSample:
    """One measured step of plain decoding: no draft, no feature capture, nothing committed."""

    batch_size: int
    context: float  # mean tokens known per live request
    seconds: float


@dataclass(frozen=True, slots=True)
class Trace:
    """The data that a learner needs from one round or prefill: every verified node, accepted or rejected.

    Row 0 of each request is its last committed token; `logits[b, i]` is the target's distribution over the
    token that follows `tokens[b, i]`, and `features[b, i]` the hidden states of its three aux layers at that token. A
    prefill is a trace whose rows are the prompt, all accepted.
    """

    request_ids: Ints  # [B] int64
    positions: Ints  # [B] int64, position in the request of row 0's token
    tokens: Tensor  # [B, n] int64
    features: Tensor  # [B, n, 3H], the target's dtype
    logits: Tensor  # [B, n, V] float32
    parents: Tensor  # [B, n] int64, the row that each node continues; -1 for row 0
    path: Tensor  # [B, num_steps + 1] int64, rows on the accepted path; padding -1
    draft_version: int
    plan: Plan | None = None  # None: a prefill
    temperatures: tuple[float, ...] = ()
    finished: tuple[int, ...] = ()  # ids of requests whose last trace this is
