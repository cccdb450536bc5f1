import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray
from test_draft_tokens import TickingClock
from tiny import AUX_LAYERS, Listed, prompts, tiny_target

import specrl
from specrl.agents.choosers.policy_network import NetworkChooser, PolicyNetwork, load_chooser
from specrl.agents.choosers.table import PlanTable
from specrl.agents.rl.distill import distill, tabulate
from specrl.agents.rl.sb3 import ALGORITHMS, Agent, AgentConfig, make_agent
from specrl.agents.rl.sb3_vector import RLTrainingLog, SB3VectorEnv
from specrl.commands.rl import rl
from specrl.core.interfaces import Request
from specrl.core.observation import vector_bounds
from specrl.core.plan import Plan, parse_plans
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.evaluation.policy_report import best_plans, report
from specrl.export.bundle import read_plans
from specrl.simulation.profile import load_profile
from specrl.testing.agent import CHECKS
from specrl.training.rl import as_vector

SMALL: dict[str, dict[str, Any]] = {
    "ppo": {"policy": "MlpPolicy", "n_steps": 8, "batch_size": 32, "n_epochs": 1},
    "maskable_ppo": {"policy": "MlpPolicy", "n_steps": 8, "batch_size": 32, "n_epochs": 1},
    "recurrent_ppo": {
        "policy": "MlpLstmPolicy", "n_steps": 8, "batch_size": 32, "n_epochs": 1,
        "policy_kwargs": {"net_arch": [8], "lstm_hidden_size": 8},
    },
    "dqn": {"policy": "MlpPolicy", "learning_starts": 16, "buffer_size": 500, "policy_kwargs": {"activation": "tanh"}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def simulated(num_envs: int = 4, **kwargs: Any) -> SimulatedVectorEnv:
    options = {"batch_size": [1, 8, 32], "max_rounds": 16, "autoreset_mode": AutoresetMode.SAME_STEP, **kwargs}
    return SimulatedVectorEnv(num_envs, **options)


def trained(algorithm: str, *, normalize: Any = True, timesteps: int = 128, **kwargs: Any) -> Agent:
    env = simulated(**kwargs)
    hyper = {**SMALL[algorithm], "normalize": normalize}
    agent = make_agent(algorithm, env, hyper, plans=env.plans, allowed=env.action_masks()[0].tolist())
    agent.model.learn(timesteps)
    return agent


def visited(agent: Agent, count: int) -> NDArray[np.float32]:
    low, high = vector_bounds(agent.plans)
    return np.random.default_rng(0).uniform(low, high, size=(count, len(low))).astype(np.float32)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_numpy_chooses_what_stable_baselines_chooses(algorithm: str) -> None:
    agent = trained(algorithm)
    chooser, vectors = agent.chooser(), visited(agent, 40)
    env = agent.model.get_env()
    state, memory = chooser.network.start(40), None
    for _ in range(4):
        vectors = np.roll(vectors, 1, axis=0)
        seen = env.normalize_obs(vectors)  # type: ignore[union-attr]
        extra = {"action_masks": np.tile(chooser.allowed, (40, 1))} if algorithm == "maskable_ppo" else {}
        theirs, memory = agent.model.predict(seen, state=memory, deterministic=True, **extra)
        ours, state = chooser.act(vectors, state)
        assert (ours == theirs).mean() > 0.95  # scores of float32 may tie
        if algorithm == "recurrent_ppo":
            assert memory is not None
            np.testing.assert_allclose(state.hidden, memory[0][0], atol=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_policy_is_no_pickle_and_chooses_and_goes_on_as_before(algorithm: str, tmp_path: Path) -> None:
    agent = trained(algorithm)
    agent.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]
    again, vectors = load_chooser(tmp_path), visited(agent, 1000)
    own = agent.chooser()
    assert again.plans == agent.plans
    one, two = (c.act(vectors, c.network.start(1000))[0] for c in (own, again))
    assert (one == two).all()
    other = make_agent(algorithm, simulated(), agent.hyperparameters, plans=agent.plans, seed=5)
    other.load(tmp_path)
    three = other.chooser()
    assert (three.act(vectors, three.network.start(1000))[0] == one).all()
    other.model.learn(64)


@pytest.mark.parametrize("algorithm", ["maskable_ppo", "dqn"])
def test_a_policy_that_sees_the_batch_size_alone_is_its_table(algorithm: str, tmp_path: Path) -> None:
    env = simulated(batch_size=[1, 8, 32])
    hyper = {**SMALL[algorithm], "normalize": True, "observe": "batch_size"}
    agent = make_agent(algorithm, env, hyper, plans=env.plans, allowed=env.action_masks()[0].tolist(), seed=3)
    agent.model.learn(2000)
    agent.save(tmp_path)
    chooser, table = load_chooser(tmp_path), tabulate(agent.chooser(), 32)
    sizes, vectors = np.random.default_rng(0).integers(1, 33, size=1000), visited(agent, 1000)
    vectors[:, 0] = np.log2(sizes) / 10.0
    chosen = chooser.act(vectors, chooser.network.start(1000))[0]
    assert [chooser.plans[action] for action in chosen] == [table.best(size) for size in sizes.tolist()]
    shown = np.zeros_like(vectors)
    shown[:, 0] = vectors[:, 0]
    normalised = agent.model.get_env().normalize_obs(shown)  # type: ignore[union-attr]
    theirs, _ = agent.model.predict(normalised, deterministic=True)
    assert (theirs == chosen).mean() > 0.95  # scores of float32 may tie
    blind, whole = trained(algorithm), trained(algorithm).chooser()
    with pytest.raises(ValueError, match="agent's 'observe'"):
        blind.load(tmp_path)
    with pytest.raises(ValueError, match="train it with"):
        tabulate(whole, 32)


def test_what_a_policy_may_observe_is_checked() -> None:
    env = simulated()
    for algorithm, observe, rule in (
        ("ppo", "load", "observe must be 'all'"),
        ("recurrent_ppo", "batch_size", "unless with recurrent_ppo"),
    ):
        with pytest.raises(ValueError, match=rule):
            make_agent(algorithm, env, {**SMALL[algorithm], "observe": observe}, plans=env.plans)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("check", CHECKS)
def test_a_policy_is_a_chooser(check: Any, recurrent: bool) -> None:
    def make(plans: tuple[Plan, ...]) -> NetworkChooser:
        rng, inputs = np.random.default_rng(1), len(vector_bounds(plans)[0])
        sizes = {"mlp_extractor.policy_net.0": (8, 8 if recurrent else inputs), "action_net": (len(plans), 8)}
        tensors = {f"{name}.weight": rng.normal(size=size) for name, size in sizes.items()}
        tensors |= {f"{name}.bias": rng.normal(size=size[0]) for name, size in sizes.items()}
        if recurrent:
            tensors |= {"lstm_actor.weight_ih_l0": rng.normal(size=(32, inputs))}
            tensors |= {"lstm_actor.weight_hh_l0": rng.normal(size=(32, 8))}
            tensors |= {f"lstm_actor.bias_{way}_l0": rng.normal(size=32) for way in ("ih", "hh")}
        return NetworkChooser(PolicyNetwork(tensors), plans)

    check(make)


def test_a_recurrent_chooser_goes_on_from_its_state() -> None:
    agent = trained("recurrent_ppo")
    one, two = agent.chooser(), agent.chooser()
    observer = specrl.core.observation.Observer(agent.plans)
    for size in (1, 8, 32):
        one.choose(observer.observe(size, 100.0))
    assert one.state_dict() != two.state_dict()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.choose(observer.observe(8, 100.0)) == two.choose(observer.observe(8, 100.0))
    assert one.state_dict() == two.state_dict()


def test_the_mask_holds_in_training_and_in_serving() -> None:
    agent = trained("maskable_ppo", profile="aurora-minimax-m2.1", batch_size=[1, 8], plans="0,2,3")
    assert agent.allowed == (True, False, True)  # a round of plan 2 would have been refused
    chooser = agent.chooser()
    actions, _ = chooser.act(visited(agent, 500), chooser.network.start(500))
    assert set(actions.tolist()) <= {0, 2}


def test_ppo_learns_to_draft_at_batch_1_and_not_at_32() -> None:
    shipped = load_profile("aurora-qwen3-coder-next-fp8")
    dear = {cost for cost in shipped.costs if cost.batch_size == 32 and cost.plan not in (None, Plan(0))}
    costs = tuple(replace(cost, seconds=1.5 * cost.seconds) if cost in dear else cost for cost in shipped.costs)
    profile = replace(shipped, costs=costs)
    env = simulated(64, profile=profile, batch_size=[1, 32], plans="0,3", max_rounds=64, stagger=True)
    hyper = {**SMALL["maskable_ppo"], "n_steps": 32, "batch_size": 512, "n_epochs": 4, "gamma": 0.0, "normalize": True}
    agent = make_agent("maskable_ppo", env, {**hyper, "learning_rate": 0.005}, plans=env.plans, seed=1)
    agent.model.learn(50_000)
    told = report(agent.chooser(), profile, [1, 32], passes=2, num_envs=32)
    assert told.distilled.table.state_dict() == {"1": "3/1/4", "32": "0"} == told.best.state_dict()
    assert told.share > 0.95


def test_a_table_is_the_majority_at_each_batch_size() -> None:
    plans = parse_plans("0,1,3")
    sizes = np.array([1, 1, 1, 8, 8, 32, 32, 32, 32, 32])
    found = distill(sizes, np.array([2, 2, 1, 1, 0, 0, 0, 0, 0, 2]), plans)
    assert found.table.state_dict() == {"1": "3/1/4", "8": "0", "32": "0"}  # of a tie, the first plan
    assert found.by_batch_size == {1: pytest.approx(2 / 3), 8: 0.5, 32: pytest.approx(0.8)}
    assert found.agreement == pytest.approx(0.7) and found.states == 10


def test_the_report_gives_the_best_table_a_share_of_one() -> None:
    profile, sizes = load_profile("aurora-qwen3-coder-next-fp8"), (1, 32)
    plans = profile.plans
    best = best_plans(profile, sizes, plans)
    first = [1.0 if plan == best.best(1) else 0.0 for plan in plans]
    last = [1.0 if plan == best.best(32) else 0.0 for plan in plans]
    weight = np.zeros((len(plans), len(vector_bounds(plans)[0])))
    weight[:, 0] = 2.0 * (np.array(last) - np.array(first))  # log2(batch size) / 10 is 0 or a half
    tensors = {"mlp_extractor.policy_net.0.weight": weight, "mlp_extractor.policy_net.0.bias": np.array(first)}
    told = report(NetworkChooser(PolicyNetwork(tensors), plans), profile, sizes)
    assert told.share == 1.0 and told.by_batch_size == {1: 1.0, 32: 1.0} and told.distilled.agreement == 1.0
    assert told.distilled.table.state_dict() == best.state_dict()


def test_the_command_writes_what_serves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_sizes": (1, 32), "output_dir": tmp_path}
    rl(agent=AgentConfig("maskable_ppo", n_timesteps=20_000), **options)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"policy.json", "policy.safetensors", "plans.json", "curve.csv", "results.json"}
    results, chooser = json.loads((tmp_path / "results.json").read_text()), load_chooser(tmp_path)
    assert 0.5 < results["share_of_best"] < 1.05 and results["timesteps"] >= 20_000
    table = PlanTable(dict(read_plans(tmp_path / "plans.json")))
    sizes, vectors = np.random.default_rng(1).integers(1, 33, size=1000), np.zeros((1000, chooser.network.inputs))
    vectors[:, 0] = np.log2(sizes) / 10.0
    chosen = chooser.act(vectors.astype(np.float32), chooser.network.start(1000))[0]
    assert [chooser.plans[action] for action in chosen] == [table.best(size) for size in sizes.tolist()]
    assert results["agreement"] == 1.0 and results["share_of_table"] == results["share_of_best"]
    header, *rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert header == "timesteps,seconds,speedup" and 0.5 < float(rows[0].split(",")[2]) < 2.0
    rl(agent=AgentConfig(policy=tmp_path, n_timesteps=1), **options)


def test_it_goes_on_on_live_decoding_and_updates_are_no_thinking_time(tmp_path: Path) -> None:
    plans, target = parse_plans("0,1"), tiny_target()
    draft = specrl.new_draft(target, intermediate_size=32, aux_layers=AUX_LAYERS)
    clock = TickingClock()
    live = SpecDecodeEnv(
        engine=specrl.LocalEngine(target, draft, max_context=64, clock=clock),
        workload=Listed([Request(prompt, 32, ignore_eos=True) for prompt in prompts(8, 4)]),
        plans=plans,
        batch_size=[1, 2],
        max_rounds=16,
    )
    env = as_vector(live)
    agent = make_agent("ppo", env, {**SMALL["ppo"], "n_steps": 32, "normalize": True}, plans=plans)
    curve = RLTrainingLog(None, live.off_the_clock)
    thinking, updates = list[float](), list[int]()
    step, train = live.step, agent.model.train  # type: ignore[attr-defined]

    def watched(action: Any) -> Any:
        out = step(action)
        thinking.append(out[4]["thinking_s"])
        return out

    def slow() -> None:
        train()
        clock.advance(100.0)
        updates.append(len(thinking))

    live.step, agent.model.train = watched, slow  # type: ignore[method-assign, attr-defined]
    agent.model.learn(96, callback=curve)
    assert len(thinking) == 96 and updates == [32, 64, 96]
    assert max(thinking) < 0.1  # those of the steps after an update, too
    assert curve.rows and 0.0 < curve.rows[0]["speedup"] < 10.0
    agent.save(tmp_path)
    assert load_chooser(tmp_path).plans == plans


def test_same_step_resets_show_the_last_observation_and_the_next_episodes_first() -> None:
    # One environment that resets by itself against one that is reset in the next step: the same random numbers.
    kwargs: dict[str, Any] = {"batch_size": [1, 8, 32], "max_rounds": 5}
    at_once, later = simulated(3, **kwargs), SimulatedVectorEnv(3, **kwargs)
    for env in (at_once, later):
        env.reset(seed=0)
    for number in range(1, 6):
        one, _, _, stops, info = at_once.step(np.full(3, 1))
        two, _, _, _, _ = later.step(np.full(3, 1))
        assert stops.all() == (number == 5) and ("final_obs" in info) == (number == 5)
    np.testing.assert_array_equal(info["final_obs"], two)
    assert info["_final_obs"].all() and (one[:, 3] == 0.0).all() and (two[:, 3] > 0.0).all()
    assert gym.make_vec("SpecRL/Simulated-v0", 2, autoreset_mode=AutoresetMode.SAME_STEP) is not None


def test_staggered_episodes_do_not_end_together() -> None:
    env = simulated(200, max_rounds=20, stagger=True)
    env.reset(seed=0)
    ended = [int(env.step(np.zeros(200, dtype=np.int64))[3].sum()) for _ in range(40)]
    assert sum(ended[:20]) == 200 == sum(ended[20:]) and max(ended) < 40
    with pytest.raises(ValueError, match="stagger needs episodes of max_rounds"):
        SimulatedVectorEnv(2, max_tokens=50, stagger=True)


def test_the_adapter_counts_speedups_and_tells_what_ended() -> None:
    env = SB3VectorEnv(simulated(3, max_rounds=4))
    env.seed(0)
    env.reset()
    for number in range(1, 9):
        _, rewards, dones, infos = env.step(np.full(3, 1))
        assert rewards.dtype == np.float32
        assert dones.all() == (number % 4 == 0)
        assert all(("terminal_observation" in info) == (number % 4 == 0) for info in infos)
    assert infos[0]["TimeLimit.truncated"] is True
    assert 0.5 < env.take_speedup() < 3.0 and np.isnan(env.take_speedup())
    assert np.stack(env.env_method("action_masks")).shape == (3, 4)
    with pytest.raises(ValueError, match="autoreset_mode=AutoresetMode.SAME_STEP"):
        SB3VectorEnv(SimulatedVectorEnv(2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("task", ["SpecRL/Simulated-v0", "SpecRL/SpecDecode-v0"])
def test_shipped_hyperparameters_make_an_agent(algorithm: Any, task: str) -> None:
    hyper = AgentConfig(algorithm).read_hyperparameters(task)
    assert hyper["n_timesteps"] > 1000
    env = simulated(2)
    agent = make_agent(algorithm, env, {**hyper, "batch_size": 32}, plans=env.plans)
    assert agent.chooser().network.outputs == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_timesteps": 0}, "agent.n_timesteps must be at least 1"),
        ({"seconds": 0.0}, "agent.seconds must be above 0"),
        ({"hyperparameters": Path("nowhere.yaml")}, "there is no 'nowhere.yaml'"),
        ({"policy": Path("nowhere")}, "must hold policy.safetensors and policy.json"),
    ],
)
def test_wrong_settings_of_the_agent_get_one_clear_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        rl(agent=AgentConfig(**changes))
    assert "\n" not in str(error.value)


def test_wrong_policies_and_hyperparameters_get_one_clear_line(tmp_path: Path) -> None:
    env = simulated()
    agent = make_agent("ppo", env, SMALL["ppo"], plans=env.plans)
    agent.save(tmp_path)
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("dqn", SMALL["dqn"], "must have the agent's algorithm, dqn, but has ppo"),
        ("ppo", {**SMALL["ppo"], "normalize": True}, "agent's 'normalize'"),
        ("ppo", {**SMALL["ppo"], "policy_kwargs": {"net_arch": [3]}}, "must have the agent's network"),
    ]
    for algorithm, hyper, message in wrong:
        with pytest.raises(ValueError, match=message) as error:
            make_agent(algorithm, simulated(), hyper, plans=env.plans).load(tmp_path)
        assert "\n" not in str(error.value)
    for algorithm, hyper, message in [
        ("a2c", {}, "algorithm must be one of"),
        ("ppo", {**SMALL["ppo"], "learning_rate": "cos_1"}, "learning_rate must be a number or 'lin_<number>'"),
        ("ppo", {**SMALL["ppo"], "n_step": 4}, "hyperparameters must be arguments of PPO"),
        ("ppo", {**SMALL["ppo"], "policy_kwargs": {"activation": "gelu"}}, "activation must be one of tanh, relu"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_agent(algorithm, env, hyper, plans=env.plans)
    observation = specrl.core.observation.Observer(parse_plans("0,1")).observe(1, 10.0)
    with pytest.raises(ValueError, match="observe the plans 0, 3/1/4, 4/1/5, 5/1/6"):
        agent.chooser().choose(observation)
    with pytest.raises(ValueError, match="layers that score plans"):
        PolicyNetwork({"value_net.weight": np.zeros((1, 2))})
