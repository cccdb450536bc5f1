"""Traces of SGLang's rounds: the data that a draft learner needs for every verified token, accepted or rejected.

They are sent to one client over a channel (`specrl.sglang.plugin.transport`), as messages of three kinds. Their
`requests` are SGLang's ids.

- 'round': tensors of the B traced requests of a verification: tokens [B, n] int64 (row 0 is the last committed token),
  children and siblings [B, n] int64 (the links of a tree, -1: none; absent for a chain), logits [B, n, V] (of the
  target, after penalties), features [B, n, 3H] (hidden states of the three aux layers), path [B, num_steps + 1] int64
  (accepted rows, padded with -1) and positions [B] int64 (of row 0).
- 'prefill': tokens [T] int64 and features [T, 3H] of one request, from position `start` on.
- 'finished': requests that have ended.

Everything happens in the scheduler's thread, which never waits: ZeroMQ's own thread does the sending.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specrl.sglang.plugin.hooks import PREFILL, VERIFY, Failsafe, log, plan_name
from specrl.sglang.plugin.settings import Settings
from specrl.sglang.plugin.transport import Channel, Message

OPT_OUT = "specrl_traces"  # {"custom_params": {"specrl_traces": false}} in a request's sampling parameters
_IN_SOCKET = 4  # messages in ZeroMQ's own queue; all others wait in ours, whose bytes are bounded


class _Pending(NamedTuple):
    message: Message
    nbytes: int
    copied: torch.cuda.Event | None  # from the GPU


def _copy(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
    """Start to copy tensors to host memory, without waiting for the GPU."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return {name: tensor.clone() for name, tensor in tensors.items()}, None
    copies = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        copies[name].copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return copies, copied


class TraceQueue:
    """Messages that wait for the client of a channel, with at most `max_bytes` of tensors.

    Without a client nothing is stored. Waiting messages are dropped when the client goes or another one comes.
    """

    def __init__(self, endpoint: str, max_bytes: int) -> None:
        self.waiting_bytes = 0
        self._max_bytes, self._warned = max_bytes, False
        self._queue: deque[_Pending] = deque()
        self._channel = Channel(endpoint, _IN_SOCKET)
        self.close = self._channel.close

    @property
    def wanted(self) -> bool:
        """Whether there is a client."""
        return self._channel.connected

    @property
    def dropped(self) -> int:
        """Messages that did not fit."""
        return self._channel.dropped

    def put(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor] = {}) -> None:
        """Queue a message, whose tensors are copied; if it does not fit, it is dropped and counted."""
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        if self.waiting_bytes + nbytes <= self._max_bytes:
            copies, copied = _copy(tensors)
            self._queue.append(_Pending(Message(header, copies), nbytes, copied))
            self.waiting_bytes += nbytes
            return
        self._channel.dropped += 1
        if nbytes > self._max_bytes and not self._warned:
            self._warned = True
            log.warning("specrl plugin: traces of %d bytes are dropped; raise SPECRL_TRACES_MAX_BYTES", nbytes)

    def send(self) -> None:
        """Take in clients, and send the messages that are ready and fit into the socket."""
        while (header := self._channel.receive()) is not None:
            if header.get("kind") == "hello":
                self._clear()
        while self._queue and self.wanted:
            message, nbytes, copied = self._queue[0]
            if (copied is not None and not copied.query()) or not self._channel.send(message):
                break
            self._queue.popleft()
            self.waiting_bytes -= nbytes
        if not self.wanted:
            self._clear()

    def _clear(self) -> None:
        self._queue.clear()
        self.waiting_bytes = 0


class TraceHooks:
    """The functions that SGLang calls. The socket is opened at the first call, in the process that serves.

    Args:
        settings: settings with a socket for traces.
        tp_rank: returns the rank of tensor parallelism; only rank 0 sends traces.
        weight_version: returns SGLang's name of the weights that serve, which hot swaps of a draft set.
    """

    def __init__(self, settings: Settings, tp_rank: Callable[[], int], weight_version: Callable[[], str]) -> None:
        self.safe = Failsafe("tracing")
        self._settings, self._tp_rank, self._weight_version = settings, tp_rank, weight_version
        self._live: dict[str, Any] = {}  # request id -> SGLang's request

    @cached_property
    def queue(self) -> TraceQueue | None:
        """The queue, opened at the first call; None on other ranks than the first."""
        if self._tp_rank() != 0:
            return None
        assert self._settings.traces is not None
        queue = TraceQueue(self._settings.traces, self._settings.traces_max_bytes)
        log.warning("specrl plugin: traces are sent on %s", self._settings.traces)
        return queue

    def around_ingest(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ingest_requests(scheduler), which begins every turn of the scheduler's loop."""
        self.safe.call(self._send)
        return original(*args, **kwargs)

    def around_verify(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around eagle_sample(verify_input, batch, logits_output, …) -> (predict, accept_lens, accept_index)."""
        result = original(*args, **kwargs)
        self.safe.call(self._round, args, kwargs, result)
        return result

    def around_prefill(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around _draft_extend_for_prefill(worker, batch, target_hidden_states, next_token_ids, …)."""
        self.safe.call(self._prefill, args, kwargs)  # before: it shifts the batch's tokens
        return original(*args, **kwargs)

    def _send(self) -> TraceQueue | None:
        """Send the waiting messages; return the queue if there is a client."""
        if self.queue is None:
            return None
        ended = [rid for rid, request in self._live.items() if request.finished()]
        for rid in ended:
            del self._live[rid]
        if ended:
            self.queue.put({"kind": "finished", "requests": ended})
        self.queue.send()
        return self.queue if self.queue.wanted else None

    def _prefill(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        queue = self._send()
        _, batch, features, _ = PREFILL.arguments(args, kwargs)
        if queue is None or features is None or batch.forward_mode.is_idle():
            return
        first, tokens = 0, batch.input_ids
        for request, count, start in zip(batch.reqs, batch.extend_lens, batch.prefix_lens, strict=True):
            rows, first = slice(first, first + count), first + count
            if self._is_traced(request):
                self._live[request.rid] = request
                tensors = {"tokens": tokens[rows].long(), "features": features[rows]}
                queue.put({"kind": "prefill", "requests": [request.rid], "start": int(start)}, tensors)

    def _round(self, args: Sequence[Any], kwargs: Mapping[str, Any], result: Sequence[Tensor]) -> None:
        queue = self._send()
        verified, batch, output = VERIFY.arguments(args, kwargs)
        if queue is None or batch.forward_mode.is_idle() or output.hidden_states is None:
            return
        chosen = [index for index, request in enumerate(batch.reqs) if self._is_traced(request)]
        if not chosen:
            return
        requests = [batch.reqs[index] for index in chosen]
        sampling = [request.sampling_params for request in requests]
        self._live.update((request.rid, request) for request in requests)
        header = {
            "kind": "round",
            "requests": [request.rid for request in requests],
            "plan": plan_name(verified),
            "temperatures": [0.0 if s.top_k == 1 else float(s.temperature) for s in sampling],
            "weight_version": str(self._weight_version()),
        }
        queue.put(header, _round_tensors(verified, batch, output, result[2], chosen))
        queue.send()

    def _is_traced(self, request: Any) -> bool:
        """Whether to trace a request, all of it."""
        custom = request.sampling_params.custom_params
        if isinstance(custom, dict) and custom.get(OPT_OUT) is False:
            return False
        digest = hashlib.blake2b(str(request.rid).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self._settings.traces_rate * 2.0**64


def _round_tensors(verified: Any, batch: Any, output: Any, accepted: Tensor, chosen: list[int]) -> dict[str, Tensor]:
    """Return the tensors of a 'round' message, for the chosen rows of the batch."""
    count, n = len(batch.reqs), int(verified.draft_token_num)
    index = torch.tensor(chosen, device=output.next_token_logits.device)

    def rows(tensor: Tensor) -> Tensor:
        return tensor.view(count, n, -1).index_select(0, index)

    accepted = accepted.view(count, -1).long()
    first = torch.arange(count, device=accepted.device)[:, None] * n
    path = torch.where(accepted >= 0, accepted - first, accepted)
    tensors = {
        "tokens": rows(verified.draft_token).squeeze(-1).long(),
        "logits": rows(output.next_token_logits[: count * n]),
        "features": rows(output.hidden_states[: count * n]),
        "path": path.index_select(0, index),
        "positions": batch.seq_lens.index_select(0, index).long(),
    }
    if verified.topk > 1:
        tensors["children"] = rows(verified.retrieve_next_token).squeeze(-1).long()
        tensors["siblings"] = rows(verified.retrieve_next_sibling).squeeze(-1).long()
    return tensors
