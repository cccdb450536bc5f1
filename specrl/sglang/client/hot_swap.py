"""Replace the draft weights of a running SGLang server without dropping requests; checked before and after.

The calls are those of SGLang 0.5.23, with the selector 'draft'. All bytes of the weights but the last one are sent
before the pause. SGLang reads weights as a pickle of tensors and names only, which is written here, and never read. It
contains the weights themselves, because tensors in shared memory can end a server.
"""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from specrl.core.checks import require
from specrl.core.clock import Clock, WallClock
from specrl.models.checkpoint import check_tensors, expected_draft_tensors
from specrl.models.config import DraftArchitecture
from specrl.models.draft import Draft
from specrl.models.hf_config import read_draft_config
from specrl.sglang.client.http import Client, ServerError, SwapError
from specrl.sglang.client.watchdog import resume, resume_on_crash

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_VOCABULARY_MAPS = ("d2t", "t2d")
_RESUME_S = 5.0  # for each of the two calls that let a server go on after a failure
_PADDED_ROWS = 64  # SGLang pads a head to a multiple of so many rows


@dataclass(frozen=True, slots=True)
class Swap:
    """A hot swap that succeeded.

    It is `exact` if the checksum of every tensor was computed here too and was the same. Only servers on a CPU use a
    checksum that can be computed without SGLang; on other devices, check the acceptance.
    """

    version: int  # of the weights that serve now; requests carry it as `weight_version`
    calls_s: Mapping[str, float]  # seconds of each of the five calls, by name and in order
    bytes: int  # size of the weights
    checksum: str  # of the server's draft, computed by the server
    exact: bool

    @property
    def pause_s(self) -> float:
        """Seconds from the request to pause to the answer to the request to go on, the running round included."""
        return sum(self.calls_s.values())

    @property
    def stopped_s(self) -> float:
        """Seconds of the last three calls, in which the server certainly decodes nothing."""
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
    """Let a running SGLang server serve these draft weights, in the middle of its requests.

    Args:
        url: URL of the server, such as http://127.0.0.1:30000.
        weights: every tensor of the draft by SGLang's names, float32, bfloat16 or float16. The vocabulary maps must be
            those that serve, and are not sent.
        version: version of the weights.
        like: the draft that the server was started with, or its directory; None: the directory that the server names.
        api_key: API key of the server; None: it needs none.
        timeout_s: seconds for all calls together. After a timeout, two more calls let the server go on.

    Raises:
        ValueError: a tensor is missing, extra, not finite, or has another shape or dtype; the vocabulary differs; or
            the server cannot swap weights. Nothing was sent.
        SwapError: the server refused, died, took too long, or holds other weights than those that were sent.
    """
    client, clock = Client(url, api_key=api_key, timeout_s=timeout_s), WallClock()
    deadline = clock.now() + timeout_s
    try:
        info = client.get("/server_info")
        algorithm = info.get("speculative_algorithm")
        require(algorithm == "EAGLE3", "the algorithm of a server", "EAGLE3 to swap its draft", algorithm)
        for name in ("tp_size", "dp_size", "pp_size"):
            require(int(info.get(name) or 1) == 1, f"{name} of a server", "1 to swap its draft", info.get(name))
        _check_weights(weights, info.get("speculative_draft_model_path") if like is None else like, version)
        sent = {name: t.detach().cpu().contiguous() for name, t in weights.items() if name not in _VOCABULARY_MAPS}
        calls_s = _swap(client, encode(sent, version), clock, deadline)
        query = {"action": "checksum", "selector": "draft"}
        checked = client.post("/weights_checker", query, timeout_s=deadline - clock.now())["ranks"][0]
    except SwapError:
        raise
    except ServerError as error:
        raise SwapError(f"draft version {version} was not swapped in: {error}") from error
    exact = str(info.get("device")) == "cpu"
    if exact:
        _compare({name.removeprefix("draft."): digest for name, digest in checked["checksums"].items()}, sent)
    return Swap(version, calls_s, sum(t.nbytes for t in sent.values()), checked["per_gpu_checksum"], exact)


def _swap(client: Client, body: bytes, clock: Clock, deadline: float) -> dict[str, float]:
    """Pause, update and continue; return the seconds of each call."""
    calls_s: dict[str, float] = {}

    def timed(path: str, call: Callable[[], Any]) -> None:
        began = clock.now()
        answer = call()
        if isinstance(answer, dict) and answer.get("success") is False:
            raise SwapError(f"{client.url}/{path} must succeed, but {answer.get('message')}; see its log")
        calls_s[path] = clock.now() - began

    def post(path: str, fields: object) -> None:
        timed(path, lambda: client.post(f"/{path}", fields, timeout_s=deadline - clock.now()))

    # The watchdog starts while the server receives the upload, so that the pause is as short as possible.
    with (
        client.upload("/update_weights_from_tensor", body, timeout_s=deadline - clock.now()) as finish,
        resume_on_crash(client.url, client.headers, client.timeout_s) as resumed,
    ):
        try:
            post("pause_generation", {"mode": "in_place"})
            post("begin_weight_update", {"selector": "draft"})
            timed("update_weights_from_tensor", finish)
            post("end_weight_update", {})
            post("continue_generation", {"torch_empty_cache": False})
        except BaseException:
            resume(client.url, client.headers, _RESUME_S)
            raise
        finally:
            resumed()
    return calls_s


def recover(url: str, *, api_key: str | None = None, timeout_s: float = 10.0) -> None:
    """Resume a server that was left paused, perhaps in the middle of a weight update."""
    resume(url, Client(url, api_key=api_key).headers, timeout_s)


def _check_weights(weights: Mapping[str, Tensor], like: Draft | Path | str | None, version: int) -> None:
    """Raise a ValueError for weights that do not fit the draft that serves."""
    config, d2t = _served_draft(like)
    name = f"draft version {version}"
    check_tensors(weights, expected_draft_tensors(config), what=name, optional=("t2d",))
    wrong = [f"{n} is {t.dtype}" for n, t in weights.items() if n not in _VOCABULARY_MAPS and t.dtype not in _DTYPES]
    if wrong:
        raise ValueError(f"{name}: weights must be float32, bfloat16 or float16, but {wrong[0]}; cast them")
    if d2t is not None and not torch.equal(weights["d2t"].cpu().long(), d2t):
        raise ValueError(f"{name}: d2t must be that of the running server, but differs; start a server with it")


def _served_draft(like: Draft | Path | str | None) -> tuple[DraftArchitecture, Tensor | None]:
    """Return the configuration and d2t, [Vd] int64, of the draft that serves."""
    if isinstance(like, Draft):
        return like.config, like.tensors.get("d2t")
    if like is None or not (Path(like) / "config.json").is_file():
        raise ValueError(
            f"the draft that serves must be known, but {str(like)!r} is not a directory with one; pass like="
        )
    config = read_draft_config(Path(like))
    if config.draft_vocab_size == config.vocab_size:
        return config, None
    with safe_open(Path(like) / "model.safetensors", framework="pt") as file:
        return config, file.get_tensor("d2t").long()


def encode(weights: Mapping[str, Tensor], version: int) -> bytes:
    """Return the body of /update_weights_from_tensor: contiguous tensors on the CPU as SGLang's flattened bucket."""
    ordered = sorted(weights.items(), key=lambda item: -item[1].element_size())  # so that each tensor is aligned
    metadata, start = [], 0
    for name, tensor in ordered:
        span = {"start_idx": start, "end_idx": start + tensor.nbytes, "numel": tensor.nbytes}
        metadata.append(SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, **span))
        start += tensor.nbytes
    flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in ordered])
    bucket = pickle.dumps({"flattened_tensor": flat, "metadata": metadata}, protocol=4)
    fields = {
        "serialized_named_tensors": [base64.b64encode(bucket).decode()],
        "load_format": "flattened_bucket",
        "selector": "draft",
        "flush_cache": False,
        "weight_version": str(version),
    }
    return json.dumps(fields).encode()


def served_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the names, stacking and padding of SGLang's model."""
    rest = dict(weights)
    head = rest.pop("lm_head.weight")
    served = {"lm_head.weight": torch.nn.functional.pad(head, (0, 0, 0, -len(head) % _PADDED_ROWS))}
    for stack, parts in {"self_attn.qkv": ("q", "k", "v"), "mlp.gate_up": ("gate", "up")}.items():
        module = stack.split(".")[0]
        stacked = [rest.pop(f"midlayer.{module}.{part}_proj.weight") for part in parts]
        served[f"model.layers.0.{stack}_proj.weight"] = torch.cat(stacked)
    return served | {"model." + name.replace("midlayer.", "layers.0."): tensor for name, tensor in rest.items()}


def _compare(checksums: Mapping[str, str], weights: Mapping[str, Tensor]) -> None:
    """Raise a SwapError if the server holds other weights in every dtype."""
    for name, tensor in served_names(weights).items():
        if checksums.get(name) not in {checksum(tensor.to(dtype)) for dtype in _DTYPES}:
            raise SwapError(f"the server must hold the weights that were sent, but its {name} differs; push them again")


def checksum(tensor: Tensor) -> str:
    """Return SGLang's checksum of a tensor on a CPU."""
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
