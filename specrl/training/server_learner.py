"""Learning a draft from the traffic of an SGLang server that others use: traces come by its plugin, weights go by swap.

The server never waits for us. Who is killed, the learner or its connection, is not noticed there; when the server goes,
what was learnt is on disk, and a resumed run first has the new server serve it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any

import numpy as np

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.clock import Clock, WallClock
from specrl.core.round import Trace
from specrl.io.output import OutputDir, show
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.sglang.client.hot_swap import Swap, describe, push
from specrl.sglang.client.trace_subscriber import Subscriber
from specrl.training.checkpoint import load_checkpoint, save_checkpoint

API_KEY = "SPECRL_API_KEY"  # in the environment, not on a command line that others can read
_WAITING = 4096  # traces that may wait for the learner; more stay in the server's ring, which drops and counts them
_ROUNDS = 400  # that the accept length is a mean of
_LOOK_S, _SILENCE_S = 0.5, 10.0  # between two looks for traces; after which the server is asked whether it is there


@dataclass(frozen=True, slots=True)
class Source:
    """A server that runs, and how it is reached.

    Attributes:
        url: of the server.
        traces: socket of its plugin (SPECRL_TRACES=unix:PATH), on this machine.
        api_key: that it wants; None: none.
    """

    url: str
    traces: Path
    api_key: str | None = None

    @classmethod
    def of(cls, url: str, traces: Path) -> Source:
        """With the environment's key, if there is one."""
        return cls(url, traces, os.environ.get(API_KEY))


class Reader:
    """Traces as they come, taken by a thread of its own, so that the server's ring is empty while we learn.

    Args:
        path: of the socket.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, path: Path) -> None:
        self._subscriber = Subscriber(path, _LOOK_S)
        self._traces: deque[Trace] = deque()
        self._changed = Condition()
        self._error: Exception | None = None
        self._thread = Thread(target=self._read, name="specrl-traces", daemon=True)
        self._thread.start()

    @property
    def over(self) -> bool:
        """Whether nothing more can come."""
        return not self._thread.is_alive()

    @property
    def lost(self) -> dict[str, int]:
        """Frames dropped by the server, and requests that are left out as something of them did not come."""
        return {"dropped": self._subscriber.dropped, "incomplete": self._subscriber.incomplete}

    def take(self) -> list[Trace]:
        """What has come; waits a moment where nothing has."""
        with self._changed:
            if not self._traces:
                self._changed.wait(_LOOK_S)
            out = list(self._traces)
            self._traces.clear()
            self._changed.notify_all()
        if self._error is not None:
            raise self._error
        return out

    def close(self) -> None:
        """Hang up."""
        self._subscriber.close()

    def _read(self) -> None:
        try:
            while not self._subscriber.gone:
                for frame in self._subscriber.frames():  # ends where nothing comes for a while
                    traces = self._subscriber.take(frame)
                    with self._changed:
                        self._changed.wait_for(lambda: len(self._traces) < _WAITING)
                        self._traces += traces
                        self._changed.notify_all()
        except OSError:  # hung up, here or there
            pass
        except ValueError as error:
            self._error = error


class Follower:
    """Learns from a server's traces, and swaps what it learnt in.

    Args:
        target: that the server serves.
        draft: that the server was started with.
        config: of the learner.
        source: the server.
        sync_every: finished requests between two calls of the learner.
        seed: of the learner's draws.
        resume: a checkpoint of an earlier run to go on from.

    Raises:
        ValueError: a checkpoint of another run, or a server or draft that cannot be swapped.
        OSError: the server does not answer.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        config: LearnerConfig,
        source: Source,
        *,
        sync_every: int = 16,
        seed: int = 0,
        resume: Path | None = None,
    ) -> None:
        if sync_every < 1:
            raise ValueError(f"sync_every must be at least 1 request, but got {sync_every}")
        self.clock: Clock = WallClock()
        self.draft, self._source, self._sync_every = draft, source, sync_every
        self.learner = OnlineLearner(draft, target.embedding, config, seed=seed, clock=self.clock)
        self.requests, self.version = 0, -1
        self.swaps: deque[Swap] = deque(maxlen=_ROUNDS)
        self.metrics: Mapping[str, float] = {}
        self._accepted: deque[int] = deque(maxlen=_ROUNDS)
        self._waiting: list[Trace] = []
        self._unlearned = 0
        if resume is not None:
            tensors, state, _ = load_checkpoint(resume)
            if state.get("engine") != "sglang":
                raise ValueError("a run with --engine sglang goes on from a checkpoint of one, but got another's")
            self.learner.load_state(tensors, state["learner"])
            self.requests = int(state["requests"])
        self._swap()
        self._reader = self._connect()
        self._heard = self.clock.now()

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and round over the last 400 rounds that drafted; nan before the first."""
        return float(np.mean(self._accepted)) if self._accepted else float("nan")

    def step(self) -> None:
        """Take what has come, learn and swap where it is due.

        Raises:
            OSError: the server is gone, or silent and does not answer.
        """
        traces = self._reader.take()
        now = self.clock.now()
        if traces:
            self._heard = now
        elif self._reader.over:
            raise self._gone()
        elif now - self._heard > _SILENCE_S:
            describe(self._source.url, api_key=self._source.api_key)  # it may have nothing to do
            self._heard = now
        self._accepted += [int((t.path >= 0).sum()) for t in traces if t.plan is not None and t.plan.num_steps]
        self._waiting += traces
        finished = sum(len(trace.finished) for trace in traces)
        self.requests += finished
        self._unlearned += finished
        if self._unlearned >= self._sync_every:
            self._unlearned = 0
            self.metrics = self.learner.learn(self._waiting)
            self._waiting = []
            self._swap()

    def save(self, directory: Path) -> None:
        """Write directory/checkpoint, from which a run goes on; sequences to learn from are not kept."""
        tensors, numbers = self.learner.state()
        save_checkpoint(
            directory / "checkpoint", tensors, {"engine": "sglang", "requests": self.requests, "learner": numbers}
        )

    def row(self) -> dict[str, object]:
        """Where things stand."""
        names = ("alpha_1", "loss", "staleness", "skipped", "held")
        return {
            "requests": self.requests,
            "draft_version": self.version,
            "accept_length": self.accept_length,
            "swap_pause_s": max((swap.pause_s for swap in self.swaps), default=float("nan")),
            **self._reader.lost,
            **{name: self.metrics[name] for name in names if name in self.metrics},
        }

    def close(self) -> None:
        """Hang up; the server goes on with the draft that it has."""
        self._reader.close()

    def _swap(self) -> None:
        version, weights = self.learner.weights()
        if version != self.version:
            source = self._source
            self.swaps.append(push(source.url, weights, version=version, like=self.draft, api_key=source.api_key))
            self.version = version

    def _connect(self) -> Reader:
        """The server's traces; somebody listens from its first request on, which is waited for while it is up."""
        while True:
            try:
                return Reader(self._source.traces)
            except (FileNotFoundError, ConnectionRefusedError):  # refused: by a socket that a killed server left
                describe(self._source.url, api_key=self._source.api_key)
            Event().wait(_LOOK_S)

    def _gone(self) -> OSError:
        source = self._source
        try:
            describe(source.url, api_key=source.api_key, timeout_s=5.0)
        except OSError:
            return OSError(f"the server {source.url} must serve, but is gone; start it again and go on with --resume")
        return OSError(f"{source.url} hung up on {source.traces}: somebody else takes its traces; one at a time may")


def follow(
    follower: Follower,
    directory: OutputDir,
    *,
    requests: int,
    checkpoint_every: int,
    every_s: float = 10.0,
    print_line: Callable[[str], None] = show,
) -> None:
    """Follow until `requests` have finished, with a checkpoint every so often, at the end, and when the server goes.

    Args:
        follower: that learns.
        directory: for checkpoint/, draft/ and log.csv.
        requests: finished by then, those before a resumption included.
        checkpoint_every: requests between two checkpoints.
        every_s: seconds between two lines.
        print_line: where they go.
    """
    clock = follower.clock
    began = last = clock.now()
    saved, rows = follower.requests, list[dict[str, Any]]()

    def report() -> None:
        row = {"seconds": round(clock.now() - began, 1), **follower.row()}
        rows.append(row)
        directory.write_csv("log.csv", rows)
        print_line(
            f"{row['seconds']:5.0f} s  {row['requests']:5d} requests  draft {row['draft_version']}  accept length "
            f"{row['accept_length']:.2f}"
        )

    try:
        while follower.requests < requests:
            follower.step()
            if clock.now() - last >= every_s:
                last = clock.now()
                report()
            if follower.requests - saved >= checkpoint_every:
                saved = follower.requests
                follower.save(directory.path)
    finally:  # when the server goes, too
        follower.save(directory.path)
        report()
        follower.close()
    Draft(follower.draft.config, follower.learner.weights()[1]).save(directory.path / "draft")
    print_line(f"written: {directory.path}")
