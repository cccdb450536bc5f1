"""Plain decoding on a server without our plugin: steps timed by the arrival of tokens, and the same model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from threading import Condition, Event
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from http_help import answering
from tiny import Listed, prompts, tiny_draft, tiny_target

import specrl  # noqa: F401 - registers the environments
from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.envs.timed_env import NO_PLAIN
from specrl.sglang.client.factory import attach_engine
from specrl.sglang.client.http import ServerError, ServerFailed, ServerGone
from specrl.sglang.client.launch import Server
from specrl.sglang.client.plain_server import StreamedPlainServer

STEP_S = 0.01
INFO = {"version": "0.5.23", "dtype": "float32", "quantization": None, "tp_size": 1}
DRAFTS = {
    "speculative_algorithm": "EAGLE3", "speculative_num_steps": 2, "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 3,
}  # fmt: skip
MODEL = {"model_path": "a/model", "weight_version": "default"}


class Stepped(VirtualClock):
    """Passes a step at a time, and only once the client has looked at it for all that came in the last one."""

    def __init__(self) -> None:
        super().__init__()
        self._looks, self._looked = 0, Condition()

    def now(self) -> float:
        with self._looked:
            self._looks += 1
            self._looked.notify_all()
            return super().now()

    def step(self, pieces: int) -> None:
        with self._looked:
            assert self._looked.wait_for(lambda: self._looks >= pieces, 60.0), "nobody looks"
            self.advance(STEP_S)


class Paper:
    """A server of paper: what it says of itself, what it was asked for, and tokens that come a step apart."""

    def __init__(
        self,
        info: dict[str, Any],
        model: dict[str, Any] = MODEL,
        *,
        lump: int = 1,
        fails: str = "",
        clock: Stepped | None = None,
    ) -> None:
        self.info, self.model, self.lump, self.fails, self.clock = {**INFO, **info}, model, lump, fails, clock
        self.pieces = 0
        self.asked: list[str] = []

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = handler.path
        self.asked.append(path)
        body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length", 0))) or b"{}")
        if path in ("/server_info", "/model_info"):
            return self._say(handler, self.info if path == "/server_info" else self.model)
        if body.get("stream"):
            return self._stream(handler, body)
        if path == "/generate":
            meta = {"spec_correct_drafts_histogram": [1, 2, 1], "finish_reason": {"type": "length"}}
            return self._say(handler, {"output_ids": [*body["input_ids"], *range(6)], "meta_info": meta})
        return self._say(handler, {})

    def _say(self, handler: BaseHTTPRequestHandler, said: object) -> None:
        text = json.dumps(said).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(text)))
        handler.end_headers()
        handler.wfile.write(text)

    def _stream(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        """The first request begins three steps before the others."""
        handler.send_response(200)
        handler.end_headers()
        new = body["sampling_params"]["max_new_tokens"]
        for step in range(1, new + 1):
            if self.clock is None:
                Event().wait(STEP_S)
            else:
                self.clock.step(self.pieces)
            for index, rid in enumerate(body["rid"]):
                count = step - (3 if index else 0)
                if count >= 1 and (count % self.lump == 0 or count == new):
                    said = {"meta_info": {"id": rid, "completion_tokens": count}}
                    handler.wfile.write(b"data: " + json.dumps(said).encode() + b"\n\n")
                    self.pieces += 1
            if self.fails == "error" and step == 2:
                handler.wfile.write(b'data: {"error": {"message": "too long"}}\n\n')
            if self.fails == "gone" and step == 2:
                return
        handler.wfile.write(b"data: [DONE]\n\n")


@pytest.fixture
def serve() -> Iterator[Callable[[Paper], str]]:
    with answering() as start:
        yield lambda paper: start(paper.answer)


@pytest.mark.parametrize("lump", [1, 4])
def test_steps_are_those_in_which_all_requests_decode(serve: Callable[[Paper], str], lump: int) -> None:
    clock = Stepped()
    plain = StreamedPlainServer(Server(serve(Paper({}, lump=lump, clock=clock))), 60.0, clock)
    steps = plain.steps([[1, 2], [1, 2, 3, 4]], 12)
    assert len(steps) <= 12 - 2 and all(step.batch_size == 2 for step in steps), "three steps were not of all"
    assert steps[0].context >= 3.0 + 3.0 and np.diff([step.context for step in steps]) == pytest.approx(1.0)
    measured = plain.measure([[1, 2], [1, 2, 3, 4]])
    # In lumps, two of 13 steps are of the first one, of which a step's time had passed when all had begun.
    assert measured.seconds == pytest.approx(STEP_S * (1.0 if lump == 1 else (2 / lump + 11) / 13))
    assert measured.context == 3.0


def test_a_stream_that_breaks_off_is_one_error(serve: Callable[[Paper], str]) -> None:
    for fails, kind, words in (("gone", ServerGone, "before the end"), ("error", ServerFailed, "too long")):
        with pytest.raises(kind, match=words):
            StreamedPlainServer(Server(serve(Paper({}, fails=fails))), 60.0).measure([[1, 2]])
    with pytest.raises(ServerFailed, match="--max-running-requests"):
        StreamedPlainServer(Server(serve(Paper({}))), 60.0).steps([[1], [2]], 1)


def test_a_running_server_is_paused_while_the_other_is_measured(
    serve: Callable[[Paper], str], caplog: pytest.LogCaptureFixture
) -> None:
    ours, beside = Paper(DRAFTS), Paper({})
    engine = attach_engine(serve(ours), plain_url=serve(beside), timeout_s=60.0)
    assert "no speedup" not in caplog.text and "no plan per round" in caplog.text
    session = engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0)
    sample = session.measure_plain()
    assert sample is not None and sample.batch_size == 2 and sample.context == 6.0, "half of what is to come"
    assert list(session.context_lengths) == [6, 6]
    assert ours.asked[-2:] == ["/pause_generation", "/continue_generation"] and beside.asked[-1] == "/generate"
    beside.fails = "gone"
    with pytest.raises(ServerGone, match="before the end"):
        session.measure_plain()
    assert ours.asked[-2:] == ["/pause_generation", "/continue_generation"], "it goes on all the same"
    with pytest.raises(ValueError, match="baseline="):
        engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0, plain=True)
    engine.close()


def test_without_a_baseline_it_is_said(serve: Callable[[Paper], str], caplog: pytest.LogCaptureFixture) -> None:
    attach_engine(serve(Paper(DRAFTS)), timeout_s=60.0).close()
    assert "no plain_url" in caplog.text


@pytest.mark.parametrize(
    ("info", "model", "words"),
    [
        (DRAFTS, MODEL, "without speculation, but http://.* EAGLE3"),
        ({}, {**MODEL, "model_path": "b/model"}, "model_path is 'b/model' at http://.* and 'a/model' at"),
        ({}, {**MODEL, "weight_version": "tuned"}, "weight_version is 'tuned'"),
        ({"dtype": "bfloat16"}, MODEL, "dtype is 'bfloat16'"),
        ({"version": "0.5.20"}, MODEL, "version is '0.5.20'"),
    ],
)
def test_another_model_is_no_baseline(
    serve: Callable[[Paper], str], info: dict[str, Any], model: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=f"plain_url must .*{words}"):
        attach_engine(serve(Paper(DRAFTS)), plain_url=serve(Paper(info, model)))


def test_a_swapped_draft_is_still_the_same_model(serve: Callable[[Paper], str]) -> None:
    ours = Paper(DRAFTS, {**MODEL, "weight_version": "12"})
    attach_engine(serve(ours), plain_url=serve(Paper({}))).close()
    with pytest.raises(ServerError, match="is it running"):
        attach_engine(serve(ours), plain_url="http://127.0.0.1:9")


class Unmeasured(LocalEngine):
    """The local engine without plain decoding, as a server is that was found running alone."""

    def start(self, *args: Any, **kwargs: Any) -> Any:
        session: Any = super().start(*args, **kwargs)
        session.measure_plain = lambda: None
        return session


def test_plan_0_stands_in_where_nobody_measures_plain_decoding(caplog: pytest.LogCaptureFixture) -> None:
    listed = [Request(p, 24, 0.0, ignore_eos=True) for p in prompts(4, 4)]
    engine = Unmeasured(tiny_target(), tiny_draft(), max_context=64)
    common: dict[str, Any] = {
        "engine": engine,
        "workload": Listed(listed),
        "batch_size": 2,
        "max_rounds": 6,
        "allow_parallel": True,
    }
    env = gym.make("SpecRL/SpecDecode-v0", plans="0,2", **common)
    with caplog.at_level(logging.WARNING):
        env.reset(seed=0)
        told = [env.step(1) for _ in range(6)]
    assert caplog.text.count(NO_PLAIN) == 1
    for _, reward, _, _, info in told:
        assert np.isfinite(float(reward))
        assert np.isnan([info[name] for name in ("t0_s", "t0_error_s", "episode_speedup")]).all()
        assert info["plan0_s"] > 0.0 and info["episode_speedup_over_plan0"] > 0.0 and info["plan"] == "2/1/3"
    env.close()
    env = gym.make("SpecRL/SpecDecode-v0", plans=(Plan(2),), **common)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="or plain_url= for a running server"):
        env.step(0)
    env.close()
