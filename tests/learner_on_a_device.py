"""A learner on a pretended device (`pretended_device`), against one on the CPU; run as a process of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pretended_device
import torch
from tiny import AUX_LAYERS, Listed, prompts, tiny_target
from torch import Tensor

import specrl
from specrl.agents.draft import learner as draft_learner
from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.models.draft import Draft, new_draft

TENSORS = ("tokens", "features", "logits", "parents", "path")
DRAFT = new_draft(tiny_target(), intermediate_size=16, aux_layers=AUX_LAYERS)


def traffic() -> list[Trace]:
    """Traces of four requests, with rounds that drafted."""
    engine = specrl.LocalEngine(tiny_target(), DRAFT, max_context=32)
    listed = [Request(prompt, 5, 1.0, ignore_eos=True) for prompt in prompts(4, 4)]
    session = engine.start(Listed(listed), batch_size=4, seed=0, trace=True)
    for _ in range(5):
        session.round(Plan(2))
    return session.drain()


def learn(
    traces: list[Trace], embedding: Tensor, draft: Draft = DRAFT, **settings: Any
) -> tuple[dict[str, float], OnlineLearner]:
    """Metrics of a first update, of further ones, and of those of a learner with the restored state."""
    config = LearnerConfig(batch_size=2, updates_per_request=0.5, **settings)
    learner, restored = (OnlineLearner(draft, embedding, config) for _ in range(2))
    learner.take(traces)
    metrics = {f"first.{name}": value for name, value in learner.update(list(learner.replay)[:2]).items()}
    metrics |= learner.learn([])
    restored.load_state_dict(learner.state_dict())
    restored.take_sequences(learner.replay)
    metrics |= {f"restored.{name}": value for name, value in restored.learn([]).items()}
    return metrics, restored


def accept_lengths(learner: OnlineLearner, embedding: Tensor) -> np.ndarray:
    return Gate(DRAFT.config, embedding, num_steps=2).accept_lengths(learner.weights()[1], list(learner.replay))


def main() -> None:
    pretended_device.install()
    draft_learner.check_device = lambda device: None  # type: ignore[attr-defined]
    traces, embedding = traffic(), tiny_target().embedding
    vocabulary = torch.arange(0, 10, 2)
    reduced = new_draft(tiny_target(), vocabulary=vocabulary, intermediate_size=16, aux_layers=AUX_LAYERS)
    chain: dict[str, Any] = {"loss": "accept_length:0.5+forward_kl", "temperature": None, "rejected_weight": 0.3}
    for target_on_device, dtype, settings in ((True, "bfloat16", {}), (False, "float32", {**chain, "draft": reduced})):
        expected, on_cpu = learn(traces, embedding, dtype="float32", **settings)
        assert expected["updates"] >= 2, expected
        with pretended_device.pretended() as device:
            if target_on_device:
                moved = [replace(t, **{name: getattr(t, name).clone().to(device) for name in TENSORS}) for t in traces]
                target_embedding = embedding.clone().to(device)
                metrics, learner = learn(moved, target_embedding, dtype=dtype, **settings)
                here, there = accept_lengths(on_cpu, embedding), accept_lengths(learner, target_embedding)
                assert len(there) > 3 and np.allclose(here, there, rtol=0.05), (here, there)
            else:
                target_embedding = embedding
                metrics, learner = learn(traces, embedding, dtype=dtype, device=str(device), **settings)
            for name, value in expected.items():  # optimiser steps amplify rounding where gradients are near 0
                tolerance = 1e-4 if dtype == "float32" and name.startswith("first") else 0.05
                assert abs(metrics[name] - value) <= tolerance * max(1.0, abs(value)), (
                    dtype,
                    name,
                    metrics[name],
                    value,
                )
            assert all(p.device == device and p.dtype == torch.float32 for p in learner.parameters.values())
            assert all(sequence.logits.device == device for sequence in learner.replay)
            moments = [tensor for state in learner.optimizer.state.values() for tensor in state.values()]
            assert moments and all(tensor.device == device for tensor in moments)
            weights = learner.weights()[1]
            assert {weights[name].device for name in learner.parameters} == {target_embedding.device}
            try:
                learner.parameters["fc.weight"] @ traces[0].features[0].clone().mT
            except RuntimeError as error:
                assert "meet" in str(error)
            else:
                raise AssertionError("the device accepts the CPU's tensors, so this proves nothing")
    print("coherent")


if __name__ == "__main__":
    main()
