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


def make(count: int, seed: int, batch_size: Any = BATCH, rounds: int = 8, temperature: float = 0.7) -> DraftTokensEnv:
    """Every reading of the clock takes a millisecond: rewards depend on the tokens alone."""
    engine = LocalEngine(tiny_target(), max_context=64, clock=TickingClock(), aux_layers=AUX_LAYERS)
    listed = [Request(p, 30, temperature, ignore_eos=True) for p in prompts(count, 4, seed=seed)]
    return DraftTokensEnv(
        engine=engine,
        workload=Listed(listed),
        num_steps=K,
        batch_size=batch_size,
        max_rounds=rounds,
        reward="speedup",
    )


def new_actor(draft: Draft, rows: int = BATCH) -> DraftActor:
    return DraftActor(draft, tiny_target(), rows=rows, num_steps=K, max_context=64, seed=1)


def play(env: DraftTokensEnv, actor: DraftActor, learner: Reinforce | None = None, seed: int = 0) -> dict[str, Any]:
    """An episode; mean reward and accept length, and log q of what was tested, in the learner's order."""
    obs, info = env.reset(seed=seed)
    over, tested = False, []
    rewards: list[float] = []
    lengths: list[float] = []
    while not over:
        actor.read(info["prefills"])
        if learner is not None:
            learner.see(obs, info)
        drafted, q = actor.act(obs)
        obs, reward, terminated, truncated, after = env.step(drafted.numpy())
        done, over = after["round"], terminated or truncated
        if learner is not None:
            parts = done.tokens * after["t0_s"] / after["seconds"]  # their mean is the reward
            assert parts.mean() == pytest.approx(reward)
            learner.record(info["request_ids"].tolist(), drafted, done.correct_drafts.tolist(), parts)
        for row, stood in enumerate(done.correct_drafts.tolist()):
            for k in range(min(stood + 1, K)):
                tested.append((k, len(rewards), row, float(q[row, k, drafted[row, k]].log())))
        rewards.append(reward)
        lengths.append(done.accept_length)
        info = after
    tested = [t for t in tested if t[1] > 0]  # the first round only makes the baseline
    return {"reward": np.mean(rewards), "length": np.mean(lengths), "logp": [t[3] for t in sorted(tested)]}


def test_it_improves_reward_and_accept_length_on_prompts_it_never_saw() -> None:
    draft, target = tiny_draft(10), tiny_target()
    actor, held_out = new_actor(draft), make(200, seed=9, rounds=40)
    learner = Reinforce(draft, target.embedding, num_steps=K, learning_rate=3e-3)
    before = play(held_out, actor)
    env = make(2000, seed=0)
    for episode in range(28):
        play(env, actor, learner, seed=episode)
        assert learner.update()["updates"] == 1.0
        version, weights = learner.weights()
        actor.load(weights, version=version)
    after = play(held_out, actor)
    assert version == 28
    assert after["reward"] > 1.1 * before["reward"] and after["length"] > 1.1 * before["length"]


@pytest.mark.parametrize("vocabulary", [None, (1, 2, 4, 5, 8)], ids=["whole", "reduced"])
def test_the_gradient_is_of_the_odds_that_drafts_were_sampled_at(vocabulary: tuple[int, ...] | None) -> None:
    """With requests that end, come in, are parked and go on."""
    draft = tiny_draft(10) if vocabulary is None else with_vocabulary(tiny_draft(10), vocabulary)
    learner = Reinforce(draft, tiny_target().embedding, num_steps=K)
    found = play(make(40, 0, batch_size="4", rounds=25), new_actor(draft, 4), learner)
    logp, advantages = learner.log_probabilities()
    assert len(logp) == len(found["logp"]) > 100 and len(advantages) == len(logp)
    np.testing.assert_allclose(logp.detach(), found["logp"], atol=2e-4)


def test_the_estimate_is_the_gradient_of_the_expected_reward() -> None:
    """Each token drafted once and weighted by its odds: the sum is exactly the gradient of Σ q(x) r(x)."""
    draft, target = tiny_draft(10), tiny_target()
    vocab = target.config.vocab_size
    env = make(1, 0, batch_size=vocab)
    obs, info = env.reset(seed=0)  # the same prompt throughout
    actor = new_actor(draft, vocab)
    actor.read(info["prefills"])
    first = int(obs["last"][0])
    same = torch.from_numpy(obs["last"] == first)
    q = actor.act(obs)[1][:, 0]  # [V, V], alike where the first token is
    at = int(same.nonzero()[0])
    request = int(info["request_ids"][at])
    rewards = torch.linspace(-1.0, 2.0, vocab)
    learner = Reinforce(draft, target.embedding, num_steps=K)
    learner.see(obs, info)
    learner.record([request], torch.full((1, K), -1), [0], 0.25)  # makes the baseline
    mean = 0.25
    for token in range(vocab):
        weighed = mean + float(q[at, token] * (rewards[token] - 0.5))  # any baseline: its term sums to zero
        learner._means[1] = (mean, 1.0)
        learner.record([request], torch.tensor([[token, -1, -1]]), [0], weighed)
    logp, advantages = learner.log_probabilities()
    (advantages * logp).sum().backward()
    estimate = {n: p.grad.clone() for n, p in learner.parameters.items() if p.grad is not None}
    learner.optimizer.zero_grad()
    logp, _ = learner.log_probabilities()
    (logp.exp() * rewards).sum().backward()
    for name, right in learner.parameters.items():
        assert right.grad is not None
        scale = float(right.grad.abs().max())
        torch.testing.assert_close(estimate[name], right.grad, atol=2e-3 * scale + 1e-7, rtol=2e-3)


def seen(learner: Reinforce, live: int = 2) -> None:
    env = make(8, 0, batch_size=live)
    obs, info = env.reset(seed=0)
    learner.see(obs, info)


def advantages(learner: Reinforce) -> list[float]:
    return learner.log_probabilities()[1].tolist()


def test_advantages_are_against_the_running_mean_of_the_batch_size_before_the_round() -> None:
    learner = Reinforce(tiny_draft(10), tiny_target().embedding, num_steps=K, forget=0.5)
    seen(learner)
    pair, one = torch.tensor([[1, 2, 3], [4, -1, -1]]), torch.tensor([[1, 2, 3]])
    learner.record([0, 1], pair, [0, 0], 2.0)  # no baseline yet
    learner.record([0], one, [3], 9.0)  # nor at batch size 1
    learner.record([0, 1], pair, [1, 0], 5.0)
    assert advantages(learner) == [3.0, 3.0, 3.0]  # of the first drafts, and the second one of request 0
    learner.record([0, 1], pair, [0, 0], 0.0)  # the mean is (0.5 * 2 + 5) / 1.5
    assert advantages(learner) == pytest.approx([3.0, 3.0, -4.0, -4.0, 3.0])
    learner.begin()
    seen(learner)
    learner.record([0], one, [0], np.array([10.0]))  # baselines outlive an episode
    assert advantages(learner) == [1.0]


def test_without_drafts_nothing_is_learnt() -> None:
    learner = Reinforce(tiny_draft(10), tiny_target().embedding, num_steps=K)
    before = {name: t.clone() for name, t in learner.weights()[1].items()}
    seen(learner)
    for _ in range(3):
        learner.record([0, 1], torch.full((2, K), -1), [0, 0], 1.0)
    assert learner.update()["updates"] == 0.0
    assert all(torch.equal(before[name], t) for name, t in learner.weights()[1].items())


def test_numbers_out_of_range_are_refused() -> None:
    for changes in ({"temperature": 0.0}, {"learning_rate": -1.0}, {"forget": 1.0}):
        with pytest.raises(ValueError, match="above 0 and forget in"):
            Reinforce(tiny_draft(10), tiny_target().embedding, **{"num_steps": K, **changes})  # type: ignore[arg-type]
