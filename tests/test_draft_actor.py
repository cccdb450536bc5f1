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


def make(batch_size: Any, draft: Draft, temperature: float = 0.0) -> tuple[DraftTokensEnv, DraftActor]:
    engine = LocalEngine(tiny_target(), max_context=64, clock=TickingClock(), aux_layers=AUX_LAYERS)
    env = DraftTokensEnv(engine=engine, workload=LISTED, num_steps=K, batch_size=batch_size, max_rounds=10_000)
    actor = DraftActor(draft, tiny_target(), rows=4, num_steps=K, max_context=64, temperature=temperature)
    return env, actor


@pytest.mark.parametrize("vocabulary", [None, (1, 2, 4, 5, 8)], ids=["whole", "reduced"])
def test_it_drafts_as_the_engine_with_the_same_weights(vocabulary: Sequence[int] | None) -> None:
    """Round by round, with requests that end, start, are parked and continue."""
    draft = tiny_draft() if vocabulary is None else with_vocabulary(tiny_draft(), vocabulary)
    session = LocalEngine(tiny_target(), draft, max_context=64).start(LISTED, batch_size=4, seed=0)
    env, actor = make("4x3,2x2", draft)
    observation, info = env.reset(seed=0)
    accepted = 0
    for index in range(40):
        actor.read(info["prefills"])
        observation, _, _, _, info = env.step(actor.act(observation)[0].numpy())
        expected = session.round(Plan(K))
        np.testing.assert_array_equal(info["round"].request_ids, expected.request_ids)
        np.testing.assert_array_equal(info["round"].correct_drafts, expected.correct_drafts)
        accepted += int(expected.correct_drafts.sum())
        session.resize((4, 4, 4, 2, 2)[(index + 1) % 5])
    assert accepted > 20


def test_drafts_are_samples_of_the_returned_distributions() -> None:
    """200 x 4 draws of one state; each of 40 counts is within 6 standard deviations (fails once in 1e6)."""
    env, actor = make(4, tiny_draft(10), temperature=1.0)
    observation, info = env.reset(seed=0)
    actor.read(info["prefills"])
    draws = [actor.act(observation) for _ in range(200)]
    q = draws[0][1][:, 0]
    counts = np.zeros(q.shape)
    for tokens, probabilities in draws:
        np.testing.assert_allclose(probabilities[:, 0], q, atol=1e-6)
        np.testing.assert_allclose(probabilities.sum(-1), 1.0, atol=1e-5)
        counts[np.arange(4), tokens[:, 0]] += 1
    mean = 200 * q.numpy()
    assert (np.abs(counts - mean) < 6 * np.sqrt(mean) + 6).all()


def test_a_shorter_round_drafts_less() -> None:
    env, actor = make(4, tiny_draft(10))
    observation, info = env.reset(seed=0)
    actor.read(info["prefills"])
    whole, short = actor.act(observation)[0], actor.act(observation, num_steps=1)[0]
    assert whole[:, :1].equal(short[:, :1]) and (short[:, 1:] == -1).all()
    assert (actor.act(observation, num_steps=0)[0] == -1).all()
