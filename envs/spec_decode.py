"""`SpecRL/SpecDecode-v0`: choose the plan of every round of live speculative decoding."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from specrl.core.batch_schedule import Phase, batch_sizes, parse_traffic
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.observation import Observation, Observer, vector_bounds
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan, parse_plans
from specrl.core.registry import make_engine
from specrl.core.round import Round, Trace
from specrl.envs.rewards import Outcome, make_reward
from specrl.envs.timed_env import OnTheClock, PlanZero, check_episode, measure_plain, named_workload

if TYPE_CHECKING:
    from torch import Tensor

    from specrl.models.draft import Draft

BatchSizes = int | str | Sequence[int] | Sequence[Phase]


class SpecDecodeEnv(OnTheClock[Session], gymnasium.Env[NDArray[np.float32], Any]):
    """Live speculative decoding of a language model; every step is one round, rewarded by the clock.

    ## Action space
    `Discrete(n)`: the index of one of the `plans` (num_steps/topk/num_draft_tokens; 0 proposes nothing).
    `action_masks()` and `info["action_mask"]` [n] tell which the engine can run. With `action="multi_discrete"`,
    `MultiDiscrete([number of num_steps, number of topk])`: the plan with those num_steps (ascending) and the nearest
    topk on offer.

    ## Observation space
    `Box`, float32, from what any serving engine knows cheaply (`specrl.core.observation.Observation.vector`). K is the
    largest num_steps of the n plans. Everything measured starts neutral.

    | Num | Observation | Min | Max | Unit |
    |-----|-------------|-----|-----|------|
    | 0 | live requests: log2(B) / 10 | 0 | 1 | |
    | 1 | mean context: log2(tokens) / 20 | 0 | 1 | |
    | 2 | recent correct drafts per round / K | 0 | 1 | |
    | 3 | rounds since the draft changed: log2(1 + rounds) / 20 | 0 | 1 | |
    | 4 | constant | 1 | 1 | |
    | 5 … 4+K | recent survival P_k: rounds whose first k drafts stood | 0 | 1 | share |
    | 5+K … 4+K+n | recent cost of each plan at this batch size: log2(seconds / plain seconds) | -4 | 4 | octaves |
    | next n | whether that cost was measured | 0 | 1 | |
    | last n | the last round's plan, one-hot | 0 | 1 | |

    ## Rewards
    `reward="differential"` (default): (N·t0/B - λ·Δt) / t_ref. N tokens were committed in Δt seconds for B requests;
    t0 is the cost of a plain round at this batch size and context, re-measured between rounds; λ is the running
    speedup; t_ref the first t0. Others by name: `specrl.envs.rewards`. Δt includes the time between the return of
    one step and the call of the next, so that a slow chooser pays for it; `drain`, `load_draft`, `render` and what
    runs inside `off_the_clock()` do not count, nor does prefill.

    ## Starting state
    `reset(seed=...)` reproduces prompts, batch sizes and the first observation. Timings are real, so what follows is
    not reproducible (`nondeterministic=True`). The draft's weights and the table of plain costs survive a reset.

    ## Episode end
    Truncated after `max_rounds` rounds, or terminated when `max_tokens` tokens were committed; exactly one is given.

    ## Info
    `tokens`, `seconds` and their split (`draft_s`, `verify_s`, `other_s`, `thinking_s`; `prefill_s` apart),
    `accept_length`, `histogram` of correct drafts [num_steps + 1], `plan`, `draft_version`, `batch_size`, `t0_s`,
    `t0_error_s`, `episode_speedup` = ΣN·t0/B ÷ ΣΔt, `action_mask`, and the whole `round`. `plan0_s` and
    `episode_speedup_over_plan0` are the same against rounds of plan 0, which keep the draft warm; absent before there
    were any. Of an SGLang server that was found running, without `plain_url`, they are all there is: plan 0 stands in
    for plain decoding in the reward, and `t0_s`, `t0_error_s` and `episode_speedup` are nan.

    ## Arguments
        engine: 'local', 'sglang' (`specrl.sglang.client.factory`; launched, or `engine_options={"server": "http://...",
            "plain_url": "http://..."}`: running servers with and without speculation), or an `Engine` ready-made
            (target and draft are then its own).
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: None: random initialisation; else an EAGLE3 directory or a `Draft`.
        batch_size: live requests: a number; several, of which each episode draws one; or a trace within the episode,
            '1x64,4x64' (batch size x rounds, repeated) or a sequence of `Phase`.
        temperature: of sampling; 0 is greedy.
        plans: on offer, separated by commas.
        reward: by name.
        workload: 'stdlib', a .txt, .jsonl or directory, or a `Workload`.
        prompt_tokens, max_new_tokens, ignore_eos: of each request.
        max_rounds, max_tokens: length of an episode; one of them.
        action: 'discrete' or 'multi_discrete'.
        use_rejection_sampling: as in `specrl.LocalEngine`.
        trace: keep traces for `drain`.
        allow_parallel: let other timed environments of this user decode on the same device during an episode. By
            default the second is refused, since neither's rewards would be true.
        render_mode: None, 'ansi' (text) or 'human' (a live panel in the terminal).
        engine_options: for an engine by name.

    ## Version history
    * v0: initial version
    """

    _title = "SpecDecode"
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 30}

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
        check_episode(max_rounds, max_tokens, reward)
        if action not in ("discrete", "multi_discrete"):
            raise ValueError(f"action must be 'discrete' or 'multi_discrete', but got {action!r}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode must be None, 'ansi' or 'human', but got {render_mode!r}")
        self.plans = parse_plans(plans)
        self.render_mode = render_mode
        self._phases, self._drawn = read_batch_sizes(batch_size)
        self._make_reward = reward
        self._reward = make_reward(reward)
        self._max_rounds, self._max_tokens, self._trace = max_rounds, max_tokens, trace
        owned = isinstance(engine, str)
        if not isinstance(engine, str):
            self.engine: Engine = engine
        elif engine == "local":
            self.engine = _local_engine(target, draft, prompt_tokens + max_new_tokens, use_rejection_sampling)
        else:
            options = dict(engine_options or {})
            self.engine = make_engine(engine, target=target, draft=draft, plans=self.plans, trace=trace, **options)
        if isinstance(workload, (str, Path)):
            self.workload: Workload = named_workload(
                workload, target, prompt_tokens, max_new_tokens, temperature, ignore_eos
            )
        else:
            self.workload = workload
        self._mask = np.array([self.engine.supports(plan) for plan in self.plans])
        if not self._mask.any():
            raise ValueError(f"the engine must support one of the plans, but none of {', '.join(map(str, self.plans))}")
        self._axes = sorted({p.num_steps for p in self.plans}), sorted({p.topk for p in self.plans})
        if action == "discrete":
            self.action_space = spaces.Discrete(len(self.plans))
        else:
            self.action_space = spaces.MultiDiscrete([len(axis) for axis in self._axes])
        discrete = isinstance(self.action_space, spaces.Discrete)
        self._action_mask = self._mask if discrete else np.ones(sum(map(len, self._axes)), dtype=np.bool_)
        low, high = vector_bounds(self.plans)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.baseline = PlainCost()
        self._zero = PlanZero()
        one_of_several = self._mask.sum() > 1 and self.engine.supports(Plan(0))
        self._stand_in = self._zero if one_of_several else None
        self._observer = Observer(self.plans)
        self._late: deque[tuple[Round, float]] = deque()  # results on their way, on engines that overlap rounds
        self._delay: int = getattr(self.engine, "result_delay", 0)
        self._set_up(owned=owned, allow_parallel=allow_parallel)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode with fresh prompts; no options are known."""
        super().reset(seed=seed)
        phases = self._begin(self.np_random, options)
        self._schedule = batch_sizes(phases)
        self._batch_size = next(self._schedule)
        self._session = self.engine.start(
            self.workload,
            batch_size=self._batch_size,
            max_batch_size=max(phase.batch_size for phase in phases),
            seed=int(self.np_random.integers(2**31)),
            trace=self._trace,
        )
        self._observer.reset()
        self._late.clear()
        self._zero.begin()
        self._agents_turn()
        return self._observe().vector(), {"action_mask": self.action_masks(), "batch_size": self._batch_size}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Run one round with the chosen plan.

        Raises:
            ValueError: before `reset`, an action that is not in the space or not in the mask, or another timed
                environment is in the middle of an episode on the same device.
        """
        session = self._running()
        thinking_s = self._thinking_s()
        plan = self._plan(action)
        context = self._context
        if self._exclusive is not None:
            self._exclusive.take()
        measure_plain(session, self.baseline, context, self._stand_in)
        done = session.round(plan)
        t0 = self.baseline.estimate(self._batch_size, context)
        outcome = Outcome(sum(done.tokens.tolist()), self._batch_size, done.seconds + thinking_s, t0.seconds)
        reward, terminated, truncated, info = self._count(done, outcome, thinking_s, t0.standard_error)
        info |= self._zero.compare(done, outcome) | {"action_mask": self._action_mask.copy()}
        self._late.append((done, t0.seconds))
        if len(self._late) > self._delay:
            self._observer.record(*self._late.popleft())
        self._batch_size = next(self._schedule)
        if self._batch_size != session.batch_size:
            session.resize(self._batch_size)
        observation = self._observe().vector()
        if self.render_mode == "human":
            self.render()
        self._agents_turn()
        return observation, reward, terminated, truncated, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which plans the engine can run [n], as sb3-contrib asks for it; 'multi_discrete' allows every entry."""
        return self._action_mask.copy()

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on; off the clock."""
        with self.off_the_clock():
            self.engine.load_draft(weights, version=version)

    def drain(self) -> list[Trace]:
        """Take the traces of the rounds so far; off the clock. Needs `trace=True`.

        Raises:
            ValueError: the environment keeps no traces.
        """
        if not self._trace:
            raise ValueError("drain needs traces, but the environment keeps none; make it with trace=True")
        with self.off_the_clock():
            return self._running().drain()

    def observation(self) -> Observation:
        """The current observation with its names, as plan choosers take it."""
        self._running()
        return self._observe()

    def _observe(self) -> Observation:
        assert self._session is not None
        self._context = sum(self._session.context_lengths) / self._batch_size
        return self._observer.observe(self._batch_size, self._context)

    def _plan(self, action: Any) -> Plan:
        if isinstance(self.action_space, spaces.Discrete):
            try:
                index = operator.index(action)
            except TypeError:
                index = -1
            if not 0 <= index < len(self.plans):
                raise ValueError(f"an action must be in {self.action_space}, but got {action!r}")
        else:
            if not self.action_space.contains(action):
                raise ValueError(f"an action must be in {self.action_space}, but got {action!r}")
            steps, topk = (axis[int(i)] for axis, i in zip(self._axes, action, strict=True))
            near = [(abs(p.topk - topk), i) for i, p in enumerate(self.plans) if p.num_steps == steps]
            index = min(near)[1]
        if not self._mask[index]:
            raise ValueError(
                f"an action must be allowed by the mask, but the engine cannot run plan {self.plans[index]}"
            )
        return self.plans[index]


def read_batch_sizes(given: BatchSizes) -> tuple[tuple[Phase, ...], tuple[Phase, ...]]:
    """A trace, and what episodes draw from (empty: they follow the trace)."""
    if isinstance(given, str):
        return parse_traffic(given), ()
    if isinstance(given, (int, np.integer)):
        return (Phase(int(given)),), ()
    parts = list(given)
    if not parts:
        raise ValueError("batch_size must name at least one size, but got none; for example 4 or [1, 4, 16]")
    phases = tuple(part for part in parts if isinstance(part, Phase))
    if len(phases) == len(parts):
        return phases, ()
    return (), tuple(Phase(int(part)) for part in parts)  # type: ignore[call-overload]


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
