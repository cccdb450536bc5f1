import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from specrl.core.observation import Observer, vector_bounds
from specrl.core.plan import Plan, parse_plans
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.envs.spec_decode import SpecDecodeEnv
from specrl.evaluation.policy_report import best_plans, report
from specrl.export.bundle import read_plans
from specrl.simulation.profile import load_profile
from specrl.testing.agent import CHECKS
from specrl.training.rl import as_vector

AUTORESET_MODES = AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP
PPO = {"policy": "MlpPolicy", "n_steps": 8, "batch_size": 32, "n_epochs": 1}
LSTM = {"net_arch": [8], "lstm_hidden_size": 8}
SMALL: dict[str, dict[str, Any]] = {
    "ppo": PPO,
    "maskable_ppo": PPO,
    "recurrent_ppo": {**PPO, "policy": "MlpLstmPolicy", "policy_kwargs": LSTM},
    "dqn": {"policy": "MlpPolicy", "learning_starts": 16, "buffer_size": 500, "policy_kwargs": {"activation": "tanh"}},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def simulated(num_envs: int = 4, **kwargs: Any) -> SimulatedVectorEnv:
    options = {"batch_size": [1, 8, 32], "max_rounds": 16, "autoreset_mode": AutoresetMode.SAME_STEP, **kwargs}
    return SimulatedVectorEnv(num_envs, **options)


def trained(algorithm: str, *, timesteps: int = 128, seed: int = 0, observe: str = "all", **kwargs: Any) -> Agent:
    env = simulated(**kwargs)
    hyper = {**SMALL[algorithm], "normalize": True, "observe": observe}
    agent = make_agent(algorithm, env, hyper, plans=env.plans, allowed=env.action_masks()[0].tolist(), seed=seed)
    agent.model.learn(timesteps)
    return agent


def random_vectors(agent: Agent, count: int) -> NDArray[np.float32]:
    low, high = vector_bounds(agent.plans)
    return np.random.default_rng(0).uniform(low, high, size=(count, len(low))).astype(np.float32)


def actions_of(chooser: NetworkChooser, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    return chooser.act(vectors, chooser.network.start(len(vectors)))[0]


def assert_is_table(chooser: NetworkChooser, table: PlanTable, vectors: NDArray[np.float32]) -> None:
    sizes = np.random.default_rng(0).integers(1, 33, size=len(vectors))
    vectors[:, 0] = np.log2(sizes) / 10.0
    chosen = [chooser.plans[action] for action in actions_of(chooser, vectors)]
    assert chosen == [table.best(size) for size in sizes.tolist()]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_saved_policy_chooses_as_stable_baselines_and_continues_training(algorithm: str, tmp_path: Path) -> None:
    agent = trained(algorithm)
    agent.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "policy.safetensors"]  # no pickle
    chooser, vectors = load_chooser(tmp_path), random_vectors(agent, 1000)
    assert chooser.plans == agent.plans
    assert (actions_of(chooser, vectors) == actions_of(agent.chooser(), vectors)).all()
    other = make_agent(algorithm, simulated(), agent.hyperparameters, plans=agent.plans, seed=5)
    other.load(tmp_path)
    assert (actions_of(other.chooser(), vectors) == actions_of(chooser, vectors)).all()
    other.model.learn(64)

    vectors, state, memory = vectors[:40], chooser.network.start(40), None
    for _ in range(4):
        vectors = np.roll(vectors, 1, axis=0)
        normalized = agent.model.get_env().normalize_obs(vectors)  # type: ignore[union-attr]
        extra = {"action_masks": np.tile(chooser.allowed, (40, 1))} if algorithm == "maskable_ppo" else {}
        expected, memory = agent.model.predict(normalized, state=memory, deterministic=True, **extra)
        actions, state = chooser.act(vectors, state)
        assert (actions == expected).mean() > 0.95  # scores of float32 may tie
        if algorithm == "recurrent_ppo":
            assert memory is not None
            np.testing.assert_allclose(state.hidden, memory[0][0], atol=1e-4)


@pytest.mark.parametrize("algorithm", ["maskable_ppo", "dqn"])
def test_a_policy_that_sees_only_the_batch_size_is_a_table(algorithm: str, tmp_path: Path) -> None:
    agent = trained(algorithm, timesteps=2000, seed=3, observe="batch_size")
    agent.save(tmp_path)
    chooser, vectors = load_chooser(tmp_path), random_vectors(agent, 1000)
    assert_is_table(chooser, tabulate(agent.chooser(), 32), vectors)
    visible = np.zeros_like(vectors)
    visible[:, 0] = vectors[:, 0]
    normalized = agent.model.get_env().normalize_obs(visible)  # type: ignore[union-attr]
    expected, _ = agent.model.predict(normalized, deterministic=True)
    assert (actions_of(chooser, vectors) == expected).mean() > 0.95  # scores of float32 may tie
    sees_all = trained(algorithm)
    with pytest.raises(ValueError, match="observe"):
        sees_all.load(tmp_path)
    with pytest.raises(ValueError, match="train it with"):
        tabulate(sees_all.chooser(), 32)


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


def test_a_recurrent_chooser_restores_its_state() -> None:
    agent = trained("recurrent_ppo")
    one, two, observer = agent.chooser(), agent.chooser(), Observer(agent.plans)
    for size in (1, 8, 32):
        one.choose(observer.observe(size, 100.0))
    assert one.state_dict() != two.state_dict()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.choose(observer.observe(8, 100.0)) == two.choose(observer.observe(8, 100.0))
    assert one.state_dict() == two.state_dict()


def test_the_mask_holds_in_training_and_in_serving() -> None:
    agent = trained("maskable_ppo", profile="aurora-minimax-m2.1", batch_size=[1, 8], plans="0,2,3")
    assert agent.allowed == (True, False, True)  # a round of plan 2 would have been refused
    assert set(actions_of(agent.chooser(), random_vectors(agent, 500)).tolist()) <= {0, 2}


def test_ppo_learns_to_draft_at_batch_1_and_not_at_32() -> None:
    shipped = load_profile("aurora-qwen3-coder-next-fp8")
    slow = {cost for cost in shipped.costs if cost.batch_size == 32 and cost.plan not in (None, Plan(0))}
    costs = tuple(replace(cost, seconds=1.5 * cost.seconds) if cost in slow else cost for cost in shipped.costs)
    profile = replace(shipped, costs=costs)
    env = simulated(64, profile=profile, batch_size=[1, 32], plans="0,3", max_rounds=64, stagger=True)
    hyper = {**PPO, "n_steps": 32, "batch_size": 512, "n_epochs": 4, "gamma": 0.0, "normalize": True}
    agent = make_agent("maskable_ppo", env, {**hyper, "learning_rate": 0.005}, plans=env.plans, seed=1)
    agent.model.learn(50_000)
    result = report(agent.chooser(), profile, [1, 32], passes=2, num_envs=32)
    assert result.distilled.table.state_dict() == {"1": "3/1/4", "32": "0"} == result.best.state_dict()
    assert result.share > 0.95


def test_a_table_is_the_majority_at_each_batch_size() -> None:
    sizes = np.array([1, 1, 1, 8, 8, 32, 32, 32, 32, 32])
    result = distill(sizes, np.array([2, 2, 1, 1, 0, 0, 0, 0, 0, 2]), parse_plans("0,1,3"))
    assert result.table.state_dict() == {"1": "3/1/4", "8": "0", "32": "0"}  # of a tie, the first plan
    assert result.by_batch_size == {1: pytest.approx(2 / 3), 8: 0.5, 32: pytest.approx(0.8)}
    assert result.agreement == pytest.approx(0.7) and result.states == 10


def test_the_report_gives_the_best_table_a_share_of_one() -> None:
    profile, sizes = load_profile("aurora-qwen3-coder-next-fp8"), (1, 32)
    plans = profile.plans
    best = best_plans(profile, sizes, plans)
    first, last = (np.array([float(plan == best.best(size)) for plan in plans]) for size in sizes)
    weight = np.zeros((len(plans), len(vector_bounds(plans)[0])))
    weight[:, 0] = 2.0 * (last - first)  # log2(batch size) / 10 is 0 or a half
    tensors = {"mlp_extractor.policy_net.0.weight": weight, "mlp_extractor.policy_net.0.bias": first}
    result = report(NetworkChooser(PolicyNetwork(tensors), plans), profile, sizes)
    assert result.share == 1.0 and result.by_batch_size == {1: 1.0, 32: 1.0} and result.distilled.agreement == 1.0
    assert result.distilled.table.state_dict() == best.state_dict()


def test_the_command_writes_a_policy_and_its_table(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_sizes": (1, 32), "output_dir": tmp_path}
    rl(agent=AgentConfig("maskable_ppo", n_timesteps=20_000), **options)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"policy.json", "policy.safetensors", "plans.json", "curve.csv", "results.json"}
    results, chooser = json.loads((tmp_path / "results.json").read_text()), load_chooser(tmp_path)
    assert 0.5 < results["share_of_best"] < 1.05 and results["timesteps"] >= 20_000
    table = PlanTable(dict(read_plans(tmp_path / "plans.json")))
    assert_is_table(chooser, table, np.zeros((1000, chooser.network.inputs), dtype=np.float32))
    assert results["agreement"] == 1.0 and results["share_of_table"] == results["share_of_best"]
    header, *rows = (tmp_path / "curve.csv").read_text().splitlines()
    assert header == "timesteps,seconds,speedup" and 0.5 < float(rows[0].split(",")[2]) < 2.0
    rl(agent=AgentConfig(policy=tmp_path, n_timesteps=1), **options)


def test_updates_on_live_decoding_are_not_thinking_time(tmp_path: Path) -> None:
    plans, target, clock = parse_plans("0,1"), tiny_target(), TickingClock()
    draft = specrl.new_draft(target, intermediate_size=32, aux_layers=AUX_LAYERS)
    live = SpecDecodeEnv(
        engine=specrl.LocalEngine(target, draft, max_context=64, clock=clock),
        workload=Listed([Request(prompt, 32, ignore_eos=True) for prompt in prompts(8, 4)]),
        plans=plans,
        batch_size=[1, 2],
        max_rounds=16,
    )
    agent = make_agent("ppo", as_vector(live), {**PPO, "n_steps": 32, "normalize": True}, plans=plans)
    curve = RLTrainingLog(None, live.paused_timer)
    thinking, updates = list[float](), list[int]()
    step, train = live.step, agent.model.train  # type: ignore[attr-defined]

    def recorded_step(action: Any) -> Any:
        out = step(action)
        thinking.append(out[4]["thinking_s"])
        return out

    def slow_train() -> None:
        train()
        clock.advance(100.0)
        updates.append(len(thinking))

    live.step, agent.model.train = recorded_step, slow_train  # type: ignore[method-assign, attr-defined]
    agent.model.learn(96, callback=curve)
    assert len(thinking) == 96 and updates == [32, 64, 96]
    assert max(thinking) < 0.1  # those of the steps after an update, too
    assert curve.rows and 0.0 < curve.rows[0]["speedup"] < 10.0
    agent.save(tmp_path)
    assert load_chooser(tmp_path).plans == plans


def test_the_adapter_counts_speedups_and_reports_the_ends_of_episodes() -> None:
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
    with pytest.raises(ValueError, match="autoreset_mode"):
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
    ("changes", "match"),
    [
        ({"n_timesteps": 0}, "agent.n_timesteps"),
        ({"seconds": 0.0}, "agent.seconds"),
        ({"hyperparameters": Path("nowhere.yaml")}, "agent.hyperparameters"),
        ({"policy": Path("nowhere")}, "must hold policy.safetensors"),
    ],
)
def test_wrong_settings_of_the_agent_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        rl(agent=AgentConfig(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("algorithm", "changes", "match"),
    [
        ("a2c", {}, "algorithm"),
        ("ppo", {"learning_rate": "cos_1"}, "learning_rate"),
        ("ppo", {"n_step": 4}, "hyperparameters must be arguments of PPO"),
        ("ppo", {"policy_kwargs": {"activation": "gelu"}}, "activation"),
        ("ppo", {"observe": "load"}, "observe"),
        ("recurrent_ppo", {"observe": "batch_size"}, "observe"),
    ],
)
def test_wrong_hyperparameters_are_refused(algorithm: str, changes: dict[str, Any], match: str) -> None:
    env = simulated()
    with pytest.raises(ValueError, match=match):
        make_agent(algorithm, env, {**SMALL.get(algorithm, {}), **changes}, plans=env.plans)


def test_a_policy_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    env = simulated()
    agent = make_agent("ppo", env, PPO, plans=env.plans)
    agent.save(tmp_path)
    others: dict[str, tuple[str, dict[str, Any]]] = {
        "algorithm": ("dqn", {}),
        "normalize": ("ppo", {"normalize": True}),
        "network": ("ppo", {"policy_kwargs": {"net_arch": [3]}}),
    }
    for match, (algorithm, changes) in others.items():
        with pytest.raises(ValueError, match=match) as error:
            make_agent(algorithm, simulated(), {**SMALL[algorithm], **changes}, plans=env.plans).load(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="observe the plans"):
        agent.chooser().choose(Observer(parse_plans("0,1")).observe(1, 10.0))
    with pytest.raises(ValueError, match="layers that score plans"):
        PolicyNetwork({"value_net.weight": np.zeros((1, 2))})


def test_same_step_resets_report_the_last_observation_and_the_first_of_the_next_episode() -> None:
    same_step, next_step = (simulated(3, max_rounds=5, autoreset_mode=mode) for mode in AUTORESET_MODES)
    for env in (same_step, next_step):
        env.reset(seed=0)  # the same random numbers
    for number in range(1, 6):
        first, _, _, stops, info = same_step.step(np.full(3, 1))
        last, *_ = next_step.step(np.full(3, 1))
        assert stops.all() == (number == 5) and ("final_obs" in info) == (number == 5)
    np.testing.assert_array_equal(info["final_obs"], last)
    assert info["_final_obs"].all() and (first[:, 3] == 0.0).all() and (last[:, 3] > 0.0).all()


def test_staggered_episodes_do_not_end_together() -> None:
    env = simulated(200, max_rounds=20, stagger=True)
    env.reset(seed=0)
    ended = [int(env.step(np.zeros(200, dtype=np.int64))[3].sum()) for _ in range(40)]
    assert sum(ended[:20]) == 200 == sum(ended[20:]) and max(ended) < 40
    with pytest.raises(ValueError, match="stagger"):
        SimulatedVectorEnv(2, max_tokens=50, stagger=True)
