from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_draft_tokens import TickingClock
from tiny import AUX_LAYERS, Listed, prompts, tiny_draft, tiny_target, with_vocabulary

from specrl.agents.draft.actor import DraftActor
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.envs.draft_tokens import DraftTokensEnv
from specrl.models.draft import Draft

K = 3
LISTED = Listed([Request(prompt, 8 + i % 5, 0.0) for i, prompt in enumerate(prompts(40, 6))])


def make(batch_size: Any, **changes: Any) -> DraftTokensEnv:
    engine = LocalEngine(tiny_target(), max_context=64, clock=TickingClock(), aux_layers=AUX_LAYERS)
    return DraftTokensEnv(
        engine=engine, workload=LISTED, num_steps=K, batch_size=batch_size, max_rounds=10_000, **changes
    )


def actor(draft: Draft, rows: int, temperature: float = 0.0) -> DraftActor:
    return DraftActor(draft, tiny_target(), rows=rows, num_steps=K, max_context=64, temperature=temperature)


@pytest.mark.parametrize("vocabulary", [None, (1, 2, 4, 5, 8)], ids=["whole", "reduced"])
def test_it_drafts_what_the_engine_drafts_from_the_same_weights(vocabulary: Sequence[int] | None) -> None:
    """Round by round, with requests that end, come in, are parked and go on."""
    draft = tiny_draft() if vocabulary is None else with_vocabulary(tiny_draft(), vocabulary)
    engine = LocalEngine(tiny_target(), draft, max_context=64)
    session = engine.start(LISTED, batch_size=4, seed=0)
    env, agent = make("4x3,2x2"), actor(draft, 4)
    obs, info = env.reset(seed=0)
    stood = 0
    for index in range(40):
        agent.read(info["prefills"])
        obs, _, _, _, info = env.step(agent.act(obs)[0].numpy())
        right = session.round(Plan(K))
        np.testing.assert_array_equal(info["round"].request_ids, right.request_ids)
        np.testing.assert_array_equal(info["round"].correct_drafts, right.correct_drafts)
        stood += int(right.correct_drafts.sum())
        session.resize((4, 4, 4, 2, 2)[(index + 1) % 5])
    assert stood > 20


def test_sampled_drafts_come_with_what_they_were_sampled_from() -> None:
    """200 x 4 draws of one state; each of 40 counts is within 6 standard deviations (odds of failing below 1e-6)."""
    env, agent = make(4), actor(tiny_draft(10), 4, temperature=1.0)
    obs, info = env.reset(seed=0)
    agent.read(info["prefills"])
    first = [agent.act(obs) for _ in range(200)]
    q = first[0][1][:, 0]
    counts = np.zeros(q.shape)
    for tokens, odds in first:
        np.testing.assert_allclose(odds[:, 0], q, atol=1e-6)
        np.testing.assert_allclose(odds.sum(-1), 1.0, atol=1e-5)
        counts[np.arange(4), tokens[:, 0]] += 1
    mean = 200 * q.numpy()
    assert (np.abs(counts - mean) < 6 * np.sqrt(mean) + 6).all()


def test_a_shorter_round_drafts_less() -> None:
    env, agent = make(4), actor(tiny_draft(10), 4)
    obs, info = env.reset(seed=0)
    agent.read(info["prefills"])
    whole, short = agent.act(obs)[0], agent.act(obs, num_steps=1)[0]
    assert whole[:, :1].equal(short[:, :1]) and (short[:, 1:] == -1).all()
    assert (agent.act(obs, num_steps=0)[0] == -1).all()
