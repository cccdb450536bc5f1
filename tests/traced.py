"""Requests as the plugin's trace queue sends them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specrl.sglang.plugin.traces import TraceQueue


def put_request(
    queue: TraceQueue, rid: str, vocab_size: int, width: int, *, start: int = 0, rounds: Sequence[int] = (4, 5, 6, 7)
) -> list[int]:
    """Queue the traces of a request with a prompt of 4 tokens and 4 rounds, and return its 8 tokens.

    The prompt is sent from `start` on, and the rounds that begin at these positions; each rejects its only draft.
    """
    generator = torch.Generator().manual_seed(len(rid))
    tokens = torch.randint(1, vocab_size, (9,), generator=generator)
    features, logits = (torch.randn(9, size, generator=generator) for size in (width, vocab_size))
    requests = {"requests": [rid]}
    prompt = {"tokens": tokens[start:4], "features": features[start:4]}
    queue.put({"kind": "prefill", **requests, "start": start}, prompt)
    header = {"kind": "round", **requests, "plan": "1/1/2", "temperatures": [0.7], "weight_version": "3"}
    for first in rounds:
        values = {"tokens": tokens, "features": features, "logits": logits}
        rows = {name: tensor[None, first : first + 2] for name, tensor in values.items()}
        queue.put(header, {**rows, "path": torch.tensor([[0, -1]]), "positions": torch.tensor([first])})
    queue.put({"kind": "finished", **requests})
    return tokens[:8].tolist()
