"""The client's end of the plugin's traces: SGLang's rounds as traces for a draft learner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch

from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.sglang.client.http import ServerError, ServerSilent
from specrl.sglang.client.plugin_client import Connection
from specrl.sglang.plugin.transport import Message, parse_address

MAX_WAITING = 1024  # messages, for a client that is busy between two readings


@dataclass(slots=True)
class _Request:
    number: int
    pieces: list[Message] = field(default_factory=list)  # of its prompt
    last: Trace | None = None  # not yielded until the next one arrives
    incomplete: bool = False  # a part of it never arrived


class Subscriber(Connection):
    """Reads traces from a server's plugin, each of one request. It belongs to one thread.

    SGLang computes no logits for a prompt's positions. The logits of a prefill's trace are therefore 0 for the prompt's
    own next token and -inf for all others. A request is left out, and counted in `incomplete`, if its prompt did not
    arrive from its start on (it was read from a cache, or was on its way when we connected) or if a round was dropped.

    Args:
        path: the plugin's socket, a path or an address as in SPECRL_TRACES.
        timeout_s: seconds without a message after which `messages` and `traces` end.
        number: returns the number for a request of this SGLang id; None: requests are counted as they arrive.
        max_waiting: messages that may wait in this process; more wait in the server, which drops and counts them.

    Attributes:
        dropped: messages that the server did not send, because we were slow.
        incomplete: requests that were left out.

    Raises:
        ServerError: no plugin listens or answers there.
    """

    def __init__(
        self,
        path: str | Path,
        timeout_s: float = 10.0,
        number: Callable[[str], int] | None = None,
        max_waiting: int = 1,
    ) -> None:
        text = str(path)
        address = text if text.startswith(("unix:", "ipc:", "tcp:")) else f"unix:{Path(text).absolute()}"
        arrived = count()
        self._number = number or (lambda _: next(arrived))
        self._requests: dict[str, _Request] = {}
        self.dropped = self.incomplete = 0
        self._error: ServerError | None = None
        super().__init__(parse_address(address, "path"), lambda: None, timeout_s, high_water_mark=max_waiting)
        self.hello()

    def messages(self, timeout_s: float | None = None) -> Iterator[Message]:
        """Yield messages until none arrives in time.

        Raises:
            ServerError: the server has gone, or another client takes its traces.
            ValueError: the data that arrived is not a message.
        """
        while True:
            try:
                message = self.receive(timeout_s)
            except ServerSilent:
                return
            self.dropped = int(message.header["dropped"])
            yield message

    def traces(self) -> Iterator[Trace]:
        """Yield traces of single requests; the last trace of a request has its number in `finished`."""
        for message in self.messages():
            yield from self.take(message)

    def received(self, wait_s: float = 0.0) -> list[Trace]:
        """Return the traces that have arrived; if there is no message, wait for one.

        Raises:
            ServerError, ValueError: as of `messages`, but not before all traces that arrived are returned.
        """
        out: list[Trace] = []
        try:
            while self._error is None and (message := self.poll(wait_s)) is not None:
                self.dropped, wait_s = int(message.header["dropped"]), 0.0
                out += self.take(message)
        except ServerError as error:
            self._error = error
        if self._error is not None and not out:
            raise self._error
        return out

    def take(self, message: Message) -> list[Trace]:
        """Return the traces that a message completes."""
        header, out = message.header, list[Trace]()
        for index, rid in enumerate(header["requests"]):
            if header["kind"] == "finished":
                ended = self._requests.pop(rid, None)
                if ended is not None and ended.last is not None and not ended.incomplete:
                    out.append(replace(ended.last, finished=(ended.number,)))
                continue
            if rid not in self._requests:
                self._requests[rid] = _Request(self._number(rid))
            request = self._requests[rid]
            if header["kind"] == "prefill":
                request.pieces.append(message)
            else:
                out += self._complete(request, _trace(request.number, message, index))
        return out

    def _complete(self, request: _Request, trace: Trace) -> list[Trace]:
        """Return the trace before this one, or the prompt before the first one; nothing if a part is missing."""
        before, request.last = request.last, trace
        if request.incomplete:
            return []
        if before is None:
            complete = _prompt(request.pieces, trace)
            request.pieces = []
        else:
            end = int(before.positions[0]) + int((before.path >= 0).sum())
            complete = before if end == trace.positions[0] else None
        if complete is None:
            request.incomplete = True
            self.incomplete += 1
            return []
        return [complete]


def _trace(number: int, message: Message, index: int) -> Trace:
    """Return the trace of one request in a 'round' message, with parents in place of the tree's links."""
    header, row = message.header, {name: tensor[index] for name, tensor in message.tensors.items()}
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
        draft_version=int(version) if version.isdecimal() else 0,  # not a number before the first hot swap
        plan=Plan.parse(header["plan"]),
        temperatures=(float(header["temperatures"][index]),),
    )


def _prompt(pieces: Sequence[Message], first: Trace) -> Trace | None:
    """Return the prefill of a request before its first round; None if its pieces do not cover the prompt."""
    length, covered = int(first.positions[0]), 0
    for piece in pieces:
        if int(piece.header["start"]) != covered:
            return None
        covered += len(piece.tensors["tokens"])
    if covered != length or covered == 0:
        return None
    tokens, features = (torch.cat([piece.tensors[name] for piece in pieces]) for name in ("tokens", "features"))
    logits = torch.full((length, first.logits.shape[-1]), float("-inf"))
    logits.scatter_(1, torch.cat([tokens[1:], first.tokens[0, :1]])[:, None], 0.0)
    rows = torch.arange(length)
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
