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

from specrl.core.batch_schedule import BatchSizes, read_schedules
from specrl.core.checks import require
from specrl.core.observation import vector_bounds
from specrl.core.plain_cost import DENSE_INTERVAL, DENSE_SAMPLES, FIRST_SAMPLES, INTERVAL, WINDOW
from specrl.core.plan import Plan
from specrl.envs.rewards import Outcome, make_reward
from specrl.envs.simulated import MAX_ROUNDS, Lengths, simulation
from specrl.envs.timed_env import check_episode
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

    Raises:
        ValueError: an argument out of range.
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
        if max_rounds is None and max_tokens is None:
            max_rounds = MAX_ROUNDS
        check_episode(max_rounds, max_tokens, reward)
        if stagger and max_rounds is None:
            raise ValueError("stagger needs episodes of max_rounds, but got max_tokens; leave one of them out")
        self._stagger = stagger
        self._mask = np.array([engine.supports(plan) for plan in self.plans])
        if not self._mask.any():
            raise ValueError(f"the profile must offer one of the plans, but none of {', '.join(map(str, self.plans))}")
        self.num_envs, self.profile = num_envs, engine.profile
        self._reward_name, self._reward = reward, make_reward(reward)
        self._max_rounds, self._max_tokens, self._delay = max_rounds, max_tokens, engine.result_delay
        schedules = read_schedules(batch_size)
        sizes = sorted({phase.batch_size for schedule in schedules for phase in schedule})
        self._first = np.array([sizes.index(schedule[0].batch_size) for schedule in schedules])
        rounds = [phase.rounds for phase in schedules[0]]  # several schedules have one phase each
        self._trace = np.repeat([sizes.index(phase.batch_size) for phase in schedules[0]], rounds)
        able = self.plans[int(self._mask.argmax())]
        runs = [plan if can else able for plan, can in zip(self.plans, self._mask, strict=True)]
        self._sessions = VectorSimulator(engine, requests, runs, sizes, num_envs)
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
        if options:
            raise ValueError(f"reset takes no options, but got {', '.join(options)}; pass them to gym.make_vec")
        if seed is not None or self._rng is None:
            self._rng = np.random.Generator(np.random.SFC64(int(self.np_random.integers(2**63))))
            self._reward = make_reward(self._reward_name)
            self._t0 = np.zeros(self.num_envs * self._cells)  # at the profile's context
            self._samples = np.zeros(len(self._t0), dtype=np.int64)
            self._since = np.zeros(len(self._t0), dtype=np.int64)
            self._size = np.zeros(self.num_envs, dtype=np.int64)
        count = self.num_envs
        self._position = np.zeros(count, dtype=np.int64)  # in the trace
        self._plain, self._spent = np.zeros(count), np.zeros(count)
        self._rounds, self._tokens, self._episode = (np.zeros(count, dtype=np.int64) for _ in range(3))
        self._over = np.zeros(count, dtype=np.bool_)
        self._late: deque[tuple[Ints, Ints, Ints, Rounds, Floats, Ints]] = deque()
        self._begin(None)
        if self._stagger and self._max_rounds is not None:
            self._rounds = self._rng.integers(self._max_rounds, size=count)
        everywhere = np.ones(count, dtype=np.bool_)
        info = {"action_mask": self.action_masks(), "batch_size": self._sessions.live.copy()}
        return self._observe(), info | {f"_{key}": everywhere for key in info}

    def step(
        self, actions: Ints
    ) -> tuple[NDArray[np.float32], Floats, NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """One round of every environment; a reset of those whose episode is over (see `autoreset_mode`).

        Raises:
            ValueError: before `reset`, or an action that is not in the space or not in the mask.
        """
        if self._rng is None:
            raise ValueError("reset was never called; call reset() before step()")
        plan, rng, sessions = self._checked(actions), self._rng, self._sessions
        over = np.flatnonzero(self._over)
        size, live = sessions.size, sessions.live
        t0 = self._measure_plain()
        done = sessions.round(plan, rng)
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
        if len(self._trace) > 1:
            self._position = (self._position + 1) % len(self._trace)
            sessions.resize(self._trace[self._position])
        ends = np.zeros(self.num_envs, dtype=np.bool_)
        truncated = ends if self._max_rounds is None else self._rounds >= self._max_rounds
        terminated = ends if self._max_tokens is None else self._tokens >= self._max_tokens
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
        """Which plans the profile offers [N, n]."""
        return np.broadcast_to(self._mask, (self.num_envs, len(self._mask))).copy()

    def _observe(self) -> NDArray[np.float32]:
        return self._observer.observe(self._sessions.size, self._sessions.context)

    def _checked(self, actions: Ints) -> Ints:
        plan = np.asarray(actions)
        if plan.shape != (self.num_envs,) or plan.dtype.kind not in "iu":
            raise ValueError(f"actions must be {self.num_envs} whole numbers, but got {plan.dtype} {plan.shape}")
        if plan.min() < 0 or plan.max() >= len(self.plans):
            raise ValueError(f"actions must be in [0, {len(self.plans)}), but got {plan.min()} .. {plan.max()}")
        if not self._mask[plan].all():
            wrong = self.plans[int(plan[~self._mask[plan]][0])]
            raise ValueError(f"actions must be allowed by the mask, but the profile does not offer plan {wrong}")
        return plan.astype(np.int64)

    def _measure_plain(self) -> Floats:
        """Measure plain decoding where `PlainCost` would; returns t0 [N] at the present context."""
        sessions, rng = self._sessions, self._rng
        assert rng is not None
        cell = self._env * self._cells + sessions.size
        since, samples = self._since.take(cell) + 1, self._samples.take(cell)
        self._since[cell] = since
        due = np.flatnonzero((samples == 0) | (since >= np.where(samples < DENSE_SAMPLES, DENSE_INTERVAL, INTERVAL)))
        if len(due):
            at, known = cell[due], samples[due]
            drawn = [sessions.plain(due, rng) for _ in range(FIRST_SAMPLES if (known == 0).any() else 1)]
            sample = np.where(known == 0, np.mean(drawn, axis=0), drawn[0])
            taken = np.where(known == 0, FIRST_SAMPLES, 1)
            self._samples[at] = known + taken
            self._since[at] = 0
            self._t0[at] += taken / np.minimum(known + taken, WINDOW) * (sample - self._t0[at])
        t0: Floats = self._t0.take(cell) * sessions.context_factor(len(self.plans))
        return t0

    def _record(self, plan: Ints, size: Ints, live: Ints, done: Rounds, t0: Floats) -> None:
        """Show the observer this round, or the earlier one whose results arrive now."""
        self._late.append((plan, size, live, done, t0, self._episode.copy()))
        if len(self._late) > self._delay:
            plan, size, live, done, t0, episode = self._late.popleft()
            self._observer.record(plan, size, live, done, t0, skip=np.flatnonzero(episode != self._episode))

    def _begin(self, which: Ints | None) -> None:
        """Begin episodes (None: all)."""
        assert self._rng is not None
        at: slice | Ints = slice(None) if which is None else which
        count = self.num_envs if which is None else len(which)
        size = self._sessions.size.copy()
        size[at] = self._first[self._rng.integers(len(self._first), size=count)]
        for array in (self._position, self._plain, self._spent, self._rounds, self._tokens):
            array[at] = 0
        self._episode[at] += 1
        self._sessions.reset(which, size, self._rng)
        self._observer.reset(which)
