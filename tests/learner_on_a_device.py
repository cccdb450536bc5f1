"""A learner on a device that is not there (`pretended_device`), against one on the CPU; run as a process of its own."""

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
from specrl.models.draft import new_draft

_TENSORS = ("tokens", "features", "logits", "parents", "path")


def traffic() -> list[Trace]:
    """Traces of four requests, with rounds that drafted."""
    draft = new_draft(tiny_target(), intermediate_size=16, aux_layers=AUX_LAYERS)
    engine = specrl.LocalEngine(tiny_target(), draft, max_context=32)
    listed = [Request(prompt, 5, 1.0, ignore_eos=True) for prompt in prompts(4, 4)]
    session = engine.start(Listed(listed), batch_size=4, seed=0, trace=True)
    for _ in range(5):
        session.round(Plan(2))
    return session.drain()


def moved(traces: list[Trace], device: torch.device) -> list[Trace]:
    return [replace(t, **{name: getattr(t, name).clone().to(device) for name in _TENSORS}) for t in traces]


def learnt(traces: list[Trace], embedding: Tensor, **settings: Any) -> tuple[dict[str, float], OnlineLearner]:
    """A first update, further ones, and those of a learner that the state was handed to."""
    words = torch.arange(0, 10, 2) if settings.pop("reduced", False) else None
    draft = new_draft(tiny_target(), vocabulary=words, intermediate_size=16, aux_layers=AUX_LAYERS)
    config = LearnerConfig(batch_size=2, updates_per_request=0.5, **settings)
    learner, again = (OnlineLearner(draft, embedding, config) for _ in range(2))
    learner.take(traces)
    found = {f"first.{name}": value for name, value in learner.update(list(learner.replay)[:2]).items()}
    found |= learner.learn([])
    again.load_state_dict(learner.state_dict())
    again.take_sequences(learner.replay)
    for name, value in again.learn([]).items():
        found[f"again.{name}"] = value
    return found, again


def judged(learner: OnlineLearner, embedding: Tensor) -> list[float]:
    """What the gate makes of the weights that the learner hands out."""
    shape = new_draft(tiny_target(), intermediate_size=16, aux_layers=AUX_LAYERS).config
    gate = Gate(shape, embedding, num_steps=2)
    return [float(length) for length in gate.accept_lengths(learner.weights()[1], list(learner.replay))]


def main() -> None:
    pretended_device.install()
    draft_learner.check_device = lambda device: None  # type: ignore[attr-defined]
    traces, embedding = traffic(), tiny_target().embedding
    chain = {"loss": "accept_length:0.5+forward_kl", "temperature": None, "reduced": True, "rejected_weight": 0.3}
    for settings, dtype, together in (({}, "bfloat16", True), (chain, "float32", False)):
        plain, known = learnt(traces, embedding, dtype="float32", **settings)
        assert plain["updates"] >= 2, plain
        with pretended_device.pretended() as device:
            if together:
                taken, shared = moved(traces, device), embedding.clone().to(device)
                got, learner = learnt(taken, shared, dtype=dtype, **settings)
                here, there = judged(known, embedding), judged(learner, shared)
                assert len(there) > 3 and np.allclose(here, there, rtol=0.05), (here, there)
            else:
                shared = embedding
                got, learner = learnt(traces, shared, dtype=dtype, device=str(device), **settings)
            for name in plain:  # optimiser steps make much of rounding where gradients are near 0
                exact = 1e-4 if dtype == "float32" and name.startswith("first") else 0.05
                near = abs(got[name] - plain[name]) <= exact * max(1.0, abs(plain[name]))
                assert near, (dtype, settings, name, got[name], plain[name])
            assert all(p.device == device and p.dtype == torch.float32 for p in learner.parameters.values())
            assert all(sequence.logits.device == device for sequence in learner.replay)
            moments = [v for of in learner.optimizer.state.values() for v in of.values()]
            assert moments and all(v.device == device for v in moments)
            _, weights = learner.weights()
            assert {weights[name].device for name in learner.parameters} == {shared.device}
            try:
                learner.parameters["fc.weight"] @ traces[0].features[0].clone().mT
            except RuntimeError as error:
                assert "meet" in str(error)
            else:
                raise AssertionError("the device lets the CPU's tensors in, so this proves nothing")
    print("coherent")


if __name__ == "__main__":
    main()
