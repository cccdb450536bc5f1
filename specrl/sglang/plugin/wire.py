"""Frames on the wire: a length of eight bytes (little-endian), then safetensors whose metadata is JSON. No pickle."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

MOST_BYTES = 1 << 32  # of a frame: more is not one
_LENGTH = struct.Struct("<Q")


class Frame(NamedTuple):
    """What one message says.

    Attributes:
        said: JSON-able; `kind` is 'round', 'prefill' or 'finished'.
        tensors: by name, on the CPU.
    """

    said: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def encode(frame: Frame) -> bytes:
    """The frame's bytes, its length included."""
    body = save({n: t.contiguous() for n, t in frame.tensors.items()}, {"said": json.dumps(frame.said)})
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Frame:
    """A frame from its bytes without the length.

    Raises:
        ValueError: they are no frame.
    """
    try:
        tensors = load(body)
        (size,) = _LENGTH.unpack_from(body)  # safetensors begins with the length of its header
        said = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["said"])
    except (SafetensorError, KeyError, ValueError, struct.error) as error:
        raise ValueError(f"a frame must be safetensors with JSON metadata, but got {error}") from error
    return Frame(said, tensors)


def receive(stream: socket.socket) -> Frame | None:
    """The next frame; None where the other side has gone.

    Raises:
        ValueError: what comes is no frame.
        TimeoutError: nothing came within the socket's timeout.
    """
    head = _exactly(stream, _LENGTH.size, begun=False)
    if head is None:
        return None
    (size,) = _LENGTH.unpack(head)
    if size > MOST_BYTES:
        raise ValueError(f"a frame must be at most {MOST_BYTES} bytes, but {size} are announced; is it ours?")
    body = _exactly(stream, size, begun=True)
    return None if body is None else decode(body)


def _exactly(stream: socket.socket, size: int, *, begun: bool) -> bytes | None:
    """Exactly so many bytes; None if the stream ends before. A timeout within a frame waits on."""
    parts = bytearray()
    while len(parts) < size:
        try:
            part = stream.recv(min(size - len(parts), 1 << 20))
        except TimeoutError:
            if not parts and not begun:
                raise
            continue
        if not part:
            return None
        parts += part
    return bytes(parts)
