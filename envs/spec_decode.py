"""`SpecRL/SpecDecode-v0`: choose the plan of every round of live speculative decoding."""

from __future__ import annotations

import logging
import math
import operator
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from specrl.core.batch_schedule import BatchSizes
from specrl.core.checks import require
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.observation import Observation, vector_bounds
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.core.registry import make_engine
from specrl.core.rollout import Step
from specrl.core.round import PlainSample, Round
from specrl.envs.timed_env import Episodes, TimedEnv

if TYPE_CHECKING:
    from torch import Tensor

    from specrl.models.draft import Draft

log = logging.getLogger("specrl.envs")
NO_PLAIN = (
    "the engine cannot measure plain decoding, so rewards are relative to rounds of plan 0, which are slower, and "
    "episode_speedup is nan; to compare with plain decoding on a running SGLang server, pass plain_url="
)
_PLAN_ZERO_ROUNDS = 32  # rounds of plan 0 in the mean cost of one


class PlanZeroBaseline(PlainCost):
    """The cost of plain decoding, or of rounds of plan 0 on engines that cannot measure plain decoding.

    A round of plan 0 commits one token per request, as plain decoding does, but the draft still reads the text.

    Args:
        may_replace: whether rounds of plan 0 may replace plain decoding.
    """

    def __init__(self, *, may_replace: bool) -> None:
        super().__init__()
        self.replaced, self._may_replace = False, may_replace  # whether rounds of plan 0 do and may replace it
        self._seconds: dict[int, deque[float]] = {}  # of recent rounds of plan 0, by batch size

    def measure(self, session: Session) -> PlainSample:
        """Measure a plain decoding step, or decode a round of plan 0."""
        if not self.replaced:
            sample = session.measure_plain() if self._may_replace else super().measure(session)
            if sample is not None:
                return sample
            self.replaced = True
            log.warning("%s", NO_PLAIN)
        done = session.round(Plan(0))
        self.record(done)
        return PlainSample(done.batch_size, float(done.context_lengths.mean()), done.seconds)

    def record(self, done: Round) -> None:
        """Add a round if it has plan 0."""
        if done.plan.num_steps == 0:
            self._seconds.setdefault(done.batch_size, deque(maxlen=_PLAN_ZERO_ROUNDS)).append(done.seconds)

    def plan_zero_s(self, batch_size: int) -> float | None:
        """Return the mean seconds of recent rounds of plan 0 at a batch size; None: there were none."""
        seconds = self._seconds.get(batch_size)
        return None if seconds is None else sum(seconds) / len(seconds)


class SpecDecodeEnv(TimedEnv[NDArray[np.float32], Session]):
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
    `render`, code inside `paused_timer()` and prefill do not count.

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

    baseline: PlanZeroBaseline
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
        episodes, owned = Episodes(batch_size, reward, max_rounds, max_tokens), isinstance(engine, str)
        require(action in ("discrete", "multi_discrete"), "action", "'discrete' or 'multi_discrete'", action)
        self.plans = parse_plans(plans)
        if engine == "local":
            engine = _local_engine(target, draft, prompt_tokens + max_new_tokens, use_rejection_sampling)
        elif isinstance(engine, str):
            options = dict(engine_options or {})
            engine = make_engine(engine, target=target, draft=draft, plans=self.plans, trace=trace, **options)
        requests: dict[str, Any] = {"prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens}
        requests |= {"temperature": temperature, "ignore_eos": ignore_eos}
        options = {"trace": trace, "allow_parallel": allow_parallel, "render_mode": render_mode}
        super().__init__(engine, episodes, workload, target, requests, owned=owned, **options)
        self._mask = np.array([self.engine.supports(plan) for plan in self.plans])
        require(bool(self._mask.any()), "plans", "some that the engine can run", ", ".join(map(str, self.plans)))
        self._axes = sorted({p.num_steps for p in self.plans}), sorted({p.topk for p in self.plans})
        self._discrete = action == "discrete"
        if self._discrete:
            self.action_space, self._action_mask = spaces.Discrete(len(self.plans)), self._mask
        else:
            self.action_space = spaces.MultiDiscrete([len(axis) for axis in self._axes])
            self._action_mask = np.ones(sum(map(len, self._axes)), dtype=np.bool_)
        self.observation_space = spaces.Box(*vector_bounds(self.plans), dtype=np.float32)
        self.baseline = self._new_baseline()

    def _begin(self, session: Session) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self._plan_zero_s = self._plan_zero_spent_s = 0.0
        return self._rollout.observe().vector(), {"action_mask": self.action_masks()}

    def _decode(self, session: Session, action: Any, thinking_s: float) -> Step:
        plan = self._plan(action)
        self._lock.acquire()
        step = self._rollout.step(plan, thinking_s)
        for _ in self._rollout.arrived():
            pass  # the observation includes it now
        return step

    def _observe(self, session: Session, step: Step) -> tuple[NDArray[np.float32], dict[str, Any]]:
        info = {"action_mask": self.action_masks(), **self._compare_with_plan_zero(step)}
        return self._rollout.observe().vector(), info

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which plans the engine can run [n], for sb3-contrib; all are True for 'multi_discrete'."""
        return self._action_mask.copy()

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on; off the clock."""
        with self.paused_timer():
            self.engine.load_draft(weights, version=version)

    def observation(self) -> Observation:
        """Return the current observation with names, as plan choosers take it."""
        self._running()
        return self._rollout.observe()

    def _new_baseline(self) -> PlanZeroBaseline:
        """Make a baseline; rounds of plan 0 may replace plain decoding if there are other plans."""
        return PlanZeroBaseline(may_replace=bool(self._mask.sum() > 1 and self.engine.supports(Plan(0))))

    def _compare_with_plan_zero(self, step: Step) -> dict[str, float]:
        """Return the entries of `info` about plan 0; those about plain decoding are nan if it replaces that."""
        self.baseline.record(step.round)
        info = dict.fromkeys(("t0_s", "t0_error_s", "episode_speedup"), math.nan) if self.baseline.replaced else {}
        seconds = self.baseline.plan_zero_s(step.round.batch_size)
        if seconds is not None:
            info["plan0_s"] = seconds
            self._plan_zero_s += float(step.round.tokens.sum()) * seconds / step.round.batch_size
            self._plan_zero_spent_s += step.seconds
        if self._plan_zero_spent_s:
            info["episode_speedup_over_plan0"] = self._plan_zero_s / self._plan_zero_spent_s
        return info

    def _plan(self, action: Any) -> Plan:
        if self._discrete:  # faster than `contains`, and takes any integer
            with suppress(TypeError):
                action = operator.index(action)
            valid = isinstance(action, int) and 0 <= action < len(self.plans)
        else:
            valid = self.action_space.contains(action)
        if not valid:
            raise ValueError(f"an action must be in {self.action_space}, but got {action!r}")
        if self._discrete:
            index = int(action)
        else:
            steps, topk = (axis[int(i)] for axis, i in zip(self._axes, action, strict=True))
            index = min((abs(p.topk - topk), i) for i, p in enumerate(self.plans) if p.num_steps == steps)[1]
        plan = self.plans[index]
        if not self._mask[index]:
            raise ValueError(f"an action must be allowed by the mask (a plan that the engine can run), but got {plan}")
        return plan


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
