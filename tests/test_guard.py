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
    """A good update, served in part."""
    weights.optimizer.zero_grad()
    sum((t.sum() for t in weights.parameters.values()), torch.zeros(())).backward()
    weights.step()


def test_finite_updates_are_admitted_and_others_are_not() -> None:
    weights = make(max_bad_updates=9)
    assert weights.admits(1.0, 2.0) and weights.admits(-5.0, 0.0)
    for loss, norm in [(NAN, 1.0), (1.0, NAN), (math.inf, 1.0), (1.0, math.inf), (-math.inf, 1.0)]:
        assert not weights.admits(loss, norm)
    assert (weights.bad_updates, weights.rollbacks) == (5, 0)


def test_after_its_patience_the_weights_remembered_return_and_the_optimiser_begins_anew() -> None:
    weights = make()
    step(weights)
    weights.snapshot()
    good = {name: t.clone() for name, t in weights.averages.items()}
    step(weights)
    assert weights.optimizer.state
    for tried in range(3):
        assert weights.rollbacks == 0, tried
        assert not weights.admits(NAN, 1.0)
    assert (weights.bad_updates, weights.rollbacks) == (3, 1)
    for name in good:
        assert torch.equal(weights.parameters[name], good[name]) and torch.equal(weights.averages[name], good[name])
        assert not torch.equal(good[name], torch.ones(2) if name == "a" else torch.zeros(3))  # not the first ones
    assert not weights.optimizer.state
    assert not weights.admits(NAN, 1.0) and weights.rollbacks == 1  # patience begins anew
    step(weights)  # and the parameters are still the optimiser's
    assert not torch.equal(weights.parameters["a"], good["a"])


def test_a_good_update_between_renews_patience() -> None:
    weights = make(max_bad_updates=2)
    for loss in (NAN, 1.0, NAN, 1.0, NAN):
        weights.admits(loss, 1.0)
    assert (weights.bad_updates, weights.rollbacks) == (3, 0)
    weights.admits(NAN, 1.0)
    assert weights.rollbacks == 1


def test_weights_that_are_not_finite_are_never_remembered() -> None:
    weights = make(max_bad_updates=1)
    with torch.no_grad():
        weights.averages["b"][1] = NAN
        weights.parameters["b"][1] = NAN
    weights.snapshot()
    weights.admits(NAN, NAN)
    assert torch.equal(weights.parameters["b"], torch.zeros(3)) and torch.equal(weights.averages["b"], torch.zeros(3))


def test_what_is_remembered_does_not_move_with_the_weights() -> None:
    weights = make(max_bad_updates=1)
    step(weights)
    weights.roll_back()
    assert torch.equal(weights.parameters["a"], torch.ones(2)) and torch.equal(weights.averages["a"], torch.ones(2))


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
