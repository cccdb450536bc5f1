"""Sessions on a server: the base class, and rounds in lock-step."""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from specrl.core.checks import refuse, require
from specrl.core.interfaces import Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Completion, PlainSample, Round, Trace
from specrl.sglang.client.http import ServerFailed
from specrl.sglang.client.launch import PLANS, ROUNDS, TRACES, Server
from specrl.sglang.client.plain_server import PlainServer
from specrl.sglang.client.plugin_client import Connection, Plans, Rounds
from specrl.sglang.client.requests import LiveRequest, LiveRequests
from specrl.sglang.client.trace_subscriber import MAX_WAITING, Subscriber
from specrl.sglang.plugin.rounds import RoundReport


class ServerSession(Session):
    """B requests on a server. If the server fails, methods raise a ServerError, whose class says why.

    Args:
        server: the server.
        workload, batch_size, max_batch_size, seed, trace: as for `Engine.start`.
        plans: plans that the server can run; one plan: it is the server's own.
        plain: measures decoding without speculation; None: it is not measured.

    Raises:
        ValueError: a batch size out of range, or traces that the server cannot send.
    """

    def __init__(
        self,
        server: Server,
        workload: Workload,
        *,
        batch_size: int,
        max_batch_size: int,
        seed: int,
        plans: Sequence[Plan],
        plain: PlainServer | None,
        trace: bool,
    ) -> None:
        self._server, self._source, self._max_batch_size = server, workload.requests(seed), max_batch_size
        self._offered, self._plain = tuple(plans), plain
        self._name = f"specrl-{secrets.token_hex(4)}"
        self._requests = LiveRequests(server.client)
        self._live: list[LiveRequest] = []
        self._connections: list[Connection] = []  # to the plugin
        self._created = self._sent = 0
        self._closed = False
        self._set_batch_size(batch_size)
        self._connect(trace)
        self._fill()

    @property
    def batch_size(self) -> int:
        """Live requests."""
        return self._batch_size

    def resize(self, batch_size: int) -> None:
        """Change the number of live requests, from 1 to `max_batch_size`, from the next round on."""
        self._check_open()
        self._set_batch_size(batch_size)
        self._fill()

    def round(self, plan: Plan) -> Round:
        """Run one round by this plan; a ValueError if the server cannot run it, or the session is closed."""
        self._check_open()
        if plan not in self._offered:
            offered = ", ".join(map(str, self._offered))
            refuse("plan", f"one that the server was launched for ({offered})", str(plan))
        return self._round(plan)

    def measure_plain(self) -> PlainSample | None:
        """Time a step of the server without speculation on the live requests' texts, while this server waits."""
        self._check_open()
        if self._plain is None:
            return None
        with self._waiting():
            return self._plain.measure(self._texts())

    def drain(self) -> list[Trace]:
        """Take the traces that have arrived; those of the last rounds may still be on their way."""
        return []

    def close(self) -> None:
        """End the live requests; idempotent."""
        if self._closed:
            return
        self._closed = True
        for connection in self._connections:
            connection.close()
        try:
            self._requests.abort(self._name)
            for live in self._live:  # the next session starts on an idle server
                self._requests.take(live.rid, self._server.timeout_s)
        except OSError:  # the server has gone, and its requests too
            pass

    def _connect(self, trace: bool) -> None:
        """Connect to the plugin, before any request is sent."""
        if trace:
            raise ValueError("trace=True needs the plugin in the server, but there is none that we can reach")

    def _waiting(self) -> AbstractContextManager[None]:
        """Let the server wait with its requests."""
        return nullcontext()

    @abstractmethod
    def _texts(self) -> list[list[int]]:
        """Return token ids as long as each live request is now."""

    @abstractmethod
    def _fill(self) -> None:
        """Have as many live requests as `batch_size` asks for."""

    @abstractmethod
    def _round(self, plan: Plan) -> Round:
        """Run a round by a plan that was checked."""

    def _set_batch_size(self, batch_size: int) -> None:
        largest = self._max_batch_size
        require(1 <= batch_size <= largest, "batch_size", f"from 1 to {largest} (max_batch_size)", batch_size)
        self._batch_size = batch_size

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed; start another one")

    def _new(self) -> LiveRequest:
        self._created += 1
        return LiveRequest(self._created - 1, next(self._source))

    def _send(self, joining: Sequence[LiveRequest]) -> None:
        for live in joining:
            live.rid = f"{self._name}-{self._sent:08d}-{live.number}"
            self._sent += 1
            self._requests.send(live.rid, live.body())


class LockstepSession(ServerSession):
    """B requests on a server that runs one round at a time and waits in between.

    A finished request is replaced after its round. The prefill of its successor comes before the next round, which
    reports its seconds as `prefill_s`. `resize` to fewer requests parks the last ones: the server can end a request
    only at the end of a round, so one further round runs, which is not reported. Parked requests go on from their
    tokens.
    """

    @property
    def context_lengths(self) -> Sequence[int]:
        """Known tokens of each live request, with the one that its prefill adds."""
        return [live.context for live in self._live]

    def plain_steps(self, count: int) -> list[PlainSample]:
        """Time `count` consecutive steps of the server without speculation; a ValueError if there is none."""
        self._check_open()
        if self._plain is None:
            return super().plain_steps(count)
        return self._plain.steps(self._texts(), count)

    def drain(self) -> list[Trace]:
        """Take the traces that have arrived."""
        arrived = [] if self._traces is None else self._traces.received()
        return [trace for trace in arrived if trace.request_ids[0] >= 0]

    def _texts(self) -> list[list[int]]:
        return [live.text for live in self._live]

    def _connect(self, trace: bool) -> None:
        server, timeout_s = self._server, self._server.timeout_s
        self._parked: list[LiveRequest] = []
        self._completed: list[Completion] = []  # since the last reported round
        self._rounds = Rounds(server.socket(ROUNDS), self._check, timeout_s)
        self._plans = Plans(server.socket(PLANS), self._check, timeout_s) if len(self._offered) > 1 else None
        self._traces = Subscriber(server.socket(TRACES), timeout_s, self._number, MAX_WAITING) if trace else None
        self._connections = [part for part in (self._rounds, self._plans, self._traces) if part is not None]
        self._rounds.hold()

    def _fill(self) -> None:
        leaving, self._live = self._live[self._batch_size :], self._live[: self._batch_size]
        if leaving:
            self._park(leaving)
        missing = self._batch_size - len(self._live)
        joining = [self._parked.pop() if self._parked else self._new() for _ in range(missing)]
        self._live += joining
        self._send(joining)

    def _round(self, plan: Plan) -> Round:
        if self._plans is not None:
            self._plans.set(plan)
        report = self._step()
        if Plan.parse(report.plan) != plan:
            raise ServerFailed(f"the round must follow {plan}, but followed {report.plan}; see the server's log")
        rows = [report.requests.index(live.rid) for live in self._live]
        self._take_ended(report, self._live)
        completed, self._completed = tuple(self._completed), []
        done = Round(
            plan=plan,
            request_ids=np.array([live.number for live in self._live]),
            tokens=np.array([len(report.tokens[row]) for row in rows]),
            correct_drafts=np.array([report.correct[row] for row in rows]),
            context_lengths=np.array([report.contexts[row] for row in rows]),
            draft_s=report.draft_s,
            verify_s=report.verify_s,
            other_s=report.other_s,
            prefill_s=report.prefill_s,
            draft_version=self._server.draft_version,
            finished=completed,
        )
        self._replace(report.finished)
        return done

    def _check(self) -> None:
        self._server.check()
        self._requests.check()

    def _number(self, rid: str) -> int:
        """Return the number of a request; -1 if it is not of this session."""
        return int(rid.rpartition("-")[2]) if rid.startswith(self._name) else -1

    def _step(self) -> RoundReport:
        """Run one round of exactly the live requests; those that end in their prefill are replaced before it."""
        self._rounds.permit(1, [live.rid for live in self._live])
        while True:
            report = self._rounds.next()
            known = {live.rid: live for live in self._live}
            for rid, tokens in zip(report.requests, report.tokens, strict=True):
                if rid in known:
                    known[rid].output += tokens
            if report.kind == "round":
                missing = known.keys() - set(report.requests)
                if missing:
                    raise ServerFailed(
                        f"a round must run {len(known)} requests, but {len(missing)} did not run; raise "
                        "--max-running-requests or --max-total-tokens"
                    )
                return report
            if known.keys() & set(report.finished):
                self._take_ended(report, self._live)
                self._replace(report.finished)
                self._rounds.permit(1, [live.rid for live in self._live])

    def _take_ended(self, report: RoundReport, requests: Sequence[LiveRequest]) -> None:
        """Take the answers of those that have ended; one that was aborted is parked with its tokens."""
        for live in requests:
            if live.rid in report.finished:
                answer = self._requests.take(live.rid, self._server.timeout_s)
                live.output = [*live.output[: live.resumed], *answer["output_ids"]]
                live.resumed = len(live.output)
                if answer["meta_info"]["finish_reason"]["type"] == "abort":
                    self._parked.insert(0, live)
                else:
                    self._completed.append(Completion(live.number, live.request.prompt, tuple(live.output)))

    def _replace(self, ended: Sequence[str]) -> None:
        rows = [index for index, live in enumerate(self._live) if live.rid in ended]
        for row in rows:
            self._live[row] = self._new()
        self._send([self._live[row] for row in rows])

    def _park(self, leaving: Sequence[LiveRequest]) -> None:
        """Let the server end these requests, which takes one more round of all."""
        for live in leaving:
            self._requests.abort(live.rid)
        if self._plans is not None and Plan(0) in self._offered:
            self._plans.set(Plan(0))
        report = self._step()
        self._take_ended(report, [*leaving, *self._live])
        self._replace(report.finished)
