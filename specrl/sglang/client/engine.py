"""The engine `sglang`: rounds of a stock SGLang server, launched here or found running."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plan import Plan
from specrl.sglang.client.launch import Server
from specrl.sglang.client.plain_server import PlainServer
from specrl.sglang.client.request_level import LOST, NO_BASELINE, CoarseSession
from specrl.sglang.client.session import LockstepSession
from specrl.sglang.client.streamed import StreamedPlain

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("specrl.sglang.client")


class SGLangEngine(Engine):
    """An SGLang server as an engine (see `specrl.core.interfaces.Engine`); `specrl.sglang.client.factory` makes one.

    It has one session at a time: starting another ends the one before, but for one with `plain=True`, which is on the
    server without speculation. Greedy output is the target's whatever is drafted; of sampling, SGLang keeps no seed.

    Args:
        server: that serves.
        plans: that it can run.
        fixed: the only one of them, that of its flags; None: its plugin follows plans.
        plain: measures decoding without speculation on the same device; None: `measure_plain` gives None, and only
            ratios over plan 0 can be had.
        draft: that it serves, for `load_draft` to compare with; None: unknown.
        timeout_s: for a round.
        coarse: see requests only, as the server has no plugin that we can reach; said once.
    """

    def __init__(
        self,
        server: Server,
        plans: Sequence[Plan],
        *,
        fixed: Plan | None = None,
        plain: PlainServer | None = None,
        draft: Path | None = None,
        timeout_s: float = 60.0,
        coarse: bool = False,
    ) -> None:
        self._coarse = coarse
        if coarse:
            log.warning("%s", LOST)
            if plain is None:
                log.warning("%s", NO_BASELINE)
        self.server, self.plans, self.plain = server, tuple(plans), plain
        self._fixed, self._draft, self._timeout_s = fixed, draft, timeout_s
        self._clock = WallClock()
        self._version = 0
        self._sessions: dict[bool, Session] = {}  # by whether they are plain

    def __deepcopy__(self, memo: dict[int, object]) -> SGLangEngine:
        """Itself: an engine stands for its server (Gymnasium copies the arguments of environments)."""
        return self

    @property
    def clock(self) -> Clock:
        """This machine's clock; rounds are timed on the server's host."""
        return self._clock

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve; 0 before any was loaded."""
        return self._version

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
        """Send `batch_size` requests to the server; `plain` needs one without speculation."""
        before = self._sessions.pop(plain, None)
        if before is not None:
            before.close()
        if plain and (self.plain is None or isinstance(self.plain, StreamedPlain)):
            raise ValueError(
                "plain rounds need a server without speculation in lock-step; launch with baseline='alternate'"
            )
        most = batch_size if max_batch_size is None else max_batch_size
        if self._coarse and not plain:
            if trace:
                raise ValueError("traces need the plugin in the server, but it has none that we can reach")
            self._sessions[plain] = coarse = CoarseSession(
                self.server,
                workload,
                batch_size=batch_size,
                most=most,
                seed=seed,
                plan=self.plans[0],
                version=lambda: self._version,
                timeout_s=self._timeout_s,
                plain=self.plain,
            )
            return coarse
        server = self.plain.server if plain and self.plain is not None else self.server
        session = LockstepSession(
            server,
            workload,
            batch_size=batch_size,
            most=most,
            seed=seed,
            plans=(Plan(0),) if plain else self.plans,
            fixed=Plan(0) if plain else self._fixed,
            version=lambda: self._version,
            plain=None if plain else self.plain,
            trace=trace and not plain,
            timeout_s=self._timeout_s,
        )
        self._sessions[plain] = session
        return session

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on; requests in flight go on.

        Raises:
            ValueError: the weights do not fit the draft that serves.
            SwapError: the server did not take them.
        """
        from specrl.sglang.client.hot_swap import push

        client = self.server.client
        push(client.url, weights, version=version, like=self._draft, api_key=client.api_key, timeout_s=self._timeout_s)
        self._version = version

    def close(self) -> None:
        """End sessions and the servers that were launched; idempotent."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()
        self.server.close()
        if self.plain is not None:
            self.plain.close()
