"""The ZeroMQ sockets between the plugin and its clients, and the format of their messages.

A message is one multipart message of ZeroMQ. Its first part is the header, a JSON object with a `kind`. Each further
part holds the raw bytes of one tensor; the header's `tensors` lists them in this order as [name, dtype, shape]. A
message with an empty header only checks whether the client is still connected.

Traces and rounds are sent by a `Channel`. Its client is the DEALER socket that sent {"kind": "hello"} last; the channel
answers with a hello of its own. The client before it gets {"kind": "error", "error": …} and nothing more. The header of
every message says how many messages were `dropped` so far, because the client was slow. Plans are received by a REP
socket (`specrl.sglang.plugin.lookahead.PlanServer`).
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import zmq
from torch import Tensor

from specrl.core.checks import require
from specrl.core.clock import WallClock

_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.int64, torch.float32, torch.float16, torch.bfloat16)}
_LONGEST_PATH = 107  # bytes of a Unix socket's path
_CHECK_S = 0.1  # between two checks whether the client is still connected


class Message(NamedTuple):
    """A JSON object, and tensors on the CPU by name: int64, float32, float16 or bfloat16."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = {}


def encode(message: Message) -> list[Any]:
    """Return the parts of a multipart message; tensors are not copied."""
    described = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in message.tensors.items()]
    header = json.dumps({**message.header, **({"tensors": described} if described else {})}).encode()
    return [header, *(t.contiguous().flatten().view(torch.uint8).numpy() for t in message.tensors.values())]


def decode(parts: Sequence[bytes | memoryview]) -> Message:
    """Return the message of these parts, whose memory its tensors use; a ValueError if they are not a message."""
    try:
        header = json.loads(bytes(parts[0]))
        described = zip(header.pop("tensors", []), parts[1:], strict=True)
        tensors = {name: _tensor(part, _DTYPES[dtype], shape) for (name, dtype, shape), part in described}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a message must be a JSON header and its tensors, but got {error!r}") from error
    return Message(header, tensors)


def _tensor(part: bytes | memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    data = memoryview(part)
    if data.nbytes != prod(shape) * dtype.itemsize:
        raise ValueError(f"{data.nbytes} bytes are not {list(shape)} of {dtype}")
    if not data.nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype).view(shape)


def parse_address(text: str, name: str) -> str:
    """Return the ZeroMQ endpoint of an address; a ValueError with the setting's `name` for another address.

    It is unix:PATH or ipc://PATH, a Unix socket that only this user may use, or tcp://127.0.0.1:PORT, which every user
    of this machine may use.
    """
    if re.fullmatch(r"tcp://127\.0\.0\.1:\d+", text):
        return text
    unix = re.fullmatch(r"(?:unix:|ipc://)(/.*)", text)
    path = unix[1] if unix else ""
    require(bool(path), name, "unix:/absolute/path or tcp://127.0.0.1:PORT", text)
    require(len(path.encode()) <= _LONGEST_PATH, name, f"a path of at most {_LONGEST_PATH} bytes", path)
    return f"ipc://{path}"


def is_listening(endpoint: str) -> bool:
    """Whether somebody accepts connections at this endpoint of this machine."""
    scheme, _, name = endpoint.partition("://")
    unix = scheme == "ipc"
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
        probe.settimeout(5.0)
        return probe.connect_ex(name if unix else ("127.0.0.1", int(name.rpartition(":")[2]))) == 0


def bind(kind: int, endpoint: str, high_water_mark: int) -> zmq.Socket[bytes]:
    """Return a ROUTER or REP socket that listens at an endpoint; a ValueError if it is in use, or cannot be used.

    The file that a dead process left there is replaced. `high_water_mark` messages may wait for each client.
    """
    path = Path(endpoint.removeprefix("ipc://"))
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise ValueError(f"a socket must not replace a file, but {str(path)!r} is one; choose another path")
    if is_listening(endpoint):
        raise ValueError(f"only one process may listen at an address, but {endpoint} is in use; choose another one")
    listening: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
    listening.linger, listening.sndhwm, listening.rcvhwm = 0, high_water_mark, high_water_mark
    mask = os.umask(0o177)  # the file of a Unix socket is for this user only
    try:
        listening.bind(endpoint)
    except zmq.ZMQError as error:
        listening.close()
        raise ValueError(f"a socket must be created at {endpoint}, but that failed: {error}; choose another") from error
    finally:
        os.umask(mask)
    return listening


class Channel:
    """The plugin's end of a connection with one client at a time. Nothing here waits for the client.

    It belongs to one thread: ZeroMQ's sockets are not thread-safe.

    Args:
        endpoint: address of its socket; a ValueError if it is in use, or cannot be used.
        high_water_mark: messages that may wait for the client.
        hello: header of the first message to every new client.

    Attributes:
        dropped: messages that were not sent; the client finds the number in every header.
    """

    def __init__(self, endpoint: str, high_water_mark: int, hello: Mapping[str, Any] = {}) -> None:
        self.dropped = 0
        self._socket = bind(zmq.ROUTER, endpoint, high_water_mark)
        self._socket.router_mandatory = True  # sending to a client that has gone is an error
        self._hello = {"kind": "hello", **hello}
        self._client: bytes | None = None
        self._refusals: list[tuple[bytes, list[Any]]] = []  # not sent yet, because these clients are slow
        self._clock, self._checked_s = WallClock(), 0.0
        self.close = self._socket.close

    @property
    def connected(self) -> bool:
        """Whether there is a client; `receive` notices within 0.1 s that it has gone."""
        return self._client is not None

    def receive(self, timeout_s: float = 0.0) -> dict[str, Any] | None:
        """Return the header of the client's next message; None if there is none in time.

        The hello of a new client is answered and returned.
        """
        self._refusals = [refusal for refusal in self._refusals if not self._send(*refusal)]
        now = self._clock.now()
        if self._client is not None and now - self._checked_s > _CHECK_S:
            self._checked_s = now
            self._send(self._client, [b""])
        while self._socket.poll(int(timeout_s * 1000)):
            sender, *parts = self._socket.recv_multipart()
            try:
                header = dict(decode(parts).header)
            except ValueError as error:
                header = {"kind": "unreadable", "error": str(error)}
            if header.get("kind") == "hello":
                if sender != self._client:
                    self.refuse("another client has connected, and one at a time is served")
                self._client = sender
                self.send(Message(self._hello))
                return header
            if sender == self._client:
                return header
        return None

    def send(self, message: Message) -> bool:
        """Send a message to the client, if there is one; False if too many wait for it already."""
        return self._client is None or self._send(self._client, self._encode(message))

    def refuse(self, reason: str) -> None:
        """Send the client the reason why it is no longer served, and forget it."""
        if self._client is not None:
            refusal = self._client, self._encode(Message({"kind": "error", "error": reason}))
            if not self._send(*refusal):
                self._refusals.append(refusal)
            self._client = None

    def _encode(self, message: Message) -> list[Any]:
        return encode(Message({**message.header, "dropped": self.dropped}, message.tensors))

    def _send(self, client: bytes, parts: list[Any]) -> bool:
        """Whether the message was sent, or the client has gone."""
        try:
            self._socket.send_multipart([client, *parts], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if client == self._client:
                self._client = None
        return True
