"""New draft weights for a server that serves: paused in place, the draft's alone, checked before and after.

SGLang 0.5.23's way: /pause_generation (in place) → /begin_weight_update → /update_weights_from_tensor →
/end_weight_update → /continue_generation, each with the selector 'draft'. Requests stay where they are and go on with
the cache that they have. The weights are on their way before the server is paused, but for their last byte.

SGLang reads weights as a pickle that its own unpickler confines to tensors and names; ours is written here, of one flat
tensor, and none is ever read. Its bytes hold the weights themselves: tensors in shared memory can end a server that
cannot open them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specrl.models.checkpoint import check_tensors, expected_draft_tensors
from specrl.models.config import DraftConfig
from specrl.models.draft import Draft
from specrl.models.hf_config import read_draft_config
from specrl.sglang.client import watchdog_process as guard
from specrl.sglang.client.errors import SwapError
from specrl.sglang.client.swap_connection import Line, headers
from specrl.sglang.client.watchdog import standing_by

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAPS = ("d2t", "t2d")
_LAST_WORD_S = 5.0  # for each of the two calls that have a server go on, whatever time was left
_GO_ON = {"torch_empty_cache": False}  # nothing of a pause in place is there to be freed
_ROWS = 64  # SGLang pads a head to a multiple of so many


@dataclass(frozen=True, slots=True)
class Swap:
    """A hot swap that succeeded.

    Attributes:
        version: of the weights that serve now; requests carry it as `weight_version`.
        calls_s: seconds that each of the five calls took, by its name, in their order.
        bytes: of weights.
        checksum: of the draft, by the server.
        exact: whether every tensor's checksum was computed here too, and was the same. Only servers on a CPU hash in
            a way that can be repeated without SGLang; elsewhere look at acceptance.
    """

    version: int
    calls_s: Mapping[str, float]
    bytes: int
    checksum: str
    exact: bool

    @property
    def pause_s(self) -> float:
        """Seconds from asking for the pause until the server had been told to go on.

        The round in flight when the pause was asked for is part of them; the server takes the second call after it.
        """
        return sum(self.calls_s.values())

    @property
    def stopped_s(self) -> float:
        """Those of them in which the server surely decoded nothing: the last three calls."""
        return sum(list(self.calls_s.values())[2:])


def push(
    url: str,
    weights: Mapping[str, Tensor],
    *,
    version: int,
    like: Draft | Path | str | None = None,
    api_key: str | None = None,
    timeout_s: float = 30.0,
) -> Swap:
    """Have a running SGLang server serve these draft weights, in the middle of its requests.

    Args:
        url: of the server, such as http://127.0.0.1:30000.
        weights: every tensor of the draft by SGLang's names, float32, bfloat16 or float16; the vocabulary maps must be
            the ones that serve, and are not sent.
        version: of the weights.
        like: the draft that the server was started with, or its directory; None: the directory that the server names.
        api_key: of the server.
        timeout_s: for all of it. Even then the server is told to go on.

    Raises:
        ValueError: weights that do not fit the draft that serves, or a server that cannot swap; nothing was sent.
        SwapError: the server refused, died or took too long, or holds something else than what was sent.
    """
    with closing(Line(url, api_key, timeout_s)) as line:
        facts = line.ask("GET", "/server_info")
        line.close()  # the server would, while weights are encoded
        _check_server(facts)
        check_weights(weights, facts.get("speculative_draft_model_path") if like is None else like, version=version)
        sent = {name: t.detach().cpu().contiguous() for name, t in weights.items() if name not in _MAPS}
        calls_s = _swap(line, encode(sent, version))
        found, checksum = line.checksums()
    exact = str(facts.get("device")) == "cpu"
    if exact:
        _compare(found, sent)
    return Swap(version, calls_s, sum(t.nbytes for t in sent.values()), checksum, exact)


def _swap(line: Line, body: bytes) -> dict[str, float]:
    """Pause, update, go on; `Swap.calls_s`."""
    calls_s: dict[str, float] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        began = line.clock.now()
        call()
        calls_s[name] = line.clock.now() - began

    def ask(name: str, said: object) -> None:
        timed(name, lambda: line.ask("POST", f"/{name}", said))

    # While the guard starts, the server takes in the body; nothing but the calls is left for the pause.
    with (
        line.upload("/update_weights_from_tensor", body) as finish,
        standing_by(line.url, line.headers, line.timeout_s) as done,
    ):
        try:
            line.connect()
            try:
                ask("pause_generation", {"mode": "in_place"})
                ask("begin_weight_update", {"selector": "draft"})
                timed("update_weights_from_tensor", finish)
                ask("end_weight_update", {})
                ask("continue_generation", _GO_ON)
            except BaseException:
                guard.release(line.url, line.headers, _LAST_WORD_S)
                raise
        finally:
            done()
    return calls_s


def recover(url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
    """Have a server go on that somebody paused and left, a weight update open perhaps."""
    guard.release(url, headers(api_key), timeout_s)


def describe(url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> dict[str, Any]:
    """What the server says of itself (/server_info).

    Raises:
        SwapError: it does not.
    """
    with closing(Line(url, api_key, timeout_s)) as line:
        return line.ask("GET", "/server_info")


def check_weights(weights: Mapping[str, Tensor], like: Draft | Path | str | None, *, version: int) -> None:
    """Refuse what does not fit the draft that serves.

    Raises:
        ValueError: a tensor that is missing, extra, misshapen, not finite or of another dtype, or another vocabulary.
    """
    config, d2t = _serving(like)
    what = f"draft version {version}"
    check_tensors(weights, expected_draft_tensors(config), what=what, optional=("t2d",))
    wrong = [f"{n} is {t.dtype}" for n, t in weights.items() if n not in _MAPS and t.dtype not in _DTYPES]
    if wrong:
        raise ValueError(f"{what}: weights must be float32, bfloat16 or float16, but {wrong[0]}; cast them")
    if d2t is not None and not torch.equal(weights["d2t"].cpu().long(), d2t):
        raise ValueError(f"{what}: d2t is fixed while a server serves, but got another; start a server with it")


def _serving(like: Draft | Path | str | None) -> tuple[DraftConfig, Tensor | None]:
    """Configuration and d2t [Vd] int64 of the draft that serves."""
    if isinstance(like, Draft):
        return like.config, like.tensors.get("d2t")
    if like is None or not (Path(like) / "config.json").is_file():
        raise ValueError(
            f"the draft that serves must be known, but {str(like)!r} is no directory of one here; name it (like=...)"
        )
    config = read_draft_config(Path(like))
    if config.draft_vocab_size == config.vocab_size:
        return config, None
    with safe_open(Path(like) / "model.safetensors", framework="pt") as file:
        return config, file.get_tensor("d2t").long()


def _check_server(facts: Mapping[str, Any]) -> None:
    if facts.get("speculative_algorithm") != "EAGLE3":
        raise ValueError(
            f"a server must serve an EAGLE3 draft to swap it, but its algorithm is {facts.get('speculative_algorithm')}"
        )
    for name in ("tp_size", "dp_size", "pp_size"):
        if int(facts.get(name) or 1) > 1:
            raise ValueError(f"hot swap is known to work with one rank, but the server's {name} is {facts[name]}")


def encode(weights: Mapping[str, Tensor], version: int) -> bytes:
    """The body of /update_weights_from_tensor: SGLang's flattened bucket.

    Args:
        weights: on the CPU, contiguous.
        version: of the weights.
    """
    ordered = sorted(weights.items(), key=lambda item: -item[1].element_size())  # so that each begins aligned
    metadata, at = [], 0
    for name, tensor in ordered:
        place = {"start_idx": at, "end_idx": at + tensor.nbytes, "numel": tensor.nbytes}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **place))
        at += tensor.nbytes
    flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in ordered])
    bucket = pickle.dumps({"flattened_tensor": flat, "metadata": metadata}, protocol=4)
    said = {
        "serialized_named_tensors": [base64.b64encode(bucket).decode()],
        "load_format": "flattened_bucket",
        "selector": "draft",
        "flush_cache": False,
        "weight_version": str(version),
    }
    return json.dumps(said).encode()


def served_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the names and in the pieces in which SGLang's model holds them."""
    out: dict[str, Tensor] = {}
    stacks = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
    for stack, parts in stacks.items():
        module = stack.split(".")[0]
        out[f"model.layers.0.{stack}.weight"] = torch.cat([weights[f"midlayer.{module}.{p}.weight"] for p in parts])
    stacked = {part for parts in stacks.values() for part in parts}
    for name, tensor in weights.items():
        if name == "lm_head.weight":
            out[name] = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % _ROWS))
        elif name.split(".")[-2] not in stacked:
            out["model." + name.replace("midlayer.", "layers.0.")] = tensor
    return out


def _compare(found: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Raise a SwapError where the server holds something else than `weights`, in whichever dtype."""
    for name, tensor in served_names(weights).items():
        if found.get(name) not in {_digest(tensor.to(dtype)) for dtype in _DTYPES}:
            raise SwapError(f"the server must hold the weights that were sent, but its {name} differs; push them again")


def _digest(tensor: Tensor) -> str:
    """SGLang's hash of a tensor on a CPU."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
