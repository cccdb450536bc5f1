"""The plugin tells of every round, and holds it for a client that sets the pace; here on a scheduler made of paper."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import pytest
from ahead import Ahead

from specrl.core.plan import Plan, parse_plans
from specrl.sglang.client.errors import ServerFailed, ServerGone, ServerSilent
from specrl.sglang.client.flags import command_line, serving_of
from specrl.sglang.client.plugin_client import Plans, Rounds
from specrl.sglang.plugin.failsafe import Failsafe
from specrl.sglang.plugin.peer import OnePeer
from specrl.sglang.plugin.plan_socket import PlanSocket
from specrl.sglang.plugin.rounds import RoundHooks
from specrl.sglang.plugin.settings import Settings


@pytest.fixture
def short() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        yield Path(name)


class Mode(str):
    def is_decode(self) -> bool:
        return self == "decode"

    def is_extend(self) -> bool:
        return self == "extend"


class Paper:
    """A scheduler that prefills what came in, then decodes two tokens of each request a round, at most `rounds`."""

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


def hooks(path: Path, lockstep: float, ranks: int = 1) -> RoundHooks:
    return RoundHooks(Settings(rounds=path, lockstep=lockstep), lambda: 0, lambda: ranks)


class Turning:
    """Turns a scheduler in a thread until it is left."""

    def __init__(self, paper: Paper) -> None:
        self.paper, self.on = paper, True
        self.thread = Thread(target=self._loop, daemon=True)

    def _loop(self) -> None:
        while self.on:
            self.paper.turn()
            Event().wait(0.0005)

    def __enter__(self) -> Paper:
        self.paper.turn()  # the socket is there from the first turn on
        self.thread.start()
        return self.paper

    def __exit__(self, *_: object) -> None:
        self.on = False
        self.thread.join(60.0)
        assert not self.thread.is_alive()


def test_a_round_runs_when_it_is_let_go_and_its_requests_are_there(short: Path) -> None:
    clock, made = Ahead(), hooks(short / "r", 240.0)
    made._clock = clock  # type: ignore[assignment]
    with Turning(Paper(made)) as paper:
        rounds = Rounds(short / "r", lambda: None, 60.0)
        assert rounds.lockstep_s == 240.0
        rounds.hold()
        paper.add("a", 6)
        rounds.go(1, ["a", "b"])
        Event().wait(0.05)
        assert paper.ran == 0 and not rounds.past(), "b is not there yet"
        clock.advance(100.0)
        paper.add("b", 3)
        said = [rounds.next(), rounds.next()]
        assert [each["kind"] for each in said] == ["prefill", "round"]
        assert said[0]["requests"] == ["a", "b"] and said[0]["tokens"] == [[7], [7]]
        done = said[1]
        assert (done["plan"], done["correct"], done["contexts"]) == ("1/1/2", [1, 1], [4, 4])
        assert done["tokens"] == [[7, 7], [7, 7]] and done["finished"] == ["b"]
        assert done["prefill_s"] == said[0]["seconds"] > 0.0
        assert 0.0 < done["draft_s"] + done["verify_s"] + done["other_s"] < 50.0, "waiting is not in it"
        Event().wait(0.05)
        assert paper.ran == 1, "one round, and no other without leave"
        rounds.go(2, ["a"])
        assert rounds.next()["tokens"] == [[7, 7]]
        last = rounds.next()
        assert last["tokens"] == [[7]] and last["finished"] == ["a"], "what comes after its end is not kept"
        rounds.close()


def test_it_waits_for_nobody_who_has_gone_and_for_no_longer_than_it_says(short: Path) -> None:
    with Turning(Paper(hooks(short / "r", 240.0))) as paper:
        rounds = Rounds(short / "r", lambda: None, 60.0)
        rounds.hold()
        paper.add("a", 1000)
        Event().wait(0.05)
        assert paper.ran == 0
        rounds.close()
        while paper.ran < 3:
            Event().wait(0.01)
    with Turning(Paper(hooks(short / "s", 0.2))) as paper:
        late = Rounds(short / "s", lambda: None, 60.0)
        paper.add("a", 1000)
        with pytest.raises(ServerFailed, match="no leave to go on came for 0.2 s"):
            late.hold()
            while True:
                late.next()
        ran = paper.ran
        while paper.ran < ran + 3:
            Event().wait(0.01)
        late.close()
        assert paper.hooks.safe.on


def test_without_lockstep_rounds_are_told_and_nothing_waits(short: Path) -> None:
    with Turning(Paper(hooks(short / "r", 0.0))) as paper:
        rounds = Rounds(short / "r", lambda: None, 60.0)
        assert rounds.lockstep_s == 0.0
        paper.add("a", 9)
        assert [rounds.next()["kind"] for _ in range(5)] == ["prefill", *["round"] * 4]
        rounds.close()


def test_overlapping_rounds_and_many_ranks_are_refused(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Turning(Paper(hooks(short / "r", 60.0), overlap=True)):
        rounds = Rounds(short / "r", lambda: None, 60.0)
        with pytest.raises(ServerFailed, match="--disable-overlap-schedule"):
            rounds.hold()
            rounds.next()
        rounds.close()
    paper = Paper(hooks(short / "other", 5.0, ranks=2))
    paper.turn()
    assert not paper.hooks.safe.on and "lock-step is for one rank" in caplog.text


def test_what_fails_in_the_plugin_leaves_the_scheduler_going(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    paper = Paper(hooks(short / "r", 60.0))
    del paper.chunked_req
    with Turning(paper):
        rounds = Rounds(short / "r", lambda: None, 60.0)
        rounds.hold()
        paper.add("a", 1000)
        rounds.go(1, ["a"])
        while paper.ran < 3:
            Event().wait(0.01)
        rounds.close()
    assert not paper.hooks.safe.on and "SPECRL PLUGIN: telling of rounds is switched off" in caplog.text


def test_waiting_for_a_round_ends(short: Path) -> None:
    dead: list[bool] = []

    def check() -> None:
        if dead:
            raise ServerGone("the server must run, but ended")

    with Turning(Paper(hooks(short / "r", 60.0))):
        rounds = Rounds(short / "r", check, 60.0)  # for what is said first, too
        rounds._timeout_s = 0.2
        with pytest.raises(ServerSilent, match="within 0.2 s"):
            rounds.next()
        dead.append(True)
        with pytest.raises(ServerGone, match="but ended"):
            rounds.next()
        rounds.close()
    with pytest.raises(ServerGone, match="is its server running"):
        Rounds(short / "nobody", check, 1.0)


def test_plans_are_given_once_and_refused_with_the_plugins_words(short: Path) -> None:
    def only(table: Any) -> None:
        if Plan(5) in table.values():
            raise ValueError("there is no buffer for 5")

    listening = PlanSocket(short / "p", only)
    plans = Plans(short / "p", lambda: None, 60.0)
    plans.give(Plan(3))
    plans.give(Plan(3))
    assert listening.steps(4) == 3
    with pytest.raises(ValueError, match="no buffer for 5"):
        plans.give(Plan(5))
    plans.give(Plan(0))
    assert listening.steps(1) == 0
    listening.close()
    plans.close()


def test_what_sglang_is_launched_with(tmp_path: Path) -> None:
    words = command_line(serving_of(parse_plans("0,3,1")), "/t", "/d", tmp_path)
    assert words[words.index("--speculative-num-steps") + 1] == "3" and "--speculative-adaptive" in words
    assert words[words.index("--speculative-draft-model-path") + 1] == "/d"
    config = Path(words[words.index("--speculative-adaptive-config") + 1]).read_text()
    assert config.strip() == '{"1": {"candidate_steps": [0, 1, 3]}}'
    tree = command_line(serving_of(parse_plans("3/2/6")), "/t", "/d", tmp_path)
    assert tree[tree.index("--speculative-num-draft-tokens") + 1] == "6" and "--speculative-adaptive" not in tree
    for plans, words_ in (("0", "one that drafts"), ("1,3/2/6", "leave out 3/2/6")):
        with pytest.raises(ValueError, match=words_):
            serving_of(parse_plans(plans))


def test_the_environment_says_what_is_asked_of_the_plugin() -> None:
    asked = Settings.of({"SPECRL_ROUNDS": "unix:/x", "SPECRL_LOCKSTEP": "30"})
    assert asked == Settings(rounds=Path("/x"), lockstep=30.0)
    for wrong, words in (
        ({"SPECRL_ROUNDS": "/x"}, "unix:/path"),
        ({"SPECRL_ROUNDS": "unix:/x", "SPECRL_LOCKSTEP": "900"}, "must be in"),
        ({"SPECRL_TRACES": "unix:/x", "SPECRL_LOCKSTEP": "9"}, "SPECRL_ROUNDS is not set"),
    ):
        with pytest.raises(ValueError, match=words):
            Settings.of(wrong)


def test_a_ring_that_is_full_drops_and_counts(short: Path) -> None:
    from specrl.sglang.plugin.round_socket import RoundSocket

    telling = RoundSocket(short / "r", 4, {"lockstep": 0.0}, Failsafe("telling", "nothing"))
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(short / "r"))
        peer.settimeout(60.0)
        peer.recv(1024)
        for _ in range(2000):
            telling.put({"kind": "round", "filler": "x" * 4096})
        assert telling.dropped > 0
    telling.close()


def test_one_who_connects_while_all_is_closed_is_hung_up_on(short: Path) -> None:
    came = list[socket.socket]()

    class Closed(OnePeer[bytes]):
        """Is closed just when somebody has connected."""

        def _leave(self, peer: socket.socket | None) -> None:
            self._safe.on = False

        def _came(self, peer: socket.socket) -> None:
            came.append(peer)

        def _send(self) -> None:
            pass

    closed = Closed(short / "s", Failsafe("telling", "nothing"), "closed")
    with socket.socket(socket.AF_UNIX) as late:
        late.settimeout(60.0)
        late.connect(str(short / "s"))
        assert late.recv(1) == b"" and not came
    closed.close()
