"""The shared part of the environments on live sessions: episodes, the agent's clock, `info`, panel and device lock."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from specrl.core.batch_schedule import BatchSizes, Phase, read_schedules
from specrl.core.checks import require
from specrl.core.clock import WallClock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout, Step
from specrl.core.round import PlainSample, Round, Trace
from specrl.envs.device_lock import DeviceLock
from specrl.envs.render import as_text, panel
from specrl.envs.rewards import Outcome, make_reward

log = logging.getLogger("specrl.envs")
NO_PLAIN = (
    "the engine cannot measure plain decoding, so rewards are relative to rounds of plan 0, which are slower, and "
    "episode_speedup is nan; to compare with plain decoding on a running SGLang server, pass plain_url="
)
S = TypeVar("S", bound=Session)
_PLAN_ZERO_ROUNDS = 32  # rounds of plan 0 in the mean cost of one


class TimedEnv(Generic[S]):
    """The part of an environment on a live session that does not depend on what the agent decides.

    An environment inherits from it and from `gymnasium.Env`. It calls `_set_episodes` before it makes an engine, and
    `_set_engine` afterwards.
    """

    engine: Engine
    render_mode: str | None
    metadata = {"render_modes": ["ansi", "human"], "render_fps": 30}
    _title: ClassVar[str]
    _rollout: Rollout

    def _set_episodes(
        self,
        batch_size: BatchSizes,
        reward: str,
        max_rounds: int | None,
        max_tokens: int | None,
        trace: bool,
        render_mode: str | None,
    ) -> None:
        check_episode(max_rounds, max_tokens, reward)
        require(render_mode in (None, "ansi", "human"), "render_mode", "None, 'ansi' or 'human'", render_mode)
        self.render_mode = render_mode
        self._schedules = read_schedules(batch_size)  # each episode draws one
        self._reward_name, self._reward = reward, make_reward(reward)
        self._max_rounds, self._max_tokens, self._trace = max_rounds, max_tokens, trace

    def _set_engine(
        self,
        engine: Engine,
        workload: str | Path | Workload,
        target: str | Path,
        *,
        owned: bool,
        allow_parallel: bool,
        **requests: Any,
    ) -> None:
        """Keep the engine and the workload; `requests` are arguments of `open_stream` for a workload by name."""
        if isinstance(workload, (str, Path)):
            from specrl.workloads.stream import open_stream

            workload = open_stream(workload, target, **requests)
        self.engine, self.workload = engine, workload
        clock = engine.clock
        self._lock = DeviceLock(clock.device) if isinstance(clock, WallClock) and not allow_parallel else None
        self._session: S | None = None
        self._traces: list[Trace] = []  # taken from the session, but not by `drain`
        self._info: dict[str, Any] | None = None
        self._live_panel: Any = None
        self._owned, self._closed = owned, False

    def _begin_episode(self, rng: np.random.Generator, options: dict[str, Any] | None) -> tuple[Phase, ...]:
        """End the previous episode; returns the batch sizes of the next one."""
        self._check_open()
        if options:
            raise ValueError(f"reset takes no options, but got {', '.join(options)}; pass them to gym.make")
        self._release_device()
        if self._session is not None:
            self._session.close()
        self._plain_s = self._spent_s = 0.0
        self._rounds = self._tokens = 0
        self._info, self._traces = None, []
        return self._schedules[int(rng.integers(len(self._schedules)))]

    def _start_agent_clock(self) -> None:
        """The agent's time counts from now on."""
        self._paused_s = 0.0
        self._returned = self.engine.clock.now()

    def _thinking_s(self) -> float:
        """Seconds since `_start_agent_clock`, pauses excluded."""
        return max(self.engine.clock.now() - self._returned - self._paused_s, 0.0)

    def _count(self, step: Step) -> tuple[Outcome, float, bool, bool, dict[str, Any]]:
        """Count a round; returns its outcome, reward, terminated, truncated and info."""
        done = step.round
        outcome = Outcome(sum(done.tokens.tolist()), done.batch_size, step.seconds, step.plain.seconds)
        self._rounds += 1
        self._tokens += outcome.tokens
        self._plain_s += outcome.plain_total_s
        self._spent_s += outcome.seconds
        self._info = {
            "tokens": outcome.tokens,
            "seconds": outcome.seconds,
            "draft_s": done.draft_s,
            "verify_s": done.verify_s,
            "other_s": done.other_s,
            "thinking_s": step.thinking_s,
            "prefill_s": done.prefill_s,
            "accept_length": done.accept_length,
            "histogram": done.histogram().tolist(),
            "plan": str(done.plan),
            "draft_version": done.draft_version,
            "batch_size": done.batch_size,
            "t0_s": step.plain.seconds,
            "t0_error_s": step.plain.standard_error,
            "episode_speedup": self._plain_s / self._spent_s,
            "round": done,
        }
        terminated = self._max_tokens is not None and self._tokens >= self._max_tokens
        truncated = self._max_rounds is not None and self._rounds >= self._max_rounds
        if terminated or truncated:
            self._release_device()
        return outcome, self._reward(outcome), terminated, truncated, self._info

    def drain(self) -> list[Trace]:
        """Take the traces of the rounds so far; off the clock. Needs `trace=True`.

        Raises:
            ValueError: the environment keeps no traces.
        """
        if not self._trace:
            raise ValueError("drain needs traces, but the environment keeps none; make it with trace=True")
        with self.off_the_clock():
            traces, self._traces = self._traces + self._running().drain(), []
        return traces

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Pause the agent's clock: time inside does not count. Other environments may use the device meanwhile."""
        self._release_device()
        began = self.engine.clock.now()
        try:
            yield
        finally:
            if self._session is not None:
                self._paused_s += self.engine.clock.now() - began

    def render(self) -> str | None:
        """The last round and the episode so far: text for 'ansi', a live panel for 'human'."""
        if self.render_mode is None:
            return None
        with self.off_the_clock():
            view = panel(self._info, self._rounds, self._title)
            if self.render_mode == "ansi":
                return as_text(view)
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
            self._live_panel = None
        self._release_device()
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._owned and not self._closed:
            self.engine.close()
        self._closed = True

    def _acquire_device(self) -> None:
        if self._lock is not None:
            self._lock.acquire()

    def _release_device(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the environment is closed; make a new one")

    def _running(self) -> S:
        self._check_open()
        if self._session is None:
            raise ValueError("reset was never called; call reset() before step()")
        return self._session


class PlanZeroBaseline(PlainCost):
    """The cost of plain decoding, or of rounds of plan 0 on engines that cannot measure plain decoding.

    A round of plan 0 commits one token per request, as plain decoding does, but the draft still reads the text.

    Args:
        may_replace: whether rounds of plan 0 may replace plain decoding.

    Attributes:
        replaced: whether they do.
    """

    def __init__(self, *, may_replace: bool) -> None:
        super().__init__()
        self.replaced, self._may_replace = False, may_replace
        self._seconds: dict[int, deque[float]] = {}  # of recent rounds of plan 0, by batch size

    def measure(self, session: Session) -> PlainSample:
        """One plain decoding step, or a round of plan 0, which is committed."""
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
        """Add a round, if it is one of plan 0."""
        if done.plan.num_steps == 0:
            self._seconds.setdefault(done.batch_size, deque(maxlen=_PLAN_ZERO_ROUNDS)).append(done.seconds)

    def plan_zero_s(self, batch_size: int) -> float | None:
        """Mean seconds of recent rounds of plan 0 at a batch size; None: there were none."""
        seconds = self._seconds.get(batch_size)
        return None if seconds is None else sum(seconds) / len(seconds)


def check_episode(max_rounds: int | None, max_tokens: int | None, reward: str) -> None:
    """Check that one length of an episode is given, and that it suits the reward.

    Raises:
        ValueError: otherwise.
    """
    if (max_rounds is None) == (max_tokens is None):
        raise ValueError(
            f"exactly one of max_rounds and max_tokens must be given, but got {max_rounds} and {max_tokens}"
        )
    length = max_tokens if max_rounds is None else max_rounds
    if length is not None and length < 1:
        raise ValueError(f"an episode must have at least 1 round or token, but got {length}")
    if reward == "time_saved" and max_tokens is None:
        raise ValueError("reward 'time_saved' is for episodes of max_tokens only, but got max_rounds")
