"""The draft that training starts from, with the most frequent tokens of the workload as its vocabulary if asked for."""

from __future__ import annotations

from dataclasses import dataclass
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
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The most frequent tokens, for `new_draft(vocabulary=...)`."""

    ids: Tensor  # [Vd] int64, ascending
    coverage: float  # share of the counted tokens; see `coverage` for other tokens
    seen: int  # different tokens counted; if fewer than Vd, the lowest other ids fill the rest


def top_tokens(counts: Tensor, size: int) -> Vocabulary:
    """The `size` most frequent tokens of `counts [V]`; ties go to the lower ids.

    Raises:
        ValueError: a size out of [1, V], or no tokens counted.
    """
    total = int(counts.sum())
    if not 1 <= size <= len(counts):
        raise ValueError(f"a draft vocabulary must have 1 to {len(counts)} tokens, but got {size}")
    if total == 0:
        raise ValueError("a draft vocabulary needs counted tokens, but got none")
    ids = counts.argsort(descending=True, stable=True)[:size].sort().values
    return Vocabulary(ids, int(counts[ids].sum()) / total, int((counts > 0).sum()))


def coverage(ids: Tensor, counts: Tensor) -> float:
    """The share of the tokens in `counts [V]` that are in the vocabulary; nan if no token was counted."""
    total = int(counts.sum())
    return int(counts[ids].sum()) / total if total else float("nan")


def make_draft(
    draft: DraftConfig,
    model: Target,
    workload: Workload,
    *,
    max_context: int,
    seed: int,
    checkpoint: Path | None = None,
    requests: int = REQUESTS,
) -> Draft:
    """Load the draft, or make a new one for a workload.

    Args:
        draft: which draft; `vocab_size` tokens of a new one are counted here.
        model: the target.
        workload: requests to count tokens of.
        max_context: most tokens of a request.
        seed: of the initialisation and of the requests.
        checkpoint: of the run to resume, which has a vocabulary; None: a new run.
        requests: to count tokens of.

    Raises:
        ValueError: a vocabulary that is larger than the target's, or of another size than the checkpoint's.
    """
    size, ids = draft.vocab_size, None
    if size is not None and checkpoint is not None:
        ids = load_checkpoint(checkpoint, "online").tensors.get("vocabulary", torch.arange(model.config.vocab_size))
        if len(ids) != size:
            raise ValueError(f"draft.vocab_size must be the checkpoint's, {len(ids)}, but got {size}")
    elif size is not None:
        found, covered = served_vocabulary(model, workload, size, max_context=max_context, seed=seed, requests=requests)
        ids = found.ids
        show(
            f"draft vocabulary: {size} of {model.config.vocab_size} tokens, {found.seen} of them seen, "
            f"covering {covered:.1%} of the text"
        )
    return draft.load(model, seed=seed, vocabulary=ids)


def served_vocabulary(
    model: Target, workload: Workload, size: int, *, max_context: int, seed: int, requests: int
) -> tuple[Vocabulary, float]:
    """The `size` most frequent tokens of prompts and continuations, and their share of the last quarter of requests.

    The last quarter is not counted for the choice.

    Raises:
        ValueError: a size out of [1, V], or fewer than 4 requests.
    """
    if requests < 4:
        raise ValueError(f"a vocabulary must be counted from at least 4 requests, but got {requests}")
    counts = torch.zeros(2, model.config.vocab_size, dtype=torch.int64)
    top_tokens(counts[0] + 1, size)  # checks the size before anything is served
    engine = LocalEngine(model, max_context=max_context)
    session = engine.start(workload, batch_size=min(_BATCH, requests), seed=seed, plain=True)
    done = 0
    while done < requests:
        for ended in session.round(Plan(0)).finished:
            part = int(done >= requests * 3 // 4)
            counts[part] += _counted((*ended.prompt, *ended.tokens), model.config.vocab_size)
            done += 1
    engine.close()
    vocabulary = top_tokens(counts[0], size)
    return vocabulary, coverage(vocabulary.ids, counts[1])


def _counted(tokens: tuple[int, ...], vocab_size: int) -> Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=vocab_size)
