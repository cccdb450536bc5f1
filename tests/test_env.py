import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from test_draft_tokens import TickingClock, drafts
from test_draft_tokens import make as make_draft_tokens
from test_sim_env import seeded
from tiny import Listed, lively_draft, prompts, tiny_target

import specrl
from specrl.core.interfaces import Request
from specrl.envs.spec_decode import SpecDecodeEnv

ID = "SpecRL/SpecDecode-v0"


def settings(**changes: Any) -> dict[str, Any]:
    engine = specrl.LocalEngine(tiny_target(), lively_draft(), max_context=32, clock=TickingClock())
    workload = Listed([Request(prompt, 12, 0.7) for prompt in prompts(40, 5)])
    return {"engine": engine, "workload": workload, "batch_size": 3, "max_rounds": 8, "plans": "0,1,2,3", **changes}


def make(**changes: Any) -> SpecDecodeEnv:
    return SpecDecodeEnv(**settings(**changes))


Make = Callable[..., Any]
BOTH = pytest.mark.parametrize(  # environments, each with an action that drafts nothing and one that drafts one token
    ("make", "nothing", "something"),
    [(make, 0, 1), (make_draft_tokens, drafts([]), drafts([[1]]))],
    ids=["plans", "drafts"],
)


def test_the_documented_example_runs() -> None:
    env = gym.make(ID, engine="local", target="embedded", draft=None, batch_size=2, max_rounds=256, trace=True)
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [True] * 6
    obs, reward, *over, _ = env.step(3)
    assert obs in env.observation_space and np.isfinite(float(reward)) and over == [False, False]
    live: SpecDecodeEnv = env.unwrapped  # type: ignore[assignment]
    live.load_draft(specrl.new_draft(live.engine.target, intermediate_size=256).state_dict(), version=1)  # type: ignore[attr-defined]
    assert [trace.plan for trace in live.drain()] == [None, None, specrl.Plan(3)]  # two prefills
    assert env.step(1)[4]["draft_version"] == 1
    env.close()


def test_gymnasium_and_stable_baselines_accept_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(seeded(gym.make(ID, **settings()).unwrapped, 0))
        for action in ("discrete", "multi_discrete"):
            check_env_sb3(seeded(make(action=action), 0))
    assert gym.spec(ID).nondeterministic


def test_a_seed_reproduces_prompts_batch_sizes_and_the_first_observation() -> None:
    workload = Listed([Request(prompt, 4) for prompt in prompts(40, 5)])
    env = make(batch_size=[1, 2, 3], plans="0", workload=workload, max_rounds=20)
    runs = []
    for _ in range(2):
        obs, info = env.reset(seed=7)
        episodes: list[Any] = [(obs.tolist(), info["batch_size"])]
        for _ in range(3):
            obs, info = env.reset()
            texts = [c.prompt for _ in range(4) for c in env.step(0)[4]["round"].finished]
            episodes.append((obs.tolist(), info["batch_size"], texts))
        runs.append(episodes)
    assert runs[0] == runs[1]
    assert len({episode[1] for episode in runs[0]}) > 1  # each episode draws its batch size


@BOTH
def test_a_reset_keeps_the_baseline_and_nothing_else(make: Make, nothing: Any, something: Any) -> None:
    env = make()
    first = env.reset(seed=3)[0]
    for _ in range(4):
        env.step(something)
    samples = env.baseline.estimate(3, 20).samples
    again = env.reset(seed=3)[0]
    np.testing.assert_equal(again, first)
    assert env.baseline.estimate(3, 20).samples == samples


@BOTH
def test_info_describes_the_round_and_the_episode(make: Make, nothing: Any, something: Any) -> None:
    env = make(reward="speedup")
    env.reset(seed=0)
    plain = spent = 0.0
    for _ in range(6):
        _, reward, _, _, info = env.step(something)
        plain_s = info["tokens"] * info["t0_s"] / info["batch_size"]
        plain, spent = plain + plain_s, spent + info["seconds"]
        assert reward == pytest.approx(plain_s / info["seconds"])
        parts = sum(info[f"{name}_s"] for name in ("draft", "verify", "other", "thinking"))
        assert info["seconds"] == pytest.approx(parts) and info["plan"] == "1/1/2"
        assert sum(info["histogram"]) == info["batch_size"] == 3 and len(info["histogram"]) == 2
    assert info["episode_speedup"] == pytest.approx(plain / spent)


@BOTH
def test_an_episode_ends_after_max_rounds_or_max_tokens(make: Make, nothing: Any, something: Any) -> None:
    env = make(max_rounds=3)
    env.reset(seed=0)
    assert [env.step(nothing)[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]
    env = make(max_rounds=None, max_tokens=6, reward="time_saved")
    env.reset(seed=0)
    assert [env.step(nothing)[2:4] for _ in range(2)] == [(False, False), (True, False)]


@BOTH
def test_the_batch_size_follows_its_schedule(make: Make, nothing: Any, something: Any) -> None:
    env = make(batch_size="1x2,3x1")
    env.reset(seed=0)
    assert [env.step(nothing)[4]["batch_size"] for _ in range(7)] == [1, 1, 3, 1, 1, 3, 1]


@BOTH
def test_the_agents_time_counts_except_paused_timer(make: Make, nothing: Any, something: Any) -> None:
    env = make()
    env.reset(seed=0)
    env.step(something)
    env.engine.clock.advance(2.0)
    with env.paused_timer():
        env.engine.clock.advance(100.0)
    _, reward, _, _, info = env.step(something)
    assert info["thinking_s"] == pytest.approx(2.0, abs=5e-3)
    assert reward < -100  # a plain round takes a few milliseconds


@BOTH
def test_traces_and_panels(make: Make, nothing: Any, something: Any) -> None:
    env = make(trace=True, render_mode="ansi")
    env.reset(seed=0)
    assert "no round yet" in env.render()
    env.step(something)
    assert [str(trace.plan) for trace in env.drain()] == ["None"] * 3 + ["1/1/2"] and env.drain() == []
    assert "plan 1/1/2" in env.render() and "speedup" in env.render()


@BOTH
def test_wrong_calls_are_refused(make: Make, nothing: Any, something: Any) -> None:
    env = make()
    with pytest.raises(ValueError, match="reset was never called"):
        env.step(nothing)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="options"):
        env.reset(options={"batch_size": 3})
    with pytest.raises(ValueError, match="trace"):
        env.drain()
    env.close()
    env.close()
    for call in (env.reset, lambda: env.step(nothing)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_multi_discrete_actions_run_the_nearest_plan() -> None:
    env = make(action="multi_discrete", plans="0,2/1/3,3/2/6")
    env.reset(seed=0)
    assert env.action_space == gym.spaces.MultiDiscrete([3, 2])
    assert [env.step(np.array(a))[4]["plan"] for a in ([0, 1], [1, 0], [2, 0])] == ["0", "2/1/3", "3/2/6"]


@pytest.mark.parametrize("action", [6, -1, 0.5, "1"])
def test_an_action_outside_the_space_is_refused(action: Any) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="an action must be in Discrete"):
        env.step(action)


def test_a_plan_that_the_engine_cannot_run_is_masked_and_refused() -> None:
    env = make(engine=specrl.LocalEngine(tiny_target(), max_context=32), plans="0,1/1/2")
    assert env.reset(seed=0)[1]["action_mask"].tolist() == [True, False]
    with pytest.raises(ValueError, match="allowed by the mask .*1/1/2"):
        env.step(1)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"engine": "locl"}, "engine must be .*did you mean 'local'"),
        ({"engine": "local", "target": "embeded"}, "'embeded'"),
        ({"engine": "local", "draft": "no/such/draft"}, "no/such/draft"),
        ({"reward": "speed"}, "reward must be one of .*did you mean 'speedup'"),
        ({"plans": "3/1"}, "a plan is written"),
        ({"plans": "70"}, "plans must be some"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": []}, "batch_size"),
        ({"batch_size": "4y2"}, "traffic is written"),
        ({"max_rounds": 0}, "max_rounds"),
        ({"max_tokens": 5}, "exactly one of max_rounds and max_tokens"),
        ({"max_rounds": None}, "exactly one of max_rounds and max_tokens"),
        ({"reward": "time_saved"}, "time_saved"),
        ({"workload": "stdlib", "temperature": -1.0}, "temperature"),
        ({"workload": "stdlib", "prompt_tokens": 0}, "prompt_tokens"),
        ({"workload": "no/such/file.txt"}, "does not exist"),
        ({"action": "box"}, "action"),
        ({"render_mode": "rgb"}, "render_mode"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValueError, match=rule) as error:
        make(**changes).reset(seed=0)
    assert "\n" not in str(error.value)
