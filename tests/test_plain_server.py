"""Plain decoding on a server without our plugin: steps timed by the arrival of tokens, and the same model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from http_help import Serve, answer_json, read_json
from tiny import Listed, lively_draft, prompts, tiny_target

import specrl  # noqa: F401 - registers the environments
from specrl.core.clock import VirtualClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.decoding.engine import LocalEngine
from specrl.envs.spec_decode import NO_PLAIN
from specrl.sglang.client.factory import attach_engine
from specrl.sglang.client.http import ServerError, ServerFailed, ServerGone
from specrl.sglang.client.plain_server import StreamedPlainServer

STEP_S = 0.01
INFO = {"version": "0.5.23", "dtype": "float32", "quantization": None, "tp_size": 1}
DRAFTS = {
    "speculative_algorithm": "EAGLE3", "speculative_num_steps": 2, "speculative_eagle_topk": 1,
    "speculative_num_draft_tokens": 3,
}  # fmt: skip
MODEL = {"model_path": "a/model", "weight_version": "default"}


class Fake:
    """A server with this information. It records its calls; if it `dies`, it closes streams early."""

    def __init__(self, info: Mapping[str, Any] = {}, model: Mapping[str, Any] = {}) -> None:
        self.answers = {"/server_info": {**INFO, **info}, "/model_info": {**MODEL, **model}}
        self.calls: list[str] = []
        self.dies = False

    def __call__(self, handler: BaseHTTPRequestHandler) -> None:
        self.calls.append(handler.path)
        body = read_json(handler)
        if not body.get("stream"):
            return answer_json(handler, self.answers.get(handler.path, {}))
        handler.send_response(200)
        handler.end_headers()
        for piece in pieces(body):
            handler.wfile.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
            if self.dies:
                return
        handler.wfile.write(b"data: [DONE]\n\n")


def pieces(body: Any, lump: int = 1, step: Callable[[], object] = lambda: None) -> Iterator[Any]:
    """The pieces of a streamed answer, `lump` tokens at a time; the first request begins three steps before others."""
    new = body["sampling_params"]["max_new_tokens"]
    for steps in range(1, new + 1):
        step()
        for index, rid in enumerate(body["rid"]):
            count = steps - (3 if index else 0)
            if count >= 1 and (count % lump == 0 or count == new):
                yield {"meta_info": {"id": rid, "completion_tokens": count}}


def streamed(lump: int = 1, *, error: str = "") -> StreamedPlainServer:
    """A plain server whose tokens arrive a step apart on a virtual clock, without HTTP."""
    clock = VirtualClock()

    def stream(path: str, body: Any) -> Iterator[Any]:
        yield from [{"error": {"message": error}}] if error else pieces(body, lump, lambda: clock.advance(STEP_S))

    client: Any = SimpleNamespace(url="http://x", stream=stream)
    server: Any = SimpleNamespace(client=client, timeout_s=60.0)
    return StreamedPlainServer(server, clock)


@pytest.mark.parametrize("lump", [1, 4])
def test_steps_are_those_in_which_all_requests_decode(lump: int) -> None:
    plain = streamed(lump)
    steps = plain.steps([[1, 2], [1, 2, 3, 4]], 12)
    assert len(steps) <= 12 - 2 and all(step.batch_size == 2 for step in steps), "three steps were of one request"
    assert steps[0].context >= 3.0 + 3.0 and np.diff([step.context for step in steps]) == pytest.approx(1.0)
    measured = plain.measure([[1, 2], [1, 2, 3, 4]])
    # In lumps, two of 13 steps are of the first lump; one step of it had passed when all requests had begun.
    assert measured.seconds == pytest.approx(STEP_S * (1.0 if lump == 1 else (2 / lump + 11) / 13))
    assert measured.context == 3.0


def test_an_error_or_a_stream_that_is_too_short_is_one_error() -> None:
    with pytest.raises(ServerFailed, match="too long"):
        streamed(error="too long").steps([[1, 2]], 1)
    with pytest.raises(ServerFailed, match="--max-running-requests"):
        streamed().steps([[1], [2]], 1)


def test_a_running_server_is_paused_while_the_other_is_measured(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    ours, beside = Fake(DRAFTS), Fake()
    url = serve(ours)
    engine = attach_engine(url, plain_url=serve(beside), timeout_s=60.0)
    assert "no speedup" not in caplog.text and "no plan per round" in caplog.text
    session = engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0)
    sample = session.measure_plain()
    assert sample is not None and sample.batch_size == 2 and sample.context == 6.0, "half of the output"
    assert list(session.context_lengths) == [6, 6]
    assert ours.calls[-2:] == ["/pause_generation", "/continue_generation"] and beside.calls[-1] == "/generate"
    beside.dies = True
    with pytest.raises(ServerGone, match="before the end"):
        session.measure_plain()
    assert ours.calls[-2:] == ["/pause_generation", "/continue_generation"], "it is resumed after an error too"
    with pytest.raises(ValueError, match="baseline="):
        engine.start(Listed([Request((5, 6), 8)]), batch_size=2, seed=0, plain=True)
    engine.close()
    attach_engine(url).close()
    assert "no speedup" in caplog.text, "without a baseline"


@pytest.mark.parametrize(
    ("info", "model", "words"),
    [
        (DRAFTS, {}, "without speculation, but http://.* EAGLE3"),
        ({}, {"model_path": "b/model"}, "model_path is 'b/model' at http://.* and 'a/model' at"),
        ({}, {"weight_version": "tuned"}, "weight_version is 'tuned'"),
        ({"dtype": "bfloat16"}, {}, "dtype is 'bfloat16'"),
        ({"version": "0.5.20"}, {}, "version is '0.5.20'"),
    ],
)
def test_another_model_is_no_baseline(serve: Serve, info: dict[str, Any], model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"plain_url must .*{words}"):
        attach_engine(serve(Fake(DRAFTS)), plain_url=serve(Fake(info, model)))


def test_a_swapped_draft_is_still_the_same_model(serve: Serve) -> None:
    ours = serve(Fake(DRAFTS, {"weight_version": "12"}))
    attach_engine(ours, plain_url=serve(Fake())).close()
    with pytest.raises(ServerError, match="is it running"):
        attach_engine(ours, plain_url="http://127.0.0.1:9")


class Unmeasured(LocalEngine):
    """The local engine without plain decoding, as a running server without a baseline."""

    def start(self, *args: Any, **kwargs: Any) -> Any:
        session: Any = super().start(*args, **kwargs)
        session.measure_plain = lambda: None
        return session


def test_plan_0_is_the_baseline_if_plain_decoding_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    common: dict[str, Any] = {
        "engine": Unmeasured(tiny_target(), lively_draft(), max_context=64),
        "workload": Listed([Request(p, 24, 0.0, ignore_eos=True) for p in prompts(4, 4)]),
        "batch_size": 2,
        "max_rounds": 6,
        "allow_parallel": True,
    }
    env = gym.make("SpecRL/SpecDecode-v0", plans="0,2", **common)
    with caplog.at_level(logging.WARNING):
        env.reset(seed=0)
        steps = [env.step(1) for _ in range(6)]
    assert caplog.text.count(NO_PLAIN) == 1
    for _, reward, _, _, info in steps:
        assert np.isfinite(float(reward))
        assert np.isnan([info[name] for name in ("t0_s", "t0_error_s", "episode_speedup")]).all()
        assert info["plan0_s"] > 0.0 and info["episode_speedup_over_plan0"] > 0.0 and info["plan"] == "2/1/3"
    env.close()
    env = gym.make("SpecRL/SpecDecode-v0", plans=(Plan(2),), **common)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="plain_url="):
        env.step(0)
    env.close()
