"""The traces of a session, read as they come by a thread of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Thread

from specrl.core.round import Trace
from specrl.sglang.client.errors import ServerFailed
from specrl.sglang.client.launch import TRACES, Server
from specrl.sglang.client.trace_subscriber import Subscriber

_MOST = 1 << 16  # traces that may wait to be drained


class Tracing:
    """Takes a server's traces.

    Args:
        server: with the plugin.
        number: of a request in the session, by SGLang's name for it; -1: not the session's.

    Raises:
        ServerFailed: the server hands out no traces.
    """

    def __init__(self, server: Server, number: Callable[[str], int]) -> None:
        path = server.socket(TRACES)
        if path is None:
            raise ServerFailed(
                f"the server must hand out traces, but has no socket {TRACES!r}; it is there from the first request on "
                "where SPECRL_TRACES asks for it"
            )
        self._subscriber = Subscriber(path, 0.5, number)
        self._traces: deque[Trace] = deque(maxlen=_MOST)
        self._on = True
        Thread(target=self._read, name="specrl-session-traces", daemon=True).start()

    @property
    def dropped(self) -> int:
        """Frames that the server could not keep for us."""
        return self._subscriber.dropped

    def drain(self) -> list[Trace]:
        """Those that have come."""
        return [self._traces.popleft() for _ in range(len(self._traces))]

    def close(self) -> None:
        """Hang up."""
        self._on = False
        self._subscriber.close()

    def _read(self) -> None:
        try:
            while self._on and not self._subscriber.gone:
                for frame in self._subscriber.frames():  # ends after half a second of silence
                    self._traces += [trace for trace in self._subscriber.take(frame) if trace.request_ids[0] >= 0]
        except (OSError, ValueError):  # hung up, here or there
            pass
