"""The calls of a hot swap and their order, and what happens if a server refuses or does not answer."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import tiny
import torch
from http_help import Serve, answer_json, read_json

from specrl.core.clock import WallClock
from specrl.models.draft import Draft, new_draft
from specrl.sglang.client.hot_swap import checksum, encode, push, served_names
from specrl.sglang.client.http import SwapError

ORDER = ["/server_info", "/pause_generation", "/begin_weight_update", "/update_weights_from_tensor"]
RELEASE = ["/end_weight_update", "/continue_generation"]


class SwapServer:
    """Answers the calls of a hot swap like an SGLang server that holds `draft`, and records them.

    `fails` is a path that it answers with status `status`; `info` are entries of /server_info.
    """

    def __init__(self, serve: Serve, draft: Draft, fails: str = "", status: int = 500, **info: object) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.keys: set[str | None] = set()
        self.dead = False  # closes every connection
        weights = {n: t for n, t in draft.tensors.items() if n not in ("d2t", "t2d")}
        checksums = {f"draft.{name}": checksum(tensor) for name, tensor in served_names(weights).items()}
        checksums["draft.model.embed_tokens.weight"] = "the target's"
        answers = {
            "/server_info": {"speculative_algorithm": "EAGLE3", "device": "cpu", "tp_size": 1, **info},
            "/weights_checker": {"ranks": [{"checksums": checksums, "per_gpu_checksum": "all"}]},
        }

        def answer(handler: BaseHTTPRequestHandler) -> None:
            if self.dead:
                raise ConnectionError
            body = read_json(handler)
            if body or handler.path != ORDER[-1]:  # an incomplete upload was canceled
                self.calls.append((handler.path, body))
                self.keys.add(handler.headers.get("Authorization"))
                value = answers.get(handler.path, {"success": True, "message": "no"})
                answer_json(handler, value, status if handler.path == fails else 200)

        self.url = serve(answer)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


Make = Callable[..., SwapServer]


@pytest.fixture
def draft() -> Draft:
    return new_draft(tiny.tiny_target(), draft_vocab_size=8, aux_layers=tiny.AUX_LAYERS, seed=3)


@pytest.fixture
def make(draft: Draft, serve: Serve) -> Make:
    return lambda holds=draft, **options: SwapServer(serve, holds, **options)


def test_the_draft_alone_is_swapped_in_place(draft: Draft, make: Make) -> None:
    server = make()
    swap = push(server.url, draft.tensors, version=7, like=draft, api_key="secret")
    assert server.paths == [*ORDER, *RELEASE, "/weights_checker"] and server.keys == {"Bearer secret"}
    bodies = dict(server.calls)
    assert bodies["/pause_generation"] == {"mode": "in_place"}
    update = bodies["/update_weights_from_tensor"]
    assert bodies["/begin_weight_update"]["selector"] == bodies["/weights_checker"]["selector"] == "draft"
    assert (update["selector"], update["flush_cache"], update["weight_version"]) == ("draft", False, "7")
    assert (swap.version, swap.exact, swap.checksum) == (7, True, "all") and 0 < swap.stopped_s <= swap.pause_s
    assert [f"/{name}" for name in swap.calls_s] == [*ORDER[1:], *RELEASE] and min(swap.calls_s.values()) > 0
    assert swap.bytes == sum(t.nbytes for n, t in draft.tensors.items() if n not in ("d2t", "t2d"))


class Confined(pickle.Unpickler):
    """Reads the names that SGLang's SafeUnpickler accepts and that we send, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "types.SimpleNamespace", "torch.Size", "torch._utils._rebuild_tensor_v2", "collections.OrderedDict",
            "torch.float32", "torch.bfloat16", "torch.serialization._get_layout",
        }  # fmt: skip
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        assert f"{module}.{name}" in allowed
        return super().find_class(module, name)


def test_what_is_sent_is_one_flat_tensor_with_names() -> None:
    sent = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0], dtype=torch.bfloat16), "c": torch.tensor([4.0])}
    (text,) = json.loads(encode(sent, 1))["serialized_named_tensors"]
    bucket = Confined(io.BytesIO(base64.b64decode(text))).load()
    received = {
        m.name: bucket["flattened_tensor"][m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)
        for m in bucket["metadata"]
    }
    assert received.keys() == sent.keys() and all(torch.equal(received[n], t) for n, t in sent.items())


@pytest.mark.parametrize("fails", [*ORDER[1:], *RELEASE])
def test_a_server_that_refuses_is_resumed(draft: Draft, make: Make, fails: str) -> None:
    server = make(fails=fails)
    with pytest.raises(SwapError, match=f"{fails} failed .500: .*see its log"):
        push(server.url, draft.tensors, version=1, like=draft)
    assert server.paths[-2:] == RELEASE and "/weights_checker" not in server.paths


def test_other_weights_in_the_server_are_noticed(draft: Draft, make: Make) -> None:
    other = new_draft(tiny.tiny_target(), draft_vocab_size=8, aux_layers=tiny.AUX_LAYERS, seed=4)
    with pytest.raises(SwapError, match="qkv_proj.weight differs"):
        push(make(other).url, draft.tensors, version=1, like=draft)


@pytest.mark.parametrize(
    ("options", "error", "rule"),
    [
        ({"speculative_algorithm": None}, ValueError, "algorithm of a server must be EAGLE3"),
        ({"tp_size": 2}, ValueError, "tp_size of a server must be 1"),
        ({"fails": "/server_info", "status": 401}, SwapError, "401.*api_key="),
    ],
)
def test_a_server_that_cannot_swap_gets_no_weights(
    draft: Draft, make: Make, options: dict[str, Any], error: type[Exception], rule: str
) -> None:
    server = make(**options)
    with pytest.raises(error, match=rule):
        push(server.url, draft.tensors, version=1, like=draft)
    assert server.paths == ["/server_info"]


def test_weights_that_do_not_fit_are_refused_before_anything_is_sent(draft: Draft, make: Make) -> None:
    server, good = make(), draft.tensors
    for changes, rule in (
        ({"d2t": good["d2t"] + 1}, "d2t must be"),
        ({"fc.weight": good["fc.weight"].double()}, "torch.float64"),
        ({"norm.weight": torch.ones(3)}, "norm.weight"),
        ({"embed_tokens.weight": torch.ones(3)}, "embed_tokens.weight"),
    ):
        with pytest.raises(ValueError, match=rule):
            push(server.url, {**good, **changes}, version=1, like=draft)
    with pytest.raises(ValueError, match="like="):
        push(server.url, good, version=1)
    assert set(server.paths) == {"/server_info"}


def test_a_silent_server_ends_the_swap_in_time(draft: Draft) -> None:
    clock = WallClock()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = clock.now()
        with pytest.raises(SwapError, match="timeout_s"):
            push(f"http://127.0.0.1:{silent.getsockname()[1]}", draft.tensors, version=1, like=draft, timeout_s=0.3)
    assert clock.now() - began < 60.0
