"""The draft's vocabulary from the traffic seen: the tokens that come most often, and how much of it they cover."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Target ids for `new_draft(vocabulary=...)`, fixed for a server's life."""

    ids: Tensor  # [Vd] int64, ascending
    coverage: float  # share of the tokens that it was made from; of other traffic, see `coverage`
    seen: int  # different tokens there; fewer than Vd: the rest are the lowest ids that never came


def top_tokens(counts: Tensor, size: int) -> Vocabulary:
    """The `size` most frequent tokens of `counts [V]`; of equals, the lower ids.

    Raises:
        ValueError: a size out of [1, V], or nothing counted.
    """
    total = int(counts.sum())
    if not 1 <= size <= len(counts):
        raise ValueError(f"a draft vocabulary must have 1 to {len(counts)} tokens, the target's, but got {size}")
    if total == 0:
        raise ValueError("a draft vocabulary needs traffic to be chosen from, but no token was counted")
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    return Vocabulary(ids, int(counts[ids].sum()) / total, int((counts > 0).sum()))


def coverage(ids: Tensor, counts: Tensor) -> float:
    """The share of the tokens in `counts [V]` that the draft can say at all; nan where nothing was counted."""
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else float("nan")
