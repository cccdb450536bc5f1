"""Plans given from outside: a table per batch size, a line of JSON each, over a local Unix socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread

from specrl.agents.choosers.table import PlanTable
from specrl.core.plan import Plan
from specrl.sglang.plugin.sockets import hang_up, listen

_LONGEST = 1 << 16  # bytes of a line


class PlanSocket:
    """Listens for lines such as {"plans": {"1": "3/1/4", "8": "0"}} and answers each with {"ok": true} or {"error": …}.

    The last table that was good holds, whether or not its sender is still there; serving never waits for one.

    Args:
        path: of the socket; only this user may connect.
        check: refuses a table by a ValueError.
    """

    def __init__(self, path: Path, check: Callable[[Mapping[int, Plan]], None]) -> None:
        self.table: PlanTable | None = None
        self.rounds = 0  # reported so far
        self._check, self._socket = check, listen(path)
        Thread(target=self._serve, name="specrl-plans", daemon=True).start()

    def steps(self, batch_size: int) -> int | None:
        """num_steps of the next round; None before any plan was given."""
        table = self.table
        return None if table is None else table.best(batch_size).num_steps

    def report(self, correct_drafts: Sequence[int], batch_size: int) -> None:
        """Count a round."""
        self.rounds += 1

    def close(self) -> None:
        """Listen no more."""
        hang_up(self._socket)

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:  # closed
                return
            Thread(target=self._follow, args=(peer,), name="specrl-plans-peer", daemon=True).start()

    def _follow(self, peer: socket.socket) -> None:
        with peer, peer.makefile("rwb") as lines:
            try:
                while line := lines.readline(_LONGEST):
                    lines.write(json.dumps(self._take(line)).encode() + b"\n")
                    lines.flush()
            except OSError:
                pass  # it went

    def _take(self, line: bytes) -> dict[str, object]:
        try:
            said = json.loads(line)
            table = {int(bound): Plan.parse(plan) for bound, plan in said["plans"].items()}
            fresh = PlanTable(table)
            self._check(table)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {"error": f'plans must be given as {{"plans": {{"1": "3/1/4"}}}}, but {error}'}
        self.table = fresh
        return {"ok": True, "rounds": self.rounds}
