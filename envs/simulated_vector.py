"""`SpecRL/Simulated-v0` for thousands of environments at once, in NumPy."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from specrl.core.batch_schedule import BatchSizes
from specrl.core.checks import require
from specrl.core.observation import vector_bounds
from specrl.core.plain_cost import DENSE_INTERVAL, DENSE_SAMPLES, FIRST_SAMPLES, INTERVAL, WINDOW
from specrl.core.plan import Plan
from specrl.envs.rewards import Outcome, make_reward
from specrl.envs.simulated import MAX_ROUNDS, Lengths, simulation
from specrl.envs.timed_env import Episodes
from specrl.envs.vector_observer import VectorObserver
from specrl.simulation.profile import Profile
from specrl.simulation.shifts import Shift
from specrl.simulation.vector import Rounds, VectorSimulator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class SimulatedVectorEnv(VectorEnv[NDArray[np.float32], Ints, NDArray[Any]]):
    """N environments of `SpecRL/Simulated-v0` (`specrl.envs.simulated.SimulatedEnv`).

    Spaces, rewards and episodes are those of the single form. Rounds have the same distribution, but not the same
    random numbers. Three things are simpler: plain costs are a mean over recent samples (without hiccups, with a known
    growth over context) instead of a robust line, the effects of requests lie on a grid (`specrl.simulation.vector`),
    and `action` is always 'discrete'.

    `info` holds arrays over environments: `tokens`, `seconds`, `accept_length`, `batch_size`, `t0_s`, `plan` (its
    index), `episode_speedup`, `action_mask` [N, n].

    Args:
        num_envs: N.
        autoreset_mode: NEXT_STEP resets an environment in the step after its episode, which ignores the action and
            gives reward 0. SAME_STEP resets it at once: the observation is then the first of the next episode, and
            `info["final_obs"]` [N, D] holds the last of the old one where `info["_final_obs"]` is True.
        stagger: give the first episodes all lengths up to `max_rounds`, so that environments are not all reset in the
            same step; learners that normalise observations need that.
        (others): as in `SimulatedEnv`.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        profile: Profile | str | Path = "aurora-qwen3-coder-next-fp8",
        batch_size: BatchSizes = 8,
        plans: str | Sequence[str] | Sequence[Plan] | None = None,
        reward: str = "differential",
        prompt_tokens: Lengths = None,
        max_new_tokens: Lengths = None,
        max_rounds: int | None = None,
        max_tokens: int | None = None,
        extrapolate: bool = False,
        shifts: Sequence[Shift] = (),
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP,
        stagger: bool = False,
    ) -> None:
        modes = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
        require(num_envs >= 1, "num_envs", "at least 1", num_envs)
        require(render_mode is None, "render_mode", "None for vectorised environments", render_mode)
        require(autoreset_mode in modes, "autoreset_mode", "NEXT_STEP or SAME_STEP", autoreset_mode)
        self._at_once = autoreset_mode == AutoresetMode.SAME_STEP
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}
        engine, requests, self.plans = simulation(
            profile, batch_size, plans, prompt_tokens, max_new_tokens, extrapolate=extrapolate, shifts=shifts
        )
        if max_tokens is None and max_rounds is None:
            max_rounds = MAX_ROUNDS
        self._episodes = episodes = Episodes(batch_size, reward, max_rounds, max_tokens)
        require(max_rounds is not None or not stagger, "stagger", "False in episodes of max_tokens", stagger)
        self._stagger = max_rounds if stagger else None
        self._mask = np.array([engine.supports(plan) for plan in self.plans])
        require(bool(self._mask.any()), "plans", "some that the profile offers", ", ".join(map(str, self.plans)))
        self.num_envs, self.profile = num_envs, engine.profile
        self._reward, self._delay = make_reward(reward), engine.result_delay
        schedules, sizes = episodes.schedules, episodes.sizes
        self._first = np.array([sizes.index(schedule[0].batch_size) for schedule in schedules])
        rounds = [phase.rounds for phase in schedules[0]]  # several schedules have one phase each
        self._schedule = np.repeat([sizes.index(phase.batch_size) for phase in schedules[0]], rounds)
        substitute = self.plans[int(self._mask.argmax())]  # for plans that the profile does not offer
        offered = [plan if allowed else substitute for plan, allowed in zip(self.plans, self._mask, strict=True)]
        self._sessions = VectorSimulator(engine, requests, offered, sizes, num_envs)
        self._observer = VectorObserver(self.plans, sizes, num_envs)
        self._cells, self._env = len(sizes), np.arange(num_envs)
        self.single_action_space = spaces.Discrete(len(self.plans))
        self.single_observation_space = spaces.Box(*vector_bounds(self.plans), dtype=np.float32)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._rng: np.random.Generator | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an episode in every environment; with a seed, forget all earlier measurements."""
        super().reset(seed=seed)
        require(not options, "options of reset", "None; pass arguments to gym.make_vec", options)
        if seed is not None or self._rng is None:
            self._rng = np.random.Generator(np.random.SFC64(int(self.np_random.integers(2**63))))
            self._reward = make_reward(self._episodes.reward)
            self._t0 = np.zeros(self.num_envs * self._cells)  # at the profile's context
            self._samples, self._since = np.zeros((2, len(self._t0)), dtype=np.int64)
        self._plain, self._spent = np.zeros((2, self.num_envs))
        # place in the schedule, and counts
        self._position, self._rounds, self._tokens, self._episode = np.zeros((4, self.num_envs), dtype=np.int64)
        self._over = np.zeros(self.num_envs, dtype=np.bool_)
        self._late: deque[tuple[Ints, Ints, Ints, Rounds, Floats, Ints]] = deque()
        self._begin(self._env)
        if self._stagger is not None:
            self._rounds = self._rng.integers(self._stagger, size=self.num_envs)
        info = {"action_mask": self.action_masks(), "batch_size": self._sessions.live.copy()}
        return self._observe(), info | {f"_{key}": ~self._over for key in info}

    def step(
        self, actions: Ints
    ) -> tuple[NDArray[np.float32], Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One round of every environment; a reset of those whose episode is over (see `autoreset_mode`).

        Raises:
            ValueError: before `reset`, or an action that is not in the space or not in the mask.
        """
        if self._rng is None:
            raise ValueError("reset was never called; call reset() before step()")
        plan, sessions = self._checked(actions), self._sessions
        over = np.flatnonzero(self._over)
        size, live = sessions.size, sessions.live
        t0 = self._measure_plain()
        done = sessions.round(plan, self._rng)
        outcome = Outcome(done.tokens, live, done.seconds, t0)
        reward: Floats = self._reward(outcome, self._over if len(over) else None)
        self._record(plan, size, live, done, t0)
        self._rounds += 1
        self._tokens += done.tokens
        self._plain += outcome.plain_total_s
        self._spent += done.seconds
        info = {
            "tokens": done.tokens,
            "seconds": done.seconds,
            "accept_length": 1.0 + done.correct / live,
            "batch_size": live,
            "t0_s": t0,
            "plan": plan,
            "episode_speedup": self._plain / self._spent,
            "action_mask": self.action_masks(),
        }
        ran = ~self._over
        info |= {f"_{key}": ran for key in info}
        if len(self._schedule) > 1:
            self._position = (self._position + 1) % len(self._schedule)
            sessions.resize(self._schedule[self._position])
        terminated, truncated = self._episodes.ended(self._rounds, self._tokens)
        if len(over):
            self._begin(over)
            reward[over], truncated[over], terminated[over] = 0.0, False, False
        self._over = truncated | terminated
        if self._at_once and self._over.any():
            info |= {"final_obs": self._observe(), "_final_obs": self._over}
            self._begin(np.flatnonzero(self._over))
            self._over = np.zeros(self.num_envs, dtype=np.bool_)
        return self._observe(), reward, terminated, truncated, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Return which plans the profile offers [N, n]."""
        return np.broadcast_to(self._mask, (self.num_envs, len(self._mask))).copy()

    def _observe(self) -> NDArray[np.float32]:
        return self._observer.observe(self._sessions.size, self._sessions.context)

    def _checked(self, actions: Ints) -> Ints:
        plan, count = np.asarray(actions), self.num_envs
        valid = plan.shape == (count,) and plan.dtype.kind in "iu"
        require(valid, "actions", f"{count} whole numbers", f"{plan.dtype} {plan.shape}")
        valid = 0 <= plan.min() <= plan.max() < len(self.plans)
        require(valid, "actions", f"in [0, {len(self.plans)})", (int(plan.min()), int(plan.max())))
        refused = sorted({str(self.plans[index]) for index in plan[~self._mask[plan]]})
        require(not refused, "actions", "allowed by the mask (plans that the profile offers)", refused)
        return plan.astype(np.int64)

    def _measure_plain(self) -> Floats:
        """Measure plain decoding in the rounds in which `PlainCost` does; return t0 [N] at the present context."""
        sessions, rng = self._sessions, self._rng
        assert rng is not None
        cell = self._env * self._cells + sessions.size
        since, samples = self._since.take(cell) + 1, self._samples.take(cell)
        self._since[cell] = since
        due = np.flatnonzero((samples == 0) | (since >= np.where(samples < DENSE_SAMPLES, DENSE_INTERVAL, INTERVAL)))
        if len(due):
            cells, before = cell[due], samples[due]
            drawn = [sessions.plain(due, rng) for _ in range(FIRST_SAMPLES if (before == 0).any() else 1)]
            sample = np.where(before == 0, np.mean(drawn, axis=0), drawn[0])
            count = np.where(before == 0, FIRST_SAMPLES, 1)
            self._samples[cells] = before + count
            self._since[cells] = 0
            self._t0[cells] += count / np.minimum(before + count, WINDOW) * (sample - self._t0[cells])
        t0: Floats = self._t0.take(cell) * sessions.context_factor(len(self.plans))
        return t0

    def _record(self, plan: Ints, size: Ints, live: Ints, done: Rounds, t0: Floats) -> None:
        """Add this round to the observations, or the earlier one whose results arrive now."""
        self._late.append((plan, size, live, done, t0, self._episode.copy()))
        if len(self._late) > self._delay:
            plan, size, live, done, t0, episode = self._late.popleft()
            self._observer.record(plan, size, live, done, t0, skip=np.flatnonzero(episode != self._episode))

    def _begin(self, which: Ints) -> None:
        """Begin an episode in these environments."""
        assert self._rng is not None
        size = self._sessions.size.copy()
        size[which] = self._first[self._rng.integers(len(self._first), size=len(which))]
        for array in (self._position, self._plain, self._spent, self._rounds, self._tokens):
            array[which] = 0
        self._episode[which] += 1
        self._sessions.reset(which, size, self._rng)
        self._observer.reset(which)
