"""The client's end of the plugin's sockets: reports of rounds, permits for them, and the plans that they follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import zmq

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.sglang.client.http import ServerError, ServerFailed, ServerGone, ServerSilent
from specrl.sglang.plugin.rounds import RoundReport
from specrl.sglang.plugin.transport import Message, decode, encode, is_listening

_POLL_S = 0.05  # wait for a message, before the other checks


C = TypeVar("C", bound="Connection")


class Connection:
    """A connection to a socket of the plugin; a context manager that disconnects. It belongs to one thread.

    Args:
        endpoint: address of the socket; a ServerGone is raised if nobody listens there.
        check: called while waiting; raises an error if no message can arrive any more.
        timeout_s: seconds that a message may take.
        kind: zmq.DEALER for a `Channel` of the plugin, zmq.REQ for the socket that receives plans.
        high_water_mark: received messages that may wait for `receive`.
    """

    def __init__(
        self,
        endpoint: str,
        check: Callable[[], None],
        timeout_s: float,
        kind: int = zmq.DEALER,
        high_water_mark: int = 4096,
    ) -> None:
        if not is_listening(endpoint):
            raise ServerGone(f"the plugin must listen on {endpoint}, but nobody does; is its server running?")
        self._endpoint, self._check, self._timeout_s, self._clock = endpoint, check, timeout_s, WallClock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, high_water_mark)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)

    def __enter__(self: C) -> C:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; the server goes on by itself. Idempotent."""
        self._monitor.close()
        self._socket.close()

    def send(self, header: Mapping[str, Any]) -> None:
        """Send a message without tensors."""
        self._socket.send_multipart(encode(Message(header)))

    def hello(self) -> Mapping[str, Any]:
        """Become the channel's client, and return the header of its answer; raise a ServerError without an answer."""
        try:
            self.send({"kind": "hello"})
            return self.receive().header
        except ServerError:
            self.close()
            raise

    def receive(self, timeout_s: float | None = None) -> Message:
        """Return the next message; `timeout_s` replaces that of the connection.

        Raises:
            ServerSilent: none came in time.
            ServerGone: the server has gone.
            ServerFailed: the plugin refuses us.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        limit = self._clock.now() + timeout_s
        while (left := limit - self._clock.now()) > 0.0:
            message = self.poll(min(left, _POLL_S))
            if message is not None:
                return message
        raise ServerSilent(
            f"the plugin must send a message on {self._endpoint} within {timeout_s:g} s, but did not; see the server's "
            "log, or allow a longer timeout_s"
        )

    def poll(self, timeout_s: float = 0.0) -> Message | None:
        """Return the next message, or None if there is none in time; the other errors are those of `receive`."""
        while self._socket.poll(int(timeout_s * 1000)):
            parts = self._socket.recv_multipart(copy=False)
            if not parts[0].bytes:  # the plugin checks whether we are still connected
                continue
            message = decode([part.buffer for part in parts])
            if message.header.get("kind") == "error":
                raise ServerFailed(f"the plugin refuses: {message.header.get('error')}")
            return message
        self._check()
        if self._monitor.poll(0):
            raise ServerGone(f"the server closed {self._endpoint}; is it running? see its log")
        return None


class Rounds(Connection):
    """Reports of the server's rounds, and permits for the next ones. Without an answer, methods raise a ServerError.

    A round waits for a permit for at most `lockstep_s` seconds.
    """

    def __init__(self, endpoint: str, check: Callable[[], None], timeout_s: float) -> None:
        super().__init__(endpoint, check, timeout_s)
        self.lockstep_s = float(self.hello()["lockstep_s"])

    def hold(self) -> None:
        """From now on, every round waits for a permit while we are connected."""
        self.send({"kind": "hold"})
        while self.receive().header["kind"] != "held":
            pass

    def permit(self, rounds: int, requests: Sequence[str]) -> None:
        """Permit this number of rounds, as soon as these requests have arrived."""
        self.send({"kind": "permit", "rounds": rounds, "requests": list(requests)})

    def next(self, timeout_s: float | None = None) -> RoundReport:
        """Return the next report."""
        fields = {name: value for name, value in self.receive(timeout_s).header.items() if name != "dropped"}
        try:
            return RoundReport(**fields)
        except TypeError as error:
            raise ServerFailed(f"the plugin must report rounds as this version does, but {error}; update it") from error

    def clear(self) -> None:
        """Discard the reports that have arrived."""
        while self.poll() is not None:
            pass


class Plans(Connection):
    """Sends the plan that the server's rounds follow; the last one stays in use after `close`."""

    def __init__(self, endpoint: str, check: Callable[[], None], timeout_s: float) -> None:
        super().__init__(endpoint, check, timeout_s, zmq.REQ)
        self._plan: Plan | None = None

    def set(self, plan: Plan) -> None:
        """Let the next rounds follow this plan; a ValueError if the server has no buffers for it."""
        if plan == self._plan:
            return
        self.send({"plans": {"1": str(plan)}})
        answer = self.receive().header
        if "error" in answer:
            raise ValueError(f"plan must be one that the server can run, but got {plan}: {answer['error']}")
        self._plan = plan
