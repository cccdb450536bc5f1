# %%
"""PPO chooses the plan: Stable-Baselines3 on `SpecRL/Simulated-v0`, hundreds of environments at once.

It learns which plan pays at which batch size, where costs and accept lengths are published ones; then it prints the
plans that it chose. Run it: python examples/train_ppo.py, or cell by cell in an editor that knows '# %%'.
"""

# %% The environment: a load of 1 to 32 requests, another one in each episode
from gymnasium.vector import AutoresetMode

from specrl.agents.choosers.policy_network import load_chooser
from specrl.agents.rl.sb3 import make_agent
from specrl.core.observation import Observer
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.evaluation.policy_report import report
from specrl.simulation.profile import load_profile

SIZES = (1, 8, 16, 32)
PROFILE = "aurora-qwen3-coder-next-fp8"

env = SimulatedVectorEnv(
    512, profile=PROFILE, batch_size=SIZES, max_rounds=256, autoreset_mode=AutoresetMode.SAME_STEP, stagger=True
)
print("plans on offer:", ", ".join(map(str, env.plans)))

# %% The agent: hyperparameters as RL Baselines3 Zoo writes them
hyperparameters = {
    "policy": "MlpPolicy",
    "normalize": True,
    "n_steps": 32,
    "batch_size": 4096,
    "n_epochs": 4,
    "gamma": 0.0,  # plans do not change the rounds after them
    "ent_coef": 0.01,
    "learning_rate": "lin_0.003",
    "policy_kwargs": {"net_arch": [32, 32]},
}
agent = make_agent("ppo", env, hyperparameters, plans=env.plans, seed=0)

# %% Train: one and a half million rounds
agent.model.learn(1_500_000)

# %% What it chose, beside the plan that is best by the profile
profile = load_profile(PROFILE)
results = report(agent.chooser(), profile, SIZES)
for size in SIZES:
    chosen, best = results.distilled.table.best(size), results.best.best(size)
    speedup = profile.speedup(size, chosen)
    print(
        f"batch {size:2}: chose {chosen!s:6} speedup {speedup:.2f}; best {best!s:6} {profile.speedup(size, best):.2f}"
    )
agreement = results.distilled.agreement
print(
    f"{results.share:.1%} of the speed of the best plans; a table of plans agrees with {agreement:.1%} of its choices"
)

# %% Save it, and let it choose without torch, as inside a serving engine
agent.save("runs/example-ppo")
chooser = load_chooser("runs/example-ppo")
print("first choice at batch 8:", chooser.choose(Observer(chooser.plans).observe(batch_size=8, context=512.0)))
