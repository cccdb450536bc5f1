"""SGLang's lookahead by our policies: the num_steps of each round, by batch size.

They come from a policy directory, or from a client that sends plans by their smallest batch size to a REP socket, such
as {"plans": {"1": "3/1/4", "8": "0"}}. The answer is {"ok": true, "rounds": n} or {"error": "…"}.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from threading import Event, Thread
from typing import Any

import numpy as np
import zmq

from specrl.agents.choosers.table import PlanTable
from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observer
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.sglang.plugin.hooks import Failsafe, log
from specrl.sglang.plugin.policy import LearnedPolicy
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.transport import Message, bind, decode, encode

_MAX_LATE_ROUNDS = 8  # rounds that may begin before the results of the first of them are reported
_POLL_MS = 100


class Lookahead:
    """A plan chooser as a controller.

    SGLang asks for a round's steps before it and reports its correct drafts after it; with overlapped scheduling later
    rounds have begun by then. A round's seconds are counted from its choice, or from the last report if that came
    later: on a busy server, the time from one round to the next. `clock` times the rounds.
    """

    ready = True  # from the first round on

    def __init__(self, chooser: PlanChooser, clock: Clock) -> None:
        self.chooser, self._clock = chooser, clock
        self._observer = Observer(chooser.plans)
        self._begun: deque[tuple[int, Plan, float]] = deque(maxlen=_MAX_LATE_ROUNDS)
        self._reported_s = 0.0

    def steps(self, batch_size: int) -> int:
        """Return num_steps of the next round."""
        plan = self.chooser.choose(self._observer.observe(batch_size, 1.0))  # SGLang does not pass the context lengths
        self._begun.append((batch_size, plan, self._clock.now()))
        return plan.num_steps

    def report(self, correct_drafts: Sequence[int], batch_size: int) -> None:
        """Take the number of correct drafts of each request; ignored if they fit no round that has begun."""
        now = self._clock.now()
        while self._begun:
            begun_size, plan, began = self._begun.popleft()
            if begun_size == batch_size == len(correct_drafts) and max(correct_drafts) <= plan.num_steps:
                rows, correct = np.arange(batch_size), np.asarray(correct_drafts, np.int64)
                seconds = now - max(began, self._reported_s)
                self.chooser.learn(Round(plan, rows, correct + 1, correct, 0 * rows, 0.0, seconds, 0.0))
                break
        self._reported_s = now


class PlanServer:
    """Plans from clients as a controller. The last valid table stays in use after its sender has disconnected.

    `check` raises a ValueError for plans that cannot be served. The endpoint must be free, or a ValueError is raised.
    """

    def __init__(self, endpoint: str, check: Callable[[Sequence[Plan]], None]) -> None:
        self._table: PlanTable | None = None
        self._rounds = 0
        self._check, self._closed = check, Event()
        self._socket = bind(zmq.REP, endpoint, 16)
        self._thread = Thread(target=self._serve, name="specrl-plans", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether there is a table."""
        return self._table is not None

    def steps(self, batch_size: int) -> int | None:
        """Return num_steps of the next round; None before the first table."""
        table = self._table
        return None if table is None else table.best(batch_size).num_steps

    def report(self, correct_drafts: Sequence[int], batch_size: int) -> None:
        """Count a round."""
        self._rounds += 1

    def close(self) -> None:
        """Stop listening."""
        self._closed.set()
        self._thread.join()

    def _serve(self) -> None:
        with self._socket:
            while not self._closed.is_set():
                if self._socket.poll(_POLL_MS):
                    answer = self._take(self._socket.recv_multipart())
                    self._socket.send_multipart(encode(Message(answer)))

    def _take(self, parts: Sequence[bytes]) -> dict[str, object]:
        try:
            table = PlanTable(decode(parts).header["plans"])
            self._check(table.plans)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {"error": f'plans must be sent as {{"plans": {{"1": "3/1/4"}}}}, but got an error: {error}'}
        self._table = table
        return {"ok": True, "rounds": self._rounds}


def check_steps(plans: Iterable[Plan], candidate_steps: Sequence[int]) -> None:
    """Raise a ValueError for plans without buffers in SGLang: trees, and a num_steps not in the adaptive config."""
    wrong = sorted({str(plan) for plan in plans if not plan.is_chain or plan.num_steps not in candidate_steps})
    if wrong:
        raise ValueError(
            f"plans must be chains of {', '.join(map(str, candidate_steps))} steps, the candidates of the adaptive "
            f"config, but got {', '.join(wrong)}; add them there"
        )


def make_lookahead(settings: Settings, candidate_steps: Sequence[int], tp_size: int, clock: Clock) -> Lookahead:
    """Return the controller for the policy directory of the settings.

    `candidate_steps` are the num_steps that the adaptive config names, `tp_size` the ranks of tensor parallelism.

    Raises:
        ValueError: the directory holds no policy, a plan has no buffers, or the policy would learn on several ranks.
    """
    assert settings.policy is not None
    policy = LearnedPolicy.load(settings.policy)
    check_steps(policy.table.values(), candidate_steps)
    if settings.pin or policy.state is None:
        return Lookahead(PlanTable(policy.table), clock)
    if tp_size > 1:
        raise ValueError(
            f"with tensor parallelism ({tp_size} ranks, each of which would learn by itself) a policy must be pinned, "
            "but it learns; set SPECRL_POLICY_PIN=1"
        )
    plans = [plan for plan in policy.plans if plan.is_chain and plan.num_steps in candidate_steps]
    return Lookahead(policy.chooser(plans), clock)


def make_policy(original: type[Any], settings: Settings, tp_size: Callable[[], int]) -> type[Any]:
    """Return a class that replaces SGLang's AdaptiveSpeculativeParams, and falls back to it if our policy fails.

    The settings have a policy, or a socket that takes plans. `tp_size` returns the ranks of tensor parallelism.
    """

    class LearnedParams(original):
        """SGLang's policy with our controller in front of it; `controller` is None if it could not be made."""

        def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
            super().__init__(initial_steps, cfg_path)
            self._safe = Failsafe("the policy", "SGLang's own lookahead is used")
            self.controller: Lookahead | PlanServer | None = self._safe.call(self._make_controller)

        def _make_controller(self) -> Lookahead | PlanServer:
            steps, ranks = list(self.candidate_steps), tp_size()
            if settings.plans is None:
                lookahead = make_lookahead(settings, steps, ranks, WallClock())
                chooser = type(lookahead.chooser).__name__
                log.warning("specrl plugin: %s chooses the lookahead among %s", chooser, steps)
                return lookahead
            if ranks > 1:
                raise ValueError(f"plans can be sent to one rank only, but tensor parallelism has {ranks}")
            server = PlanServer(settings.plans, lambda plans: check_steps(plans, steps))
            log.warning("specrl plugin: the lookahead follows the plans sent to %s", settings.plans)
            return server

        def get_steps_for_batch(self, batch_size: int) -> int:
            steps = None if self.controller is None else self._safe.call(self.controller.steps, batch_size)
            return int(super().get_steps_for_batch(batch_size)) if steps is None else steps

        def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
            if self.controller is not None:
                self._safe.call(self.controller.report, num_correct_drafts_per_req, batch_size)
                if self._safe.on and self.controller.ready:
                    return None  # the next round asks for its steps
            return super().on_verify_complete(num_correct_drafts_per_req, batch_size)

        def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
            if self.controller is None:
                return super().cuda_graph_bs_for_step(step)
            return None if self._cuda_graph_bs is None else list(self._cuda_graph_bs)  # any step at any batch size

    return LearnedParams
