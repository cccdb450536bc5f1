"""Learns a draft from the traffic of an SGLang server that others use: traces come from its plugin, weights go by swap.

The server never waits for the learner, and does not notice if the learner dies. If the server dies, what was learned is
on disk, and a resumed run first swaps it into the new server.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.clock import WallClock
from specrl.core.round import Trace
from specrl.io.output import OutputDir, show
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.sglang.client.hot_swap import Swap, push
from specrl.sglang.client.http import Client, ServerError, ServerGone
from specrl.sglang.client.trace_subscriber import MAX_WAITING, Subscriber
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

API_KEY = "SPECRL_API_KEY"  # in the environment, as others can read command lines
_KIND = "server"
_ROUNDS = 400  # that the accept length is the mean of
_WAIT_S, _SILENCE_S = 0.5, 10.0  # for traces; without any, before the server is asked whether it is there


class ServerLearner:
    """Learns from a server's traces, and swaps the new weights in.

    Args:
        target: the target that the server serves.
        draft: the draft that the server was started with.
        config: configuration of the learner.
        url: URL of the server. Its API key, if it needs one, is read from SPECRL_API_KEY.
        traces: socket of the server's plugin (SPECRL_TRACES=unix:PATH), on this machine.
        sync_every: finished requests between two updates.
        seed: of the learner.
        resume: checkpoint of an earlier run to continue.

    Attributes:
        requests: finished requests, those before a resumption included.
        version: version of the weights that serve.

    Raises:
        ValueError: a checkpoint of another run, or a server or draft that cannot be swapped.
        OSError: the server does not answer.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        config: LearnerConfig,
        url: str,
        traces: Path,
        *,
        sync_every: int = 16,
        seed: int = 0,
        resume: Path | None = None,
    ) -> None:
        self.clock = WallClock()
        self.draft, self._url, self._sync_every = draft, url, sync_every
        self.learner = OnlineLearner(draft, target.embedding, config, seed=seed, clock=self.clock)
        self.requests, self.version = 0, -1
        self._swaps: deque[Swap] = deque(maxlen=_ROUNDS)
        self._metrics: Mapping[str, float] = {}
        self._accepted: deque[int] = deque(maxlen=_ROUNDS)
        self._unlearned: list[Trace] = []
        self._finished = 0  # requests that finished in them
        if resume is not None:
            state = load_checkpoint(resume, _KIND).state
            self.learner.load_state_dict(state["learner"])
            self.requests = int(state["requests"])
        self._api_key = os.environ.get(API_KEY)
        self._client = Client(url, api_key=self._api_key, timeout_s=10.0)
        self._swap()
        self._reader = self._connect(traces)
        self._heard_s = self.clock.now()

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and round over the last 400 rounds that drafted; nan before the first."""
        return float(np.mean(self._accepted)) if self._accepted else math.nan

    def step(self) -> None:
        """Take the traces that have come; learn and swap every `sync_every` requests.

        Raises:
            OSError: the server has gone or does not answer, or another client takes its traces.
        """
        traces = self._take()
        self._accepted += [int((t.path >= 0).sum()) for t in traces if t.plan is not None and t.plan.num_steps]
        self._unlearned += traces
        finished = sum(len(trace.finished) for trace in traces)
        self.requests += finished
        self._finished += finished
        if self._finished >= self._sync_every:
            self._metrics = self.learner.learn(self._unlearned)
            self._unlearned, self._finished = [], 0
            self._swap()

    def save(self, directory: Path) -> None:
        """Write directory/checkpoint; traces and sequences to learn from are not saved."""
        state = {"requests": self.requests, "learner": self.learner.state_dict()}
        save_checkpoint(directory / "checkpoint", _KIND, Checkpoint(state))

    def row(self) -> dict[str, Any]:
        """A line of log.csv."""
        names = ("alpha_1", "loss", "staleness", "skipped", "held")
        return {
            "requests": self.requests,
            "draft_version": self.version,
            "accept_length": self.accept_length,
            "swap_pause_s": max((swap.pause_s for swap in self._swaps), default=math.nan),
            "dropped": self._reader.dropped,
            "incomplete": self._reader.incomplete,
            **{name: self._metrics[name] for name in names if name in self._metrics},
        }

    def close(self) -> None:
        """Disconnect; the server keeps the draft that it has."""
        self._reader.close()

    def _swap(self) -> None:
        version, weights = self.learner.weights()
        if version != self.version:
            self._swaps.append(push(self._url, weights, version=version, like=self.draft, api_key=self._api_key))
            self.version = version

    def _take(self) -> list[Trace]:
        try:
            traces = self._reader.received(_WAIT_S)
            if traces:
                self._heard_s = self.clock.now()
            elif self.clock.now() - self._heard_s > _SILENCE_S:
                self._client.get("/server_info")  # perhaps it has no requests
                self._heard_s = self.clock.now()
        except ServerGone as error:
            raise OSError(
                f"the server {self._url} must run, but is gone ({error}); start it again and go on with --resume"
            ) from error
        return traces

    def _connect(self, traces: Path) -> Subscriber:
        """Connect to the traces, as soon as the server's plugin listens."""
        while True:
            try:
                return Subscriber(traces, max_waiting=MAX_WAITING)
            except ServerError:
                self._client.get("/server_info")  # raises an error if the server has gone too
            Event().wait(_WAIT_S)


def learn_from_server(
    learner: ServerLearner,
    directory: OutputDir,
    *,
    requests: int,
    checkpoint_every: int,
    every_s: float = 10.0,
    print_line: Callable[[str], None] = show,
) -> None:
    """Learn until so many requests have finished; checkpoints are written on the way, at the end, and on errors.

    Args:
        learner: closed at the end.
        directory: for checkpoint/, draft/ and log.csv.
        requests: finished requests in all, those before a resumption included.
        checkpoint_every: requests between two checkpoints.
        every_s: seconds between two lines of output.
        print_line: prints a line.
    """
    clock = learner.clock
    began = last = clock.now()
    saved, rows = learner.requests, list[dict[str, Any]]()

    def report() -> None:
        row = {"seconds": round(clock.now() - began, 1), **learner.row()}
        rows.append(row)
        directory.write_csv("log.csv", rows)
        print_line(
            f"{row['seconds']:5.0f} s  {row['requests']:5d} requests  draft {row['draft_version']}  accept length "
            f"{row['accept_length']:.2f}"
        )

    try:
        while learner.requests < requests:
            learner.step()
            if clock.now() - last >= every_s:
                last = clock.now()
                report()
            if learner.requests - saved >= checkpoint_every:
                saved = learner.requests
                learner.save(directory.path)
    finally:  # also if the server has gone
        learner.save(directory.path)
        report()
        learner.close()
    Draft(learner.draft.config, learner.learner.weights()[1]).save(directory.path / "draft")
    print_line(f"written: {directory.path}")
