"""Plain decoding on a server without a draft, on the same device: the baseline of every speedup.

The two servers take turns: the one that speculates waits for a permit (or is paused) while this one is measured, and
this one gets no requests otherwise.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from specrl.core.clock import Clock, WallClock
from specrl.core.round import PlainSample
from specrl.sglang.client.http import ServerError, ServerFailed
from specrl.sglang.client.launch import ROUNDS, Server
from specrl.sglang.client.plugin_client import Rounds
from specrl.sglang.client.requests import LiveRequests
from specrl.sglang.client.watchdog import resume_on_crash

WARM_UP_STEPS = 2  # of a measurement, left out
_TRIES = 3  # on a busy machine a request may end before the others have begun
_SAME = ("version", "revision", "dtype", "quantization", "tp_size")  # in /server_info


class PlainServer:
    """Times steps of plain decoding by the plugin's reports.

    Methods take texts, the token ids of each live request. They raise a ServerError if the server did not decode the
    texts together, or not at all. `server` is a server without speculation, whose plugin reports rounds.
    """

    lockstep = True  # whether sessions can run on it
    measured_steps = 4  # of `measure`
    average: Callable[[Iterator[float]], float] = staticmethod(median)

    def __init__(self, server: Server) -> None:
        self.server = server
        self._requests = LiveRequests(server.client, server.timeout_s)
        self._rounds: Rounds | None = None

    def measure(self, texts: Sequence[Sequence[int]]) -> PlainSample:
        """Return the average time of a step that continues these texts together."""
        seconds = self.average(step.seconds for step in self.steps(texts, self.measured_steps))
        return PlainSample(len(texts), fmean(map(len, texts)), seconds)

    def steps(self, texts: Sequence[Sequence[int]], count: int) -> list[PlainSample]:
        """Return `count` consecutive steps; fewer, but at least one, if requests join one by one."""
        for _ in range(_TRIES):
            sampling = {"temperature": 0.0, "max_new_tokens": WARM_UP_STEPS + count + 1, "ignore_eos": True}
            rids = [f"plain-{secrets.token_hex(4)}-{index}" for index in range(len(texts))]
            body = {"rid": rids, "input_ids": [list(text) for text in texts], "sampling_params": sampling}
            steps = self._decode(body, fmean(map(len, texts)))
            if len(steps) > WARM_UP_STEPS:
                return steps[WARM_UP_STEPS:]
        raise ServerFailed(
            f"{self.server.client.url} must decode {len(texts)} requests at once, but did not; raise its "
            "--max-running-requests or --max-total-tokens"
        )

    def close(self) -> None:
        """End the server if it was launched here; idempotent."""
        if self._rounds is not None:
            self._rounds.close()
        self.server.close()

    def _connect(self) -> Rounds:
        """The server's reports. An idle server may take a second to answer, so the connection is kept."""
        if self._rounds is not None:
            try:
                self._rounds.clear()  # reports of other requests
                return self._rounds
            except ServerError:  # another client has taken our place
                self._rounds.close()
        self._rounds = Rounds(self.server.socket(ROUNDS), self._check, self.server.timeout_s)
        return self._rounds

    def _check(self) -> None:
        self.server.check()
        self._requests.check()

    def _decode(self, body: dict[str, Any], context: float) -> list[PlainSample]:
        """Steps in which all requests of `body` were decoded, with the warm-up; `context` is their mean length."""
        self._requests = LiveRequests(self.server.client, self.server.timeout_s)
        rounds = self._connect()
        self._requests.send("plain", body)
        steps, rids, ended = list[PlainSample](), set(body["rid"]), set[str]()
        while not rids <= ended:
            report = rounds.next()
            ended |= set(report.finished)
            if report.kind == "round" and set(report.requests) == rids:
                steps.append(PlainSample(len(rids), fmean(report.contexts), report.seconds))
        self._requests.take("plain", self.server.timeout_s)
        return steps


class StreamedPlainServer(PlainServer):
    """Times steps of plain decoding on a server without our plugin, by the arrival of its tokens.

    A step is the time between two tokens of the request that leads, while all requests decode. If several tokens arrive
    at once (its --stream-interval, or a slow network), their steps share the time equally. `clock` times their arrival.
    """

    lockstep = False
    measured_steps = 16
    average = staticmethod(fmean)  # arrival times say little about single steps

    def __init__(self, server: Server, clock: Clock | None = None) -> None:
        super().__init__(server)
        self._clock = WallClock() if clock is None else clock

    def _decode(self, body: dict[str, Any], context: float) -> list[PlainSample]:
        tokens = dict.fromkeys(body["rid"], 0)
        counted, counted_s = 0, 0.0  # tokens of the leading request that are counted, and when the last one arrived
        steps: list[PlainSample] = []
        for piece in self.server.client.stream("/generate", {**body, "stream": True}):
            if "error" in piece:
                raise ServerFailed(f"{self.server.client.url} must decode plainly, but {piece['error']}; see its log")
            now, meta = self._clock.now(), piece["meta_info"]
            tokens[meta["id"]] = meta["completion_tokens"]
            leading = max(tokens.values())
            if counted and counted < leading:
                step_s = (now - counted_s) / (leading - counted)
                steps += [PlainSample(len(tokens), context + n, step_s) for n in range(counted, leading)]
            if counted < leading and min(tokens.values()):
                counted, counted_s = leading, now
        return steps


def check_baseline(server: Server, plain: Server) -> None:
    """Refuse a baseline that is not the same model without speculation.

    Raises:
        ValueError: it differs; the message names the difference.
        ServerError: one of them does not answer.
    """
    url = plain.client.url
    algorithm = plain.info.get("speculative_algorithm")
    if algorithm:
        raise ValueError(
            f"plain_url must be a server without speculation, but {url} runs {algorithm}; start one with the same "
            "--model-path and no --speculative flags"
        )
    expected, actual = _served_model(server), _served_model(plain)
    if expected["weight_version"].isdecimal():  # the version of a draft, set by a hot swap
        actual["weight_version"] = expected["weight_version"]
    for name, value in expected.items():
        if actual[name] != value:
            raise ValueError(
                f"plain_url must serve the server's model, but {name} is {actual[name]!r} at {url} and {value!r} at "
                f"{server.client.url}; start it like the other, without its --speculative flags"
            )


def _served_model(server: Server) -> dict[str, Any]:
    model = server.client.get("/model_info")
    path = Path(model["model_path"])
    return {
        "model_path": str(path.resolve()) if path.is_dir() else model["model_path"],
        "weight_version": str(model.get("weight_version")),
        **{name: server.info.get(name) for name in _SAME},
    }


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """Pause a server with its requests in place; a watchdog process resumes it if this process is killed."""
    client = server.client
    with resume_on_crash(client.url, client.headers, client.timeout_s) as resumed:
        try:
            client.post("/pause_generation", {"mode": "in_place"})
            yield
        finally:
            client.post("/continue_generation", {"torch_empty_cache": False})
            resumed()
