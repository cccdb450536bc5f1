"""The client's end of the plugin's traces: SGLang's rounds as the traces that a draft learner takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.sglang.client.http import ServerError, ServerSilent
from specrl.sglang.client.plugin_client import Connection
from specrl.sglang.plugin.transport import Message, parse_address

_SLICE_S = 0.1  # wait of the reading thread, before it looks whether it is closed
_MAX_WAITING = 4096  # traces that wait for `TraceReader.take`; more stay in the server, which drops and counts them


@dataclass(slots=True)
class _Request:
    """A request: its number, the pieces of its prompt, and its last trace, kept until the next one has come."""

    number: int
    pieces: list[Message] = field(default_factory=list)
    last: Trace | None = None
    began: bool = False
    incomplete: bool = False  # a part of it never came


class Subscriber:
    """Reads traces from a server's plugin, each of one request. It belongs to one thread.

    SGLang computes no logits for a prompt's positions. The logits of a prefill's trace are therefore 0 for the prompt's
    own next token and -inf for all others. A request is left out, and counted in `incomplete`, if its prompt did not
    come from its start on (it was read from a cache, or was on its way when we connected) or if a round was dropped.

    Args:
        path: the plugin's socket, a path or an address as in SPECRL_TRACES.
        timeout_s: seconds without a message after which `messages` and `traces` end.
        number: returns the number for a request of this SGLang id; None: requests are counted as they come.

    Raises:
        ServerError: nobody listens there, or does not answer.
    """

    def __init__(self, path: str | Path, timeout_s: float = 10.0, number: Callable[[str], int] | None = None) -> None:
        text = str(path)
        address = text if text.startswith(("unix:", "ipc:", "tcp:")) else f"unix:{Path(text).absolute()}"
        self._timeout_s, self._number = timeout_s, number
        self._requests: dict[str, _Request] = {}
        self._count = 0
        self.dropped = self.incomplete = 0
        self._connection = Connection(parse_address(address, "path"), lambda: None, high_water_mark=1)
        try:
            self._connection.hello(timeout_s)
        except ServerError:
            self.close()
            raise

    def __enter__(self) -> Subscriber:
        """Return itself; leaving disconnects."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    def messages(self, timeout_s: float | None = None) -> Iterator[Message]:
        """Yield messages until none comes in time.

        Raises:
            ServerGone: the server has gone.
            ServerFailed: another client takes its traces.
            ValueError: something came that is no message.
        """
        while True:
            try:
                message = self._connection.receive(self._timeout_s if timeout_s is None else timeout_s)
            except ServerSilent:
                return
            self.dropped = int(message.header["dropped"])
            yield message

    def traces(self) -> Iterator[Trace]:
        """Yield the same as traces; the last one of a request has it in `finished`."""
        for message in self.messages():
            yield from self.take(message)

    def take(self, message: Message) -> list[Trace]:
        """Return the traces that a message completes."""
        header, out = message.header, list[Trace]()
        for index, rid in enumerate(header["requests"]):
            request = self._requests.get(rid)
            if header["kind"] == "finished":
                if request is not None:
                    del self._requests[rid]
                    if request.last is not None and not request.incomplete:
                        out.append(replace(request.last, finished=(request.number,)))
                continue
            if request is None:
                number = self._count if self._number is None else self._number(rid)
                request = self._requests[rid] = _Request(number)
                self._count += 1
            if header["kind"] == "prefill":
                request.pieces.append(message)
            else:
                out += self._round(request, header, {n: t[index] for n, t in message.tensors.items()}, index)
        return out

    def _round(
        self, request: _Request, header: Mapping[str, Any], row: Mapping[str, Tensor], index: int
    ) -> list[Trace]:
        out: list[Trace] = []
        trace = _trace(request.number, header, row, index)
        position = int(row["positions"])
        if not request.began:
            request.began = True
            prompt = _prompt(request, int(row["tokens"][0]), position, trace)
            request.pieces.clear()
            if prompt is None:
                self._leave_out(request)
            else:
                out.append(prompt)
        elif request.last is not None and not request.incomplete:
            accepted = int((request.last.path >= 0).sum())
            if int(request.last.positions[0]) + accepted == position:
                out.append(request.last)
            else:
                self._leave_out(request)
        request.last = trace
        return [] if request.incomplete else out

    def _leave_out(self, request: _Request) -> None:
        request.incomplete = True
        self.incomplete += 1


def _trace(number: int, header: Mapping[str, Any], row: Mapping[str, Tensor], index: int) -> Trace:
    """The trace of one request in a 'round' message, with parents in place of the tree's links."""
    n = len(row["tokens"])
    parents = torch.arange(n) - 1
    if "children" in row:
        children, siblings = row["children"].tolist(), row["siblings"].tolist()
        parents = torch.full((n,), -1)
        for parent, child in enumerate(children):
            while child >= 0:
                parents[child] = parent
                child = siblings[child]
    version = str(header.get("weight_version", ""))
    return Trace(
        request_ids=torch.tensor([number]).numpy(),
        positions=row["positions"].view(1).numpy(),
        tokens=row["tokens"][None],
        features=row["features"][None],
        logits=row["logits"][None].float(),
        parents=parents[None],
        path=row["path"][None],
        draft_version=int(version) if version.isdecimal() else 0,  # another name: no draft was swapped in yet
        plan=Plan.parse(header["plan"]),
        temperatures=(float(header["temperatures"][index]),),
    )


def _prompt(request: _Request, next_token: int, end: int, first: Trace) -> Trace | None:
    """The prefill of a request before its first round; None if its pieces do not cover the prompt."""
    at = 0
    for piece in request.pieces:
        if int(piece.header["start"]) != at:
            return None
        at += len(piece.tensors["tokens"])
    if at != end or at == 0:
        return None
    tokens = torch.cat([piece.tensors["tokens"] for piece in request.pieces])
    features = torch.cat([piece.tensors["features"] for piece in request.pieces])
    logits = torch.full((end, first.logits.shape[-1]), float("-inf"))
    logits.scatter_(1, torch.cat([tokens[1:], torch.tensor([next_token])])[:, None], 0.0)
    rows = torch.arange(end)
    return replace(
        first,
        positions=torch.zeros(1, dtype=torch.int64).numpy(),
        tokens=tokens[None],
        features=features[None],
        logits=logits[None],
        parents=(rows - 1)[None],
        path=rows[None],
        plan=None,
    )


class TraceReader:
    """Reads traces in a thread of its own, so that few wait in the server while its owner is busy.

    Args:
        path: as for `Subscriber`.
        number: as for `Subscriber`; requests with a negative number are left out.

    Raises:
        ServerError: nobody listens there, or does not answer.
    """

    def __init__(self, path: str | Path, number: Callable[[str], int] | None = None) -> None:
        self._subscriber = Subscriber(path, number=number)
        self._traces: deque[Trace] = deque()
        self._changed = Condition()
        self._error: Exception | None = None
        self._closed = False
        self._thread = Thread(target=self._read, name="specrl-traces", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> dict[str, int]:
        """Messages that the server dropped, and requests that were left out because a part of them did not come."""
        return {"dropped": self._subscriber.dropped, "incomplete": self._subscriber.incomplete}

    def take(self, wait_s: float = 0.0) -> list[Trace]:
        """Return the traces that have come; if there are none, wait for some.

        Raises:
            ServerError: there are none, and no more can come: the server has gone, or another client takes them.
            ValueError: something came that is no message.
        """
        with self._changed:
            if not self._traces and self._error is None:
                self._changed.wait(wait_s)
            out = list(self._traces)
            self._traces.clear()
            self._changed.notify_all()
            if not out and self._error is not None:
                raise self._error
        return out

    def close(self) -> None:
        """Disconnect; idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _read(self) -> None:
        try:
            with self._subscriber:
                while not self._closed:
                    for message in self._subscriber.messages(_SLICE_S):
                        self._keep(self._subscriber.take(message))
                        if self._closed:
                            break
        except (ServerError, ValueError) as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _keep(self, traces: list[Trace]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._traces) < _MAX_WAITING)
            self._traces += [trace for trace in traces if trace.request_ids[0] >= 0]
            self._changed.notify_all()
