"""What the environments over live decoding share: the plain baseline, what `info` tells, workloads by name."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from specrl.core.batch_schedule import Phase
from specrl.core.clock import WallClock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plain_cost import PlainCost
from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round
from specrl.envs.device_lock import Exclusive
from specrl.envs.render import as_text, panel
from specrl.envs.rewards import Outcome, Reward

log = logging.getLogger("specrl.envs")
NO_PLAIN = (
    "the engine measures no plain decoding, so that only the ratio over plan 0 is reported: rewards count against "
    "rounds of plan 0, and episode_speedup is nan; for a running SGLang server pass plain_url="
)
S = TypeVar("S", bound=Session)
_ZEROS = 32  # rounds of plan 0 that its cost is the mean of
_FIRST_SAMPLES = 3  # plain steps measured when a batch size is met for the first time


class OnTheClock(Generic[S]):
    """What an environment on a live session does between steps: its lock, its pauses, its panel, its end.

    For a `gymnasium.Env` to inherit beside it, which calls `_set_up` once its engine is there.
    """

    engine: Engine
    render_mode: str | None
    _title: ClassVar[str]
    _phases: tuple[Phase, ...]  # the trace of batch sizes that episodes follow,
    _drawn: tuple[Phase, ...]  # or what each of them draws from
    _max_rounds: int | None
    _max_tokens: int | None
    _reward: Reward

    def _set_up(self, *, owned: bool, allow_parallel: bool) -> None:
        clock = self.engine.clock
        alone = isinstance(clock, WallClock) and not allow_parallel
        self._exclusive = Exclusive(str(clock.device)) if alone else None  # type: ignore[attr-defined]
        self._session: S | None = None
        self._info: dict[str, Any] | None = None
        self._live: Any = None
        self._owned, self._closed = owned, False

    def _begin(self, rng: np.random.Generator, options: dict[str, Any] | None) -> tuple[Phase, ...]:
        """End the episode before; the trace of batch sizes of the next.

        Raises:
            ValueError: the environment is closed, or there are options.
        """
        if self._closed:
            raise ValueError("the environment is closed; make another one")
        if options:
            raise ValueError(f"reset knows no options, but got {', '.join(options)}; pass them to gym.make")
        self._let_others_run()
        if self._session is not None:
            self._session.close()
        self._plain = self._spent = 0.0
        self._rounds = self._tokens = 0
        self._info = None
        return (self._drawn[int(rng.integers(len(self._drawn)))],) if self._drawn else self._phases

    def _agents_turn(self) -> None:
        """The agent's time counts from now on."""
        self._paused_s = 0.0
        self._returned = self.engine.clock.now()

    def _thinking_s(self) -> float:
        """Seconds that the agent took since its turn began."""
        return max(self.engine.clock.now() - self._returned - self._paused_s, 0.0)

    def _count(
        self, done: Round, outcome: Outcome, thinking_s: float, error_s: float
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        """Take a round in, as `describe` tells it: its reward, terminated, truncated and info."""
        self._rounds += 1
        self._tokens += outcome.tokens
        self._plain += outcome.plain_total_s
        self._spent += outcome.seconds
        self._info = info = describe(done, outcome, thinking_s, error_s, self._plain / self._spent)
        terminated = self._max_tokens is not None and self._tokens >= self._max_tokens
        truncated = self._max_rounds is not None and self._rounds >= self._max_rounds
        if terminated or truncated:
            self._let_others_run()
        return self._reward(outcome), terminated, truncated, info

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """What happens inside does not count as the agent's time: learning, logging, other environments."""
        self._let_others_run()
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
            if self._live is None:
                from rich.live import Live

                self._live = Live(auto_refresh=False)
                self._live.start()
            self._live.update(view, refresh=True)
        return None

    def close(self) -> None:
        """End the session, and the engine if the environment made it; idempotent."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._let_others_run()
        if self._session is not None:
            self._session.close()
            self._session = None
        if self._owned and not self._closed:
            self.engine.close()
        self._closed = True

    def _let_others_run(self) -> None:
        if self._exclusive is not None:
            self._exclusive.give_back()

    def _running(self) -> S:
        if self._closed:
            raise ValueError("the environment is closed; make another one")
        if self._session is None:
            raise ValueError("an episode must have begun, but reset was never called; call reset() first")
        return self._session


def check_episode(max_rounds: int | None, max_tokens: int | None, reward: str) -> None:
    """Raise a ValueError unless exactly one length of an episode is given, and it suits the reward."""
    if (max_rounds is None) == (max_tokens is None):
        raise ValueError(
            f"exactly one of max_rounds and max_tokens must be given, but got {max_rounds} and {max_tokens}"
        )
    if min(v for v in (max_rounds, max_tokens) if v is not None) < 1:
        raise ValueError(f"an episode must have at least 1 round or token, but got {max_rounds or max_tokens}")
    if reward == "time_saved" and max_tokens is None:
        raise ValueError("reward 'time_saved' is right only in episodes of max_tokens, but got max_rounds")


def measure_plain(session: Session, baseline: PlainCost, context: float, stand_in: PlanZero | None = None) -> None:
    """Re-measure plain decoding where it is due; outside every timed window.

    Args:
        session: about to run a round.
        baseline: takes the samples.
        context: mean tokens known per live request.
        stand_in: where the engine does not measure plain decoding, rounds of plan 0 are run in its place, and this is
            told; None: that is an error.

    Raises:
        ValueError: the engine does not measure plain decoding between rounds.
    """
    batch = session.batch_size
    baseline.tick(batch, context)
    if not baseline.due(batch, context):
        return
    first = not baseline.known(batch)
    for _ in range(_FIRST_SAMPLES if first else 1):
        sample = session.measure_plain()
        if sample is None and stand_in is not None:
            sample = stand_in.run(session)
        if sample is None:
            raise ValueError(
                "the engine must measure plain decoding between rounds, but it does not; use 'local', or 'sglang' with "
                "baseline='alternate', or plain_url= for a running server"
            )
        baseline.add(sample)


class PlanZero:
    """What rounds of plan 0 cost at each batch size, and how much faster the episode is than they.

    A draft that proposes nothing still follows the text, so that this is not plain decoding.
    """

    def __init__(self) -> None:
        self.stands_in = False  # for plain decoding, which the engine does not measure
        self._seconds: dict[int, deque[float]] = {}
        self.begin()

    def begin(self) -> None:
        """An episode begins; costs are kept."""
        self._saved = self._spent = 0.0

    def forget(self) -> None:
        """Costs are not kept."""
        self._seconds.clear()

    def run(self, session: Session) -> PlainSample:
        """A round of plan 0 in the place of a plain step; said once."""
        if not self.stands_in:
            self.stands_in = True
            log.warning("%s", NO_PLAIN)
        done = session.round(Plan(0))
        self._take(done)
        return PlainSample(done.batch_size, float(done.context_lengths.mean()), done.seconds)

    def _take(self, done: Round) -> None:
        self._seconds.setdefault(done.batch_size, deque(maxlen=_ZEROS)).append(done.seconds)

    def compare(self, done: Round, outcome: Outcome) -> dict[str, float]:
        """Take a round; what `info` tells of it."""
        batch = outcome.batch_size
        if done.plan.num_steps == 0:
            self._take(done)
        told = dict.fromkeys(("t0_s", "t0_error_s", "episode_speedup"), math.nan) if self.stands_in else {}
        if known := self._seconds.get(batch):
            told["plan0_s"] = sum(known) / len(known)
            self._saved += outcome.tokens * told["plan0_s"] / batch
            self._spent += outcome.seconds
        if self._spent:
            told["episode_speedup_over_plan0"] = self._saved / self._spent
        return told


def describe(done: Round, outcome: Outcome, thinking_s: float, error_s: float, speedup: float) -> dict[str, Any]:
    """What `info` tells of a round.

    Args:
        done: the round.
        outcome: what its reward was computed from.
        thinking_s: that the agent took.
        error_s: standard error of the plain round's seconds.
        speedup: of the episode so far.
    """
    correct = done.correct_drafts.tolist()
    return {
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "draft_s": done.draft_s,
        "verify_s": done.verify_s,
        "other_s": done.other_s,
        "thinking_s": thinking_s,
        "prefill_s": done.prefill_s,
        "accept_length": 1.0 + sum(correct) / len(correct),
        "histogram": [correct.count(k) for k in range(done.plan.num_steps + 1)],
        "plan": str(done.plan),
        "draft_version": done.draft_version,
        "batch_size": outcome.batch_size,
        "t0_s": outcome.plain_s,
        "t0_error_s": error_s,
        "episode_speedup": speedup,
        "round": done,
    }


def named_workload(
    spec: str | Path, target: str | Path, prompt_tokens: int, max_new_tokens: int, temperature: float, ignore_eos: bool
) -> Workload:
    """A workload or stream by name, in the tokens of a target by name or directory (see `specrl.workloads.stream`)."""
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
