"""Calls to a server: every one ends, and failures say what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from http_help import Serve, answer_json, read_json
from tiny import Listed

from specrl.core.clock import WallClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.registry import make_engine
from specrl.sglang.client.factory import attach_engine, command_line, launch_engine, serving_of
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


def test_an_answer_is_json_the_key_is_sent_and_the_connection_is_kept(serve: Serve) -> None:
    ports = set[int]()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        read_json(handler)
        ports.add(handler.client_address[1])
        handler.protocol_version, handler.close_connection = "HTTP/1.1", False
        answer_json(handler, {"key": handler.headers["Authorization"]})

    url = serve(answer)
    assert Client(url + "/").get("/x") == {"key": None}
    client = Client(url, api_key="secret")
    assert [client.post("/x", {}) for _ in range(3)] == [{"key": "Bearer secret"}] * 3 and len(ports) == 2


@pytest.mark.parametrize(
    ("status", "body", "error", "remedy"),
    [
        (401, "Unauthorized", ServerRefuses, "pass api_key="),
        (400, "input too long", ServerFailed, "input too long"),
        (500, "boom", ServerFailed, "boom.*see its log"),
        (500, "CUDA out of memory", ServerOutOfMemory, "--mem-fraction-static"),
        (503, "Not enough memory", ServerOutOfMemory, "lower --max-running-requests"),
    ],
)
def test_refusals_say_what_to_do(serve: Serve, status: int, body: str, error: type[ServerError], remedy: str) -> None:
    with pytest.raises(error, match=remedy):
        Client(serve(lambda handler: answer_json(handler, body, status))).post("/generate", {})


def test_a_busy_server_is_asked_again_within_the_deadline(serve: Serve) -> None:
    statuses = [200, 429, 429]
    url = serve(lambda handler: answer_json(handler, "queue is full", statuses.pop()))
    assert Client(url).post("/generate", {}) == "queue is full" and not statuses
    with pytest.raises((ServerBusy, ServerSilent), match="in time"):
        Client(serve(lambda handler: answer_json(handler, "queue is full", 429)), timeout_s=1.0).post("/generate", {})


def test_no_server_and_an_answer_that_is_not_json(serve: Serve) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ServerGone, match="is it running"):  # nobody listens on a port that is ours
            Client(f"http://127.0.0.1:{free.getsockname()[1]}").get("/model_info")

    def html(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"<html>")

    with pytest.raises(ServerFailed, match="JSON"):
        Client(serve(html)).get("/")


@pytest.mark.parametrize("url", ["localhost:30000", "ftp://x", "http://", "http://x:port"])
def test_wrong_arguments_are_named(url: str) -> None:
    with pytest.raises(ValueError, match="url must be"):
        Client(url)
    with pytest.raises(ValueError, match="timeout_s must be"):
        Client("http://x", timeout_s=0.0)


@pytest.mark.parametrize(
    ("sends", "dies", "error"), [("", False, ServerSilent), (" ", False, ServerSilent), ("[1, 2", True, ServerGone)]
)
def test_a_server_that_hangs_or_dies(serve: Serve, sends: str, dies: bool, error: type[ServerError]) -> None:
    """A hang ends at the deadline, also if bytes arrive one by one; 1,000 of them would take 100 s."""
    over = Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        if sends:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
        while not over.wait(0.1):
            handler.wfile.write(sends.encode())
            handler.wfile.flush()
            if dies:
                return handler.connection.shutdown(socket.SHUT_RDWR)

    clock = WallClock()
    began = clock.now()
    with pytest.raises(error, match="is it running" if dies else "timeout_s"):
        Client(serve(hang), timeout_s=60.0 if dies else 0.3).post("/generate", {})
    over.set()
    assert clock.now() - began < 60.0


def test_requests_are_sent_at_once_and_one_failure_ends_them_all(serve: Serve) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        body = read_json(handler)
        tokens = body["input_ids"]
        answer_json(handler, {"output_ids": tokens, **body["sampling_params"]}, 500 if tokens == [9] else 200)

    requests = LiveRequests(Client(serve(answer)))
    for number in range(3):
        requests.send(f"r{number}", LiveRequest(number, Request((number, 1), 5, 0.5, learn=False)).body())
    for number in range(3):
        taken = requests.take(f"r{number}", 60.0)
        assert taken["output_ids"] == [number, 1] and taken["max_new_tokens"] == 5
        assert taken["custom_params"] == {"specrl_traces": False}
    requests.check()
    with pytest.raises(ServerSilent, match="request nobody"):
        requests.take("nobody", 0.05)
    requests.send("bad", LiveRequest(4, Request((9,), 5)).body())
    with pytest.raises(ServerFailed, match="500"):
        requests.take("r2", 60.0)


SGLANG = {
    "version": "0.5.23", "speculative_algorithm": "EAGLE3", "speculative_num_steps": 2, "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 3,
}  # fmt: skip


def test_a_server_without_the_plugin_reports_whole_requests(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        meta = {"spec_correct_drafts_histogram": [1, 2, 1], "finish_reason": {"type": "length"}}
        generated = {"output_ids": [*read_json(handler).get("input_ids", ()), *range(6)], "meta_info": meta}
        answer_json(handler, {"/server_info": SGLANG, "/generate": generated}.get(handler.path))

    engine = attach_engine(serve(answer), timeout_s=60.0)
    assert engine.plans == (Plan(2),) and caplog.text.count("no plan per round, no traces") == 1
    session = engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0)
    done = session.round(Plan(2))
    assert done.correct_drafts.tolist() == [0, 1, 1, 2]
    assert done.tokens.tolist() == [1, 2, 2, 2], "8 tokens, the first of the prefill, one past the end"
    assert done.finished[0].tokens == (5, 6, 0, 1, 2, 3, 4, 5) and done.seconds > 0.0
    assert session.round(Plan(2)).request_ids[0] != done.request_ids[0]
    assert session.measure_plain() is None and session.drain() == [] and session.batch_size == 2
    with pytest.raises(ValueError, match="plan must be"):
        session.round(Plan(0))
    engine.close()
    with pytest.raises(ValueError, match="is closed"):
        session.round(Plan(2))
    with pytest.raises(ValueError, match="trace"):
        engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0, trace=True)
    with pytest.raises(ValueError, match="SGLang must be 0.5.23.* 0.4.1"):
        attach_engine(serve(lambda handler: answer_json(handler, {**SGLANG, "version": "0.4.1"})))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"speed": 3}, "speed"),
        ({"python": sys.executable}, "must have SGLang and specrl.*python="),
        ({"python": "/nowhere/python"}, "python= must be"),
        ({"baseline": "never"}, "baseline must be"),
    ],
)
def test_wrong_options_of_an_engine_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_engine("sglang", plans=(Plan(1),), **options)


def test_the_flags_that_sglang_is_launched_with(tmp_path: Path) -> None:
    words = command_line(serving_of([Plan(0), Plan(3), Plan(1)]), "/t", "/d", tmp_path)
    assert words[words.index("--speculative-num-steps") + 1] == "3" and "--speculative-adaptive" in words
    assert words[words.index("--speculative-draft-model-path") + 1] == "/d"
    config = Path(words[words.index("--speculative-adaptive-config") + 1]).read_text()
    assert config.strip() == '{"1": {"candidate_steps": [0, 1, 3]}}'
    tree = command_line(serving_of([Plan(3, 2, 6)]), "/t", "/d", tmp_path)
    assert tree[tree.index("--speculative-num-draft-tokens") + 1] == "6" and "--speculative-adaptive" not in tree
    for plans in ("0", "1,3/2/6"):
        with pytest.raises(ValueError, match="plans must"):
            launch_engine(plans=plans)


def fake_python(folder: Path, code: str) -> Path:
    """A Python that runs this code and nothing else."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}"\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("raise SystemExit('no such model')", ServerGone, "status 1.*no such model"),
        ("raise SystemExit('CUDA out of memory')", ServerOutOfMemory, "--mem-fraction-static.*CUDA out of memory"),
        ("import time; time.sleep(60)", ServerSilent, "0.5 s"),
    ],
)
def test_a_server_that_does_not_start(tmp_path: Path, code: str, error: type[ServerError], words: str) -> None:
    server = Server.launch([], tmp_path / "log", tmp_path, python=fake_python(tmp_path, code))
    with pytest.raises(error, match=words):
        server.wait(0.5 if error is ServerSilent else 120.0)
    server.close()
    assert not server.running
    server.close()


def test_a_server_ends_with_the_process_that_launched_it(tmp_path: Path) -> None:
    fake_python(tmp_path, "import time; time.sleep(600)")
    code = (
        "import sys; from pathlib import Path; from specrl.sglang.client.launch import Server\n"
        "folder = Path(sys.argv[1]); server = Server.launch([], folder / 'log', folder, python=folder / 'python')\n"
        "print(server.process_id, flush=True); sys.stdin.read()"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert launcher.stdout is not None
    group = int(launcher.stdout.readline())
    os.killpg(group, 0)
    launcher.kill()
    launcher.communicate()
    for _ in range(2400):
        state = Path(f"/proc/{group}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        Event().wait(0.05)
    raise AssertionError("it still runs")
