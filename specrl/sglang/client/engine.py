"""The engine `sglang`: rounds of an unmodified SGLang server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plan import Plan
from specrl.sglang.client.hot_swap import push
from specrl.sglang.client.launch import Server
from specrl.sglang.client.plain_server import PlainServer
from specrl.sglang.client.request_level import RequestLevelSession
from specrl.sglang.client.session import LockstepSession

if TYPE_CHECKING:
    from torch import Tensor


class SGLangEngine(Engine):
    """An SGLang server as an engine (see `specrl.core.interfaces.Engine`); `specrl.sglang.client.factory` opens one.

    It has one session at a time: starting another one ends the one before. A session with `plain=True` runs on the
    server without speculation, beside the other one. Greedy output is the target's with every plan. Sampled output is
    not reproducible: SGLang takes no seed.

    Args:
        server: the server that speculates.
        plans: plans that it can run; several: its plugin follows the plan that we send.
        plain: measures decoding without speculation on the same device; None: `measure_plain` returns None, and only
            ratios over plan 0 can be reported.
        draft: directory of the draft that it serves, for `load_draft` to compare with; None: unknown.
        request_level: report whole requests only, because there is no plugin that we can reach.
    """

    def __init__(
        self,
        server: Server,
        plans: Sequence[Plan],
        *,
        plain: PlainServer | None = None,
        draft: Path | None = None,
        request_level: bool = False,
    ) -> None:
        self.server, self.plans, self.plain = server, tuple(plans), plain
        self._draft, self._request_level = draft, request_level
        self._clock = WallClock()
        self._sessions: dict[bool, Session] = {}  # by `plain`

    def __deepcopy__(self, memo: dict[int, object]) -> SGLangEngine:
        """Return itself, as Gymnasium copies the arguments of environments."""
        return self

    @property
    def clock(self) -> Clock:
        """The clock of this machine; rounds are timed on the server's host."""
        return self._clock

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve; 0 before any were loaded."""
        return self.server.draft_version

    @property
    def single_session(self) -> bool:
        """True: a server serves one set of requests."""
        return True

    def facts(self) -> dict[str, Any]:
        """Version, device and dtype of the server, and how its rounds are run."""
        info = self.server.info
        return {
            "engine": "sglang",
            "sglang": self.server.version,
            "device": str(info.get("device")),
            "dtype": str(info.get("dtype")),
            "pace": "lock-step: one round at a time, on both servers, in turns",
        }

    def supports(self, plan: Plan) -> bool:
        """Whether the server was launched for `plan`."""
        return plan in self.plans

    def start(
        self,
        workload: Workload,
        *,
        batch_size: int,
        seed: int,
        max_batch_size: int | None = None,
        plain: bool = False,
        trace: bool = False,
    ) -> Session:
        """Send `batch_size` requests to the server; see `Engine.start`."""
        previous = self._sessions.pop(plain, None)
        if previous is not None:
            previous.close()
        server = self.server
        if plain:
            if self.plain is None or not self.plain.lockstep:
                raise ValueError(
                    "plain rounds need a server without speculation in lock-step; launch with baseline='alternate'"
                )
            server = self.plain.server
        session_type = RequestLevelSession if self._request_level and not plain else LockstepSession
        self._sessions[plain] = session_type(
            server,
            workload,
            batch_size=batch_size,
            max_batch_size=batch_size if max_batch_size is None else max_batch_size,
            seed=seed,
            plans=(Plan(0),) if plain else self.plans,
            plain=None if plain else self.plain,
            trace=trace and not plain,
        )
        return self._sessions[plain]

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (by SGLang's names) from the next round on; raises the errors of `push`."""
        server, client = self.server, self.server.client
        push(client.url, weights, version=version, like=self._draft, api_key=client.api_key, timeout_s=server.timeout_s)
        server.draft_version = version

    def close_sessions(self) -> None:
        """End the sessions; the servers go on."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def close(self) -> None:
        """End the sessions, and the servers that were launched; idempotent."""
        self.close_sessions()
        self.server.close()
        if self.plain is not None:
            self.plain.close()
