"""The draft that training starts from, with the most frequent tokens of the workload as its vocabulary if asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from specrl.config import DraftConfig
from specrl.core.checks import require
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.io.output import show
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import load_checkpoint

_COUNTED, _HELD_OUT = 72, 24  # requests that are decoded plainly to count tokens, and to test the vocabulary
_BATCH = 16


def top_tokens(counts: Tensor, size: int) -> Tensor:
    """Return the ids [size] int64, ascending, of the most frequent tokens of `counts [V]`; ties go to the lower ids.

    A size out of [1, V] or counts of 0 raise a ValueError.
    """
    require(1 <= size <= len(counts), "draft.vocab_size", f"in [1, {len(counts)}]", size)
    if not counts.any():
        raise ValueError("a draft vocabulary needs counted tokens, but got none")
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def coverage(ids: Tensor, counts: Tensor) -> float:
    """Return the share of the tokens in `counts [V]` that are in the vocabulary; nan if no token was counted."""
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
    """Load the draft, or make a new one with the most frequent `draft.vocab_size` tokens of the workload.

    A run that resumes `checkpoint` has its vocabulary; a ValueError if that has another size.
    """
    size, ids = draft.vocab_size, None
    if size is not None and checkpoint is not None:
        ids = load_checkpoint(checkpoint, "online").vocabulary
        if ids is None:
            ids = torch.arange(model.config.vocab_size)
        require(len(ids) == size, "draft.vocab_size", f"the checkpoint's, {len(ids)}", size)
    elif size is not None:
        ids = _count_tokens(model, workload, size, max_context=max_context, seed=seed)
    return draft.load(model, seed=seed, vocabulary=ids)


def _count_tokens(model: Target, workload: Workload, size: int, *, max_context: int, seed: int) -> Tensor:
    """Serve requests; return the `size` most frequent tokens of prompts and continuations, and print their coverage."""
    counts, held_out = torch.zeros(2, model.config.vocab_size, dtype=torch.int64)
    top_tokens(counts + 1, size)  # checks the size before anything is served
    engine = LocalEngine(model, max_context=max_context)
    session = engine.start(workload, batch_size=_BATCH, seed=seed, plain=True)
    finished = 0
    while finished < _COUNTED + _HELD_OUT:
        for request in session.round(Plan(0)).finished:
            tokens = torch.tensor((*request.prompt, *request.tokens))
            (counts if finished < _COUNTED else held_out).add_(tokens.bincount(minlength=len(counts)))
            finished += 1
    engine.close()
    ids, occurring = top_tokens(counts, size), int(counts.count_nonzero())
    covered = coverage(ids, held_out)
    show(f"draft vocabulary: {size} of {len(counts)} tokens ({occurring} occur), covering {covered:.1%} of the text")
    return ids
