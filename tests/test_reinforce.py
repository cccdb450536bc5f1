from typing import Any

import numpy as np
import pytest
import torch
from test_draft_tokens import TickingClock
from tiny import AUX_LAYERS, Listed, prompts, tiny_draft, tiny_target, with_vocabulary

from specrl.agents.draft.actor import DraftActor
from specrl.agents.draft.reinforce import Reinforce
from specrl.core.interfaces import Request
from specrl.decoding.engine import LocalEngine
from specrl.envs.draft_tokens import DraftTokensEnv
from specrl.models.draft import Draft

K, BATCH = 3, 32


def make(count: int, seed: int, batch_size: Any = BATCH, rounds: int = 8) -> DraftTokensEnv:
    """Every reading of the clock takes a millisecond: rewards depend on the tokens alone."""
    engine = LocalEngine(tiny_target(), max_context=64, clock=TickingClock(), aux_layers=AUX_LAYERS)
    workload = Listed([Request(p, 30, 0.7, ignore_eos=True) for p in prompts(count, 4, seed=seed)])
    settings: dict[str, Any] = {"batch_size": batch_size, "max_rounds": rounds, "reward": "speedup"}
    return DraftTokensEnv(engine=engine, workload=workload, num_steps=K, **settings)


def new_actor(draft: Draft, rows: int = BATCH) -> DraftActor:
    return DraftActor(draft, tiny_target(), rows=rows, num_steps=K, max_context=64, seed=1)


def make_learner(draft: Draft | None = None, **settings: Any) -> Reinforce:
    return Reinforce(draft or tiny_draft(10), tiny_target().embedding, num_steps=K, **settings)


def play(env: DraftTokensEnv, actor: DraftActor, learner: Reinforce | None = None, seed: int = 0) -> dict[str, Any]:
    """Run an episode; return mean reward and accept length, and log q of tested drafts in the learner's order."""
    observation, info = env.reset(seed=seed)
    over, tested, rewards, lengths = False, [], list[float](), list[float]()
    while not over:
        actor.read(info["prefills"])
        if learner is not None:
            learner.see(observation, info)
        drafts, q = actor.act(observation)
        observation, reward, terminated, truncated, after = env.step(drafts.numpy())
        done, over = after["round"], terminated or truncated
        correct = done.correct_drafts.tolist()
        if learner is not None:
            parts = done.tokens * after["t0_s"] / after["seconds"]  # their mean is the reward
            assert parts.mean() == pytest.approx(reward)
            learner.record(info["request_ids"].tolist(), drafts, correct, parts)
        for row, accepted in enumerate(correct):
            for k in range(min(accepted + 1, K)):
                tested.append((k, len(rewards), row, float(q[row, k, drafts[row, k]].log())))
        rewards.append(reward)
        lengths.append(done.accept_length)
        info = after
    logp = [t[3] for t in sorted(tested) if t[1] > 0]  # the first round only sets the baseline
    return {"reward": np.mean(rewards), "length": np.mean(lengths), "logp": logp}


def test_it_improves_reward_and_accept_length_on_new_prompts() -> None:
    actor, held_out = new_actor(tiny_draft(10)), make(200, seed=9, rounds=40)
    learner = make_learner(learning_rate=3e-3)
    before, env = play(held_out, actor), make(2000, seed=0)
    for episode in range(28):
        play(env, actor, learner, seed=episode)
        assert learner.update()["updates"] == 1.0
        version, weights = learner.weights()
        actor.load(weights, version=version)
    after = play(held_out, actor)
    assert version == 28
    assert after["reward"] > 1.1 * before["reward"] and after["length"] > 1.1 * before["length"]


@pytest.mark.parametrize("vocabulary", [None, (1, 2, 4, 5, 8)], ids=["whole", "reduced"])
def test_log_probabilities_are_those_that_drafts_were_sampled_with(vocabulary: tuple[int, ...] | None) -> None:
    """With requests that end, start, are parked and continue."""
    draft = tiny_draft(10) if vocabulary is None else with_vocabulary(tiny_draft(10), vocabulary)
    learner = make_learner(draft)
    episode = play(make(40, 0, batch_size="4", rounds=25), new_actor(draft, 4), learner)
    logp, advantages = learner.log_probabilities()
    assert len(logp) == len(episode["logp"]) > 100 and len(advantages) == len(logp)
    np.testing.assert_allclose(logp.detach(), episode["logp"], atol=2e-4)


def test_the_estimate_is_the_gradient_of_the_expected_reward() -> None:
    """Each token is drafted once and weighted by its probability: the sum is exactly the gradient of Σ q(x) r(x)."""
    vocab_size = tiny_target().config.vocab_size
    observation, info = make(1, 0, batch_size=vocab_size).reset(seed=0)  # the same prompt in every row
    actor = new_actor(tiny_draft(10), vocab_size)
    actor.read(info["prefills"])
    row = int((torch.from_numpy(observation["last"] == observation["last"][0])).nonzero()[0])
    q = actor.act(observation)[1][row, 0]
    request = int(info["request_ids"][row])
    rewards, baseline = torch.linspace(-1.0, 2.0, vocab_size), 0.25
    learner = make_learner(forget=0.0)
    learner.see(observation, info)
    for token in range(vocab_size):
        learner.record([request], torch.full((1, K), -1), [0], baseline)  # sets the baseline
        weighted = baseline + float(q[token] * (rewards[token] - 0.5))  # the term of any constant has the sum 0
        learner.record([request], torch.tensor([[token, -1, -1]]), [0], weighted)
    logp, advantages = learner.log_probabilities()
    (advantages * logp).sum().backward()
    estimate = {n: p.grad.clone() for n, p in learner.parameters.items() if p.grad is not None}
    learner.optimizer.zero_grad()
    (learner.log_probabilities()[0].exp() * rewards).sum().backward()
    for name, exact in learner.parameters.items():
        assert exact.grad is not None
        scale = float(exact.grad.abs().max())
        torch.testing.assert_close(estimate[name], exact.grad, atol=2e-3 * scale + 1e-7, rtol=2e-3)


def see(learner: Reinforce) -> None:
    learner.see(*make(8, 0, batch_size=2).reset(seed=0))


def test_advantages_are_relative_to_the_mean_of_earlier_rounds_at_the_batch_size() -> None:
    learner = make_learner(forget=0.5)
    see(learner)
    pair, one = torch.tensor([[1, 2, 3], [4, -1, -1]]), torch.tensor([[1, 2, 3]])
    learner.record([0, 1], pair, [0, 0], 2.0)  # no baseline yet
    learner.record([0], one, [3], 9.0)  # nor at batch size 1
    learner.record([0, 1], pair, [1, 0], 5.0)
    assert learner.log_probabilities()[1].tolist() == [3.0, 3.0, 3.0]  # both first drafts, and the second of request 0
    learner.record([0, 1], pair, [0, 0], 0.0)  # the mean is (0.5 * 2 + 5) / 1.5
    assert learner.log_probabilities()[1].tolist() == pytest.approx([3.0, 3.0, -4.0, -4.0, 3.0])
    learner.begin()
    see(learner)
    learner.record([0], one, [0], np.array([10.0]))  # baselines continue in the next episode
    assert learner.log_probabilities()[1].tolist() == [1.0]


def test_without_drafts_the_weights_do_not_change() -> None:
    learner = make_learner()
    before = learner.weights()[1]
    see(learner)
    for _ in range(3):
        learner.record([0, 1], torch.full((2, K), -1), [0, 0], 1.0)
    assert learner.update()["updates"] == 0.0
    assert all(torch.equal(before[name], t) for name, t in learner.weights()[1].items())


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("learning_rate", -1.0), ("forget", 1.0)])
def test_numbers_out_of_range_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        make_learner(**{name: value})
