"""Learning from a server's traffic; the server and its plugin are stand-ins."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import tiny
import torch
from http_help import Serve
from test_hot_swap import SwapServer
from traced import put_request

from specrl.agents.draft.learner import LearnerConfig
from specrl.commands.train import train_server
from specrl.io.output import OutputDir
from specrl.models.draft import Draft, load_draft, new_draft
from specrl.sglang.plugin.traces import TraceQueue
from specrl.training.server_learner import ServerLearner, learn_from_server

CONFIG = LearnerConfig(batch_size=2, ttt_steps=1, dtype="float32")


class Traffic:
    """Requests of eight tokens, one after the other, as the plugin sends them."""

    def __init__(self, path: Path) -> None:
        self._queue = TraceQueue(f"ipc://{path}", 1 << 20)
        self._over = Event()
        self._thread = Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        self._thread.join()

    def _serve(self) -> None:
        target, number = tiny.tiny_target().config, 0
        while not self._over.wait(0.005):
            self._queue.send()
            if self._queue.wanted:
                put_request(self._queue, f"r{number}", target.vocab_size, 3 * target.hidden_size)
                number += 1
        self._queue.close()


@pytest.fixture
def draft() -> Draft:
    return new_draft(tiny.tiny_target(), aux_layers=tiny.AUX_LAYERS, seed=3)


@pytest.fixture
def server(draft: Draft, serve: Serve) -> SwapServer:
    return SwapServer(serve, draft, device="cuda")  # checksums cannot be compared, so any weights are accepted


@pytest.fixture
def traffic(short: Path) -> Iterator[Traffic]:
    made = Traffic(short / "t")
    yield made
    made.close()


def swapped_versions(server: SwapServer) -> list[int]:
    return [int(body["weight_version"]) for path, body in server.calls if path == "/update_weights_from_tensor"]


def test_it_learns_swaps_and_goes_on(
    draft: Draft, server: SwapServer, traffic: Traffic, short: Path, tmp_path: Path
) -> None:
    arguments: Any = (tiny.tiny_target(), draft, CONFIG, server.url, short / "t")
    lines: list[str] = []
    learner = ServerLearner(*arguments, weight_sync_interval=2)
    learn_from_server(learner, OutputDir(tmp_path), requests=4, checkpoint_every=2, print_line=lines.append)
    versions = swapped_versions(server)
    assert versions[0] == 0 and versions == sorted(set(versions)) and learner.version == versions[-1] > 0
    assert learner.accept_length == 1.0 and "accept length 1.00" in lines[-2]
    assert {s.draft_version for s in learner.learner.replay} == {3}, "the version that the server reports"
    learned = load_draft(tmp_path / "draft")
    assert not torch.equal(learned.tensors["fc.weight"], draft.tensors["fc.weight"])
    # A resumed run first swaps its weights in, and goes on counting.
    server.calls.clear()
    resumed = ServerLearner(*arguments, weight_sync_interval=2, resume=tmp_path / "checkpoint")
    assert swapped_versions(server) == [learner.version] and resumed.requests == learner.requests
    assert all(torch.equal(t, learned.tensors[n]) for n, t in resumed.learner.weights()[1].items())
    resumed.close()


def test_a_server_that_goes_leaves_a_checkpoint_and_one_error(
    draft: Draft, server: SwapServer, traffic: Traffic, short: Path, tmp_path: Path
) -> None:
    learner = ServerLearner(tiny.tiny_target(), draft, CONFIG, server.url, short / "t", weight_sync_interval=2)

    def die(line: str) -> None:
        if learner.requests and not server.dead:
            server.dead = True
            traffic.close()

    with pytest.raises(OSError, match="go on with --resume|is it running"):
        learn_from_server(
            learner, OutputDir(tmp_path), requests=10_000, checkpoint_every=9_999, every_s=0.2, print_line=die
        )
    state = json.loads((tmp_path / "checkpoint/state.json").read_text())
    assert state["requests"] == learner.requests > 0


@pytest.mark.parametrize("name", ["requests", "checkpoint_interval", "weight_sync_interval"])
def test_numbers_out_of_range_are_named(name: str, tmp_path: Path) -> None:
    numbers: Any = {name: 0}
    with pytest.raises(ValueError, match=name):
        train_server(server="", traces=tmp_path, draft=tmp_path, output_dir=tmp_path, **numbers)
