"""The other end of the plugin's traces: SGLang's rounds as the traces that a draft learner takes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.sglang.plugin.wire import Frame, receive


@dataclass(slots=True)
class _Known:
    """A request: the number it goes by, pieces of its prompt, and its last trace, held back until the next."""

    number: int
    pieces: list[Frame] = field(default_factory=list)
    held: Trace | None = None
    began: bool = False
    lost: bool = False  # a part of it never came


class Subscriber:
    """Reads traces from a server's plugin, one request each.

    SGLang computes no logits at a prompt's positions, so a prefill's say the prompt's own next token for certain: 0
    there and -inf elsewhere. A request whose prompt did not come from its start on (it was read from a cache, or was on
    its way when we connected) or of which a round was dropped is left out, and counted in `incomplete`.

    Args:
        path: of the plugin's socket, which is there from the server's first request on.
        timeout_s: after which `frames` and `traces` end where nothing comes.
        number: of a request by SGLang's name for it; None: they are counted as they come.

    Raises:
        OSError: nobody listens there.
    """

    def __init__(self, path: str | Path, timeout_s: float = 10.0, number: Callable[[str], int] | None = None) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError:
            self._socket.close()
            raise
        self._known: dict[str, _Known] = {}
        self._count, self._number = 0, number
        self.dropped = self.incomplete = 0
        self.gone = False  # the server has hung up

    def __enter__(self) -> Subscriber:
        """Itself; leaving hangs up."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def frames(self) -> Iterator[Frame]:
        """What comes, until nothing does or the server has gone."""
        while True:
            try:
                frame = receive(self._socket)
            except TimeoutError:
                return
            if frame is None:
                self.gone = True
                return
            self.dropped = int(frame.said["dropped"])
            yield frame

    def traces(self) -> Iterator[Trace]:
        """The same as traces; a request's last one says that it has finished."""
        for frame in self.frames():
            yield from self.take(frame)

    def take(self, frame: Frame) -> list[Trace]:
        """The traces that a frame completes."""
        out: list[Trace] = []
        for index, rid in enumerate(frame.said["requests"]):
            known = self._known.get(rid)
            if frame.said["kind"] == "finished":
                if known is not None:
                    del self._known[rid]
                    if known.held is not None and not known.lost:
                        out.append(replace(known.held, finished=(known.number,)))
                continue
            if known is None:
                known = self._known[rid] = _Known(self._count if self._number is None else self._number(rid))
                self._count += 1
            if frame.said["kind"] == "prefill":
                known.pieces.append(frame)
            else:
                out += self._round(known, frame.said, {n: t[index] for n, t in frame.tensors.items()}, index)
        return out

    def _round(self, known: _Known, said: Mapping[str, Any], row: dict[str, Tensor], index: int) -> list[Trace]:
        out: list[Trace] = []
        temperature = float(said["temperatures"][index])
        trace = _trace(known.number, Plan.parse(said["plan"]), row, temperature, _version(said))
        position = int(row["positions"])
        if not known.began:
            known.began = True
            prompt = _prompt(known, int(row["tokens"][0]), position, trace)
            known.pieces.clear()
            if prompt is None:
                self._lose(known)
            else:
                out.append(prompt)
        elif known.held is not None and not known.lost:
            accepted = int((known.held.path >= 0).sum())
            if int(known.held.positions[0]) + accepted == position:
                out.append(known.held)
            else:
                self._lose(known)
        known.held = trace
        return [] if known.lost else out

    def _lose(self, known: _Known) -> None:
        known.lost = True
        self.incomplete += 1


def _version(said: Mapping[str, Any]) -> int:
    """Of the draft of a round; 0 before any was swapped in."""
    name = str(said.get("weight_version", ""))
    return int(name) if name.isdecimal() else 0


def _trace(number: int, plan: Plan, row: Mapping[str, Tensor], temperature: float, version: int = 0) -> Trace:
    """A request's round; row by row as in the frame, with parents for the tree's links."""
    n = len(row["tokens"])
    parents = torch.arange(n) - 1
    if "children" in row:
        children, siblings = row["children"].tolist(), row["siblings"].tolist()
        parents = torch.full((n,), -1)
        for parent, child in enumerate(children):
            while child >= 0:
                parents[child] = parent
                child = siblings[child]
    return Trace(
        request_ids=torch.tensor([number]).numpy(),
        positions=row["positions"].view(1).numpy(),
        tokens=row["tokens"][None],
        features=row["features"][None],
        logits=row["logits"][None].float(),
        parents=parents[None],
        path=row["path"][None],
        draft_version=version,
        plan=plan,
        temperatures=(temperature,),
    )


def _prompt(known: _Known, following: int, end: int, like: Trace) -> Trace | None:
    """The prefill of a request; None where its pieces do not reach from its start to its first round."""
    at = 0
    for piece in known.pieces:
        if int(piece.said["start"]) != at:
            return None
        at += len(piece.tensors["tokens"])
    if at != end or at == 0:
        return None
    tokens = torch.cat([piece.tensors["tokens"] for piece in known.pieces])
    features = torch.cat([piece.tensors["features"] for piece in known.pieces])
    logits = torch.full((end, like.logits.shape[-1]), float("-inf"))
    logits.scatter_(1, torch.cat([tokens[1:], torch.tensor([following])])[:, None], 0.0)
    rows = torch.arange(end)
    return Trace(
        request_ids=like.request_ids,
        positions=torch.zeros(1, dtype=torch.int64).numpy(),
        tokens=tokens[None],
        features=features[None],
        logits=logits[None],
        parents=(rows - 1)[None],
        path=rows[None],
        draft_version=like.draft_version,
        plan=None,
        temperatures=like.temperatures,
    )
