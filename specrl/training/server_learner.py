"""Learns a draft from the requests of an SGLang server: traces come from its plugin, and weights are hot-swapped.

The server never waits for the learner and continues without it. If the server ends, a resumed run first swaps the
learned weights into the new server.
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
from specrl.sglang.client.hot_swap import push
from specrl.sglang.client.http import Client, ServerError, ServerGone
from specrl.sglang.client.trace_subscriber import MAX_WAITING, Subscriber
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

API_KEY = "SPECRL_API_KEY"  # in the environment, because other users can read command lines
_KIND = "server"
_RECENT = 400  # rounds of the mean accept length, and swaps of the longest pause
_POLL_S = 0.5  # between polls
_SILENCE_S = 10.0  # without traces, until the server is polled
_METRICS = ("alpha_1", "loss", "staleness", "skipped", "held")


class ServerLearner:
    """Learns from a server's traces, and swaps the new weights in.

    Args:
        target, draft: the models that the server was started with.
        config, seed: of the learner.
        url: of the server. Its API key, if it needs one, is read from SPECRL_API_KEY.
        traces: socket of the server's plugin (SPECRL_TRACES=unix:PATH), on this machine.
        weight_sync_interval: finished requests between two updates.
        resume: checkpoint of an earlier run to continue.

    Attributes:
        requests: finished requests, including those before a resumption.
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
        weight_sync_interval: int = 16,
        seed: int = 0,
        resume: Path | None = None,
    ) -> None:
        self.clock, self.draft = WallClock(), draft
        self.learner = OnlineLearner(draft, target.embedding, config, seed=seed, clock=self.clock)
        self.requests, self.version = 0, -1
        self._url, self._weight_sync_interval, self._api_key = url, weight_sync_interval, os.environ.get(API_KEY)
        self._metrics: Mapping[str, float] = {}
        self._pauses_s: deque[float] = deque(maxlen=_RECENT)
        self._accept_lengths: deque[int] = deque(maxlen=_RECENT)
        self._unlearned: list[Trace] = []
        if resume is not None:
            state = load_checkpoint(resume, _KIND).state
            self.learner.load_state_dict(state["learner"])
            self.requests = int(state["requests"])
        self._client = Client(url, api_key=self._api_key, timeout_s=10.0)
        self._swap()
        self._subscriber = self._connect(traces)
        self._heard_at = self.clock.now()

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and round over the last 400 rounds that drafted; nan before the first."""
        return float(np.mean(self._accept_lengths)) if self._accept_lengths else math.nan

    def step(self) -> None:
        """Read the traces that have arrived; learn and swap every `weight_sync_interval` requests.

        An OSError: the server has gone or does not answer, or another client reads its traces.
        """
        traces = self._read()
        self._accept_lengths += [int((t.path >= 0).sum()) for t in traces if t.plan is not None and t.plan.num_steps]
        self._unlearned += traces
        self.requests += sum(len(trace.finished) for trace in traces)
        if sum(len(trace.finished) for trace in self._unlearned) >= self._weight_sync_interval:
            self._metrics = self.learner.learn(self._unlearned)
            self._unlearned = []
            self._swap()

    def save(self, directory: Path) -> None:
        """Write directory/checkpoint; traces and sequences to learn from are not saved."""
        state = {"requests": self.requests, "learner": self.learner.state_dict()}
        save_checkpoint(directory / "checkpoint", _KIND, Checkpoint(state))

    def row(self) -> dict[str, Any]:
        """Return a row of log.csv."""
        return {
            "requests": self.requests,
            "draft_version": self.version,
            "accept_length": self.accept_length,
            "swap_pause_s": max(self._pauses_s, default=math.nan),
            "dropped": self._subscriber.dropped,
            "incomplete": self._subscriber.incomplete,
            **{name: self._metrics[name] for name in _METRICS if name in self._metrics},
        }

    def close(self) -> None:
        """Disconnect; the server continues with its present draft."""
        self._subscriber.close()

    def _swap(self) -> None:
        version, weights = self.learner.weights()
        if version != self.version:
            swap = push(self._url, weights, version=version, like=self.draft, api_key=self._api_key)
            self._pauses_s.append(swap.pause_s)
            self.version = version

    def _read(self) -> list[Trace]:
        try:
            traces = self._subscriber.received(_POLL_S)
            if not traces and self.clock.now() - self._heard_at <= _SILENCE_S:
                return []
            if not traces:
                self._client.get("/server_info")  # raises an error unless the server is only idle
        except ServerGone as error:
            raise OSError(
                f"the server {self._url} must run, but is gone ({error}); start it again and go on with --resume"
            ) from error
        self._heard_at = self.clock.now()
        return traces

    def _connect(self, traces: Path) -> Subscriber:
        """Connect to the traces as soon as the server's plugin listens."""
        while True:
            try:
                return Subscriber(traces, max_waiting=MAX_WAITING)
            except ServerError:
                self._client.get("/server_info")  # raises an error if the server has gone too
            Event().wait(_POLL_S)


def learn_from_server(
    learner: ServerLearner,
    directory: OutputDir,
    *,
    requests: int,
    checkpoint_every: int,
    every_s: float = 10.0,
    print_line: Callable[[str], None] = show,
) -> None:
    """Learn until `requests` have finished, including those before a resumption, and close the learner.

    Writes a row of log.csv every `every_s` seconds, and a checkpoint every `checkpoint_every` requests, at the end and
    on errors. At the end it writes draft/.
    """
    clock = learner.clock
    began = logged_at = clock.now()
    saved, rows = learner.requests, list[dict[str, Any]]()

    def log() -> None:
        row = {"seconds": round(clock.now() - began, 1), **learner.row()}
        rows.append(row)
        directory.write_csv("log.csv", rows)
        text = f"{row['seconds']:5.0f} s  {row['requests']:5d} requests  draft {row['draft_version']}"
        print_line(f"{text}  accept length {row['accept_length']:.2f}")

    try:
        while learner.requests < requests:
            learner.step()
            if clock.now() - logged_at >= every_s:
                logged_at = clock.now()
                log()
            if learner.requests - saved >= checkpoint_every:
                saved = learner.requests
                learner.save(directory.path)
    finally:  # also if the server has gone
        learner.save(directory.path)
        log()
        learner.close()
    Draft(learner.draft.config, learner.learner.weights()[1]).save(directory.path / "draft")
    print_line(f"written: {directory.path}")
