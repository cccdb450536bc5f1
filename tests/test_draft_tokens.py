"""Whatever an agent drafts, the output is the target's own; it sees what a draft may see, and its time counts.

Odds: each of the 6 statistics of sampled tokens is refused at ALPHA = 8e-6 (see test_distribution.py), so that the odds
of failing falsely are below 1e-4; the seeds are fixed. What a wrong rule does to the same statistic is tested, too.
"""

import warnings
from collections.abc import Callable, Iterator
from itertools import cycle, repeat
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
Maker = Callable[[DraftTokensEnv], Agent]


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
    """[B, K] of these tokens, -1 elsewhere."""
    action = np.full((rows, K), -1)
    for row, listed in enumerate(tokens):
        action[row, : len(listed)] = listed
    return action


class Finished:
    """Runs an agent until the first `count` requests are done."""

    def __init__(self, env: DraftTokensEnv, agent: Agent, count: int) -> None:
        self.tokens: dict[int, tuple[int, ...]] = {}
        self.order: dict[int, list[int]] = {i: [0] for i in range(count)}  # where in its round each token came
        self.correct = self.proposed = 0
        obs, info = env.reset(seed=0)
        while not all(i in self.tokens for i in range(count)):
            obs, _, _, _, info = env.step(agent(obs, info))
            done = info["round"]
            self.correct += int(done.correct_drafts.sum())
            self.proposed += done.batch_size * done.plan.num_steps
            for request, kept in zip(done.request_ids.tolist(), done.tokens.tolist(), strict=True):
                self.order.setdefault(request, []).extend(range(kept))
            self.tokens |= {c.request_id: c.prompt + c.tokens for c in done.finished}
        env.close()


def random_agent(seed: int = 0) -> Agent:
    rng = np.random.default_rng(seed)
    return lambda obs, info: rng.integers(-1, V, obs["tokens"][:, 1:].shape)


class Memory:
    """What each request is known to hold: kept from prefills and observations alone."""

    def __init__(self) -> None:
        self.known: dict[int, list[int]] = {}
        self.row: dict[int, int] = {}

    def read(self, obs: dict[str, Any], info: dict[str, Any]) -> list[list[int]]:
        for prefill in info["prefills"]:
            self.known[prefill.request_id] = prefill.tokens.tolist()
        for row, request in enumerate(info["request_ids"].tolist()):
            new = obs["tokens"][row][obs["mask"][row] == 1]
            at = int(obs["positions"][row, 0])
            self.known[request][at:] = new.tolist()
        return [self.known[request] for request in info["request_ids"].tolist()]


def ngram_agent() -> Agent:
    memory = Memory()

    def act(obs: dict[str, Any], info: dict[str, Any]) -> Any:
        found = []
        for known in memory.read(obs, info):
            at = next((i for i in range(len(known) - 2, -1, -1) if known[i] == known[-1]), len(known))
            found.append(known[at + 1 : at + 1 + K])
        return drafts(found, len(obs["live"]))

    return act


def adversarial_agent(outputs: dict[tuple[int, ...], tuple[int, ...]]) -> Agent:
    """Knows what the target will say: drafts it rightly up to a point, and wrongly after it."""
    memory, rng = Memory(), np.random.default_rng(1)

    def act(obs: dict[str, Any], info: dict[str, Any]) -> Any:
        found = []
        for known in memory.read(obs, info):
            output = outputs.get(tuple(known[:5]), ())
            ahead = list(output[len(known) : len(known) + int(rng.integers(0, K + 1))])
            wrong = int(rng.integers(0, K + 1))
            found.append([t if i < wrong else (t + 1) % V for i, t in enumerate(ahead)])
        return drafts(found, len(obs["live"]))

    return act


def drawing_agent(env: DraftTokensEnv, outputs: dict[tuple[int, ...], tuple[int, ...]]) -> Agent:
    """Knows what the target will say, and lets drafts be drawn that are it more often than not."""
    memory, rng = Memory(), np.random.default_rng(1)

    def act(obs: dict[str, Any], info: dict[str, Any]) -> Any:
        knowns = memory.read(obs, info)
        action = drafts([], len(obs["live"]))
        for step in range(int(rng.integers(0, K + 1))):
            q = rng.dirichlet(np.ones(V), len(knowns)).astype(np.float32)
            for row, known in enumerate(knowns):
                output = outputs.get(tuple(known[:5]), ())
                if len(known) + step < len(output):
                    q[row] *= 0.4
                    q[row, output[len(known) + step]] += 0.6
            action[: len(knowns), step] = env.draw(q)
        return action

    return act


def test_gymnasium_and_stable_baselines_find_no_fault() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 12, "prompt_tokens": 16, "max_rounds": 8}
        env = gym.make("SpecRL/DraftTokens-v0", **small)
        check_env(seeded(env.unwrapped, 0))
        check_env_sb3(seeded(make(flat=True), 0))
        env.close()
    assert gym.spec("SpecRL/DraftTokens-v0").nondeterministic


@pytest.mark.parametrize("agent", ["random", "ngram", "adversarial", "drawing"])
def test_greedy_output_is_the_targets_own_whatever_is_drafted(agent: str) -> None:
    requests = [Request(prompt, 12 + i, 0.0) for i, prompt in enumerate(prompts(12, 5))]  # eos ends some of them
    plain = LocalEngine(tiny_target(), max_context=64).start(Listed(requests), batch_size=12, seed=0, plain=True)
    right: dict[tuple[int, ...], tuple[int, ...]] = {}
    while len(right) < 12:
        right |= {c.prompt: c.prompt + c.tokens for c in plain.round(Plan(0)).finished if c.request_id < 12}
    env = make(requests, max_context=640, batch_size="3x4,1x2,2x3")
    agents = {
        "random": random_agent(),
        "ngram": ngram_agent(),
        "adversarial": adversarial_agent(right),
        "drawing": drawing_agent(env, right),
    }
    found = Finished(env, agents[agent], 12)
    assert {found.tokens[i][:5]: found.tokens[i] for i in range(12)} == right
    if agent in ("adversarial", "drawing"):  # many stand and many fall, so that both are put to the test
        assert 0.2 < found.correct / found.proposed < 0.8


class Sampler:
    """Drawn from odds that depend on the token before; chains end where the token is even, or after K."""

    def __init__(self, env: DraftTokensEnv) -> None:
        self.env = env
        self.odds = np.random.default_rng(3).dirichlet(np.ones(V), V).astype(np.float32)  # [V before, V]

    def __call__(self, obs: dict[str, Any], info: dict[str, Any]) -> Any:
        live = int(obs["live"].sum())
        last, action = obs["last"][:live], np.full((len(obs["last"]), K), -1)
        for step in range(K):
            q = self.odds[last]
            if step:
                q[last % 2 == 0] = 0.0
            action[:live, step] = last = self.env.draw(q)
        return action


def sampled(agent: Maker) -> tuple[float, float, float]:
    """The share of drafts that stood, and p-values by the token before and by the order in the round."""
    count, new = 200, 40
    heats = [heat for _, heat in zip(range(count), cycle((0.7, 1.0, 1.5)), strict=False)]
    requests = [Request(p, new, heat, ignore_eos=True) for p, heat in zip(prompts(count, 3), heats, strict=True)]
    env = make(requests, max_context=640, batch_size=count)
    found = Finished(env, agent(env), count)
    ids = torch.tensor([found.tokens[i] for i in range(count)])
    logits = tiny_target()(ids)[:, 2:-1]
    p = distribution(logits, Temperatures.of(heats, "cpu"))[:, 1:].flatten(0, 1)
    order = torch.tensor([found.order[i][1:new] for i in range(count)]).flatten()
    tokens, before = ids[:, 4:].flatten(), ids[:, 3:-1].flatten()
    return found.correct / found.proposed, p_value(tokens, p, before), p_value(tokens, p, order)


@pytest.mark.parametrize(
    "agent", [Sampler, lambda env: ngram_agent(), lambda env: random_agent()], ids=["rejection", "ngram", "random"]
)
def test_sampled_output_is_distributed_as_the_targets_own(agent: Maker) -> None:
    accepted, *p_values = sampled(agent)
    assert accepted > 0.02 and min(p_values) > ALPHA


def test_the_statistic_sees_a_false_account_of_the_odds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why agents do not draw themselves: claims that do not fit the samples shift the output."""
    honest = SampledDrafts.distributions

    def claimed(draws: SampledDrafts, drafted: torch.Tensor) -> torch.Tensor | None:
        q = honest(draws, drafted)
        return None if q is None else torch.full_like(q, 1.0 / V)

    monkeypatch.setattr(SampledDrafts, "distributions", claimed)
    assert min(sampled(Sampler)[1:]) < ALPHA


def test_draws_are_samples_of_q() -> None:
    """4,000 of one distribution; each count within 5 standard deviations (odds of failing below 1e-5)."""
    q = np.array([0.5, 0.0, 0.3, 0.15, 0.05], dtype=np.float32)
    drafts = SampledDrafts(1, 5)
    drafts.reset(seed=0)
    drawn = drafts.draw(np.tile(q, (4000, 1)), 4000)
    counts = np.bincount(drawn, minlength=5)
    assert counts[1] == 0 and (np.abs(counts - 4000 * q) <= 5 * np.sqrt(4000 * q * (1 - q))).all()


def test_the_observation_is_what_the_target_computed_of_the_tokens_committed() -> None:
    requests = [Request(prompt, 9, 1.0, ignore_eos=True) for prompt in prompts(30, 5)]
    env = make(requests, batch_size="2x3,1x2,3x2")
    memory, rng = Memory(), np.random.default_rng(0)
    seen: dict[int, dict[int, np.ndarray]] = {}
    prompted: dict[int, np.ndarray] = {}
    done: dict[int, tuple[int, ...]] = {}
    obs, info = env.reset(seed=1)
    for _ in range(60):
        assert obs in env.observation_space
        live = len(info["request_ids"])
        assert obs["live"].tolist() == [1] * live + [0] * (3 - live)
        assert not obs["features"][live:].any() and (obs["tokens"][live:] == -1).all()
        prompted |= {prefill.request_id: prefill.features for prefill in info["prefills"]}
        for known, last in zip(memory.read(obs, info), obs["last"].tolist(), strict=False):
            assert known[-1] == last
        for row, request in enumerate(info["request_ids"].tolist()):
            for i in range(int(obs["mask"][row].sum())):
                seen.setdefault(request, {})[int(obs["positions"][row, i]) - 1] = obs["features"][row, i]
        obs, _, _, _, info = env.step(rng.integers(-1, V, (3, K)))
        done |= {c.request_id: c.prompt + c.tokens for c in info["round"].finished}
    assert len(done) > 10
    for request, tokens in done.items():
        known = memory.known[request]  # the round that ends a request is not seen any more
        assert tuple(known) == tokens[: len(known)] and len(known) > 5
        ids = torch.tensor([tokens])
        target = tiny_target()
        right = target.prefill(ids, target.new_cache(1, ids.shape[1]), aux_layers=AUX_LAYERS).aux_hidden_states
        assert right is not None
        for position, features in seen[request].items():
            np.testing.assert_allclose(features, right[0, position].numpy(), rtol=1e-3, atol=1e-3)
        assert sorted(seen[request]) == list(range(4, len(known) - 1))
        np.testing.assert_allclose(prompted[request], right[0, :5].numpy(), rtol=1e-3, atol=1e-3)


def test_chains_differ_in_length_and_the_longest_is_the_plan() -> None:
    env = make()
    env.reset(seed=0)
    info = env.step(drafts([[1, 2], [], [3]]))[4]
    assert info["plan"] == "2/1/3" and sum(info["histogram"]) == 3
    assert env.step(drafts([]))[4]["plan"] == "0"
    assert env.step(drafts([[], [-1, 5, 5]]))[4]["plan"] == "0"  # a draft ends at its first -1


def test_given_and_own_drafts_may_alternate_in_a_session() -> None:
    """Greedy output stays the target's own, and the engine's draft is none the worse for rounds that were not its."""
    requests = [Request(prompt, 40, 0.0, ignore_eos=True) for prompt in prompts(6, 5)]
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=640)
    rng = np.random.default_rng(0)
    outputs, stood = [], []
    for given in (False, True):
        session = engine.start(Once(requests), batch_size=6, seed=0)
        done: dict[int, tuple[int, ...]] = {}
        own: list[float] = []
        while not all(i in done for i in range(6)):
            own.append(float((last := session.round(Plan(K))).correct_drafts.mean()))
            done |= {c.request_id: c.tokens for c in last.finished}
            if given:
                drafted = torch.from_numpy(rng.integers(0, V, (6, K)))
                done |= {c.request_id: c.tokens for c in session.round_with(drafted).finished}
        outputs.append({i: done[i] for i in range(6)})
        stood.append(np.mean(own))
    assert outputs[0] == outputs[1]
    assert stood[0] > 1.0 and stood[1] > 0.8 * stood[0]  # a draft that had lost its place would stand for nothing


def test_a_session_refuses_what_is_no_proposal() -> None:
    session = LocalEngine(tiny_target(), max_context=64).start(Listed([Request((1, 2), 9)]), batch_size=2, seed=0)
    for drafted, message in [
        (torch.zeros(3, 2, dtype=torch.int64), r"drafted must be int64 \[2, num_steps\]"),
        (torch.zeros(2, 2), "drafted must be int64"),
        (torch.zeros(2, 64, dtype=torch.int64), "num_steps of drafted must be below 64"),
        (torch.tensor([[1, V], [1, 1]]), rf"drafted must be in \[0, {V}\)"),
        (torch.tensor([[1, 1], [-1, 1]]), "drafted must be -1 after the end"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.round_with(drafted)
    assert session.round_with(torch.tensor([[1, 1], [1, -1]])).plan == Plan(2)
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.round_with(torch.zeros(2, 1, dtype=torch.int64))


def test_flat_actions_and_observations_are_the_same_in_vectors() -> None:
    wide, flat = make(), make(flat=True)
    one, other = wide.reset(seed=0)[0], flat.reset(seed=0)[0]
    rng = np.random.default_rng(0)
    for _ in range(5):
        for name in one:
            np.testing.assert_array_equal(one[name].reshape(-1), other[name])
        action = rng.integers(-1, V, (3, K))
        one, other = wide.step(action)[0], flat.step(np.where(action < 0, V, action).reshape(-1))[0]


def test_drafting_counts_in_full_and_what_is_off_the_clock_does_not() -> None:
    env = make()
    env.reset(seed=0)
    env.step(drafts([[1]]))
    env.engine.clock.advance(2.0)  # type: ignore[attr-defined]
    with env.off_the_clock():
        env.engine.clock.advance(100.0)  # type: ignore[attr-defined]
    _, reward, _, _, info = env.step(drafts([[1]]))
    assert info["thinking_s"] == pytest.approx(2.0, abs=5e-3)
    parts = sum(info[f"{name}_s"] for name in ("draft", "verify", "other", "thinking"))
    assert info["seconds"] == pytest.approx(parts)
    assert reward < -100  # a plain round takes a few milliseconds


def test_rewards_are_those_of_the_other_environment_by_name() -> None:
    env = make(reward="speedup")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(drafts([[1]]))
    assert reward == pytest.approx(info["tokens"] * info["t0_s"] / (3 * info["seconds"]))


def test_an_episode_ends_after_max_rounds_or_max_tokens_and_a_seed_reproduces() -> None:
    env = make(max_rounds=2)
    first = env.reset(seed=4)[0]
    assert [env.step(drafts([]))[2:4] for _ in range(2)] == [(False, False), (False, True)]
    again = env.reset(seed=4)[0]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    env = make(max_rounds=None, max_tokens=6, reward="time_saved")
    env.reset(seed=0)
    assert [env.step(drafts([]))[2:4] for _ in range(2)] == [(False, False), (True, False)]


def test_traces_are_drained_and_panels_drawn() -> None:
    env = make(trace=True, render_mode="ansi")
    env.reset(seed=0)
    assert "no round yet" in str(env.render())
    env.step(drafts([[1, 2]]))
    traces = env.drain()
    assert [trace.plan for trace in traces] == [None] * 3 + [Plan(2)] and env.drain() == []
    assert "plan 2/1/3" in str(env.render()) and "DraftTokens" in str(env.render())
    with pytest.raises(ValueError, match="make it with trace=True"):
        make().drain()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((2, K), dtype=np.int64), r"integers \[3, 3\], but got int64 \[2, 3\]"),
        (np.zeros((3, K + 1), dtype=np.int64), r"integers \[3, 3\]"),
        (np.zeros((3, K)), "integers .* but got float64"),
        (drafts([[V]]), rf"in \[-1, {V - 1}\], but got -1..{V}"),
        (drafts([[-2]]), r"but got -2..-1"),
        ({"tokens": drafts([[1]])}, "an action must be integers"),
    ],
)
def test_wrong_actions_get_one_clear_line_and_change_nothing(action: Any, message: str) -> None:
    env = make()
    env.reset(seed=0)
    before = env.step(drafts([]))[4]
    with pytest.raises(ValueError, match=message) as error:
        env.step(action)
    assert "\n" not in str(error.value)
    after = env.step(drafts([]))[4]
    assert (after["round"].context_lengths == before["round"].context_lengths + 1).all()


EVEN = np.full((3, V), 1.0 / V, dtype=np.float32)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (EVEN[:2], rf"float32 \[3, {V}\], a row for each live request, but got float32 \[2, {V}\]"),
        (EVEN.astype(np.float64), "but got float64"),
        (EVEN * np.nan, "must be finite, at least 0 and sum to 1"),
        (EVEN - 1.0, "must be finite, at least 0 and sum to 1"),
        (EVEN * 2, "sums from 2 to 2"),
    ],
)
def test_a_wrong_distribution_gets_one_clear_line_and_draws_nothing(q: Any, message: str) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message) as error:
        env.draw(q)
    assert "\n" not in str(error.value)
    assert env.step(drafts([]))[4]["round"].plan == Plan(0)


def test_what_was_drawn_is_proposed() -> None:
    """All of it: who drops drafts after having seen them, or puts others in, shifts sampled output."""
    env = make()
    env.reset(seed=0)
    first, second = env.draw(EVEN), env.draw(np.where([[True], [False], [True]], EVEN, 0.0))
    assert (first >= 0).all() and second[1] == -1 and (second[[0, 2]] >= 0).all()
    right = drafts([[a, b] if b >= 0 else [a] for a, b in zip(first, second, strict=True)])
    shorter, other = right.copy(), right.copy()
    shorter[0, 1], other[2, 0] = -1, (right[2, 0] + 1) % V
    for wrong in (shorter, other, drafts([])):
        with pytest.raises(ValueError, match="must be the drafts that were drawn"):
            env.step(wrong)
    assert env.step(right)[4]["round"].plan == Plan(2)
    assert env.step(drafts([[1]]))[4]["round"].plan == Plan(1)  # nothing drawn, nothing asked
    for _ in range(K):
        env.draw(EVEN)
    with pytest.raises(ValueError, match=f"at most num_steps={K} tokens"):
        env.draw(EVEN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, r"num_steps must be in \[1, 63\], but got 0"),
        ({"num_steps": 64}, "num_steps must be in"),
        ({"max_rounds": None}, "exactly one of max_rounds and max_tokens"),
        ({"reward": "speed"}, "reward must be one of"),
        ({"render_mode": "rgb"}, "render_mode must be"),
        ({"engine": "remote"}, "engine must be 'local' or a LocalEngine with aux_layers"),
        ({"engine": LocalEngine(tiny_target())}, "engine must hand out features"),
    ],
)
def test_wrong_arguments_get_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftTokensEnv(**{"max_rounds": 5, "engine": "local", **changes})


def test_wrong_calls_get_one_clear_line() -> None:
    env = make()
    with pytest.raises(ValueError, match="reset was never called"):
        env.step(drafts([]))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="options"):
        env.reset(options={"a": 1})
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(drafts([]))):
        with pytest.raises(ValueError, match="closed"):
            call()
