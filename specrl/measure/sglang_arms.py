"""Plans of an SGLang server beside plain decoding on one without speculation, in turns on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specrl.core.clock import Clock
from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plan import Plan
from specrl.core.round import PlainSample
from specrl.measure.local_arms import NULL, watched
from specrl.measure.paired import PLAIN, Measured, Setting

if TYPE_CHECKING:
    from torch import Tensor


def launch(target: str, draft: Path | None, plans: Sequence[Plan], python: Path | None, flags: Sequence[str]) -> Engine:
    """Two servers, with and without speculation, both in lock-step: one round at a time, when it is asked for."""
    from specrl.sglang.client.factory import launch_engine

    alone = ("--disable-overlap-schedule",)
    return launch_engine(target, draft, plans=tuple(plans), python=python, flags=tuple(flags), plain_flags=alone)


def plain_steps(session: Session, count: int) -> Sequence[PlainSample]:
    """Consecutive steps of the server without speculation, at the contexts that a served session's requests have."""
    from specrl.sglang.client.session import LockstepSession

    assert isinstance(session, LockstepSession)
    return session.plain_steps(count)


def served_facts(engine: Engine, flags: Sequence[str]) -> dict[str, object]:
    """What a result says of the server that it was measured on."""
    from specrl.sglang.client.engine import SGLangEngine

    assert isinstance(engine, SGLangEngine)
    told = engine.server.info
    return {
        "engine": "sglang",
        "sglang": engine.server.version,
        "device": str(told.get("device")),
        "dtype": str(told.get("dtype")),
        "flags": list(flags),
        "pace": "lock-step: one round at a time, on both servers, in turns",
    }


def measure_served(
    engine: Engine,
    plans: Sequence[Plan],
    workload: Workload,
    *,
    batch_size: int,
    block_tokens: int,
    precision: float,
    seconds: float,
    seed: int = 0,
) -> list[Measured]:
    """Plain, plain again (A/A) and every plan, taking turns.

    A server serves one set of requests, so its lanes share it: each goes on with the requests where the lane before
    left them. Lanes are paired by time, not by prompt.
    """
    shared = Shared(engine)
    settings = [Setting(name, shared, None) for name in (PLAIN, NULL)]
    settings += [Setting(str(plan), shared, plan) for plan in plans]
    return watched(
        settings,
        workload,
        batch_size=batch_size,
        block_tokens=block_tokens,
        precision=precision,
        seconds=seconds,
        seed=seed,
        each=True,
    )


class Shared:
    """An engine whose sessions are shared by whoever starts one: one that drafts, and one that is plain.

    Args:
        engine: whose sessions they are; it stays open.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sessions: dict[bool, Session] = {}

    @property
    def clock(self) -> Clock:
        """The engine's."""
        return self._engine.clock

    @property
    def draft_version(self) -> int:
        """Of the weights that serve."""
        return self._engine.draft_version

    def supports(self, plan: Plan) -> bool:
        """Whether the engine can run it."""
        return self._engine.supports(plan)

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
        """The session that is there, or a new one; the first to close it closes it for all."""
        if plain not in self._sessions:
            self._sessions[plain] = self._engine.start(
                workload,
                batch_size=batch_size,
                seed=seed,
                max_batch_size=max_batch_size,
                plain=plain,
                trace=trace,
            )
        return self._sessions[plain]

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these weights."""
        self._engine.load_draft(weights, version=version)

    def close(self) -> None:
        """Nothing: the engine is its owner's."""
