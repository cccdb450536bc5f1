"""New draft weights in a server under load: no request fails or changes, and acceptance follows at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from learned import Decoded, decode, prompts
from server import Server, export, serve
from test_serve import compare

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.models.draft import Draft, new_draft
from specrl.models.target import Target
from specrl.sglang.client.hot_swap import push, recover
from specrl.sglang.client.http import SwapError

AT_ONCE, SWAPS, NEW, LONG, EARLY = 8, 20, 96, 400, 60
PLAN = Plan(3)
CLOCK = WallClock()


class Streamed(NamedTuple):
    """A request's answer, and when each piece of it came."""

    answer: dict[str, Any]
    times: list[float]
    known: list[int]  # tokens by then

    def accept_length(self, begin_s: float, end_s: float) -> float:
        """Tokens per piece, which is per round, of the pieces that came in between."""
        steps = [b - a for (a, b), t in zip(pairwise(self.known), self.times[1:], strict=True) if begin_s < t < end_s]
        return float(np.mean(steps)) if steps else float("nan")


def stream(server: Server, prompt: Sequence[int], new: int, out: Streamed | None = None) -> Streamed:
    """`out`, or a new one, grows as the answer comes."""
    sampling = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
    body = json.dumps({"input_ids": list(prompt), "sampling_params": sampling, "stream": True}).encode()
    request = urllib.request.Request(server.url + "/generate", body, {"Content-Type": "application/json"})
    out = Streamed({}, [], []) if out is None else out
    with urllib.request.urlopen(request, timeout=120) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                out.answer.update(json.loads(line.removeprefix(b"data: ")))
                out.times.append(CLOCK.now())
                out.known.append(len(out.answer["output_ids"]))
    return out


@pytest.fixture(scope="module")
def fresh(target: Target) -> Draft:
    """A random draft of the learned one's shape."""
    return new_draft(target, intermediate_size=128, seed=5)


@pytest.fixture(scope="module")
def started(fresh: Draft, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all tests; whatever they do to it, it serves."""
    directory = tmp_path_factory.mktemp("hot_swap")
    with serve(export(fresh, {1: PLAN}, directory / "bundle"), log=directory / "server.log") as server:
        push(server.url, fresh.tensors, version=0, like=fresh)  # the first one loads what later ones find loaded
        yield server


@pytest.fixture
def server(started: Server, fresh: Draft) -> Server:
    """It, with the random draft."""
    push(started.url, fresh.tensors, version=0, like=fresh)
    return started


def test_twenty_swaps_under_load(target: Target, draft: Draft, fresh: Draft, server: Server) -> None:
    listed = prompts(16)
    ours = decode(target, draft, listed, PLAN, NEW)
    done: list[tuple[tuple[int, ...], Decoded, Streamed]] = []
    enough, numbers = Event(), count()

    def client() -> None:
        while not enough.is_set():
            which = next(numbers) % len(listed)
            done.append((listed[which], ours[which], stream(server, listed[which], NEW)))

    swaps, windows = [], []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        clients = [pool.submit(client) for _ in range(AT_ONCE)]
        try:
            for number in range(1, SWAPS + 1):
                Event().wait(0.4)
                began = CLOCK.now()
                swaps.append(push(server.url, (draft if number % 2 else fresh).tensors, version=number, like=fresh))
                windows.append((began, CLOCK.now()))
        finally:
            enough.set()
        for one in clients:
            one.result()  # no request failed
    assert all(swap.exact for swap in swaps) and [swap.version for swap in swaps] == [*range(1, SWAPS + 1)]
    answers = [streamed.answer for _, _, streamed in done]
    assert all(a["meta_info"]["finish_reason"] == {"type": "length", "length": NEW} for a in answers)
    compare(target, [p for p, _, _ in done], [o for _, o, _ in done], answers, drafts=False)
    crossed = [len(a["meta_info"]["weight_versions"]) > 1 for a in answers]
    assert sum(crossed) >= AT_ONCE, "requests lived through swaps"
    usual = np.concatenate([np.diff(s.times) for _, _, s in done])
    gaps = [
        max((b - a for _, _, s in done for a, b in pairwise(s.times) if a < ended and b > began), default=0.0)
        for began, ended in windows
    ]
    pauses, stops = ([getattr(s, name) * 1e3 for s in swaps] for name in ("pause_s", "stopped_s"))
    calls = {name: [swap.calls_s[name] * 1e3 for swap in swaps] for name in swaps[0].calls_s}
    print(
        f"{SWAPS} swaps of {swaps[0].bytes:,} bytes, {len(done)} requests, {sum(crossed)} lived through one; "
        f"longest pause {max(pauses):.0f} ms with the round in flight, {max(stops):.0f} ms without (median "
        f"{np.median(stops):.0f}); between two pieces of a request {np.median(usual) * 1e3:.0f} ms as a rule, "
        f"{max(gaps) * 1e3:.0f} ms at worst around a swap; ms by call, median and longest: "
        + ", ".join(f"{name} {np.median(took):.1f} {max(took):.1f}" for name, took in calls.items())
    )


def test_acceptance_rises_within_a_request(target: Target, draft: Draft, fresh: Draft, server: Server) -> None:
    prompt = prompts(1)[0]
    ours = decode(target, draft, [prompt], PLAN, LONG)
    with ThreadPoolExecutor(1) as pool:
        streamed = Streamed({}, [], [])
        request = pool.submit(stream, server, prompt, LONG, streamed)
        while len(streamed.known) < EARLY:
            assert not request.done(), "it ended before the swap"
            Event().wait(0.001)
        began = CLOCK.now()
        push(server.url, draft.tensors, version=1, like=fresh)
        ended = CLOCK.now()
        request.result()
    compare(target, [prompt], ours, [streamed.answer], drafts=False)
    before, after = streamed.accept_length(0.0, began), streamed.accept_length(ended, float("inf"))
    print(f"accept length {before:.2f} before and {after:.2f} after the swap, in one request")
    assert before < 1.2 and after > before + 0.3


def test_what_does_not_fit_never_reaches_the_server(
    target: Target, draft: Draft, fresh: Draft, server: Server, tmp_path: Path
) -> None:
    good, pauses = draft.tensors, len(server.log_lines("pause_generation"))

    def refused(weights: dict[str, torch.Tensor], rule: str, like: Draft | Path | None = fresh) -> None:
        with pytest.raises(ValueError, match=rule):
            push(server.url, weights, version=9, like=like)

    refused({**good, "norm.weight": good["norm.weight"][:-1]}, "norm.weight")
    refused({**good, "embed_tokens.weight": torch.zeros(512, 192)}, "embed_tokens.weight")
    refused({n: t for n, t in good.items() if n != "fc.weight"}, "fc.weight")
    refused({**good, "fc.weight": good["fc.weight"].double()}, "fc.weight is torch.float64")
    refused({**good, "fc.weight": good["fc.weight"].int()}, "fc.weight is torch.int32")
    refused({**good, "fc.weight": good["fc.weight"] * float("nan")}, "finite")
    refused(dict(good), "like=", None)  # the server names a directory relative to its own
    small = new_draft(target, draft_vocab_size=256, intermediate_size=128)
    other = {**small.tensors, "d2t": small.tensors["d2t"] + 1}
    refused(other, "d2t must be", small)
    small.save(tmp_path / "small")
    refused(other, "d2t must be", tmp_path / "small")
    assert len(server.log_lines("pause_generation")) == pauses


@contextmanager
def pausing(server: Server, draft: Draft, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed (kill -9) between the pause and the end of an update."""
    draft.save(tmp_path / "draft")
    code = (
        "import os, signal, sys\n"
        "from specrl.models.draft import load_draft\n"
        "from specrl.sglang.client.hot_swap import push\n"
        "from specrl.sglang.client.http import Client\n"
        "post = Client.post\n"
        "def dies(self, path, body, **rest):\n"
        "    answer = post(self, path, body, **rest)\n"
        "    if path == '/begin_weight_update':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return answer\n"
        "Client.post = dies\n"
        "draft = load_draft(sys.argv[2])\n"
        "push(sys.argv[1], draft.tensors, version=1, like=draft)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(tmp_path / "draft")])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_pusher_killed_in_the_middle_leaves_the_server_serving(
    server: Server, draft: Draft, fresh: Draft, tmp_path: Path
) -> None:
    quiet = server.generate(prompts(1)[0], 24)["output_ids"]
    begun, ended = (len(server.log_lines(f"{word}_weight_update")) for word in ("begin", "end"))
    with pausing(server, draft, tmp_path) as process:
        assert process.wait(180) == -signal.SIGKILL
    assert len(server.log_lines("begin_weight_update")) == begun + 1, "it died with the server paused"
    assert server.generate(prompts(1)[0], 24)["output_ids"] == quiet
    assert len(server.log_lines("end_weight_update")) == ended + 1, "the watchdog resumed it"
    assert push(server.url, draft.tensors, version=2, like=fresh).exact
    # A pause without a watchdog is for `recover`.
    server.post("/pause_generation", {"mode": "in_place"})
    server.post("/begin_weight_update", {"selector": "draft"})
    recover(server.url)
    assert server.generate(prompts(1)[0], 24)["output_ids"] == quiet


def test_a_server_that_is_not_there_is_one_clear_error(draft: Draft) -> None:
    with pytest.raises(SwapError, match="is it running"):
        push("http://127.0.0.1:9", draft.tensors, version=1, like=draft, timeout_s=5.0)
    with pytest.raises(ValueError, match="url must be"):
        push("127.0.0.1:9", draft.tensors, version=1, like=draft)
