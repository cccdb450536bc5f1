"""Reports of rounds, permits for them, and plans, between the plugin and its client; the scheduler is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from ahead import Ahead

from specrl.core.plan import Plan, parse_plans
from specrl.sglang.client.factory import command_line, serving_of
from specrl.sglang.client.http import ServerFailed, ServerGone, ServerSilent
from specrl.sglang.client.plugin_client import Plans, Rounds
from specrl.sglang.plugin.lookahead import PlanServer
from specrl.sglang.plugin.rounds import RoundHooks
from specrl.sglang.plugin.settings import Settings


class Mode(str):
    def is_decode(self) -> bool:
        return self == "decode"

    def is_extend(self) -> bool:
        return self == "extend"


class Paper:
    """A scheduler that prefills new requests, then decodes two tokens of each request a round."""

    def __init__(self, hooks: RoundHooks, overlap: bool = False) -> None:
        self.hooks, self.enable_overlap, self.device = hooks, overlap, "cpu"
        self._engine_paused = self.gracefully_exit = False
        self.arriving: list[Any] = []
        self.waiting_queue: list[Any] = []
        self.running_batch = SimpleNamespace(reqs=[])
        self.last_batch = self.chunked_req = None
        self.ran = 0

    def add(self, rid: str, new: int) -> None:
        request = SimpleNamespace(rid=rid, output_ids=[], origin_input_ids=[1, 2, 3], finished_len=None, new=new)
        request.finished = lambda: len(request.output_ids) >= new
        self.arriving.append(request)

    def ingest(self, *_: object) -> list[Any]:
        came, self.arriving = self.arriving, []
        self.waiting_queue += came
        return came

    def turn(self) -> None:
        self.hooks.around_ingest(self.ingest, self)
        self.running_batch.reqs = [r for r in self.running_batch.reqs if not r.finished()]
        if self.waiting_queue:
            came, self.waiting_queue = self.waiting_queue, []
            self.running_batch.reqs += came
            self._run(SimpleNamespace(reqs=came, forward_mode=Mode("extend")), 1)
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
    settings = Settings(rounds=f"ipc://{folder}/r", lockstep_s=lockstep_s)
    return RoundHooks(settings, lambda: 0, lambda: tp_size, **options)


@contextmanager
def turning(paper: Paper) -> Iterator[Paper]:
    """Turns a scheduler in a thread."""
    over = Event()

    def loop() -> None:
        while not over.wait(0.0005):
            paper.turn()

    paper.turn()  # the socket exists from the first turn on
    thread = Thread(target=loop, daemon=True)
    thread.start()
    yield paper
    over.set()
    thread.join(60.0)
    assert not thread.is_alive()
    paper.hooks.close()


@contextmanager
def client(folder: Path) -> Iterator[Rounds]:
    rounds = Rounds(f"ipc://{folder}/r", lambda: None, 60.0)
    yield rounds
    rounds.close()


def wait_for(paper: Paper, rounds: int) -> None:
    more = paper.ran + rounds
    while paper.ran < more:
        Event().wait(0.01)


def test_a_round_runs_with_a_permit_once_its_requests_are_there(short: Path) -> None:
    clock = Ahead()
    with turning(Paper(make_hooks(short, 240.0, clock=clock))) as paper, client(short) as rounds:
        assert rounds.lockstep_s == 240.0
        rounds.hold()
        paper.add("a", 6)
        rounds.permit(1, ["a", "b"])
        Event().wait(0.05)
        assert paper.ran == 0 and rounds.poll() is None, "b is not there yet"
        clock.advance(100.0)
        paper.add("b", 3)
        prefill, done = rounds.next(), rounds.next()
        assert (prefill.kind, done.kind) == ("prefill", "round")
        assert prefill.requests == ["a", "b"] and prefill.tokens == [[7], [7]]
        assert (done.plan, done.correct, done.contexts) == ("1/1/2", [1, 1], [4, 4])
        assert done.tokens == [[7, 7], [7, 7]] and done.finished == ["b"]
        assert done.prefill_s == prefill.prefill_s > 0.0
        assert 0.0 < done.seconds < 50.0, "waiting is not counted"
        Event().wait(0.05)
        assert paper.ran == 1, "no other round without a permit"
        rounds.permit(2, ["a"])
        assert rounds.next().tokens == [[7, 7]]
        last = rounds.next()
        assert last.tokens == [[7]] and last.finished == ["a"], "tokens after its end are not reported"


@pytest.mark.parametrize("killed", [False, True])
def test_the_scheduler_does_not_wait_for_a_client_that_has_gone(short: Path, killed: bool) -> None:
    with turning(Paper(make_hooks(short, 240.0))) as paper:
        code = (
            "import sys; from specrl.sglang.client.plugin_client import Rounds\n"
            "rounds = Rounds(sys.argv[1], lambda: None, 60.0); rounds.hold(); print('held', flush=True)\n"
            "sys.stdin.read(); rounds.close()"
        )
        holds = subprocess.Popen(
            [sys.executable, "-c", code, f"ipc://{short}/r"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holds.stdout is not None and holds.stdout.readline() == b"held\n"
        paper.add("a", 10_000)
        Event().wait(0.05)
        assert paper.ran == 0
        if killed:
            holds.kill()
        holds.communicate()
        wait_for(paper, 3)


def test_the_scheduler_waits_no_longer_than_lockstep_s(short: Path) -> None:
    with turning(Paper(make_hooks(short, 0.2))) as paper, client(short) as late:
        paper.add("a", 10_000)
        with pytest.raises(ServerFailed, match="SPECRL_LOCKSTEP"):
            late.hold()
            while True:
                late.next()
        wait_for(paper, 3)
        assert paper.hooks.safe.on


def test_without_lockstep_rounds_are_reported_and_nothing_waits(short: Path) -> None:
    with turning(Paper(make_hooks(short, 0.0))) as paper, client(short) as rounds:
        assert rounds.lockstep_s == 0.0
        paper.add("a", 9)
        assert [rounds.next().kind for _ in range(5)] == ["prefill", *["round"] * 4]
        with pytest.raises(ServerFailed, match="SPECRL_LOCKSTEP"):
            rounds.hold()


def test_the_last_client_is_served(short: Path) -> None:
    with turning(Paper(make_hooks(short, 0.0))) as paper, client(short) as first, client(short) as second:
        with pytest.raises(ServerFailed, match="another client"):
            first.next()
        paper.add("a", 3)
        assert second.next().kind == "prefill"


def test_overlapping_rounds_and_several_ranks_are_refused(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    paper = Paper(make_hooks(short, 5.0, tp_size=2))
    paper.turn()
    assert not paper.hooks.safe.on and "one rank" in caplog.text
    with turning(Paper(make_hooks(short, 60.0), overlap=True)), client(short) as rounds:
        with pytest.raises(ServerFailed, match="--disable-overlap-schedule"):
            rounds.hold()


def test_a_failure_in_the_plugin_leaves_the_scheduler_going(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    paper = Paper(make_hooks(short, 60.0))
    del paper.chunked_req
    with turning(paper), client(short) as rounds:
        rounds.hold()
        paper.add("a", 10_000)
        rounds.permit(1, ["a"])
        wait_for(paper, 3)
    assert not paper.hooks.safe.on and "SPECRL PLUGIN: reporting of rounds is switched off" in caplog.text


def test_waiting_for_a_round_ends(short: Path) -> None:
    dead: list[bool] = []

    def check() -> None:
        if dead:
            raise ServerGone("the server must run, but ended")

    with turning(Paper(make_hooks(short, 60.0))):
        rounds = Rounds(f"ipc://{short}/r", check, 60.0)
        with pytest.raises(ServerSilent, match="timeout_s"):
            rounds.next(timeout_s=0.2)
        dead.append(True)
        with pytest.raises(ServerGone, match="but ended"):
            rounds.next()
        dead.clear()
    with pytest.raises(ServerGone, match="is it running"):
        rounds.next()
    rounds.close()
    with pytest.raises(ServerGone, match="is its server running"):
        Rounds(f"ipc://{short}/nobody", check, 1.0)


def test_reports_that_do_not_fit_are_dropped_and_counted(short: Path) -> None:
    slow: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    with turning(Paper(make_hooks(short, 0.0, max_waiting=4))) as paper, slow:
        slow.linger, slow.rcvhwm, slow.rcvtimeo = 0, 1, 60_000
        slow.connect(f"ipc://{short}/r")
        slow.send_json({"kind": "hello"})
        slow.recv()
        paper.add("a" * 10_000, 100_000)  # a long id: few reports fill the socket
        wait_for(paper, 200)
        while not json.loads(slow.recv() or b"{}").get("dropped"):
            pass


def test_plans_are_sent_once_and_refusals_are_passed_on(short: Path) -> None:
    def only(table: Any) -> None:
        if Plan(5) in table.values():
            raise ValueError("there is no buffer for 5")

    server = PlanServer(f"ipc://{short}/p", only)
    plans = Plans(f"ipc://{short}/p", lambda: None, 60.0)
    assert not server.ready and server.steps(1) is None
    plans.set(Plan(3))
    plans.set(Plan(3))
    assert server.ready and server.steps(4) == 3
    with pytest.raises(ValueError, match="no buffer for 5"):
        plans.set(Plan(5))
    plans.set(Plan(0))
    assert server.steps(1) == 0
    server.close()
    plans.close()


def test_the_flags_that_sglang_is_launched_with(tmp_path: Path) -> None:
    words = command_line(serving_of(parse_plans("0,3,1")), "/t", "/d", tmp_path)
    assert words[words.index("--speculative-num-steps") + 1] == "3" and "--speculative-adaptive" in words
    assert words[words.index("--speculative-draft-model-path") + 1] == "/d"
    config = Path(words[words.index("--speculative-adaptive-config") + 1]).read_text()
    assert config.strip() == '{"1": {"candidate_steps": [0, 1, 3]}}'
    tree = command_line(serving_of(parse_plans("3/2/6")), "/t", "/d", tmp_path)
    assert tree[tree.index("--speculative-num-draft-tokens") + 1] == "6" and "--speculative-adaptive" not in tree
    for plans in ("0", "1,3/2/6"):
        with pytest.raises(ValueError, match="plans must"):
            serving_of(parse_plans(plans))
