import math

import pytest
import torch
from tiny import AUX_LAYERS, tiny_target
from torch import Tensor

from specrl.agents.draft.divergence_guard import DivergenceGuard
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import TrainingSequence
from specrl.models.draft import new_draft

NAN = float("nan")


def make(
    max_bad_updates: int = 3,
) -> tuple[DivergenceGuard, dict[str, Tensor], dict[str, Tensor], torch.optim.Optimizer]:
    parameters = {"a": torch.ones(2, requires_grad=True), "b": torch.zeros(3, requires_grad=True)}
    served = {name: t.detach().clone() for name, t in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    return DivergenceGuard(parameters, served, optimizer, max_bad_updates), parameters, served, optimizer


def step(parameters: dict[str, Tensor], served: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """A good update, served in part."""
    sum((t.sum() for t in parameters.values()), torch.zeros(())).backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for name, tensor in served.items():
            tensor.lerp_(parameters[name], 0.5)


def test_finite_updates_are_admitted_and_others_are_not() -> None:
    guard, *_ = make(max_bad_updates=9)
    assert guard.admits(1.0, 2.0) and guard.admits(-5.0, 0.0)
    for loss, norm in [(NAN, 1.0), (1.0, NAN), (math.inf, 1.0), (1.0, math.inf), (-math.inf, 1.0)]:
        assert not guard.admits(loss, norm)
    assert (guard.bad_updates, guard.rollbacks) == (5, 0)


def test_after_its_patience_the_weights_remembered_return_and_the_optimiser_begins_anew() -> None:
    guard, parameters, served, optimizer = make()
    step(parameters, served, optimizer)
    guard.snapshot()
    good = {name: t.clone() for name, t in served.items()}
    step(parameters, served, optimizer)
    assert optimizer.state
    for tried in range(3):
        assert guard.rollbacks == 0, tried
        assert not guard.admits(NAN, 1.0)
    assert (guard.bad_updates, guard.rollbacks) == (3, 1)
    for name in good:
        assert torch.equal(parameters[name], good[name]) and torch.equal(served[name], good[name])
        assert not torch.equal(good[name], torch.ones(2) if name == "a" else torch.zeros(3))  # not the first ones
    assert not optimizer.state
    assert not guard.admits(NAN, 1.0) and guard.rollbacks == 1  # patience begins anew
    step(parameters, served, optimizer)  # and the parameters are still the optimiser's
    assert not torch.equal(parameters["a"], good["a"])


def test_a_good_update_between_renews_patience() -> None:
    guard, *_ = make(max_bad_updates=2)
    for loss in (NAN, 1.0, NAN, 1.0, NAN):
        guard.admits(loss, 1.0)
    assert (guard.bad_updates, guard.rollbacks) == (3, 0)
    guard.admits(NAN, 1.0)
    assert guard.rollbacks == 1


def test_weights_that_are_not_finite_are_never_remembered() -> None:
    guard, parameters, served, _ = make(max_bad_updates=1)
    with torch.no_grad():
        served["b"][1] = NAN
        parameters["b"][1] = NAN
    guard.snapshot()
    guard.admits(NAN, NAN)
    assert torch.equal(parameters["b"], torch.zeros(3)) and torch.equal(served["b"], torch.zeros(3))


def test_what_is_remembered_does_not_move_with_the_weights() -> None:
    guard, parameters, served, optimizer = make(max_bad_updates=1)
    step(parameters, served, optimizer)
    guard.roll_back()
    assert torch.equal(parameters["a"], torch.ones(2)) and torch.equal(served["a"], torch.ones(2))


def test_a_guard_begins_with_finite_weights() -> None:
    _, parameters, served, optimizer = make()
    served["a"][0] = NAN
    with pytest.raises(ValueError, match="must be finite, but a is not"):
        DivergenceGuard(parameters, served, optimizer, 3)


# --- in the learner ---


def sequence(seed: int = 0, bad: bool = False) -> TrainingSequence:
    c = tiny_target().config
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, c.vocab_size, (12,), generator=generator)
    features = torch.randn(12, 3 * c.hidden_size, generator=generator)
    if bad:
        features[4, 2] = NAN
    return TrainingSequence(tokens, features, torch.randn(12, c.vocab_size, generator=generator), 1.0, 0)


def learner(rate: float = 5e-3) -> OnlineLearner:
    config = LearnerConfig(dtype="float32", learning_rate=rate, ema_decay=0.5)
    return OnlineLearner(
        new_draft(tiny_target(), intermediate_size=16, aux_layers=AUX_LAYERS), tiny_target().embedding, config
    )


def test_an_update_that_is_not_finite_changes_nothing_of_a_learner() -> None:
    ours = learner()
    assert ours.update([sequence()])
    before, (version, _) = {n: t.detach().clone() for n, t in ours.parameters.items()}, ours.weights()
    moments = {n: ours.optimizer.state[t]["exp_avg"].clone() for n, t in ours.parameters.items()}
    assert ours.update([sequence(1), sequence(2, bad=True)]) == {}
    for name, tensor in ours.parameters.items():
        assert torch.equal(tensor, before[name]) and torch.equal(ours.optimizer.state[tensor]["exp_avg"], moments[name])
        assert tensor.grad is None
    assert ours.weights()[0] == version and ours.counts()["bad_updates"] == 1.0


def test_a_learner_that_diverged_comes_back_and_learns_on() -> None:
    ours = learner()
    ours.update([sequence()])
    ours.snapshot()
    good = ours.weights()[1]
    with torch.no_grad():
        ours.parameters["fc.weight"][0, 0] = NAN  # as after a step that overflowed
    version = ours.version
    for _ in range(3):
        assert ours.update([sequence()]) == {}
    assert ours.counts()["rollbacks"] == 1.0 and ours.version == version + 1
    for name, tensor in ours.weights()[1].items():
        assert torch.equal(tensor, good[name])
    losses = [ours.update([sequence()])["loss"] for _ in range(20)]
    assert losses[-1] < losses[0] - 0.01
