"""What the environments over live decoding share: the agent's clock, episodes, `info`, the panel, the device lock."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from specrl.core.batch_schedule import Phase
from specrl.core.clock import WallClock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plain_cost import PlainCost, no_plain_measurement
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout, Step
from specrl.core.round import PlainSample, Round
from specrl.envs.device_lock import DeviceLock
from specrl.envs.render import as_text, panel
from specrl.envs.rewards import Outcome, Reward

log = logging.getLogger("specrl.envs")
NO_PLAIN = (
    "the engine cannot measure plain decoding, so rewards are relative to rounds of plan 0, which are slower, and "
    "episode_speedup is nan; to compare with plain decoding on a running SGLang server, pass plain_url="
)
S = TypeVar("S", bound=Session)
_PLAN_ZERO_ROUNDS = 32  # rounds of plan 0 in the mean cost of one


class TimedEnv(Generic[S]):
    """The part of an environment on a live session that does not depend on what the agent decides.

    An environment inherits from it and from `gymnasium.Env`, and calls `_set_up` after its engine is set.
    """

    engine: Engine
    render_mode: str | None
    _title: ClassVar[str]
    _phases: tuple[Phase, ...]  # the batch sizes that every episode follows,
    _drawn: tuple[Phase, ...]  # or those that each episode draws one of
    _max_rounds: int | None
    _max_tokens: int | None
    _reward: Reward
    _rollout: Rollout

    def _set_up(self, *, owned: bool, allow_parallel: bool) -> None:
        clock = self.engine.clock
        locked = isinstance(clock, WallClock) and not allow_parallel
        self._lock = DeviceLock(str(clock.device)) if locked else None  # type: ignore[attr-defined]
        self._session: S | None = None
        self._info: dict[str, Any] | None = None
        self._live_panel: Any = None
        self._owned, self._closed = owned, False

    def _begin_episode(self, rng: np.random.Generator, options: dict[str, Any] | None) -> tuple[Phase, ...]:
        """End the previous episode; returns the batch sizes of the next one.

        Raises:
            ValueError: the environment is closed, or there are options.
        """
        if self._closed:
            raise ValueError("the environment is closed; make a new one")
        if options:
            raise ValueError(f"reset takes no options, but got {', '.join(options)}; pass them to gym.make")
        self._release_device()
        if self._session is not None:
            self._session.close()
        self._plain = self._spent = 0.0
        self._rounds = self._tokens = 0
        self._info = None
        return (self._drawn[int(rng.integers(len(self._drawn)))],) if self._drawn else self._phases

    def _start_agent_clock(self) -> None:
        """The agent's time counts from now on."""
        self._paused_s = 0.0
        self._returned = self.engine.clock.now()

    def _thinking_s(self) -> float:
        """Seconds since `_start_agent_clock`, pauses excluded."""
        return max(self.engine.clock.now() - self._returned - self._paused_s, 0.0)

    def _count(self, step: Step) -> tuple[Outcome, float, bool, bool, dict[str, Any]]:
        """Count a round; returns its outcome, reward, terminated, truncated and info (see `describe`)."""
        done, batch = step.round, step.round.batch_size
        outcome = Outcome(sum(done.tokens.tolist()), batch, step.seconds, step.plain.seconds)
        self._rounds += 1
        self._tokens += outcome.tokens
        self._plain += outcome.plain_total_s
        self._spent += outcome.seconds
        self._info = info = describe(step, outcome, self._plain / self._spent)
        terminated = self._max_tokens is not None and self._tokens >= self._max_tokens
        truncated = self._max_rounds is not None and self._rounds >= self._max_rounds
        if terminated or truncated:
            self._release_device()
        return outcome, self._reward(outcome), terminated, truncated, info

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

    def _running(self) -> S:
        if self._closed:
            raise ValueError("the environment is closed; make a new one")
        if self._session is None:
            raise ValueError("reset was never called; call reset() before step()")
        return self._session


class PlanZeroBaseline(PlainCost):
    """The cost of plain decoding, or of rounds of plan 0 on engines that cannot measure plain decoding.

    A round of plan 0 commits one token per request, as plain decoding does, but the draft still reads the text.

    Args:
        may_stand_in: whether rounds of plan 0 may replace plain decoding.

    Attributes:
        stands_in: whether they do.
    """

    def __init__(self, *, may_stand_in: bool) -> None:
        super().__init__()
        self.stands_in, self._may_stand_in = False, may_stand_in
        self._seconds: dict[int, deque[float]] = {}  # of recent rounds of plan 0, by batch size

    def measure(self, session: Session) -> PlainSample:
        """One plain decoding step, or a round of plan 0, which is committed.

        Raises:
            ValueError: the engine cannot measure plain decoding, and plan 0 may not replace it.
        """
        sample = session.measure_plain()
        if sample is not None:
            return sample
        if not self._may_stand_in:
            raise no_plain_measurement()
        if not self.stands_in:
            self.stands_in = True
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
    if min(v for v in (max_rounds, max_tokens) if v is not None) < 1:
        raise ValueError(f"an episode must have at least 1 round or token, but got {max_rounds or max_tokens}")
    if reward == "time_saved" and max_tokens is None:
        raise ValueError("reward 'time_saved' is for episodes of max_tokens only, but got max_rounds")


def describe(step: Step, outcome: Outcome, speedup: float) -> dict[str, Any]:
    """The `info` of a round; `speedup` is that of the episode so far."""
    done, correct = step.round, step.round.correct_drafts.tolist()
    return {
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "draft_s": done.draft_s,
        "verify_s": done.verify_s,
        "other_s": done.other_s,
        "thinking_s": step.thinking_s,
        "prefill_s": done.prefill_s,
        "accept_length": 1.0 + sum(correct) / len(correct),
        "histogram": [correct.count(k) for k in range(done.plan.num_steps + 1)],
        "plan": str(done.plan),
        "draft_version": done.draft_version,
        "batch_size": outcome.batch_size,
        "t0_s": outcome.plain_s,
        "t0_error_s": step.plain.standard_error,
        "episode_speedup": speedup,
        "round": done,
    }


def named_workload(
    spec: str | Path, target: str | Path, prompt_tokens: int, max_new_tokens: int, temperature: float, ignore_eos: bool
) -> Workload:
    """A workload or stream by name, in the tokens of a target (see `specrl.workloads.stream`)."""
    from specrl.workloads.stream import open_stream

    return open_stream(
        spec,
        target,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        split="train",
    )
