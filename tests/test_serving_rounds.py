"""Reports of rounds and permits for them, between the plugin and its client; the scheduler is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from ahead import Ahead
from http_help import Serve, answer_json, read_json
from tiny import Listed

from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.sglang.client.factory import attach_engine
from specrl.sglang.client.http import ServerFailed, ServerGone, ServerSilent
from specrl.sglang.client.plugin_client import Rounds
from specrl.sglang.plugin.rounds import RoundHooks
from specrl.sglang.plugin.settings import Settings


class Mode(str):
    def is_decode(self) -> bool:
        return self == "decode"

    def is_extend(self) -> bool:
        return self == "extend"


class Scheduler:
    """A scheduler that prefills new requests, then decodes two tokens of each request a round."""

    def __init__(self, hooks: RoundHooks, overlap: bool = False) -> None:
        self.hooks, self.enable_overlap, self.device = hooks, overlap, "cpu"
        self._engine_paused = self.gracefully_exit = False
        self.arriving: list[Any] = []
        self.waiting_queue: list[Any] = []
        self.running_batch = SimpleNamespace(reqs=[])
        self.last_batch = self.chunked_req = None
        self.ran = 0

    def add(self, rid: str, new: int, prompt: Sequence[int] = (1, 2, 3)) -> Any:
        request = SimpleNamespace(rid=rid, output_ids=[], origin_input_ids=prompt, finished_len=None, new=new)
        request.finished = lambda: len(request.output_ids) >= request.new
        self.arriving.append(request)
        return request

    def ingest(self, *_: object) -> list[Any]:
        arrived, self.arriving = self.arriving, []
        self.waiting_queue += arrived
        return arrived

    def turn(self) -> None:
        self.hooks.around_ingest(self.ingest, self)
        self.running_batch.reqs = [r for r in self.running_batch.reqs if not r.finished()]
        if self.waiting_queue:
            arrived, self.waiting_queue = self.waiting_queue, []
            self.running_batch.reqs += arrived
            self._run(SimpleNamespace(reqs=arrived, forward_mode=Mode("extend")), 1)
        elif self.running_batch.reqs:
            self._run(SimpleNamespace(reqs=list(self.running_batch.reqs), forward_mode=Mode("decode")), 2)
            self.ran += 1

    def _run(self, batch: Any, count: int) -> None:
        batch.spec_info = SimpleNamespace(spec_steps=1, topk=1, draft_token_num=2)
        decodes = batch.forward_mode.is_decode()
        self.hooks.around_run(
            lambda *_: self.hooks.around_verify(lambda *_: None, self, batch) if decodes else None, self, batch
        )

        def process(*_: object) -> None:
            for request in batch.reqs:
                request.output_ids = [*request.output_ids, *[7] * count]
                if request.finished():
                    request.finished_len = request.new

        result = SimpleNamespace(num_correct_drafts_per_req_cpu=[1] * len(batch.reqs))
        self.hooks.around_process(process, self, batch, result)


def make_hooks(folder: Path, lockstep_s: float, tp_size: int = 1, **options: Any) -> RoundHooks:
    settings = Settings(rounds=f"ipc://{folder}/rounds", lockstep_s=lockstep_s)
    return RoundHooks(settings, lambda: 0, lambda: tp_size, **options)


@contextmanager
def running(scheduler: Scheduler) -> Iterator[Scheduler]:
    """Runs a scheduler in a thread."""
    over = Event()

    def loop() -> None:
        while not over.wait(0.0005):
            scheduler.turn()

    scheduler.turn()  # the socket exists from the first turn on
    thread = Thread(target=loop, daemon=True)
    thread.start()
    yield scheduler
    over.set()
    thread.join(60.0)
    assert not thread.is_alive()
    scheduler.hooks.close()


def client(folder: Path) -> Rounds:
    return Rounds(f"ipc://{folder}/rounds", lambda: None, 60.0)


def wait_for(scheduler: Scheduler, rounds: int) -> None:
    more = scheduler.ran + rounds
    while scheduler.ran < more:
        Event().wait(0.01)


def test_a_round_runs_with_a_permit_once_its_requests_are_there(short: Path) -> None:
    clock = Ahead()
    with running(Scheduler(make_hooks(short, 240.0, clock=clock))) as scheduler, client(short) as rounds:
        assert rounds.lockstep_s == 240.0
        rounds.hold()
        scheduler.add("a", 6)
        rounds.permit(1, ["a", "b"])
        Event().wait(0.05)
        assert scheduler.ran == 0 and rounds.poll() is None, "b is not there yet"
        clock.advance(100.0)
        scheduler.add("b", 3)
        prefill, done = rounds.next(), rounds.next()
        assert (prefill.kind, done.kind) == ("prefill", "round")
        assert prefill.requests == ["a", "b"] and prefill.tokens == [[7], [7]]
        assert (done.plan, done.correct, done.contexts) == ("1/1/2", [1, 1], [4, 4])
        assert done.tokens == [[7, 7], [7, 7]] and done.finished == ["b"]
        assert done.prefill_s == prefill.prefill_s > 0.0
        assert 0.0 < done.seconds < 50.0, "waiting is not counted"
        Event().wait(0.05)
        assert scheduler.ran == 1, "no other round without a permit"
        rounds.permit(2, ["a"])
        assert rounds.next().tokens == [[7, 7]]
        last = rounds.next()
        assert last.tokens == [[7]] and last.finished == ["a"], "tokens after its end are not reported"


def test_a_session_runs_resizes_and_parks(short: Path, serve: Serve) -> None:
    """`tests/sglang` runs sessions on real servers."""
    with running(Scheduler(make_hooks(short, 60.0))) as scheduler:
        requests: list[Any] = []

        def answer(handler: BaseHTTPRequestHandler) -> None:
            body = read_json(handler)
            if handler.path == "/server_info":
                plan = {"num_steps": 1, "eagle_topk": 1, "num_draft_tokens": 2, "algorithm": "EAGLE3"}
                flags = {f"speculative_{name}": value for name, value in plan.items()}
                return answer_json(handler, {"version": "0.5.23", **flags})
            if handler.path == "/abort_request":
                for request in requests:
                    if request.rid.startswith(body["rid"]) and not request.finished():
                        request.aborted, request.new = True, len(request.output_ids) + 1
                return answer_json(handler, None)
            request = scheduler.add(body["rid"], body["sampling_params"]["max_new_tokens"], body["input_ids"])
            requests.append(request)
            while request.finished_len is None:
                Event().wait(0.002)
            reason = {"type": "abort" if hasattr(request, "aborted") else "length"}
            tokens = request.output_ids[: request.finished_len]
            answer_json(handler, {"output_ids": tokens, "meta_info": {"finish_reason": reason}})

        engine = attach_engine(serve(answer), sockets=short, timeout_s=60.0)
        listed = [Request((1, 2, 3), 12), Request((1, 2, 3), 41)]
        session = engine.start(Listed(listed), batch_size=2, max_batch_size=3, seed=0)
        finished = dict[int, int]()
        for index in range(50):
            before = list(session.context_lengths)
            done = session.round(Plan(1))
            assert done.context_lengths.tolist() == before and len(before) == session.batch_size
            finished |= {completion.request_id: len(completion.tokens) for completion in done.finished}
            if size := {4: 3, 6: 1, 8: 2, 20: 3}.get(index):
                session.resize(size)
        assert all(finished[number] == listed[number % 2].max_new_tokens for number in range(6)), "parked ones too"
        assert session.measure_plain() is None and session.drain() == []
        for wrong in (0, 4):
            with pytest.raises(ValueError, match="batch_size"):
                session.resize(wrong)
        engine.close()


@pytest.mark.parametrize("killed", [False, True])
def test_the_scheduler_does_not_wait_for_a_client_that_has_gone(short: Path, killed: bool) -> None:
    with running(Scheduler(make_hooks(short, 240.0))) as scheduler:
        code = (
            "import sys; from specrl.sglang.client.plugin_client import Rounds\n"
            "rounds = Rounds(sys.argv[1], lambda: None, 60.0); rounds.hold(); print('held', flush=True)\n"
            "sys.stdin.read(); rounds.close()"
        )
        holds = subprocess.Popen(
            [sys.executable, "-c", code, f"ipc://{short}/rounds"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holds.stdout is not None and holds.stdout.readline() == b"held\n"
        scheduler.add("a", 10_000)
        Event().wait(0.05)
        assert scheduler.ran == 0
        if killed:
            holds.kill()
        holds.communicate()
        wait_for(scheduler, 3)


def test_the_scheduler_waits_no_longer_than_lockstep_s(short: Path) -> None:
    with running(Scheduler(make_hooks(short, 0.2))) as scheduler, client(short) as late:
        scheduler.add("a", 10_000)
        with pytest.raises(ServerFailed, match="SPECRL_LOCKSTEP"):
            late.hold()
            while True:
                late.next()
        wait_for(scheduler, 3)
        assert scheduler.hooks.safe.on


def test_without_lockstep_nothing_waits_and_the_last_client_is_served(short: Path) -> None:
    with running(Scheduler(make_hooks(short, 0.0))) as scheduler, client(short) as first, client(short) as second:
        with pytest.raises(ServerFailed, match="another client"):
            first.next()
        assert second.lockstep_s == 0.0
        scheduler.add("a", 9)
        assert [second.next().kind for _ in range(5)] == ["prefill", *["round"] * 4]
        with pytest.raises(ServerFailed, match="SPECRL_LOCKSTEP"):
            second.hold()


def test_overlapping_rounds_and_several_ranks_are_refused(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(make_hooks(short, 5.0, tp_size=2))
    scheduler.turn()
    assert not scheduler.hooks.safe.on and "one rank" in caplog.text
    with running(Scheduler(make_hooks(short, 60.0), overlap=True)), client(short) as rounds:
        with pytest.raises(ServerFailed, match="--disable-overlap-schedule"):
            rounds.hold()


def test_a_failure_in_the_plugin_leaves_the_scheduler_going(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    scheduler = Scheduler(make_hooks(short, 60.0))
    del scheduler.chunked_req
    with running(scheduler), client(short) as rounds:
        rounds.hold()
        scheduler.add("a", 10_000)
        rounds.permit(1, ["a"])
        wait_for(scheduler, 3)
    assert not scheduler.hooks.safe.on and "SPECRL PLUGIN: reporting of rounds is switched off" in caplog.text


def test_waiting_for_a_round_ends(short: Path) -> None:
    def check() -> None:
        if not healthy:
            raise ServerGone("the server must run, but ended")

    healthy = True
    with running(Scheduler(make_hooks(short, 60.0))):
        rounds = Rounds(f"ipc://{short}/rounds", check, 60.0)
        with pytest.raises(ServerSilent, match="timeout_s"):
            rounds.next(timeout_s=0.2)
        healthy = False
        with pytest.raises(ServerGone, match="but ended"):
            rounds.next()
        healthy = True
    with pytest.raises(ServerGone, match="is it running"):
        rounds.next()
    rounds.close()
    with pytest.raises(ServerGone, match="is its server running"):
        Rounds(f"ipc://{short}/nobody", check, 1.0)


def test_reports_that_do_not_fit_are_dropped_and_counted(short: Path) -> None:
    slow: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with running(Scheduler(make_hooks(short, 0.0, max_waiting=4))) as scheduler, slow:
        slow.linger, slow.rcvhwm, slow.rcvtimeo = 0, 1, 60_000
        slow.connect(f"ipc://{short}/rounds")
        slow.send_json({"kind": "hello"})
        slow.recv()
        scheduler.add("a" * 10_000, 100_000)  # a long id: few reports fill the socket
        wait_for(scheduler, 200)
        while not json.loads(slow.recv() or b"{}").get("dropped"):
            pass
