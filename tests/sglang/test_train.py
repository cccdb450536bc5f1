"""`specrl train server` beside a server with traffic: it learns, and if one of them is killed, the other goes on."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from learned import prompts
from server import ON_A_CPU, Server, export, serve

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.models.target import Target
from specrl.sglang.client.hot_swap import push
from specrl.sglang.client.trace_subscriber import Subscriber

AT_ONCE, NEW = 8, 48
LEAST = 1.5  # accept length
ENOUGH_S = 600.0


class Traffic:
    """Clients that send requests one after the other, and keep the answers."""

    def __init__(self, server: Server) -> None:
        self._server, self._listed = server, prompts(256, "train")
        self._numbers, self._stop = count(), Event()
        self.answers: list[dict[str, Any]] = []
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._clients = [self._pool.submit(self._send) for _ in range(AT_ONCE)]

    def _send(self) -> None:
        while not self._stop.is_set():
            sampling = {"temperature": 0.7, "max_new_tokens": NEW, "ignore_eos": True}
            prompt = self._listed[next(self._numbers) % len(self._listed)]
            body = {"input_ids": list(prompt), "sampling_params": sampling}
            self.answers.append(self._server.post("/generate", body))

    def stop(self) -> list[BaseException]:
        """The error of each client that failed."""
        self._stop.set()
        self._pool.shutdown()
        return [error for error in (client.exception() for client in self._clients) if error is not None]


@contextmanager
def traffic(server: Server) -> Iterator[Traffic]:
    clients = Traffic(server)
    try:
        yield clients
    finally:
        failures = clients.stop()
    assert not failures, failures[0]


def accept_length(answers: list[dict[str, Any]]) -> float:
    """Tokens per round of these requests."""
    histograms = [a["meta_info"]["spec_correct_drafts_histogram"] for a in answers]
    rounds = sum(sum(h) for h in histograms)
    return 1.0 + sum(k * n for h in histograms for k, n in enumerate(h)) / rounds


class Learner:
    """`specrl train server` in a process of its own."""

    def __init__(self, server: Server, folder: Path, directory: Path, *more: str, requests: int = 100_000) -> None:
        options = {
            "--server": server.url,
            "--traces": str(folder / "t"),
            "--draft": str(folder / "bundle/draft"),
            "--output_dir": str(directory),
            "--requests": str(requests),
            "--weight_sync_interval": "8",
            "--checkpoint_interval": "8",
            "--learner.batch_size": "8",
        }
        words = [word for option in options.items() for word in option]
        command = [sys.executable, "-m", "specrl", "train", "server", *words, *more]
        self.directory = directory
        self.log = directory.with_suffix(".log")
        with self.log.open("a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    @property
    def requests(self) -> int:
        """Of the last checkpoint."""
        state = self.directory / "checkpoint/state.json"
        return int(json.loads(state.read_text())["requests"]) if state.exists() else 0

    def until(self, done: Callable[[], bool]) -> None:
        clock = WallClock()
        began = clock.now()
        while not done():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert clock.now() - began < ENOUGH_S, self.log.read_text()[-3000:]
            Event().wait(0.2)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def fresh(target: Target) -> Draft:
    return new_draft(target, intermediate_size=128, seed=5)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def server(fresh: Draft, folder: Path) -> Iterator[Server]:
    """A server of a random draft, with traces."""
    bundle = export(fresh, {1: Plan(3)}, folder / "bundle")
    with serve(bundle, log=folder / "server.log", SPECRL_TRACES=f"unix:{folder}/t") as started:
        yield started


def test_a_random_draft_learns_from_traffic_and_a_killed_learner_goes_on(
    server: Server, folder: Path, fresh: Draft, tmp_path: Path
) -> None:
    listed = prompts(4)
    quiet = [server.generate(prompt, NEW)["output_ids"] for prompt in listed]
    with traffic(server) as clients:
        first = Learner(server, folder, tmp_path / "run")
        first.until(lambda: first.requests >= 24)
        before = accept_length(clients.answers[:AT_ONCE])
        first.kill()  # kill -9
        kept = first.requests
        served = len(clients.answers)
        first_version = max(_versions(clients.answers))
        second = Learner(server, folder, tmp_path / "run", "--resume", "true")
        second.until(lambda: accept_length(clients.answers[-3 * AT_ONCE :]) >= LEAST)
        assert second.requests > kept, "it went on"
        after, versions = accept_length(clients.answers[-3 * AT_ONCE :]), _versions(clients.answers)
        assert max(versions) > first_version
        learned_after = len(clients.answers)
        second.kill()
        Event().wait(2.0)  # without a subscriber
        more = len(clients.answers) + 2 * AT_ONCE  # those on their way, and as many begun since
        clock = WallClock()
        began = clock.now()
        while len(clients.answers) < more:
            assert clock.now() - began < ENOUGH_S, "serving goes on"
            Event().wait(0.2)
    assert before < 1.2
    assert [server.generate(prompt, NEW)["output_ids"] for prompt in listed] == quiet
    assert not server.log_lines("SPECRL PLUGIN")
    assert all(len(a["output_ids"]) == NEW for a in clients.answers)
    print(
        f"accept length {before:.2f} at first, {after:.2f} over the last {3 * AT_ONCE} of {learned_after} requests, "
        f"{served} of them before a kill -9; {len(set(versions))} drafts served"
    )


def _versions(answers: list[dict[str, Any]]) -> list[int]:
    names = [span["version"] for a in answers for span in a["meta_info"]["weight_versions"]]
    return [int(name) for name in names if name.isdecimal()] or [0]


def test_every_trace_names_the_draft_it_was_served_by(server: Server, folder: Path, fresh: Draft) -> None:
    with Subscriber(folder / "t", timeout_s=60.0) as subscriber:
        for version in (7, 1234):
            push(server.url, fresh.tensors, version=version, like=fresh)
            server.generate(prompts(1)[0], 8)
            found = set()
            for trace in subscriber.traces():
                found.add(trace.draft_version)
                if trace.finished:
                    break
            assert found == {version}


def test_a_killed_server_is_one_clear_error_and_the_run_goes_on_with_another(
    server: Server, fresh: Draft, folder: Path, start: Callable[..., Server], tmp_path: Path
) -> None:
    """The last test of the common server, as it ends it."""
    clients = Traffic(server)
    learner = Learner(server, folder, tmp_path / "run")
    learner.until(lambda: learner.requests >= 16)
    assert _kill(server.url.rsplit(":", 1)[1]) == 1
    status = learner.process.wait(ENOUGH_S)
    assert clients.stop(), "its clients notice"
    assert status == 2
    (line,) = [line for line in learner.log.read_text().splitlines() if "error" in line]
    assert re.search(r"specrl train server: error: .*(go on with --resume|is it running)", line)
    kept = learner.requests
    assert kept >= 16
    again = start(folder / "bundle", SPECRL_TRACES=f"unix:{folder}/t")  # the old socket is still there
    second = Learner(again, folder, tmp_path / "run", "--resume", "true", requests=kept + 16)
    with traffic(again) as more:
        assert second.process.wait(ENOUGH_S) == 0, second.log.read_text()[-3000:]
    assert second.requests >= kept + 16
    assert max(_versions(more.answers)) > 0, "what was learnt serves again"
    learned = load_draft(tmp_path / "run/draft")
    assert not np.array_equal(learned.tensors["fc.weight"].numpy(), fresh.tensors["fc.weight"].numpy())


def test_a_server_launched_for_it_is_learned_on_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    directory, log = tmp_path / "run", tmp_path / "log"
    options = [
        "--engine.name=sglang", f"--engine.flags={' '.join(ON_A_CPU)}", "--serving.plans=0,3",
        "--serving.chooser=3/1/4", "--serving.batch_schedule=4x64", "--serving.weight_sync_interval=8",
        "--workload.prompt_tokens=32", "--workload.max_new_tokens=16", "--checkpoint.interval=16",
        "--learner.batch_size=8", "--draft.intermediate_size=128", "--log.tensorboard=false",
        f"--output_dir={directory}",
    ]  # fmt: skip

    def run(*more: str) -> list[dict[str, str]]:
        """Lines of log.csv."""
        command = [sys.executable, "-m", "specrl", "train", *options, *more]
        mark = f"SPECRL_TEST={directory}"
        with log.open("a") as out:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "SPECRL_TEST": str(directory)}
            )
        assert done.returncode == 0, log.read_text()[-3000:]
        assert not _running(mark), "its servers end with it"
        with (directory / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    first = run("--serving.requests=24")
    versions = [int(line["draft_version"]) for line in first]
    assert versions == sorted(versions) and versions[-1] >= 2, "what was learnt serves"
    weights = load_draft(directory / "draft").tensors["fc.weight"].clone()
    second = run("--serving.requests=48", "--resume=true")
    assert [line["requests"] for line in second[: len(first)]] == [line["requests"] for line in first], "it goes on"
    assert int(second[-1]["requests"]) >= 48 and int(second[-1]["draft_version"]) > versions[-1]
    assert not np.array_equal(load_draft(directory / "draft").tensors["fc.weight"].numpy(), weights.numpy())
    for name in ("plans.json", "config.yaml", "checkpoint/state.json"):
        assert (directory / name).is_file(), name


def _running(mark: str) -> list[str]:
    """Processes with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(entry.name)
    return found


def _kill(port: str) -> int:
    """kill -9 to all processes of the server on this port; how many groups of them there were."""
    groups = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"sglang.launch_server" in words and port.encode() in words:
                groups.add(os.getpgid(int(entry.name)))
    for group in groups:
        os.killpg(group, signal.SIGKILL)
    return len(groups)
