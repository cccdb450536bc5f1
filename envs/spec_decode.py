"""`SpecRL/SpecDecode-v0`: choose the plan of every round of live speculative decoding."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from specrl.core.batch_schedule import BatchSizes, batch_sizes
from specrl.core.checks import require
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.observation import Observation, vector_bounds
from specrl.core.plan import Plan, parse_plans
from specrl.core.registry import make_engine
from specrl.core.rollout import Rollout, Step
from specrl.envs.rewards import Outcome
from specrl.envs.timed_env import PlanZeroBaseline, TimedEnv

if TYPE_CHECKING:
    from torch import Tensor

    from specrl.models.draft import Draft


class SpecDecodeEnv(TimedEnv[Session], gymnasium.Env[NDArray[np.float32], Any]):
    """Live speculative decoding of a language model; every step is one round, rewarded by the clock.

    ## Action space
    `Discrete(n)`: the index of one of the `plans` (num_steps/topk/num_draft_tokens; plan 0 proposes no drafts).
    `action_masks()` and `info["action_mask"]` [n] show which plans the engine can run. With
    `action="multi_discrete"`, `MultiDiscrete([number of num_steps, number of topk])`: the plan with this num_steps
    (ascending) and the nearest topk.

    ## Observation space
    `Box`, float32, of what any serving engine knows (`specrl.core.observation.Observation.vector`). K is the largest
    num_steps of the n plans. All measured entries have a neutral value at first.

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0 | live requests: log2(B) / 10 | 0 | 1 | |
    | 1 | mean context: log2(tokens) / 20 | 0 | 1 | |
    | 2 | recent correct drafts per round / K | 0 | 1 | |
    | 3 | rounds since the draft changed: log2(1 + rounds) / 20 | 0 | 1 | |
    | 4 | constant | 1 | 1 | |
    | 5 … 4+K | recent survival P_k: share of rounds whose first k drafts were accepted | 0 | 1 | share |
    | 5+K … 4+K+n | recent cost of each plan at this batch size: log2(seconds / plain seconds) | -4 | 4 | octaves |
    | next n | whether that cost was measured | 0 | 1 | |
    | last n | the last round's plan, one-hot | 0 | 1 | |

    ## Rewards
    `reward="differential"` (default): (N·t0/B - λ·Δt) / t_ref. N tokens were committed in Δt seconds for B requests;
    t0 is the cost of a plain decoding step at this batch size and context, measured between rounds; λ is the running
    speedup; t_ref is the first t0. Other rewards: `specrl.envs.rewards`. Δt includes the time between the return of
    one step and the call of the next, which is the time that the agent takes to decide. `drain`, `load_draft`,
    `render`, code inside `off_the_clock()` and prefill do not count.

    ## Starting state
    `reset(seed=...)` reproduces prompts, batch sizes and the first observation. Rounds are timed on a real clock, so
    later observations are not reproducible (`nondeterministic=True`). The draft's weights and the measured plain costs
    are kept.

    ## Episode end
    Truncated after `max_rounds` rounds, or terminated when `max_tokens` tokens are committed; give exactly one.

    ## Info
    `tokens`, `seconds` and their parts (`draft_s`, `verify_s`, `other_s`, `thinking_s`), `prefill_s`,
    `accept_length`, `histogram` of correct drafts [num_steps + 1], `plan`, `draft_version`, `batch_size`, `t0_s`,
    `t0_error_s`, `episode_speedup` = ΣN·t0/B ÷ ΣΔt, `action_mask`, and the whole `round`. `plan0_s` and
    `episode_speedup_over_plan0` compare with rounds of plan 0 instead, in which the draft still reads the text; they
    appear after the first such round. On an SGLang server that was running already, without `plain_url`, plain
    decoding cannot be measured: rewards are then relative to plan 0, and `t0_s`, `t0_error_s` and `episode_speedup`
    are nan.

    ## Arguments
        engine: 'local', 'sglang' (`specrl.sglang.client.factory`; launched, or `engine_options={"server": "http://...",
            "plain_url": "http://..."}`: running servers with and without speculation), or an `Engine`, which has its
            own target and draft.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: None: random initialisation; else an EAGLE3 directory or a `Draft`.
        batch_size: live requests: a number; several, one of which each episode draws; or a schedule within the
            episode, '1x64,4x64' (batch size x rounds, repeated) or a sequence of `Phase`.
        temperature: of sampling; 0 is greedy.
        plans: the plans to choose from, separated by commas.
        reward: name of the reward.
        workload: 'stdlib', a .txt, .jsonl or directory, or a `Workload`.
        prompt_tokens, max_new_tokens, ignore_eos: of each request.
        max_rounds, max_tokens: length of an episode; exactly one of them.
        action: 'discrete' or 'multi_discrete'.
        use_rejection_sampling: as in `specrl.LocalEngine`.
        trace: keep traces for `drain`.
        allow_parallel: allow other timed environments of this user on the same device during an episode. By default
            they are refused, because environments that share a device slow each other down.
        render_mode: None, 'ansi' (text) or 'human' (a live panel in the terminal).
        engine_options: options of an engine that is given by name.

    ## Version history
    * v0: initial version
    """

    _title = "SpecDecode"

    def __init__(
        self,
        *,
        engine: str | Engine = "local",
        target: str | Path = "embedded",
        draft: Draft | str | Path | None = None,
        batch_size: BatchSizes = 4,
        temperature: float = 0.7,
        plans: str | Sequence[str] | Sequence[Plan] = "0,1/1/2,2/1/3,3/1/4,4/1/5,3/2/6",
        reward: str = "differential",
        workload: str | Path | Workload = "stdlib",
        prompt_tokens: int = 64,
        max_new_tokens: int = 128,
        ignore_eos: bool = False,
        max_rounds: int | None = None,
        max_tokens: int | None = None,
        action: Literal["discrete", "multi_discrete"] = "discrete",
        use_rejection_sampling: bool = True,
        trace: bool = False,
        allow_parallel: bool = False,
        render_mode: str | None = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._set_episodes(batch_size, reward, max_rounds, max_tokens, trace, render_mode)
        require(action in ("discrete", "multi_discrete"), "action", "'discrete' or 'multi_discrete'", action)
        self.plans = parse_plans(plans)
        owned = isinstance(engine, str)
        if engine == "local":
            engine = _local_engine(target, draft, prompt_tokens + max_new_tokens, use_rejection_sampling)
        elif isinstance(engine, str):
            options = dict(engine_options or {})
            engine = make_engine(engine, target=target, draft=draft, plans=self.plans, trace=trace, **options)
        self._set_engine(
            engine,
            workload,
            target,
            owned=owned,
            allow_parallel=allow_parallel,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            ignore_eos=ignore_eos,
        )
        self._mask = np.array([self.engine.supports(plan) for plan in self.plans])
        if not self._mask.any():
            raise ValueError(f"the engine must support one of the plans, but none of {', '.join(map(str, self.plans))}")
        self._axes = sorted({p.num_steps for p in self.plans}), sorted({p.topk for p in self.plans})
        if action == "discrete":
            self.action_space, self._action_mask = spaces.Discrete(len(self.plans)), self._mask
        else:
            self.action_space = spaces.MultiDiscrete([len(axis) for axis in self._axes])
            self._action_mask = np.ones(sum(map(len, self._axes)), dtype=np.bool_)
        self.observation_space = spaces.Box(*vector_bounds(self.plans), dtype=np.float32)
        self.baseline = self._new_baseline()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode with new prompts; there are no options."""
        super().reset(seed=seed)
        phases = self._begin_episode(self.np_random, options)
        self._session = self.engine.start(
            self.workload,
            batch_size=phases[0].batch_size,
            max_batch_size=max(phase.batch_size for phase in phases),
            seed=int(self.np_random.integers(2**31)),
            trace=self._trace,
        )
        sizes, delay = batch_sizes(phases), self.engine.result_delay
        self._rollout = Rollout(self._session, self.plans, self.baseline, batch_sizes=sizes, result_delay=delay)
        self._plan_zero_s = self._plan_zero_spent_s = 0.0
        observation = self._rollout.observe().vector()
        self._start_agent_clock()
        return observation, {"action_mask": self.action_masks(), "batch_size": phases[0].batch_size}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Decode one round with the chosen plan.

        Raises:
            ValueError: before `reset`, an action that is not in the space or is masked, or another timed environment
                is in an episode on the same device.
        """
        self._running()
        thinking_s = self._thinking_s()
        plan = self._plan(action)
        self._acquire_device()
        step = self._rollout.step(plan, thinking_s)
        for _ in self._rollout.arrived():
            pass  # the observation includes it now
        outcome, reward, terminated, truncated, info = self._count(step)
        info |= self._compare_with_plan_zero(step, outcome) | {"action_mask": self._action_mask.copy()}
        observation = self._rollout.observe().vector()
        if self.render_mode == "human":
            self.render()
        self._start_agent_clock()
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which plans the engine can run [n], for sb3-contrib; all entries are True for 'multi_discrete'."""
        return self._action_mask.copy()

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on; off the clock."""
        with self.off_the_clock():
            self.engine.load_draft(weights, version=version)

    def observation(self) -> Observation:
        """The current observation with names, as plan choosers take it."""
        self._running()
        return self._rollout.observe()

    def _new_baseline(self) -> PlanZeroBaseline:
        """A new baseline; rounds of plan 0 may replace plain decoding if that leaves a choice of plans."""
        return PlanZeroBaseline(may_replace=bool(self._mask.sum() > 1 and self.engine.supports(Plan(0))))

    def _compare_with_plan_zero(self, step: Step, outcome: Outcome) -> dict[str, float]:
        """The entries of `info` about rounds of plan 0; those about plain decoding are nan if they replace it."""
        self.baseline.record(step.round)
        info = dict.fromkeys(("t0_s", "t0_error_s", "episode_speedup"), math.nan) if self.baseline.replaced else {}
        seconds = self.baseline.plan_zero_s(outcome.batch_size)
        if seconds is not None:
            info["plan0_s"] = seconds
            self._plan_zero_s += outcome.tokens * seconds / outcome.batch_size
            self._plan_zero_spent_s += outcome.seconds
        if self._plan_zero_spent_s:
            info["episode_speedup_over_plan0"] = self._plan_zero_s / self._plan_zero_spent_s
        return info

    def _plan(self, action: Any) -> Plan:
        discrete = isinstance(self.action_space, spaces.Discrete)
        if discrete:
            with suppress(TypeError):  # for integers that are not NumPy's
                action = operator.index(action)
        if not self.action_space.contains(action):
            raise ValueError(f"an action must be in {self.action_space}, but got {action!r}")
        if discrete:
            index = int(action)
        else:
            steps, topk = (axis[int(i)] for axis, i in zip(self._axes, action, strict=True))
            index = min((abs(p.topk - topk), i) for i, p in enumerate(self.plans) if p.num_steps == steps)[1]
        if not self._mask[index]:
            raise ValueError(
                f"an action must be allowed by the mask, but the engine cannot run plan {self.plans[index]}"
            )
        return self.plans[index]


def _local_engine(
    target: str | Path, draft: Draft | str | Path | None, max_context: int, use_rejection_sampling: bool
) -> Engine:
    from specrl.decoding.engine import LocalEngine
    from specrl.models.draft import Draft, load_draft, new_draft
    from specrl.models.target import load_target

    model = load_target(target)
    if draft is None:
        draft = new_draft(model, intermediate_size=min(256, model.config.intermediate_size))
    elif not isinstance(draft, Draft):
        draft = load_draft(draft)
    return LocalEngine(model, draft, max_context=max_context, use_rejection_sampling=use_rejection_sampling)
