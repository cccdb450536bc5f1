"""Updates that are not finite, and the weights that are restored after them."""

import math

import torch
from tiny import AUX_LAYERS, tiny_target

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import TrainingSequence
from specrl.agents.draft.weights import LearnedWeights
from specrl.models.draft import new_draft

NAN = float("nan")


def make(max_bad_updates: int = 3) -> LearnedWeights:
    config = LearnerConfig(learning_rate=0.1, max_bad_updates=max_bad_updates)
    return LearnedWeights({"a": torch.ones(2), "b": torch.zeros(3)}, config)


def step(weights: LearnedWeights) -> None:
    weights.optimizer.zero_grad()
    sum((t.sum() for t in weights.parameters.values()), torch.zeros(())).backward()
    weights.step()


def test_only_finite_updates_are_admitted() -> None:
    weights = make(max_bad_updates=9)
    assert weights.admits(1.0, 2.0) and weights.admits(-5.0, 0.0)
    for loss, norm in [(NAN, 1.0), (1.0, NAN), (math.inf, 1.0), (1.0, math.inf), (-math.inf, 1.0)]:
        assert not weights.admits(loss, norm)
    assert (weights.bad_updates, weights.rollbacks) == (5, 0)


def test_bad_updates_in_a_row_restore_the_snapshot_and_clear_the_optimiser() -> None:
    weights = make()
    step(weights)
    weights.snapshot()
    good = {name: t.clone() for name, t in weights.averages.items()}
    step(weights)
    assert weights.optimizer.state
    for loss in (NAN, NAN, 1.0, NAN, NAN):  # a good update between starts the count again
        weights.admits(loss, 1.0)
    assert weights.rollbacks == 0
    assert not weights.admits(NAN, 1.0)
    assert (weights.bad_updates, weights.rollbacks) == (5, 1)
    for name in good:
        assert torch.equal(weights.parameters[name], good[name]) and torch.equal(weights.averages[name], good[name])
        assert not torch.equal(good[name], torch.ones(2) if name == "a" else torch.zeros(3))  # not the first ones
    assert not weights.optimizer.state
    assert not weights.admits(NAN, 1.0) and weights.rollbacks == 1  # the count starts again
    step(weights)  # and the parameters are still the optimiser's
    assert not torch.equal(weights.parameters["a"], good["a"])


def test_a_snapshot_is_finite_and_a_copy() -> None:
    weights = make(max_bad_updates=1)
    step(weights)
    with torch.no_grad():
        weights.averages["b"][1] = NAN
    weights.snapshot()
    weights.admits(NAN, NAN)
    for tensors in (weights.parameters, weights.averages):
        assert torch.equal(tensors["a"], torch.ones(2)) and torch.equal(tensors["b"], torch.zeros(3))


def sequence(seed: int = 0) -> TrainingSequence:
    c = tiny_target().config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, c.vocab_size, (12,), generator=generator)
    features, logits = (torch.randn(12, size, generator=generator) for size in (3 * c.hidden_size, c.vocab_size))
    return TrainingSequence(tokens, features, logits, 1.0, 0)


def learner() -> OnlineLearner:
    draft = new_draft(tiny_target(), intermediate_size=16, aux_layers=AUX_LAYERS)
    return OnlineLearner(draft, tiny_target().embedding, LearnerConfig(dtype="float32", ema_decay=0.5))


def test_an_update_that_is_not_finite_does_not_change_a_learner() -> None:
    online = learner()
    assert online.update([sequence()])
    before, version = {n: t.detach().clone() for n, t in online.parameters.items()}, online.version
    moments = {n: online.optimizer.state[t]["exp_avg"].clone() for n, t in online.parameters.items()}
    bad = sequence(2)
    bad.features[4, 2] = NAN
    assert online.update([sequence(1), bad]) == {}
    for name, tensor in online.parameters.items():
        moment = online.optimizer.state[tensor]["exp_avg"]
        assert torch.equal(tensor, before[name]) and torch.equal(moment, moments[name])
        assert tensor.grad is None
    assert online.version == version and online.counts()["bad_updates"] == 1.0


def test_a_learner_that_diverged_is_restored_and_learns_again() -> None:
    online = learner()
    online.update([sequence()])
    online.snapshot()
    good, version = online.weights()[1], online.version
    with torch.no_grad():
        online.parameters["fc.weight"][0, 0] = NAN  # as after a step that overflowed
    assert [online.update([sequence()]) for _ in range(3)] == [{}] * 3
    assert online.counts()["rollbacks"] == 1.0 and online.version == version + 1
    assert all(torch.equal(tensor, good[name]) for name, tensor in online.weights()[1].items())
    losses = [online.update([sequence()])["loss"] for _ in range(20)]
    assert losses[-1] < losses[0] - 0.01
