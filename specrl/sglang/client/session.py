"""Rounds of a server in lock-step with whoever chooses their plans."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specrl.core.interfaces import Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import Completion, PlainSample, Round, Trace
from specrl.sglang.client.errors import ServerFailed
from specrl.sglang.client.launch import PLANS, ROUNDS, Server
from specrl.sglang.client.plain_server import PlainServer
from specrl.sglang.client.plugin_client import Plans, Rounds
from specrl.sglang.client.requests import Flight, Flights
from specrl.sglang.client.tracing import Tracing


class LockstepSession(Session):
    """B requests on a server, which runs one round whenever it is asked to, and stands still in between.

    A finished request is replaced after its round; the prefill comes before the next one, and its `prefill_s` says how
    long that took. `resize` to fewer parks the last ones: the server ends a request only at the end of a round, so
    that one round, of which nobody is told, lies between; parked requests go on from their tokens.

    Args:
        server: with the plugin, in lock-step.
        workload: where requests come from.
        batch_size: live requests.
        most: that it may be resized to.
        seed: of the requests' order.
        plans: that the server can run.
        fixed: the only one of them, which no plan socket sets; None: they are set.
        version: gives the draft that serves.
        plain: measures decoding without speculation; None: nobody does.
        trace: keep traces.
        timeout_s: for a round.
    """

    def __init__(
        self,
        server: Server,
        workload: Workload,
        *,
        batch_size: int,
        most: int,
        seed: int,
        plans: Sequence[Plan],
        fixed: Plan | None,
        version: Callable[[], int],
        plain: PlainServer | None,
        trace: bool,
        timeout_s: float,
    ) -> None:
        if not 1 <= batch_size <= most:
            raise ValueError(f"batch_size must be from 1 to max_batch_size, but got {batch_size} and {most}")
        self._server, self._source, self._most = server, workload.requests(seed), most
        self._able, self._fixed, self._version, self._plain = tuple(plans), fixed, version, plain
        self._timeout_s = timeout_s
        self._name = f"specrl-{secrets.token_hex(4)}"
        self._count = self._sent = 0
        self._parked: list[Flight] = []
        self._ended: list[Completion] = []  # since the last round that was told of
        self._closed = False
        self._flights = Flights(server.client)
        self._rounds = Rounds(_need(server, ROUNDS), self._check, timeout_s)
        self._plans = None if fixed is not None else Plans(_need(server, PLANS), self._check, timeout_s)
        self._tracing = Tracing(server, self._number) if trace else None
        self._rounds.hold()
        self._live = [self._new() for _ in range(batch_size)]
        self._send(self._live)

    @property
    def batch_size(self) -> int:
        """Live requests."""
        return len(self._live)

    @property
    def context_lengths(self) -> Sequence[int]:
        """Tokens known of each live request, its prefill's included."""
        return [flight.context for flight in self._live]

    def resize(self, batch_size: int) -> None:
        """Decode so many requests from the next round on.

        Raises:
            ValueError: more than the session was started for, or none.
            ServerError: the server does not.
        """
        self._open()
        if not 1 <= batch_size <= self._most:
            raise ValueError(f"batch_size must be from 1 to {self._most} (max_batch_size), but got {batch_size}")
        leaving, self._live = self._live[batch_size:], self._live[:batch_size]
        if leaving:
            self._park(leaving)
        joining = [self._parked.pop() if self._parked else self._new() for _ in range(batch_size - len(self._live))]
        self._live += joining
        self._send(joining)

    def round(self, plan: Plan) -> Round:
        """Run a round as planned.

        Raises:
            ValueError: a plan that the server cannot run, or the session is closed.
            ServerError: the server does not; its class says why.
        """
        self._open()
        if plan not in self._able:
            able = ", ".join(map(str, self._able))
            raise ValueError(f"a plan must be one that the server was launched for ({able}), but got {plan}")
        if self._plans is not None:
            self._plans.give(plan)
        said = self._step()
        if Plan.parse(said["plan"]) != plan:
            raise ServerFailed(f"the round must follow {plan}, but followed {said['plan']}; see the server's log")
        rows = [said["requests"].index(flight.rid) for flight in self._live]
        self._end(said, self._live)
        ended, self._ended = tuple(self._ended), []
        done = Round(
            plan=plan,
            request_ids=np.array([flight.number for flight in self._live]),
            tokens=np.array([len(said["tokens"][row]) for row in rows]),
            correct_drafts=np.array([said["correct"][row] for row in rows]),
            context_lengths=np.array([said["contexts"][row] for row in rows]),
            draft_s=said["draft_s"],
            verify_s=said["verify_s"],
            other_s=said["other_s"],
            prefill_s=said["prefill_s"],
            draft_version=self._version(),
            finished=ended,
        )
        self._replace(said["finished"])
        return done

    def measure_plain(self) -> PlainSample | None:
        """A step of the server without speculation, at the contexts that the requests have; ours stands still."""
        self._open()
        return None if self._plain is None else self._plain.measure([flight.text for flight in self._live])

    def plain_steps(self, count: int) -> list[PlainSample]:
        """`count` steps of it one after another, for whoever wants to know how they scatter.

        Raises:
            ValueError: there is no server without speculation.
        """
        self._open()
        if self._plain is None:
            raise ValueError("plain steps need a server without speculation; launch with baseline='alternate'")
        return self._plain.steps([flight.text for flight in self._live], count)

    def drain(self) -> list[Trace]:
        """Take the traces that have come; those of the last rounds may still be on their way."""
        return [] if self._tracing is None else self._tracing.drain()

    def close(self) -> None:
        """End what is in flight, and let the server go on by itself; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._rounds.close()
        if self._plans is not None:
            self._plans.close()
        if self._tracing is not None:
            self._tracing.close()
        try:
            self._flights.abort(self._name)
            for flight in self._live:
                self._flights.take(flight.rid, self._timeout_s)
        except OSError:  # it is gone, and they with it
            pass

    def _open(self) -> None:
        if self._closed:
            raise ValueError("the session is closed; start another one")

    def _check(self) -> None:
        self._server.check()
        self._flights.check()

    def _new(self) -> Flight:
        self._count += 1
        return Flight(self._count - 1, next(self._source), "")

    def _send(self, flights: Sequence[Flight]) -> None:
        for flight in flights:
            flight.rid = f"{self._name}-{self._sent:08d}-{flight.number}"
            self._sent += 1
            self._flights.send(flight)

    def _number(self, rid: str) -> int:
        """The number of a request by its name; -1 of one that is not ours."""
        return int(rid.rpartition("-")[2]) if rid.startswith(self._name) else -1

    def _step(self) -> dict[str, Any]:
        """One round of exactly the live requests; those that end in their prefill are replaced before it."""
        self._rounds.go(1, [flight.rid for flight in self._live])
        while True:
            said = self._rounds.next()
            known = {flight.rid: flight for flight in self._live}
            for rid, tokens in zip(said["requests"], said["tokens"], strict=True):
                if rid in known:
                    known[rid].said += tokens
            if said["kind"] == "round":
                missing = known.keys() - set(said["requests"])
                if missing:
                    raise ServerFailed(
                        f"a round must be of {len(known)} requests, but {len(missing)} were left out; raise "
                        "--max-running-requests or --max-total-tokens"
                    )
                return said
            if known.keys() & set(said["finished"]):
                self._end(said, self._live)
                self._replace(said["finished"])
                self._rounds.go(1, [flight.rid for flight in self._live])

    def _end(self, said: dict[str, Any], flights: Sequence[Flight]) -> None:
        """Take the answers of those that have ended; of one that was parked, keep what it has put out."""
        for flight in flights:
            if flight.rid in said["finished"]:
                answer = self._flights.take(flight.rid, self._timeout_s)
                flight.said = [*flight.said[: flight.earlier], *answer["output_ids"]]
                flight.earlier = len(flight.said)
                if answer["meta_info"]["finish_reason"]["type"] == "abort":
                    self._parked.insert(0, flight)
                else:
                    self._ended.append(Completion(flight.number, flight.request.prompt, tuple(flight.said)))

    def _replace(self, ended: Sequence[str]) -> None:
        fresh = [self._new() if flight.rid in ended else flight for flight in self._live]
        joined = [new for new, old in zip(fresh, self._live, strict=True) if new is not old]
        self._live = fresh
        self._send(joined)

    def _park(self, leaving: Sequence[Flight]) -> None:
        """Have the server end them, which takes it one more round of all."""
        for flight in leaving:
            self._flights.abort(flight.rid)
        if self._plans is not None and Plan(0) in self._able:
            self._plans.give(Plan(0))
        said = self._step()
        self._end(said, [*leaving, *self._live])
        self._replace(said["finished"])


def _need(server: Server, name: str) -> Path:
    path = server.socket(name)
    if path is None:
        raise ServerFailed(
            f"the server's plugin must listen on its socket {name!r}, but does not; is specrl installed beside SGLang? "
            f"its log says {server.said('SPECRL PLUGIN') or 'nothing of it'}"
        )
    return path
