"""Odds of failing falsely: below 1e-4 for the 6 statistics of sampled tokens at ALPHA = 8e-6; the seeds are fixed."""

import warnings
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from test_distribution import ALPHA, p_value
from test_sim_env import seeded
from tiny import AUX_LAYERS, CONFIG, Listed, prompts, tiny_draft, tiny_target

from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.decoding.sampling import Temperatures, distribution
from specrl.envs.draft_io import SampledDrafts
from specrl.envs.draft_tokens import DraftTokensEnv

V, K = CONFIG.vocab_size, 3
Agent = Callable[[dict[str, Any], dict[str, Any]], Any]
Outputs = dict[tuple[int, ...], tuple[int, ...]]  # by prompt
AgentMaker = Callable[[DraftTokensEnv, Outputs], Agent]


class TickingClock(VirtualClock):
    """A millisecond passes with every reading, so that all durations are known."""

    def now(self) -> float:
        self.advance(1e-3)
        return super().now()


class Once(Listed):
    """These requests, then ones that outlast the test."""

    def requests(self, seed: int) -> Iterator[Request]:
        yield from self.listed
        yield from repeat(Request((1,), 600, self.listed[0].temperature, ignore_eos=True))


def make(requests: list[Request] | None = None, *, max_context: int = 64, **changes: Any) -> DraftTokensEnv:
    engine = LocalEngine(tiny_target(), max_context=max_context, clock=TickingClock(), aux_layers=AUX_LAYERS)
    if requests is None:
        requests = [Request(prompt, 10, 0.0, ignore_eos=True) for prompt in prompts(12, 5)]
    defaults: dict[str, Any] = {"num_steps": K, "batch_size": 3, "max_rounds": 10_000}
    return DraftTokensEnv(engine=engine, workload=Once(requests), **{**defaults, **changes})


def drafts(tokens: Any, rows: int = 3) -> Any:
    """An action [B, K] with these tokens, and -1 elsewhere."""
    action = np.full((rows, K), -1)
    for row, listed in enumerate(tokens):
        action[row, : len(listed)] = listed
    return action


class Result:
    """The output of an agent's first `count` requests."""

    def __init__(self, env: DraftTokensEnv, agent: Agent, count: int) -> None:
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.order: dict[int, list[int]] = {i: [0] for i in range(count)}  # index of each token in its round
        correct = proposed = 0
        obs, info = env.reset(seed=0)
        while not all(i in self.tokens for i in range(count)):
            obs, _, _, _, info = env.step(agent(obs, info))
            done = info["round"]
            correct += int(done.correct_drafts.sum())
            proposed += done.batch_size * done.plan.num_steps
            for request, tokens in zip(done.request_ids.tolist(), done.tokens.tolist(), strict=True):
                self.order.setdefault(request, []).extend(range(tokens))
            self.tokens |= {c.request_id: c.prompt + c.tokens for c in done.finished}
        self.accepted = correct / proposed  # share of the drafts
        env.close()


class Memory:
    """The known tokens of each request, from prefills and observations alone."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}

    def read(self, obs: dict[str, Any], info: dict[str, Any]) -> list[list[int]]:
        for prefill in info["prefills"]:
            self.tokens[prefill.request_id] = prefill.tokens.tolist()
        for row, request in enumerate(info["request_ids"].tolist()):
            self.tokens[request][int(obs["positions"][row, 0]) :] = obs["tokens"][row][obs["mask"][row] == 1].tolist()
        return [self.tokens[request] for request in info["request_ids"].tolist()]


def random_agent(env: DraftTokensEnv, outputs: Outputs) -> Agent:
    rng = np.random.default_rng(0)
    return lambda obs, info: rng.integers(-1, V, obs["tokens"][:, 1:].shape)


def reading_agent(draft: Callable[[list[int]], list[int]]) -> Agent:
    """Drafts by a function of a request's text."""
    memory = Memory()
    return lambda obs, info: drafts([draft(text) for text in memory.read(obs, info)], len(obs["live"]))


def ngram_agent(env: DraftTokensEnv, outputs: Outputs) -> Agent:
    def draft(text: list[int]) -> list[int]:
        start = next((i for i in range(len(text) - 2, -1, -1) if text[i] == text[-1]), len(text)) + 1
        return text[start : start + K]

    return reading_agent(draft)


def adversarial_agent(env: DraftTokensEnv, outputs: Outputs) -> Agent:
    """Knows the target's output: drafts it correctly up to a position, and wrongly after it."""
    rng = np.random.default_rng(1)

    def draft(text: list[int]) -> list[int]:
        output = outputs.get(tuple(text[:5]), ())
        ahead = output[len(text) : len(text) + int(rng.integers(0, K + 1))]
        wrong = int(rng.integers(0, K + 1))
        return [t if i < wrong else (t + 1) % V for i, t in enumerate(ahead)]

    return reading_agent(draft)


def drawing_agent(env: DraftTokensEnv, outputs: Outputs) -> Agent:
    """Knows the target's output, and draws drafts from distributions that favour it."""
    memory, rng = Memory(), np.random.default_rng(1)

    def act(obs: dict[str, Any], info: dict[str, Any]) -> Any:
        texts = memory.read(obs, info)
        action = drafts([], len(obs["live"]))
        for step in range(int(rng.integers(0, K + 1))):
            q = rng.dirichlet(np.ones(V), len(texts)).astype(np.float32)
            for row, text in enumerate(texts):
                output = outputs.get(tuple(text[:5]), ())
                if len(text) + step < len(output):
                    q[row] *= 0.4
                    q[row, output[len(text) + step]] += 0.6
            action[: len(texts), step] = env.draw(q)
        return action

    return act


def bigram_agent(env: DraftTokensEnv, outputs: Outputs) -> Agent:
    """Draws from a distribution that depends on the token before; drafts end after an even token."""
    distributions = np.random.default_rng(3).dirichlet(np.ones(V), V).astype(np.float32)  # [V before, V]

    def act(obs: dict[str, Any], info: dict[str, Any]) -> Any:
        live = int(obs["live"].sum())
        last, action = obs["last"][:live], np.full((len(obs["last"]), K), -1)
        for step in range(K):
            q = distributions[last]
            if step:
                q[last % 2 == 0] = 0.0
            action[:live, step] = last = env.draw(q)
        return action

    return act


def test_gymnasium_and_stable_baselines_accept_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 12, "prompt_tokens": 16, "max_rounds": 8}
        env = gym.make("SpecRL/DraftTokens-v0", **small)
        check_env(seeded(env.unwrapped, 0))
        check_env_sb3(seeded(make(flat=True), 0))
        env.close()
    assert gym.spec("SpecRL/DraftTokens-v0").nondeterministic


@pytest.mark.parametrize("make_agent", [random_agent, ngram_agent, adversarial_agent, drawing_agent])
def test_greedy_output_is_the_targets_for_any_drafts(make_agent: AgentMaker) -> None:
    requests = [Request(prompt, 12 + i, 0.0) for i, prompt in enumerate(prompts(12, 5))]  # some end with eos
    plain = LocalEngine(tiny_target(), max_context=64).start(Listed(requests), batch_size=12, seed=0, plain=True)
    outputs: Outputs = {}
    while len(outputs) < 12:
        outputs |= {c.prompt: c.prompt + c.tokens for c in plain.round(Plan(0)).finished if c.request_id < 12}
    env = make(requests, max_context=640, batch_size="3x4,1x2,2x3")
    result = Result(env, make_agent(env, outputs), 12)
    assert {result.tokens[i][:5]: result.tokens[i] for i in range(12)} == outputs
    if make_agent in (adversarial_agent, drawing_agent):  # both accepted and rejected drafts are tested
        assert 0.2 < result.accepted < 0.8


def sampled(make_agent: AgentMaker) -> tuple[float, float, float]:
    """The share of accepted drafts, and p-values by the token before and by the index in the round."""
    count, new = 200, 40
    temperatures = [(0.7, 1.0, 1.5)[i % 3] for i in range(count)]
    requests = [Request(p, new, t, ignore_eos=True) for p, t in zip(prompts(count, 3), temperatures, strict=True)]
    env = make(requests, max_context=640, batch_size=count)
    result = Result(env, make_agent(env, {}), count)
    ids = torch.tensor([result.tokens[i] for i in range(count)])
    logits = tiny_target()(ids)[:, 2:-1]
    p = distribution(logits, Temperatures.of(temperatures, "cpu"))[:, 1:].flatten(0, 1)
    order = torch.tensor([result.order[i][1:new] for i in range(count)]).flatten()
    tokens, before = ids[:, 4:].flatten(), ids[:, 3:-1].flatten()
    return result.accepted, p_value(tokens, p, before), p_value(tokens, p, order)


@pytest.mark.parametrize("make_agent", [bigram_agent, ngram_agent, random_agent])
def test_sampled_output_has_the_targets_distribution(make_agent: AgentMaker) -> None:
    accepted, *p_values = sampled(make_agent)
    assert accepted > 0.02 and min(p_values) > ALPHA


def test_the_statistic_detects_wrong_distributions_of_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """This is why agents do not draw their drafts themselves."""
    distributions = SampledDrafts.distributions

    def uniform(draws: SampledDrafts, drafted: torch.Tensor) -> torch.Tensor | None:
        q = distributions(draws, drafted)
        return None if q is None else torch.full_like(q, 1.0 / V)

    monkeypatch.setattr(SampledDrafts, "distributions", uniform)
    assert min(sampled(bigram_agent)[1:]) < ALPHA


def test_draws_are_samples_of_q() -> None:
    """4,000 of one distribution; each count is within 5 standard deviations (odds of failing below 1e-5)."""
    q = np.array([0.5, 0.0, 0.3, 0.15, 0.05], dtype=np.float32)
    drafts = SampledDrafts(1, 5)
    drafts.reset(seed=0)
    drawn = drafts.draw(np.tile(q, (4000, 1)), 4000)
    counts = np.bincount(drawn, minlength=5)
    assert counts[1] == 0 and (np.abs(counts - 4000 * q) <= 5 * np.sqrt(4000 * q * (1 - q))).all()


def test_the_observation_holds_the_targets_features_of_the_committed_tokens() -> None:
    requests = [Request(prompt, 9, 1.0, ignore_eos=True) for prompt in prompts(30, 5)]
    env = make(requests, batch_size="2x3,1x2,3x2")
    memory, rng = Memory(), np.random.default_rng(0)
    features: dict[int, dict[int, np.ndarray]] = {}  # request, position
    prefilled: dict[int, np.ndarray] = {}
    done: dict[int, tuple[int, ...]] = {}
    obs, info = env.reset(seed=1)
    for _ in range(60):
        assert obs in env.observation_space
        live = len(info["request_ids"])
        assert obs["live"].tolist() == [1] * live + [0] * (3 - live)
        assert not obs["features"][live:].any() and (obs["tokens"][live:] == -1).all()
        prefilled |= {prefill.request_id: prefill.features for prefill in info["prefills"]}
        assert [text[-1] for text in memory.read(obs, info)] == obs["last"][:live].tolist()
        for row, request in enumerate(info["request_ids"].tolist()):
            for i in range(int(obs["mask"][row].sum())):
                features.setdefault(request, {})[int(obs["positions"][row, i]) - 1] = obs["features"][row, i]
        obs, _, _, _, info = env.step(rng.integers(-1, V, (3, K)))
        done |= {c.request_id: c.prompt + c.tokens for c in info["round"].finished}
    assert len(done) > 10
    target = tiny_target()
    for request, tokens in done.items():
        text = memory.tokens[request]  # the observation does not show the round that ends a request
        assert tuple(text) == tokens[: len(text)] and len(text) > 5
        ids = torch.tensor([tokens])
        expected = target.prefill(ids, target.new_cache(1, ids.shape[1]), aux_layers=AUX_LAYERS).aux_hidden_states
        assert expected is not None and sorted(features[request]) == list(range(4, len(text) - 1))
        for position, vector in features[request].items():
            np.testing.assert_allclose(vector, expected[0, position].numpy(), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(prefilled[request], expected[0, :5].numpy(), rtol=1e-3, atol=1e-3)


def test_the_longest_draft_is_the_plan() -> None:
    env = make()
    env.reset(seed=0)
    info = env.step(drafts([[1, 2], [], [3]]))[4]
    assert info["plan"] == "2/1/3" and sum(info["histogram"]) == 3
    assert env.step(drafts([[], [-1, 5, 5]]))[4]["plan"] == "0"  # a draft ends at its first -1


def test_drafts_from_outside_and_of_the_engine_may_alternate_in_a_session() -> None:
    """Greedy output is the target's, and the engine's draft reads the text of the other rounds too."""
    requests = [Request(prompt, 40, 0.0, ignore_eos=True) for prompt in prompts(6, 5)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=640)
    rng = np.random.default_rng(0)
    outputs, accepted = [], []
    for alternate in (False, True):
        session = engine.start(Once(requests), batch_size=6, seed=0)
        done: dict[int, tuple[int, ...]] = {}
        correct: list[float] = []
        while not all(i in done for i in range(6)):
            rounds = [session.round(Plan(K))]
            correct.append(float(rounds[0].correct_drafts.mean()))
            if alternate:
                rounds.append(session.round_with(torch.from_numpy(rng.integers(0, V, (6, K)))))
            done |= {c.request_id: c.tokens for round_ in rounds for c in round_.finished}
        outputs.append({i: done[i] for i in range(6)})
        accepted.append(np.mean(correct))
    assert outputs[0] == outputs[1]
    assert accepted[0] > 1.0 and accepted[1] > 0.8 * accepted[0]


@pytest.mark.parametrize(
    ("drafted", "rule"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), r"\[3, 2\]"),
        (torch.zeros(2, 2), "float32"),
        (torch.zeros(2, 64, dtype=torch.int64), "below 64"),
        (torch.tensor([[1, V], [1, 1]]), rf"\[0, {V}\)"),
        (torch.tensor([[1, 1], [-1, 1]]), "-1 after the end"),
    ],
)
def test_a_session_refuses_wrong_drafts(drafted: torch.Tensor, rule: str) -> None:
    session = LocalEngine(tiny_target(), max_context=64).start(Listed([Request((1, 2), 9)]), batch_size=2, seed=0)
    with pytest.raises(ValueError, match=rule):
        session.round_with(drafted)
    assert session.round_with(torch.tensor([[1, 1], [1, -1]])).plan == Plan(2)


def test_flat_actions_and_observations_are_reshaped() -> None:
    wide, flat = make(), make(flat=True)
    one, other = wide.reset(seed=0)[0], flat.reset(seed=0)[0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        for name in one:
            np.testing.assert_array_equal(one[name].reshape(-1), other[name])
        action = rng.integers(-1, V, (3, K))
        one, other = wide.step(action)[0], flat.step(np.where(action < 0, V, action).reshape(-1))[0]


@pytest.mark.parametrize(
    ("action", "rule"),
    [
        (np.zeros((2, K), dtype=np.int64), r"integers \[3, 3\]"),
        (np.zeros((3, K)), "float64"),
        (drafts([[V]]), rf"in \[-1, {V - 1}\]"),
        (drafts([[-2]]), "drafted tokens"),
        ({"tokens": drafts([[1]])}, "integers"),
    ],
)
def test_a_wrong_action_is_refused_and_commits_nothing(action: Any, rule: str) -> None:
    env = make()
    env.reset(seed=0)
    before = env.step(drafts([]))[4]
    with pytest.raises(ValueError, match=rule):
        env.step(action)
    after = env.step(drafts([]))[4]
    assert (after["round"].context_lengths == before["round"].context_lengths + 1).all()


EVEN = np.full((3, V), 1.0 / V, dtype=np.float32)


@pytest.mark.parametrize(
    ("q", "rule"),
    [(EVEN[:2], "q must be float32"), (EVEN.astype(np.float64), "q must be float32")]
    + [(q, "rows of q") for q in (EVEN * np.nan, EVEN - 1.0, EVEN * 2)],
)
def test_a_wrong_distribution_is_refused_and_draws_nothing(q: Any, rule: str) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=rule):
        env.draw(q)
    assert env.step(drafts([]))[4]["round"].plan == Plan(0)


def test_all_drafts_that_were_drawn_must_be_proposed() -> None:
    """An agent that drops or replaces drafts after it has seen them changes the distribution of the output."""
    env = make()
    env.reset(seed=0)
    first, second = env.draw(EVEN), env.draw(np.where([[True], [False], [True]], EVEN, 0.0))
    assert (first >= 0).all() and second[1] == -1 and (second[[0, 2]] >= 0).all()
    drawn = drafts([[a, b] if b >= 0 else [a] for a, b in zip(first, second, strict=True)])
    shorter, other = drawn.copy(), drawn.copy()
    shorter[0, 1], other[2, 0] = -1, (drawn[2, 0] + 1) % V
    for wrong in (shorter, other, drafts([])):
        with pytest.raises(ValueError, match="must be the drafts that were drawn"):
            env.step(wrong)
    assert env.step(drawn)[4]["round"].plan == Plan(2)
    assert env.step(drafts([[1]]))[4]["round"].plan == Plan(1)  # without draws any drafts are allowed
    for _ in range(K):
        env.draw(EVEN)
    with pytest.raises(ValueError, match=f"at most num_steps={K}"):
        env.draw(EVEN)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_steps", 0),
        ("num_steps", 64),
        ("max_rounds", None),
        ("reward", "speed"),
        ("render_mode", "rgb"),
        ("engine", "remote"),
        ("engine", LocalEngine(tiny_target())),
    ],
)
def test_wrong_arguments_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=argument):
        DraftTokensEnv(**{"max_rounds": 5, "engine": "local", argument: value})
