"""A random target of a few thousand weights and drafts that learnt from it, for fast tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle

import torch
from torch import Tensor

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.models.checkpoint import expected_target_tensors
from specrl.models.config import TargetArchitecture
from specrl.models.draft import Draft, new_draft
from specrl.models.rope import RopeConfig
from specrl.models.target import Target

CONFIG = TargetArchitecture("llama", 10, 32, 48, 4, 4, 2, 8, 1e-6, RopeConfig(10000.0), 640, eos_token_ids=(0,))
AUX_LAYERS = (1, 2, 3)


@dataclass(frozen=True)
class Listed:
    """A workload that repeats these requests, for any seed."""

    listed: Sequence[Request]

    def requests(self, seed: int) -> Iterator[Request]:
        return cycle(self.listed)


def prompts(count: int, length: int, vocab_size: int = CONFIG.vocab_size, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts without the end-of-sequence token 0."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(row) for row in torch.randint(1, vocab_size, (count, length), generator=generator).tolist()]


@dataclass(frozen=True)
class Drawn:
    """A workload of random prompts; every `never`-th request has `learn=False`."""

    never: int = 0

    def requests(self, seed: int) -> Iterator[Request]:
        for i, prompt in enumerate(prompts(100_000, 4, seed=seed)):
            yield Request(prompt, 20, 1.0, ignore_eos=True, learn=not self.never or i % self.never > 0)


def target_tensors() -> dict[str, Tensor]:
    """Random weights whose logits have a standard deviation of about 1.5."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in expected_target_tensors(CONFIG).items():
        spread = {"model.embed_tokens.weight": 1.0, "lm_head.weight": 1.3 * 32**-0.5}.get(name, 0.25)
        tensors[name] = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * spread
    return tensors


@cache
@torch.inference_mode(False)
def tiny_target(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Target:
    """The target of these weights."""
    return Target(CONFIG, target_tensors(), device=device, dtype=dtype)


@cache
@torch.inference_mode(False)
def tiny_draft(updates: int = 60) -> Draft:
    """A draft that learnt from 128 requests of the tiny target at temperature 1.

    Its attention starts ten times as strong as a new draft's, so that a wrong slot or mask changes its tokens.
    """
    target = tiny_target()
    new = new_draft(target, intermediate_size=32, aux_layers=AUX_LAYERS)
    draft = Draft(new.config, {n: t * (10.0 if "self_attn" in n else 1.0) for n, t in new.tensors.items()})
    engine = LocalEngine(target, draft, max_context=64)
    listed = [Request(prompt, 32, 1.0, ignore_eos=True) for prompt in prompts(128, 4)]
    session = engine.start(Listed(listed), batch_size=128, seed=0, trace=True)
    for _ in range(31):
        session.round(Plan(0))
    config = LearnerConfig(updates_per_request=updates / 128, batch_size=32, ema_decay=0.9, dtype="float32")
    learner = OnlineLearner(draft, target.embedding, config)
    learner.learn(session.drain())
    return Draft(draft.config, learner.weights()[1])


def lively_draft(vocabulary: Sequence[int] | None = None) -> Draft:
    """A random draft whose attention and every norm matter (a new one is nearly the identity)."""
    ids = None if vocabulary is None else torch.tensor(vocabulary)
    draft = new_draft(tiny_target(), vocabulary=ids, intermediate_size=24, aux_layers=AUX_LAYERS)
    generator = torch.Generator().manual_seed(1)
    for tensor in draft.tensors.values():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1.0 + 0.2 * noise if tensor.ndim == 1 else 0.25 * noise)
    return draft


def with_vocabulary(draft: Draft, vocabulary: Sequence[int]) -> Draft:
    """The draft with a vocabulary of these target ids (ascending)."""
    ids = torch.tensor(vocabulary)
    config = replace(draft.config, draft_vocab_size=len(ids))
    tensors = {**draft.tensors, "lm_head.weight": draft.tensors["lm_head.weight"][ids].clone()}
    return Draft(config, {**tensors, "d2t": ids - torch.arange(len(ids))})
