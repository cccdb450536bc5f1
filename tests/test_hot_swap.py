"""The calls of a hot swap and their order, and what happens if a server refuses or does not answer."""

from __future__ import annotations

import base64
import io
import json
import pickle
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
import tiny
import torch

from specrl.core.clock import WallClock
from specrl.models.draft import Draft, new_draft
from specrl.sglang.client.hot_swap import checksum, encode, push, served_names
from specrl.sglang.client.http import SwapError


class Fake:
    """A server that answers as SGLang does, and records its calls.

    Args:
        draft: the draft that it seems to hold.
        fails: path -> status that it answers instead of 200.
    """

    def __init__(self, draft: Draft, fails: dict[str, int], **facts: object) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.keys: set[str | None] = set()
        fake = self
        known = {n: t for n, t in draft.tensors.items() if n not in ("d2t", "t2d")}
        hashes = {f"draft.{name}": checksum(tensor) for name, tensor in served_names(known).items()}
        hashes["draft.model.embed_tokens.weight"] = "the target's"
        answers = {
            "/server_info": {"speculative_algorithm": "EAGLE3", "device": "cpu", "tp_size": 1, **facts},
            "/weights_checker": {"ranks": [{"checksums": hashes, "per_gpu_checksum": "all"}]},
        }

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if len(body) < length:  # an upload that was given up
                    return
                fake.calls.append((self.path, json.loads(body) if body else None))
                fake.keys.add(self.headers.get("Authorization"))
                said = json.dumps(answers.get(self.path, {"success": True, "message": "no"})).encode()
                self.send_response(fails.get(self.path, 200))
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.block_on_close = False  # a connection that is kept must not delay the end
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]


@pytest.fixture
def draft() -> Draft:
    return new_draft(tiny.tiny_target(), draft_vocab_size=8, aux_layers=tiny.AUX_LAYERS, seed=3)


@pytest.fixture
def fakes(draft: Draft) -> Iterator[Any]:
    made: list[Fake] = []

    def make(fails: dict[str, int] | None = None, holds: Draft = draft, **facts: object) -> Fake:
        made.append(Fake(holds, fails or {}, **facts))
        return made[-1]

    yield make
    for fake in made:
        fake.server.shutdown()
        fake.server.server_close()


ORDER = ["/server_info", "/pause_generation", "/begin_weight_update", "/update_weights_from_tensor"]
RELEASE = ["/end_weight_update", "/continue_generation"]


def test_the_draft_alone_is_swapped_in_place(draft: Draft, fakes: Any) -> None:
    fake = fakes()
    swap = push(fake.url, draft.tensors, version=7, like=draft, api_key="secret")
    assert fake.paths == [*ORDER, *RELEASE, "/weights_checker"] and fake.keys == {"Bearer secret"}
    said = dict(fake.calls)
    assert said["/pause_generation"] == {"mode": "in_place"}
    update = said["/update_weights_from_tensor"]
    assert said["/begin_weight_update"]["selector"] == said["/weights_checker"]["selector"] == "draft"
    assert (update["selector"], update["flush_cache"], update["weight_version"]) == ("draft", False, "7")
    assert (swap.version, swap.exact, swap.checksum) == (7, True, "all") and 0 < swap.stopped_s <= swap.pause_s
    assert [f"/{name}" for name in swap.calls_s] == [*ORDER[1:], *RELEASE] and min(swap.calls_s.values()) > 0
    assert swap.bytes == sum(t.nbytes for n, t in draft.tensors.items() if n not in ("d2t", "t2d"))


class Confined(pickle.Unpickler):
    """Reads what SGLang's SafeUnpickler lets through, and this is all of it that we send."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            "types.SimpleNamespace",
            "torch.Size",
            "torch._utils._rebuild_tensor_v2",
            "collections.OrderedDict",
            "torch.float32",
            "torch.bfloat16",
        }
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), weights_only=True)
        if (module, name) == ("torch.serialization", "_get_layout") or f"{module}.{name}" in allowed:
            return super().find_class(module, name)
        raise AssertionError(f"{module}.{name} is sent")


def test_what_is_sent_is_one_flat_tensor_with_names() -> None:
    sent = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([3.0], dtype=torch.bfloat16), "c": torch.tensor([4.0])}
    (text,) = json.loads(encode(sent, 1))["serialized_named_tensors"]
    bucket = Confined(io.BytesIO(base64.b64decode(text))).load()
    found = {
        m.name: bucket["flattened_tensor"][m.start_idx : m.end_idx].view(m.dtype).reshape(m.shape)
        for m in bucket["metadata"]
    }
    assert found.keys() == sent.keys() and all(torch.equal(found[n], t) for n, t in sent.items())


@pytest.mark.parametrize("fails", [*ORDER[1:], *RELEASE])
def test_a_server_that_refuses_is_told_to_go_on(draft: Draft, fakes: Any, fails: str) -> None:
    fake = fakes({fails: 500})
    with pytest.raises(SwapError, match=f"{fails} failed .500: .*see its log"):
        push(fake.url, draft.tensors, version=1, like=draft)
    assert fake.paths[-2:] == RELEASE
    assert "/weights_checker" not in fake.paths


def test_a_server_that_wants_a_key_says_so(draft: Draft, fakes: Any) -> None:
    fake = fakes({"/server_info": 401})
    with pytest.raises(SwapError, match="401.*api_key="):
        push(fake.url, draft.tensors, version=1, like=draft)
    assert fake.paths == ["/server_info"]


def test_other_weights_in_the_server_are_noticed(draft: Draft, fakes: Any) -> None:
    other = new_draft(tiny.tiny_target(), draft_vocab_size=8, aux_layers=tiny.AUX_LAYERS, seed=4)
    with pytest.raises(SwapError, match="qkv_proj.weight differs"):
        push(fakes(holds=other).url, draft.tensors, version=1, like=draft)


@pytest.mark.parametrize("facts", [{"speculative_algorithm": None}, {"tp_size": 2}])
def test_a_server_that_cannot_swap_is_refused(draft: Draft, fakes: Any, facts: dict[str, object]) -> None:
    fake = fakes(**facts)
    with pytest.raises(ValueError, match="EAGLE3|tp_size must be 1"):
        push(fake.url, draft.tensors, version=1, like=draft)
    assert fake.paths == ["/server_info"]


def test_weights_that_do_not_fit_are_refused_before_anything_is_sent(draft: Draft, fakes: Any) -> None:
    fake = fakes()
    for weights, rule in (
        ({**draft.tensors, "d2t": draft.tensors["d2t"] + 1}, "d2t must be"),
        ({**draft.tensors, "fc.weight": draft.tensors["fc.weight"].double()}, "torch.float64"),
        ({**draft.tensors, "norm.weight": torch.ones(3)}, "norm.weight"),
        ({**draft.tensors, "embed_tokens.weight": torch.ones(3)}, "embed_tokens.weight"),
    ):
        with pytest.raises(ValueError, match=rule):
            push(fake.url, weights, version=1, like=draft)
    assert set(fake.paths) == {"/server_info"}


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_asked(draft: Draft) -> None:
    clock = WallClock()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = clock.now()
        with pytest.raises(SwapError, match="timeout_s"):
            push(f"http://127.0.0.1:{silent.getsockname()[1]}", draft.tensors, version=1, like=draft, timeout_s=0.3)
    assert clock.now() - began < 60.0
