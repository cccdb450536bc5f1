"""Calls to a server: every one ends, and failures say what to do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from itertools import count
from pathlib import Path
from threading import Event

import pytest
from http_help import answering
from tiny import Listed

from specrl.core.clock import WallClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.registry import make_engine
from specrl.sglang.client.factory import attach_engine, launch_engine
from specrl.sglang.client.http import (
    Client,
    ServerBusy,
    ServerError,
    ServerFailed,
    ServerGone,
    ServerOutOfMemory,
    ServerRefuses,
    ServerSilent,
)
from specrl.sglang.client.launch import Server
from specrl.sglang.client.requests import LiveRequest, LiveRequests

ROOT = Path(__file__).parent.parent
Answers = Callable[[BaseHTTPRequestHandler, int], None]
Serve = Callable[[Answers], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves what a function makes of each request and its number; gives the URL."""
    with answering() as start:

        def counted(answers: Answers) -> str:
            number = count(1)
            return start(lambda handler: answers(handler, next(number)))

        yield counted


def answer_json(handler: BaseHTTPRequestHandler, status: int, value: object) -> None:
    body = json.dumps(value).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_an_answer_is_json_and_the_key_is_sent(serve: Serve) -> None:
    url = serve(lambda handler, _: answer_json(handler, 200, {"key": handler.headers["Authorization"]}))
    assert Client(url, api_key="secret").post("/x", {}) == {"key": "Bearer secret"}
    assert Client(url + "/").get("/x") == {"key": None}


@pytest.mark.parametrize(
    ("status", "said", "kind", "words"),
    [
        (401, "Unauthorized", ServerRefuses, "pass api_key="),
        (400, "input too long", ServerFailed, "input too long"),
        (500, "boom", ServerFailed, "boom.*see its log"),
        (500, "CUDA out of memory", ServerOutOfMemory, "--mem-fraction-static"),
        (503, "Not enough memory", ServerOutOfMemory, "lower --max-running-requests"),
    ],
)
def test_refusals_say_what_to_do(serve: Serve, status: int, said: str, kind: type[ServerError], words: str) -> None:
    url = serve(lambda handler, _: answer_json(handler, status, said))
    with pytest.raises(kind, match=words):
        Client(url).post("/generate", {})


def test_a_busy_server_is_asked_again_within_the_deadline(serve: Serve) -> None:
    url = serve(lambda handler, count: answer_json(handler, 429 if count < 3 else 200, "queue is full"))
    assert Client(url).post("/generate", {}) == "queue is full"
    asked: list[int] = []

    def full(handler: BaseHTTPRequestHandler, number: int) -> None:
        asked.append(number)
        answer_json(handler, 429, "queue is full")

    with pytest.raises((ServerBusy, ServerSilent), match="in time"):
        Client(serve(full), timeout_s=2.0).post("/generate", {})
    assert len(asked) > 1


def test_connections_are_kept(serve: Serve) -> None:
    ports = set[int]()

    def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
        ports.add(handler.client_address[1])
        handler.protocol_version, handler.close_connection = "HTTP/1.1", False
        answer_json(handler, 200, {})

    client = Client(serve(answer))
    for _ in range(3):
        client.get("/")
    assert len(ports) == 1


def test_nobody_and_nonsense(serve: Serve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerGone, match="is it running"):  # nobody listens on a port that is ours
            Client(f"http://127.0.0.1:{free.getsockname()[1]}").get("/model_info")

    def html(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"<html>")

    with pytest.raises(ServerFailed, match="JSON"):
        Client(serve(html)).get("/")


@pytest.mark.parametrize(
    ("url", "timeout_s", "name"),
    [
        ("localhost:30000", 1.0, "url"),
        ("ftp://x", 1.0, "url"),
        ("http://", 1.0, "url"),
        ("http://x:port", 1.0, "url"),
        ("http://x", 0.0, "timeout_s"),
    ],
)
def test_wrong_arguments_are_named(url: str, timeout_s: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be"):
        Client(url, timeout_s=timeout_s)


@pytest.mark.parametrize("drips", [False, True])
def test_a_hang_ends_at_the_deadline(serve: Serve, drips: bool) -> None:
    """Also if bytes come one by one; 1,000 of them would take 100 s."""
    over = Event()

    def hang(handler: BaseHTTPRequestHandler, _: int) -> None:
        if drips:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        while not over.wait(0.1):
            if drips:
                handler.wfile.write(b" ")
                handler.wfile.flush()

    clock = WallClock()
    began = clock.now()
    with pytest.raises(ServerSilent, match="timeout_s"):
        Client(serve(hang), timeout_s=0.3).post("/generate", {})
    over.set()
    assert clock.now() - began < 60.0


def test_a_server_that_dies_in_the_middle(serve: Serve) -> None:
    def die(handler: BaseHTTPRequestHandler, _: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b'{"output_ids": [1, 2')
        handler.wfile.flush()
        handler.connection.shutdown(socket.SHUT_RDWR)

    with pytest.raises(ServerGone, match="is it running"):
        Client(serve(die)).post("/generate", {})


def test_requests_are_sent_at_once_and_one_failure_ends_them_all(serve: Serve) -> None:
    def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        status = 500 if body["input_ids"] == [9] else 200
        answer_json(handler, status, {"output_ids": body["input_ids"], "asked": body["sampling_params"]})

    requests = LiveRequests(Client(serve(answer)))
    for number in range(3):
        requests.send(f"r{number}", LiveRequest(number, Request((number, 1), 5, 0.5, learn=False)).body())
    for number in range(3):
        found = requests.take(f"r{number}", 60.0)
        assert found["output_ids"] == [number, 1]
        assert found["asked"]["max_new_tokens"] == 5 and found["asked"]["custom_params"] == {"specrl_traces": False}
    requests.check()
    with pytest.raises(ServerSilent, match="request nobody"):
        requests.take("nobody", 0.05)
    requests.send("bad", LiveRequest(4, Request((9,), 5)).body())
    with pytest.raises(ServerFailed, match="500"):
        requests.take("r2", 60.0)


SGLANG = {"version": "0.5.23", "speculative_algorithm": "EAGLE3"}
CHAIN = {"speculative_num_steps": 2, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 3}


def test_a_server_without_the_plugin_is_seen_by_the_request(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def answer(handler: BaseHTTPRequestHandler, _: int) -> None:
        if handler.path == "/server_info":
            return answer_json(handler, 200, {**SGLANG, **CHAIN})
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path == "/abort_request":
            return answer_json(handler, 200, None)
        meta = {"spec_correct_drafts_histogram": [1, 2, 1], "finish_reason": {"type": "length"}}
        answer_json(handler, 200, {"output_ids": [*body["input_ids"], *range(6)], "meta_info": meta})

    engine = attach_engine(serve(answer), timeout_s=60.0)
    assert engine.plans == (Plan(2),) and caplog.text.count("no plan per round, no traces") == 1
    session = engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0)
    done = session.round(Plan(2))
    assert done.correct_drafts.tolist() == [0, 1, 1, 2]
    assert done.tokens.tolist() == [1, 2, 2, 2], "8 tokens, the first of the prefill, one past the end"
    assert done.finished[0].tokens == (5, 6, 0, 1, 2, 3, 4, 5) and done.seconds > 0.0
    assert session.round(Plan(2)).request_ids[0] != done.request_ids[0]
    assert session.measure_plain() is None and session.drain() == [] and session.batch_size == 2
    with pytest.raises(ValueError, match="plan must be .* launched for .2/1/3."):
        session.round(Plan(0))
    engine.close()
    with pytest.raises(ValueError, match="is closed"):
        session.round(Plan(2))
    with pytest.raises(ValueError, match="trace"):
        engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0, trace=True)


def test_another_version_without_the_plugin_is_refused_by_name(serve: Serve) -> None:
    with pytest.raises(ValueError, match="SGLang must be 0.5.23.* 0.4.1"):
        attach_engine(serve(lambda handler, _: answer_json(handler, 200, {**SGLANG, **CHAIN, "version": "0.4.1"})))


def test_wrong_options_of_an_engine_are_named() -> None:
    with pytest.raises(ValueError, match="speed"):
        make_engine("sglang", plans=(Plan(1),), speed=3)
    for options, name in (
        ({"python": sys.executable}, "must have SGLang and specrl.*python="),
        ({"python": "/nowhere/python"}, "python= must be"),
        ({"baseline": "never"}, "baseline must be"),
    ):
        with pytest.raises(ValueError, match=name):
            launch_engine(plans="1", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("raise SystemExit('no such model')", ServerGone, "status 1.*no such model"),
        ("raise SystemExit('CUDA out of memory')", ServerOutOfMemory, "--mem-fraction-static.*CUDA out of memory"),
        ("import time; time.sleep(60)", ServerSilent, "0.5 s"),
    ],
)
def test_a_server_that_does_not_start(tmp_path: Path, code: str, kind: type[ServerError], words: str) -> None:
    """Its Python runs other code."""
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    fake.chmod(0o755)
    server = Server.launch([], tmp_path / "server.log", tmp_path, python=fake)
    with pytest.raises(kind, match=words):
        server.wait(0.5 if kind is ServerSilent else 120.0)
    server.close()
    assert not server.running
    server.close()


def test_a_server_does_not_outlive_whoever_launched_it(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import time; time.sleep(600)"\n')
    fake.chmod(0o755)
    code = (
        "import sys; from pathlib import Path; from specrl.sglang.client.launch import Server\n"
        "folder = Path(sys.argv[1]); server = Server.launch([], folder / 'log', folder, python=folder / 'python')\n"
        "print(server.process_id, flush=True); sys.stdin.read()"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert launcher.stdout is not None and launcher.stdin is not None
    group = int(launcher.stdout.readline())
    os.killpg(group, 0)
    launcher.kill()
    launcher.communicate()
    for _ in range(2400):
        state = Path(f"/proc/{group}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        Event().wait(0.05)
    raise AssertionError("it is still there")


def test_a_parked_request_goes_on_from_its_tokens() -> None:
    live = LiveRequest(0, Request((1, 2), 10), "r", output=[3, 4, 5], resumed=3)
    assert live.body()["input_ids"] == [1, 2, 3, 4, 5]
    assert live.body()["sampling_params"]["max_new_tokens"] == 7
    assert live.context == 6  # its prefill adds one
    assert LiveRequest(0, Request((1, 2), 10), "r").context == 3
