"""The draft that training starts from, with the most frequent tokens of the workload as its vocabulary if asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from specrl.config import DraftConfig
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import show
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import load_checkpoint

REQUESTS = 96  # decoded plainly to count tokens
_HELD_OUT = REQUESTS // 4  # of them, to test the vocabulary
_BATCH = 16


def top_tokens(counts: Tensor, size: int) -> Tensor:
    """The `size` most frequent tokens of `counts [V]`; ties go to the lower ids.

    Returns:
        [size] int64, ascending, for `new_draft(vocabulary=...)`.

    Raises:
        ValueError: a size out of [1, V], or no tokens counted.
    """
    if not 1 <= size <= len(counts):
        raise ValueError(f"a draft vocabulary must have 1 to {len(counts)} tokens, but got {size}")
    if not counts.any():
        raise ValueError("a draft vocabulary needs counted tokens, but got none")
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(ids: Tensor, counts: Tensor) -> float:
    """The share of the tokens in `counts [V]` that are in the vocabulary; nan if no token was counted."""
    return float(counts[ids].sum().double() / counts.sum())


def make_draft(
    draft: DraftConfig,
    model: Target,
    workload: Workload,
    *,
    max_context: int,
    seed: int,
    checkpoint: Path | None = None,
) -> Draft:
    """Load the draft, or make a new one, whose `vocab_size` tokens are counted in requests of the workload.

    Args:
        draft: which draft.
        model: the target.
        workload: requests to count tokens of.
        max_context: most tokens of a request.
        seed: of the initialisation and of the requests.
        checkpoint: of the run to resume, which has a vocabulary; None: a new run.

    Raises:
        ValueError: a vocabulary that is larger than the target's, or of another size than the checkpoint's.
    """
    size, ids = draft.vocab_size, None
    if size is not None and checkpoint is not None:
        ids = load_checkpoint(checkpoint, "online").vocabulary
        if ids is None:
            ids = torch.arange(model.config.vocab_size)
        if len(ids) != size:
            raise ValueError(f"draft.vocab_size must be the checkpoint's, {len(ids)}, but got {size}")
    elif size is not None:
        ids = _count_tokens(model, workload, size, max_context=max_context, seed=seed)
    return draft.load(model, seed=seed, vocabulary=ids)


def _count_tokens(model: Target, workload: Workload, size: int, *, max_context: int, seed: int) -> Tensor:
    """Serve requests; return the `size` most frequent tokens of prompts and continuations, and print their coverage."""
    counts, held_out = torch.zeros(2, model.config.vocab_size, dtype=torch.int64)
    top_tokens(counts + 1, size)  # checks the size before anything is served
    engine = LocalEngine(model, max_context=max_context)
    session = engine.start(workload, batch_size=_BATCH, seed=seed, plain=True)
    done = 0
    while done < REQUESTS:
        for ended in session.round(Plan(0)).finished:
            tokens = torch.tensor((*ended.prompt, *ended.tokens))
            (counts if done < REQUESTS - _HELD_OUT else held_out).add_(tokens.bincount(minlength=len(counts)))
            done += 1
    engine.close()
    ids, seen = top_tokens(counts, size), int(counts.count_nonzero())
    covered = coverage(ids, held_out)
    show(f"draft vocabulary: {size} of {len(counts)} tokens, {seen} of them seen, covering {covered:.1%} of the text")
    return ids
