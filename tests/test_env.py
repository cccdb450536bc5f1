import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from test_sim_env import seeded

import specrl
from specrl.core.clock import VirtualClock
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.models.target import Target

SMALL: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 12, "prompt_tokens": 16, "max_rounds": 8}


@pytest.fixture(scope="module")
def target() -> Target:
    return specrl.load_target("embedded")


@pytest.fixture(scope="module")
def engine(target: Target) -> specrl.LocalEngine:
    return specrl.LocalEngine(target, specrl.new_draft(target, intermediate_size=64, seed=1), max_context=32)


def make(engine: specrl.LocalEngine, **changes: Any) -> SpecDecodeEnv:
    return SpecDecodeEnv(engine=engine, **{**SMALL, **changes})


def test_the_documented_example_runs(target: Target) -> None:
    env = gym.make(
        "SpecRL/SpecDecode-v0", engine="local", target="embedded", draft=None,
        batch_size=4, temperature=0.7, plans="0,1/1/2,2/1/3,3/1/4,4/1/5,3/2/6", reward="differential",
        workload="stdlib", max_rounds=256, trace=True,
    )  # fmt: skip
    _, info = env.reset(seed=0)
    assert info["action_mask"].all() and len(info["action_mask"]) == 6
    env.action_space.seed(0)
    obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert obs in env.observation_space and np.isfinite(float(reward)) and not terminated and not truncated
    draft = specrl.new_draft(target, intermediate_size=256, seed=5)
    env.unwrapped.load_draft(draft.state_dict(), version=1)  # type: ignore[attr-defined]
    traces = env.unwrapped.drain()  # type: ignore[attr-defined]
    assert [trace.plan for trace in traces[:4]] == [None] * 4  # the prefills
    assert env.step(1)[4]["draft_version"] == 1
    env.close()


def test_gymnasium_and_stable_baselines_find_no_fault(engine: specrl.LocalEngine) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            check_env(seeded(gym.make("SpecRL/SpecDecode-v0", engine=engine, **SMALL).unwrapped, seed))
            for action in ("discrete", "multi_discrete"):
                check_env_sb3(seeded(make(engine, action=action), seed))


def test_it_is_declared_nondeterministic() -> None:
    assert gym.spec("SpecRL/SpecDecode-v0").nondeterministic


def test_reset_with_a_seed_reproduces_prompts_batch_sizes_and_the_first_observation(
    engine: specrl.LocalEngine,
) -> None:
    env = make(engine, batch_size=[1, 2, 3], max_new_tokens=4, max_rounds=20, temperature=0.0, plans="0")
    seen = []
    for _ in range(2):
        obs, info = env.reset(seed=7)
        episodes = [(obs.tolist(), info["batch_size"])]
        for _ in range(3):
            obs, info = env.reset()
            prompts = [c.prompt for _ in range(4) for c in env.step(0)[4]["round"].finished]
            episodes.append((obs.tolist(), info["batch_size"], prompts))  # type: ignore[arg-type]
        seen.append(episodes)
    assert seen[0] == seen[1]
    assert len({episode[1] for episode in seen[0]}) > 1  # the batch size is drawn


def test_info_tells_the_round_and_the_episode_speedup_is_a_ratio_of_sums(engine: specrl.LocalEngine) -> None:
    env = make(engine)
    env.reset(seed=0)
    plain = spent = 0.0
    for _ in range(6):
        info = env.step(3)[4]
        plain += info["tokens"] * info["t0_s"] / info["batch_size"]
        spent += info["seconds"]
        split = info["draft_s"] + info["verify_s"] + info["other_s"] + info["thinking_s"]
        assert info["seconds"] == pytest.approx(split)
        assert sum(info["histogram"]) == info["batch_size"] and len(info["histogram"]) == 4
        assert info["plan"] == "3/1/4"
    assert info["episode_speedup"] == pytest.approx(plain / spent)


def test_an_episode_ends_after_max_rounds_or_max_tokens(engine: specrl.LocalEngine) -> None:
    env = make(engine)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(8)]
    assert ends == [(False, False)] * 7 + [(False, True)]
    env = make(engine, max_rounds=None, max_tokens=6, reward="time_saved")
    env.reset(seed=0)
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False)] * 2 + [(True, False)]


def test_the_batch_size_moves_along_a_trace(engine: specrl.LocalEngine) -> None:
    env = make(engine, batch_size="1x2,3x1")
    env.reset(seed=0)
    assert [env.step(0)[4]["batch_size"] for _ in range(7)] == [1, 1, 3, 1, 1, 3, 1]


def test_thinking_counts_and_what_is_off_the_clock_does_not(target: Target) -> None:
    clock = VirtualClock()
    draft = specrl.new_draft(target, intermediate_size=64)
    env = make(specrl.LocalEngine(target, draft, max_context=32, clock=clock), trace=True, render_mode="ansi")
    env.baseline.add(specrl.PlainSample(2, 20.0, 1.0))
    env.reset(seed=0)
    clock.advance(2.0)
    with env.off_the_clock():
        clock.advance(100.0)
    info = env.step(0)[4]
    assert info["thinking_s"] == pytest.approx(2.0) and info["seconds"] == pytest.approx(2.0)


def test_multi_discrete_runs_the_nearest_plan_on_offer(engine: specrl.LocalEngine) -> None:
    env = make(engine, action="multi_discrete", plans="0,2/1/3,3/2/6")
    env.reset(seed=0)
    assert env.action_space == gym.spaces.MultiDiscrete([3, 2])
    plans = [env.step(np.array(a))[4]["plan"] for a in ([0, 1], [1, 0], [2, 0])]
    assert plans == ["0", "2/1/3", "3/2/6"]


def test_a_plan_that_the_engine_cannot_run_is_masked_and_refused(target: Target) -> None:
    env = make(specrl.LocalEngine(target, max_context=32), plans="0,1/1/2")
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [True, False]
    with pytest.raises(ValueError, match="cannot run plan 1/1/2"):
        env.step(1)


def test_the_draft_and_the_baseline_survive_a_reset_and_nothing_else_does(engine: specrl.LocalEngine) -> None:
    env = make(engine)
    first, _ = env.reset(seed=3)
    for _ in range(4):
        env.step(2)
    samples = env.baseline.estimate(2, 20).samples
    again, _ = env.reset(seed=3)
    np.testing.assert_array_equal(first, again)
    assert env.baseline.estimate(2, 20).samples == samples


def test_panels(engine: specrl.LocalEngine) -> None:
    env = make(engine, render_mode="ansi")
    env.reset(seed=0)
    assert "no round yet" in str(env.render())
    env.step(1)
    assert "plan 1/1/2" in str(env.render()) and "speedup" in str(env.render())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "locl"}, "engine must be one of local, sglang or an Engine, but got 'locl'; did you mean 'local'"),
        ({"target": "embeded"}, "'embeded'"),
        ({"reward": "speed"}, "reward must be one of .*did you mean 'speedup'"),
        ({"plans": "3/1"}, "a plan is written .* but got '3/1'"),
        ({"plans": "3/1/5"}, "a chain .* but got num_draft_tokens=5"),
        ({"plans": "0,0"}, "plans must differ"),
        ({"plans": ""}, "a plan is written"),
        ({"plans": "70"}, "must support one of the plans"),
        ({"batch_size": 0}, "batch_size and rounds .* at least 1"),
        ({"batch_size": []}, "batch_size must name at least one"),
        ({"batch_size": "4y2"}, "traffic is written"),
        ({"max_rounds": 0}, "at least 1 round"),
        ({"max_tokens": 5}, "exactly one of max_rounds and max_tokens"),
        ({"max_rounds": None}, "exactly one of max_rounds and max_tokens"),
        ({"reward": "time_saved"}, "episodes of max_tokens"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0"),
        ({"workload": "no/such/file.txt"}, "does not exist"),
        ({"action": "box"}, "action must be 'discrete' or 'multi_discrete'"),
        ({"render_mode": "rgb"}, "render_mode must be"),
        ({"prompt_tokens": 0}, "prompt_tokens"),
        ({"draft": "no/such/draft"}, "no/such/draft"),
    ],
)
def test_wrong_arguments_get_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        env = SpecDecodeEnv(**{**SMALL, **changes})
        env.reset(seed=0)
    assert "\n" not in str(error.value)


def test_wrong_calls_get_one_clear_line(engine: specrl.LocalEngine) -> None:
    env = make(engine)
    with pytest.raises(ValueError, match="reset was never called"):
        env.step(0)
    env.reset(seed=0)
    for action in (6, -1, 0.5, "1"):
        with pytest.raises(ValueError, match="an action must be in Discrete"):
            env.step(action)
    with pytest.raises(ValueError, match="options"):
        env.reset(options={"batch_size": 3})
    with pytest.raises(ValueError, match="make it with trace=True"):
        env.drain()
    wrong = {**specrl.new_draft(engine.target, intermediate_size=64).state_dict(), "norm.weight": torch.ones(3)}
    with pytest.raises(ValueError, match="norm.weight is .3,. instead of .192,."):
        env.load_draft(wrong, version=1)
    bad = specrl.new_draft(engine.target, intermediate_size=64).state_dict()
    bad["fc.weight"] = bad["fc.weight"] * float("nan")
    with pytest.raises(ValueError, match="finite.*fc.weight"):
        env.load_draft(bad, version=1)
    env.step(1)  # what served before goes on serving
    env.close()
    env.close()
    with pytest.raises(ValueError, match="closed"):
        env.step(0)
    with pytest.raises(ValueError, match="closed"):
        env.reset()
