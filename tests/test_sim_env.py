import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_env_sb3
from test_profile import made_up
from tiny import Listed, prompts, tiny_target

import specrl
from specrl.core.interfaces import Request
from specrl.envs.device_lock import DeviceLock
from specrl.envs.simulated import SimulatedEnv
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.simulation.profile import Profile
from specrl.simulation.shifts import Shift

ID = "SpecRL/Simulated-v0"


def deterministic(**changes: Any) -> Profile:
    """A profile without randomness: two drafts are accepted, and rounds take their mean time."""
    log_odds = {"chain": (20.0, 20.0, -20.0, -20.0, -20.0)}
    profile = made_up(request_spread=0.0, hiccup_share=0.0, log_odds=log_odds, **changes)
    return replace(profile, costs=tuple(replace(c, jitter=0.0, spread=0.0, per_token=0.0) for c in profile.costs))


def seeded(env: gym.Env[Any, Any], seed: int) -> gym.Env[Any, Any]:
    """Seed the actions that the environment checkers draw."""
    env.action_space.seed(seed)
    return env


def test_gymnasium_and_stable_baselines_accept_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(2):  # of the actions that the checkers draw
            check_env(seeded(gym.make(ID, batch_size=[1, 3]).unwrapped, seed))
            few = gym.make(ID, plans="1/1/2,2/1/3", profile="embedded-fp32-early")
            check_env(seeded(few.unwrapped, seed))
            check_env_sb3(seeded(SimulatedEnv(batch_size="1x3,4x2"), seed))
            check_env_sb3(seeded(SimulatedEnv(action="multi_discrete"), seed))
    assert not gym.spec(ID).nondeterministic


def test_spaces_and_info_are_those_of_the_live_environment() -> None:
    live = SpecDecodeEnv(engine=specrl.LocalEngine(tiny_target()), workload=Listed([]), plans="0,3,4,5", max_rounds=1)
    env = SimulatedEnv(render_mode="ansi")
    assert env.plans == live.plans and env.observation_space == live.observation_space
    assert env.action_space == live.action_space
    _, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [True] * 4 and info["batch_size"] == 8
    *_, info = env.step(1)
    assert set(info) >= {"tokens", "seconds", "accept_length", "histogram", "t0_s", "episode_speedup", "round"}
    assert info["thinking_s"] == 0.0 and "plan 3/1/4" in str(env.render())


def test_a_seed_reproduces_all_results() -> None:
    env = SimulatedEnv(batch_size=[1, 2, 8, 32], max_rounds=20)
    runs = []
    for seed in (3, 3, 4):
        obs, info = env.reset(seed=seed)
        run = [obs.tolist(), info["batch_size"]]
        for i in range(50):
            obs, reward, _, over, info = env.step(i % 4)
            run += [obs.tolist(), reward, {key: str(value) for key, value in info.items()}]
            if over:
                env.reset()
        runs.append(run)
    assert runs[0] == runs[1] != runs[2]


def test_plans_are_those_that_the_profile_has_at_all_batch_sizes() -> None:
    minimax = "aurora-minimax-m2.1"
    assert SimulatedEnv(profile=minimax, batch_size=[1, 8]).plans == specrl.parse_plans("0,3,4")
    assert SimulatedEnv(profile=minimax, batch_size=[8, 32]).plans == specrl.parse_plans("0,3,4,5")
    env = SimulatedEnv(profile=minimax, batch_size=[1, 8], plans="0,2,3,5")
    assert env.action_masks().tolist() == [True, False, True, False]
    assert SimulatedEnv(profile=minimax, plans="0,2,3,5", extrapolate=True).action_masks().all()
    vector = SimulatedVectorEnv(3, profile=minimax, batch_size=[1, 8], plans="0,2,3,5")
    vector.reset(seed=0)
    assert vector.action_masks().tolist() == [[True, False, True, False]] * 3
    with pytest.raises(ValueError, match="allowed by the mask .*5/1/6"):
        vector.step(np.array([0, 3, 2]))


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("reward", ["differential", "time_saved", "speedup", "log_speedup", "tokens_per_second"])
def test_both_forms_are_equal_on_a_profile_without_randomness(reward: str, delay: int) -> None:
    until: dict[str, Any] = {"max_tokens": 150} if reward == "time_saved" else {"max_rounds": 23}
    kwargs: dict[str, Any] = {
        "profile": deterministic(delay=delay), "batch_size": "4x5,1x3,16x4", "reward": reward, "max_new_tokens": 30,
        "shifts": [Shift(15, cost=1.3, from_steps=3)], **until,
    }  # fmt: skip
    env = SimulatedEnv(**kwargs)
    vector = gym.make_vec(ID, num_envs=3, vectorization_mode="vector_entry_point", **kwargs)
    rng = np.random.default_rng(0)
    one, _ = env.reset(seed=0)
    many, _ = vector.reset(seed=0)
    over = False
    for _ in range(80):
        np.testing.assert_allclose(many, np.tile(one, (3, 1)), rtol=1e-5, atol=1e-6)
        action = int(rng.integers(6))
        many, rewards, terminated, truncated, infos = vector.step(np.full(3, action))
        if over:
            one, _ = env.reset()
            over = False
            assert not rewards.any() and not infos["_tokens"].any()
            continue
        one, value, ends, stops, info = env.step(action)
        over = ends or stops
        np.testing.assert_allclose(rewards, [float(value)] * 3, rtol=1e-6, atol=1e-9)
        assert terminated.tolist() == [ends] * 3 and truncated.tolist() == [stops] * 3
        for key in ("tokens", "seconds", "accept_length", "batch_size", "t0_s", "episode_speedup"):
            np.testing.assert_allclose(infos[key], info[key], rtol=1e-6)
    assert delay == 0 or one[-6:].sum() == 1.0


def test_both_forms_agree_in_distribution() -> None:
    """40 single episodes against 400 vectorised ones of 150 rounds, with the same plans.

    Differences of means over episodes beyond 4.5 standard errors: odds below 1 in 1,000 for all. The seeds are fixed.
    """
    settings: dict[str, Any] = {"batch_size": "1x7,4x5,16x3", "max_rounds": 150, "max_new_tokens": (9, 40)}
    keys = ("episode_speedup", "tokens", "seconds", "t0_s")
    single = []
    for seed in range(40):
        env = SimulatedEnv(profile=made_up(), **settings)
        env.reset(seed=seed)
        steps = [env.step((i // 3) % 6) for i in range(150)]
        means = [float(np.mean([step[4][key] for step in steps])) for key in keys[1:]]
        single.append([steps[-1][4]["episode_speedup"], *means, np.mean([step[1] for step in steps]), *steps[-1][0]])
    vector = SimulatedVectorEnv(400, profile=made_up(), **settings)
    vector.reset(seed=0)
    totals, rewards = np.zeros((3, 400)), np.zeros(400)
    for i in range(150):
        obs, reward, _, _, info = vector.step(np.full(400, (i // 3) % 6))
        totals += [info[key] for key in keys[1:]]
        rewards += reward
    one = np.array(single).T
    many = np.concatenate([[info["episode_speedup"]], totals / 150, [rewards / 150], obs.T])
    error = np.sqrt(one.var(1) / 40 + many.var(1) / 400)
    difference = np.abs(one.mean(1) - many.mean(1))
    assert (difference <= 4.5 * error + 1e-6).all(), np.flatnonzero(difference > 4.5 * error + 1e-6)


def test_the_vectorised_form_runs_plan_0_alone() -> None:
    vector = SimulatedVectorEnv(3, plans="0", batch_size=[1, 2], max_rounds=5)
    observations, _ = vector.reset(seed=0)
    assert vector.step(np.zeros(3, dtype=np.int64))[0].shape == observations.shape == (3, 8)


def test_the_vectorised_form_is_deterministic_and_in_its_spaces() -> None:
    vector = gym.make_vec(ID, num_envs=5, batch_size=[1, 8, 32], max_rounds=9)  # the vectorised form is the default
    assert isinstance(vector.unwrapped, SimulatedVectorEnv)
    runs = []
    for seed in (1, 1, 2):
        run = [vector.reset(seed=seed)[0]]
        vector.action_space.seed(0)
        for _ in range(30):
            obs, reward, *_ = vector.step(vector.action_space.sample())
            assert obs in vector.observation_space
            run += [obs, reward]
        runs.append(np.concatenate([values.ravel() for values in run]))  # a step must not change earlier results
    assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[1], runs[2])
    vector.close()


@pytest.mark.parametrize("make", [SimulatedEnv, SimulatedVectorEnv])
@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"profile": "aurora"}, "profile must be one of"),
        ({"batch_size": 64}, "batch sizes 1 to 32"),
        ({"plans": "1,2"}, "plans must be some"),
        ({"max_rounds": 5, "max_tokens": 5}, "max_rounds and max_tokens"),
        ({"reward": "time_saved"}, "time_saved"),
        ({"max_new_tokens": (9, 3)}, "max_new_tokens must be a length or two"),
        ({"render_mode": "rgb"}, "render_mode must be None"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], rule: str, make: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=rule):
        make(**changes)


def test_wrong_calls_of_the_vectorised_form_are_refused() -> None:
    vector = SimulatedVectorEnv(2)
    with pytest.raises(ValueError, match="reset was never called"):
        vector.step(np.zeros(2, dtype=np.int64))
    vector.reset(seed=0)
    for actions in (np.zeros(3, dtype=np.int64), np.zeros(2), np.array([0, 9]), np.array([-1, 0])):
        with pytest.raises(ValueError, match="actions must be"):
            vector.step(actions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="options"):
        vector.reset(options={"x": 1})


def live(**changes: Any) -> SpecDecodeEnv:
    listed = Listed([Request(prompt, 16, ignore_eos=True) for prompt in prompts(4, 4)])
    engine = specrl.LocalEngine(tiny_target(), max_context=32)
    env = SpecDecodeEnv(engine=engine, workload=listed, plans="0", **{"max_rounds": 3, **changes})
    env.reset(seed=0)
    return env


def test_timed_environments_refuse_to_run_in_parallel() -> None:
    first, second = live(), live()
    first.step(0)
    with pytest.raises(ValueError, match="'cpu' must be used by one .* in this process.*allow_parallel=True"):
        second.step(0)
    with first.paused_timer():
        second.step(0)
    with pytest.raises(ValueError, match="another one"):
        first.step(0)
    live(allow_parallel=True).step(0)
    second.close()
    first.step(0)
    first.step(0)  # its episode is over
    third = live()
    third.step(0)
    third.reset()
    first.reset()
    first.step(0)
    del first  # releases the device
    third.step(0)


def test_the_device_lock_names_another_process_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from specrl.envs.device_lock import DeviceLock; "
        f"lock = DeviceLock('cuda:0', pathlib.Path({str(tmp_path)!r})); lock.acquire(); print('held', flush=True); "
        "sys.stdin.read()"
    )
    command, root = [sys.executable, "-c", code], Path(specrl.__file__).parent.parent
    lock = DeviceLock("cuda:0", tmp_path)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in process {holder.pid}"):
            lock.acquire()
        DeviceLock("cuda:1", tmp_path).acquire()
        holder.kill()
    for call in (lock.acquire, lock.acquire, lock.release, lock.release):
        call()
    assert next(tmp_path.glob("*cuda0.lock")).read_text() == str(os.getpid())
