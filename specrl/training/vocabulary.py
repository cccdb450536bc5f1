"""A draft's vocabulary for a workload: some requests are decoded plainly, and the tokens that come most are it."""

from __future__ import annotations

import torch
from torch import Tensor

from specrl.agents.draft.vocabulary import Vocabulary, coverage, top_tokens
from specrl.core.interfaces import Workload
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.models.target import Target

_BATCH = 16


def served_vocabulary(
    model: Target, workload: Workload, size: int, *, max_context: int, seed: int, requests: int
) -> tuple[Vocabulary, float]:
    """The `size` most frequent tokens of prompts and continuations, and their share of a last quarter kept apart.

    Raises:
        ValueError: a size out of [1, V], or fewer than 4 requests.
    """
    if requests < 4:
        raise ValueError(f"a vocabulary needs at least 4 requests to be chosen from, but got {requests}")
    counts = torch.zeros(2, model.config.vocab_size, dtype=torch.int64)
    top_tokens(counts[0] + 1, size)  # refuses a size before anything is served
    engine = LocalEngine(model, max_context=max_context)
    session = engine.start(workload, batch_size=min(_BATCH, requests), seed=seed, plain=True)
    done = 0
    while done < requests:
        for ended in session.round(Plan(0)).finished:
            apart = int(done >= requests * 3 // 4)
            counts[apart] += _counted((*ended.prompt, *ended.tokens), model.config.vocab_size)
            done += 1
    engine.close()
    vocabulary = top_tokens(counts[0], size)
    return vocabulary, coverage(vocabulary.ids, counts[1])


def _counted(tokens: tuple[int, ...], vocab_size: int) -> Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=vocab_size)
