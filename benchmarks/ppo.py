"""How soon deep reinforcement learning chooses as well as the best plan per batch size, from nothing, in simulation.

    python benchmarks/ppo.py [--algo maskable_ppo] [--seeds 3] [--seconds 120] [--hyperparameters file.yaml]

The load moves: each episode of training draws one of the batch sizes; in the measurement they change every 64 rounds.
The share is the seconds that the best plans of the profile need for the same tokens over the seconds that the policy
spends, both played with the same seed. Training runs with the shipped hyperparameters and `specrl rl`'s environment;
its clock is stopped during measurements. Prints a line per measurement and, last, one line of JSON. The aim: a share
of at least 0.97 within 120 seconds on two cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.callbacks import BaseCallback

from specrl.agents.rl.sb3 import ALGORITHMS, AgentConfig, make_agent
from specrl.core.clock import WallClock
from specrl.envs import SIMULATED
from specrl.envs.simulated_vector import SimulatedVectorEnv
from specrl.evaluation.policy_report import report
from specrl.measure.machine import environment
from specrl.simulation.profile import load_profile
from specrl.training.rl import EPISODE_ROUNDS

SIZES = (1, 2, 4, 8, 12, 16, 24, 32)
AIM = 0.97


class Measure(BaseCallback):
    """Measures the policy now and then, off the clock, and stops when the time is up."""

    def __init__(self, measure, seconds: float, every: float) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.rows: list[dict[str, float]] = []
        self._measure, self._limit, self._every = measure, seconds, every
        self._clock = WallClock()
        self._began, self._due = self._clock.now(), every

    def spent(self) -> float:
        """Seconds of training so far."""
        return self._clock.now() - self._began

    def _on_step(self) -> bool:
        return self.spent() < self._limit

    def _on_rollout_end(self) -> None:
        if self.spent() >= self._due:
            self._due += self._every
            self.take()

    def take(self) -> None:
        """Measure now."""
        spent = self.spent()
        results = self._measure()
        self.rows.append({"seconds": spent, "timesteps": self.num_timesteps, "share": results.share})
        worst = min(results.by_batch_size, key=results.by_batch_size.__getitem__)
        rate = self.num_timesteps / spent
        print(
            f"  {spent:6.1f} s  {self.num_timesteps:9,} rounds ({rate:,.0f}/s)  share {results.share:.3f}, "
            f"least {results.by_batch_size[worst]:.3f} at {worst}  "
            + " ".join(f"{b}:{results.distilled.table.best(b)}" for b in results.by_batch_size)
        )
        self.rows[-1] |= {"least": results.by_batch_size[worst], "agreement": results.distilled.agreement}
        self.rows[-1]["table_share"] = results.table_share
        self._began += self.spent() - spent


def run(args: argparse.Namespace, seed: int) -> list[dict[str, float]]:
    hyper = AgentConfig(args.algo, hyperparameters=args.hyperparameters).read_hyperparameters(SIMULATED)
    hyper |= {"observe": args.observe} if args.observe else {}
    env = SimulatedVectorEnv(
        hyper["n_envs"],
        profile=args.profile,
        batch_size=SIZES,
        max_rounds=args.max_rounds,
        autoreset_mode=AutoresetMode.SAME_STEP,
        stagger=not args.together,
    )
    agent = make_agent(args.algo, env, hyper, plans=env.plans, allowed=env.action_masks()[0].tolist(), seed=seed)
    known = load_profile(args.profile)
    watch = Measure(lambda: report(agent.chooser(), known, SIZES, seed=1000 + seed), args.seconds, args.every)
    agent.model.learn(hyper["n_timesteps"], callback=watch)
    watch.take()
    return watch.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algo", choices=list(ALGORITHMS), default="maskable_ppo")
    parser.add_argument("--profile", default="aurora-qwen3-coder-next-fp8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--every", type=float, default=5.0, help="seconds of training between measurements")
    parser.add_argument("--hyperparameters", type=Path, help="YAML; by default the shipped ones")
    parser.add_argument("--observe", choices=["all", "batch_size"], help="by default what the hyperparameters say")
    parser.add_argument("--max_rounds", type=int, default=EPISODE_ROUNDS[SIMULATED], help="of an episode of training")
    parser.add_argument("--together", action="store_true", help="let all episodes end in the same step")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ends, reached = [], []
    for seed in range(args.seeds):
        print(f"{args.algo}, seed {seed}")
        rows = run(args, seed)
        ends.append(rows[-1])
        reached.append(next((row["seconds"] for row in rows if row["share"] >= AIM), None))
    shares = [row["share"] for row in ends]
    print(f"share at the end: {np.median(shares):.3f} ({min(shares):.3f} .. {max(shares):.3f}); aim {AIM}")
    agreement = [row["agreement"] for row in ends]
    print(f"choices that are those of the table it comes to: {min(agreement):.1%} .. {max(agreement):.1%}")
    print(f"first measured at {AIM} after: " + ", ".join("never" if s is None else f"{s:.0f} s" for s in reached))
    print(json.dumps({"algo": args.algo, "ends": ends, "reached_s": reached, "environment": environment()}))


if __name__ == "__main__":
    main()
