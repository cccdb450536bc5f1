"""The embedded target's prompts, a draft that learned from them, and what our own engine makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tiny import Listed

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.models.draft import Draft, new_draft
from specrl.models.embedded import embedded_directory
from specrl.models.target import Target
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.text import load_workload

PROMPT, NEW = 48, 48


class Decoded(NamedTuple):
    """What a prompt became."""

    tokens: tuple[int, ...]
    histogram: tuple[int, ...]  # rounds by number of correct drafts


def prompts(count: int, split: str = "held_out") -> list[tuple[int, ...]]:
    """Token ids of `count` pieces of Python."""
    source = load_workload(
        "stdlib",
        load_tokenizer(embedded_directory()),
        prompt_tokens=PROMPT,
        max_new_tokens=NEW,
        temperature=0.0,
        split=split,  # type: ignore[arg-type]
    ).requests(0)
    return [next(source).prompt for _ in range(count)]


def learn_draft(target: Target, requests: int = 128) -> Draft:
    """From random initialisation on the target's greedy output."""
    draft = new_draft(target, intermediate_size=128)
    engine = LocalEngine(target, draft, max_context=PROMPT + NEW)
    listed = [Request(prompt, NEW, ignore_eos=True) for prompt in prompts(requests, "train")]
    session = engine.start(Listed(listed), batch_size=32, seed=0, trace=True)
    learner = OnlineLearner(draft, target.embedding, LearnerConfig(batch_size=8, ttt_steps=3, dtype="float32"))
    while learner.requests < requests:
        session.round(Plan(0))
        learner.learn(session.drain())
    return Draft(draft.config, learner.weights()[1])


def decode(target: Target, draft: Draft, listed: Sequence[tuple[int, ...]], plan: Plan, new: int) -> list[Decoded]:
    """Each prompt by itself, greedy: its tokens, and its rounds by number of correct drafts."""
    engine = LocalEngine(target, draft, max_context=PROMPT + new + plan.num_steps + 1, use_rejection_sampling=False)
    out = []
    for prompt in listed:
        session = engine.start(Listed([Request(prompt, new, ignore_eos=True)]), batch_size=1, seed=0)
        histogram = np.zeros(plan.num_steps + 1, np.int64)
        done = session.round(plan)
        while not done.finished:
            histogram += done.histogram()
            done = session.round(plan)
        histogram += done.histogram()
        out.append(Decoded(done.finished[0].tokens, tuple(histogram.tolist())))
    return out


def margin(target: Target, tokens: Sequence[int]) -> float:
    """By how much the target's first choice after `tokens` beats its second, in logits."""
    with torch.inference_mode():
        best = target(torch.tensor([list(tokens)]))[0, -1].topk(2).values
    return float(best[0] - best[1])
