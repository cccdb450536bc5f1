"""The base of the environments on sessions: episodes, the agent's clock, `info`, panel and device lock."""

from __future__ import annotations

import io
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import gymnasium
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from specrl.core.batch_schedule import BatchSizes, batch_sizes, read_schedules
from specrl.core.checks import require
from specrl.core.clock import WallClock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout, Step
from specrl.core.round import Trace
from specrl.envs.device_lock import DeviceLock
from specrl.envs.rewards import Outcome, make_reward

Obs = TypeVar("Obs")
S = TypeVar("S", bound=Session)


class Episodes:
    """The batch sizes, the reward and the length of episodes; the arguments are those of `SpecRL/SpecDecode-v0`."""

    def __init__(self, batch_size: BatchSizes, reward: str, max_rounds: int | None, max_tokens: int | None) -> None:
        lengths = [length for length in (max_rounds, max_tokens) if length is not None]
        require(len(lengths) == 1, "exactly one of max_rounds and max_tokens", "set", lengths)
        require(lengths[0] >= 1, "max_rounds or max_tokens", "at least 1", lengths[0])
        make_reward(reward)
        require(reward != "time_saved" or max_rounds is None, "max_rounds", "None for reward 'time_saved'", max_rounds)
        self.reward, self.max_rounds, self.max_tokens = reward, max_rounds, max_tokens
        self.schedules = read_schedules(batch_size)  # each episode draws one
        self.sizes = sorted({phase.batch_size for schedule in self.schedules for phase in schedule})

    def ended(self, rounds: Any, tokens: Any) -> tuple[Any, Any]:
        """Return terminated and truncated after these rounds and tokens of an episode; numbers, or arrays [N]."""
        return tokens >= (self.max_tokens or math.inf), rounds >= (self.max_rounds or math.inf)


class TimedEnv(gymnasium.Env[Obs, Any], Generic[Obs, S]):
    """The part of an environment on a session that does not depend on what the agent decides.

    Args:
        engine: the engine that decodes.
        episodes: batch sizes, reward and length of episodes.
        target, workload, trace, allow_parallel, render_mode: as in `SpecRL/SpecDecode-v0`.
        requests: the arguments of `open_stream` for a workload by name.
        owned: whether `close` closes the engine.
    """

    metadata = {"render_modes": ["ansi", "human"], "render_fps": 30}
    baseline: PlainCost
    plans: tuple[Plan, ...] = ()
    _title: ClassVar[str]
    _needs_traces: ClassVar[bool] = False

    def __init__(
        self,
        engine: Engine,
        episodes: Episodes,
        workload: str | Path | Workload,
        target: str | Path,
        requests: Mapping[str, Any],
        *,
        owned: bool,
        trace: bool = False,
        allow_parallel: bool = False,
        render_mode: str | None = None,
    ) -> None:
        require(render_mode in (None, "ansi", "human"), "render_mode", "None, 'ansi' or 'human'", render_mode)
        if isinstance(workload, (str, Path)):
            from specrl.workloads.stream import open_stream

            workload = open_stream(workload, target, **requests)
        self.engine, self.workload, self.render_mode = engine, workload, render_mode
        self._episodes, self._reward = episodes, make_reward(episodes.reward)
        clock = engine.clock
        self._lock = DeviceLock(clock.device if isinstance(clock, WallClock) and not allow_parallel else None)
        self._session: S | None = None
        self._trace, self._traces = trace, list[Trace]()  # the traces that `drain` will return
        self._info: dict[str, Any] | None = None
        self._live_panel: Any = None
        self._owned, self._closed = owned, False

    @abstractmethod
    def _begin(self, session: S) -> tuple[Obs, dict[str, Any]]:
        """Begin an episode: return the first observation and its `info`."""

    @abstractmethod
    def _decode(self, session: S, action: Any, thinking_s: float) -> Step:
        """Check an action, acquire the device and decode a round."""

    @abstractmethod
    def _observe(self, session: S, step: Step) -> tuple[Obs, dict[str, Any]]:
        """Return the observation after a round, and the entries of `info` that other environments do not have."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Obs, dict[str, Any]]:
        """Begin an episode with new prompts; there are no options."""
        super().reset(seed=seed)
        self._check_open()
        require(not options, "options of reset", "None; pass arguments to gym.make", options)
        self._lock.release()
        if self._session is not None:
            self._session.close()
        phases = self._episodes.schedules[int(self.np_random.integers(len(self._episodes.schedules)))]
        session = self.engine.start(
            self.workload,
            batch_size=phases[0].batch_size,
            max_batch_size=max(phase.batch_size for phase in phases),
            seed=int(self.np_random.integers(2**31)),
            trace=self._trace or self._needs_traces,
        )
        self._session = cast(S, session)
        sizes, delay = batch_sizes(phases), self.engine.result_delay
        self._rollout = Rollout(session, self.plans, self.baseline, batch_sizes=sizes, result_delay=delay)
        self._plain_s = self._spent_s = 0.0
        self._rounds = self._tokens = 0
        self._info, self._traces = None, []
        observation, info = self._begin(self._session)
        self._start_agent_clock()
        return observation, {**info, "batch_size": session.batch_size}

    def step(self, action: Any) -> tuple[Obs, float, bool, bool, dict[str, Any]]:
        """Decode one round.

        Raises:
            ValueError: before `reset`, an action that is not allowed, or another timed environment is in an episode on
                the same device. Nothing is committed then.
        """
        session = self._running()
        thinking_s = max(self.engine.clock.now() - self._returned - self._paused_s, 0.0)
        step = self._decode(session, action, thinking_s)
        done = step.round
        outcome = Outcome(sum(done.tokens.tolist()), done.batch_size, step.seconds, step.plain.seconds)
        self._rounds += 1
        self._tokens += outcome.tokens
        self._plain_s += outcome.plain_total_s
        self._spent_s += outcome.seconds
        parts = "draft_s", "verify_s", "other_s", "prefill_s", "accept_length", "draft_version", "batch_size"
        self._info = {name: getattr(done, name) for name in parts} | {
            "tokens": outcome.tokens,
            "seconds": outcome.seconds,
            "thinking_s": step.thinking_s,
            "histogram": done.histogram().tolist(),
            "plan": str(done.plan),
            "t0_s": step.plain.seconds,
            "t0_error_s": step.plain.standard_error,
            "episode_speedup": self._plain_s / self._spent_s,
            "round": done,
        }
        terminated, truncated = self._episodes.ended(self._rounds, self._tokens)
        if terminated or truncated:
            self._lock.release()
        observation, info = self._observe(session, step)
        self._info |= info
        if self.render_mode == "human":
            self.render()
        self._start_agent_clock()
        return observation, self._reward(outcome), terminated, truncated, self._info

    def _start_agent_clock(self) -> None:
        """Count the agent's time from now on."""
        self._paused_s, self._returned = 0.0, self.engine.clock.now()

    def drain(self) -> list[Trace]:
        """Return the traces of the rounds since the last call; off the clock. Needs `trace=True`."""
        require(self._trace, "trace", "True to drain traces", self._trace)
        with self.paused_timer():
            traces, self._traces = self._traces + self._running().drain(), []
        return traces

    @contextmanager
    def paused_timer(self) -> Iterator[None]:
        """Pause the agent's clock: time inside does not count. Other environments may use the device meanwhile."""
        self._lock.release()
        began = self.engine.clock.now()
        try:
            yield
        finally:
            if self._session is not None:
                self._paused_s += self.engine.clock.now() - began

    def render(self) -> str | None:
        """Show the last round and the episode so far: text for 'ansi', a live panel for 'human'."""
        if self.render_mode is None:
            return None
        with self.paused_timer():
            view = _panel(self._info, self._rounds, self._title)
            if self.render_mode == "ansi":
                return _as_text(view)
            if self._live_panel is None:
                from rich.live import Live

                self._live_panel = Live(auto_refresh=False)
                self._live_panel.start()
            self._live_panel.update(view, refresh=True)
        return None

    def close(self) -> None:
        """End the session, and the engine if the environment made it; idempotent."""
        if self._live_panel is not None:
            self._live_panel.stop()
        self._lock.release()
        if self._session is not None:
            self._session.close()
        if self._owned and not self._closed:
            self.engine.close()
        self._live_panel = self._session = None
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the environment is closed; make a new one")

    def _running(self) -> S:
        self._check_open()
        if self._session is None:
            raise ValueError("reset was never called; call reset() before step()")
        return self._session


def _panel(info: Mapping[str, Any] | None, rounds: int, title: str) -> Panel:
    """Return the panel that `render` shows; `info` is None before the first round."""
    grid = Table.grid(padding=(0, 3))
    if info is None:
        return Panel("no round yet", title=title, title_align="left", expand=False)
    split = "  ".join(f"{name} {info[f'{name}_s'] * 1e3:.2f}" for name in ("draft", "verify", "other", "thinking"))
    histogram = " ".join(str(count) for count in info["histogram"])
    rows = {
        "round": f"{rounds}, {info['batch_size']} requests, plan {info['plan']}, draft version {info['draft_version']}",
        "tokens": f"{info['tokens']}, accept length {info['accept_length']:.2f}, correct drafts {histogram}",
        "milliseconds": f"{info['seconds'] * 1e3:.2f} ({split})",
        "plain round": f"{info['t0_s'] * 1e3:.2f} ± {info['t0_error_s'] * 1e3:.2f} ms",
        "speedup": f"{info['episode_speedup']:.3f} over this episode",
    }
    for name, value in rows.items():
        grid.add_row(name, value)
    return Panel(grid, title=title, title_align="left", expand=False)


def _as_text(view: Panel) -> str:
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(view)
    return out.getvalue()
