"""The client's end of the plugin's sockets: reports of rounds, permits for them, and the plans that they follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq

from specrl.core.clock import WallClock
from specrl.core.plan import Plan
from specrl.sglang.client.http import ServerError, ServerFailed, ServerGone, ServerSilent
from specrl.sglang.plugin.rounds import RoundReport
from specrl.sglang.plugin.transport import Message, decode, encode, is_listening

_SLICE_S = 0.05  # wait for a message, before the other checks


class Connection:
    """A connection to a socket of the plugin, with a deadline on every message. It belongs to one thread.

    Args:
        endpoint: address of the socket.
        check: called while waiting; raises an error if waiting is useless.
        kind: zmq.DEALER for a `Channel` of the plugin, zmq.REQ for the socket that takes plans.
        high_water_mark: received messages that may wait for `receive`.

    Raises:
        ServerGone: nobody listens there.
    """

    def __init__(
        self, endpoint: str, check: Callable[[], None], kind: int = zmq.DEALER, high_water_mark: int = 4096
    ) -> None:
        if not is_listening(endpoint):
            raise ServerGone(f"the plugin must listen on {endpoint}, but nobody does; is its server running?")
        self._endpoint, self._check, self._clock = endpoint, check, WallClock()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVHWM, high_water_mark)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(endpoint)

    def close(self) -> None:
        """Disconnect; idempotent."""
        self._monitor.close()
        self._socket.close()

    def send(self, header: Mapping[str, Any]) -> None:
        """Send a message without tensors."""
        self._socket.send_multipart(encode(Message(header)))

    def hello(self, timeout_s: float) -> Mapping[str, Any]:
        """Become the channel's client, and return its hello.

        Raises:
            ServerError: it does not answer.
        """
        self.send({"kind": "hello"})
        return self.receive(timeout_s).header

    def receive(self, timeout_s: float) -> Message:
        """Return the next message.

        Raises:
            ServerSilent: none came in time.
            ServerGone: the server has gone.
            ServerFailed: the plugin refuses us.
        """
        limit = self._clock.now() + timeout_s
        while (left := limit - self._clock.now()) > 0.0:
            message = self.poll(min(left, _SLICE_S))
            if message is not None:
                return message
        raise ServerSilent(
            f"the plugin must send a message on {self._endpoint} within {timeout_s:g} s, but did not; see the server's "
            "log, or allow a longer timeout_s"
        )

    def poll(self, timeout_s: float = 0.0) -> Message | None:
        """Return the next message if it comes in time; raises what `receive` does, but ServerSilent."""
        while self._socket.poll(int(timeout_s * 1000)):
            parts = self._socket.recv_multipart(copy=False)
            if not parts[0].bytes:  # the plugin asks whether we are still here
                continue
            message = decode([part.buffer for part in parts])
            if message.header.get("kind") == "error":
                raise ServerFailed(f"the plugin refuses: {message.header.get('error')}")
            return message
        self._check()
        if self._monitor.poll(0):
            raise ServerGone(f"the server closed {self._endpoint}; is it running? see its log")
        return None


class Rounds:
    """Reports of the server's rounds, and permits for the next ones.

    Args:
        endpoint: address of the socket.
        check: as for `Connection`.
        timeout_s: seconds that a round may take.

    Raises:
        ServerError: the plugin does not answer.
    """

    def __init__(self, endpoint: str, check: Callable[[], None], timeout_s: float) -> None:
        self._connection, self._timeout_s = Connection(endpoint, check), timeout_s
        self.dropped = 0  # reports that the server did not keep for us
        try:
            self.lockstep_s = float(self._connection.hello(timeout_s)["lockstep_s"])  # 0: no round waits
        except ServerError:
            self.close()
            raise

    def close(self) -> None:
        """Disconnect; the server goes on by itself."""
        self._connection.close()

    def hold(self) -> None:
        """Let no round run without a permit from now on, while we are connected."""
        self._connection.send({"kind": "hold"})
        while self._connection.receive(self._timeout_s).header["kind"] != "held":
            pass

    def permit(self, rounds: int, requests: Sequence[str]) -> None:
        """Permit so many rounds, once these requests are there."""
        self._connection.send({"kind": "permit", "rounds": rounds, "requests": list(requests)})

    def next(self, timeout_s: float | None = None) -> RoundReport:
        """Return the next report.

        Raises:
            ServerError: there is none.
        """
        return self._report(self._connection.receive(self._timeout_s if timeout_s is None else timeout_s))

    def received(self) -> list[RoundReport]:
        """Return the reports that have come."""
        found = []
        while (message := self._connection.poll()) is not None:
            found.append(self._report(message))
        return found

    def _report(self, message: Message) -> RoundReport:
        fields = dict(message.header)
        try:
            self.dropped = int(fields.pop("dropped"))
            return RoundReport(**fields)
        except (TypeError, KeyError) as error:
            raise ServerFailed(f"the plugin must report rounds as this version does, but {error}; update it") from error


class Plans:
    """The plan that the server's rounds follow.

    Args:
        endpoint: address of the socket.
        check: as for `Connection`.
        timeout_s: seconds that an answer may take.

    Raises:
        ServerGone: nobody listens there.
    """

    def __init__(self, endpoint: str, check: Callable[[], None], timeout_s: float) -> None:
        self._connection, self._timeout_s = Connection(endpoint, check, zmq.REQ), timeout_s
        self._plan: Plan | None = None

    def close(self) -> None:
        """Disconnect; the last plan stays in force."""
        self._connection.close()

    def set(self, plan: Plan) -> None:
        """Let the next rounds follow this plan.

        Raises:
            ValueError: the server has no buffers for it.
            ServerError: there is no answer.
        """
        if plan == self._plan:
            return
        self._connection.send({"plans": {"1": str(plan)}})
        answer = self._connection.receive(self._timeout_s).header
        if "error" in answer:
            raise ValueError(f"plan must be one that the server can run, but got {plan}: {answer['error']}")
        self._plan = plan
