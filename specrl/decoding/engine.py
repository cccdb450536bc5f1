"""The local engine: decoding in this process with torch, on a CPU or one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import Engine, Workload
from specrl.core.plan import Plan
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.propose import MOST_NODES
from specrl.decoding.session import LocalSession
from specrl.models.draft import Draft, ServingDraft
from specrl.models.memory import check_room
from specrl.models.target import Target

_DEFAULT_CONTEXT = 2048


class LocalEngine(Engine):
    """A target in this process, with or without a draft (see `specrl.core.interfaces.Engine`).

    Args:
        target: the model (`specrl.load_target`).
        draft: its draft; None: plain decoding only.
        max_context: tokens a request may reach, prompt included; None: the target's positions, at most 2048.
        use_rejection_sampling: sample chains from the draft and accept by rejection sampling; else drafts are
            the draft's best tokens and stand where the target itself chooses them (SGLang's default).
        clock: that times the rounds; None: the machine's, synchronised with the target's device.
        taps: without a draft: layers whose inputs are the features in traces, for one who drafts outside the engine.
        static: decode in fixed shapes, captured as CUDA graphs on a GPU; None: on a GPU yes, on a CPU, where it costs
            more than it saves, no. It has run on a CPU only so far (docs/decisions/0009-gpu.md).

    Raises:
        ValueError: the draft was made for another target, or has taps of its own.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None = None,
        *,
        max_context: int | None = None,
        use_rejection_sampling: bool = True,
        clock: Clock | None = None,
        taps: tuple[int, ...] = (),
        static: bool | None = None,
    ) -> None:
        if taps and draft is not None:
            raise ValueError(f"taps must be left out where there is a draft, which has its own, but got {taps}")
        if any(not 0 <= tap < target.config.num_layers for tap in taps):
            raise ValueError(f"taps must be layers of the target, in [0, {target.config.num_layers}), but got {taps}")
        self.target = target
        self._serving = None if draft is None else ServingDraft(draft, target)
        most = min(_DEFAULT_CONTEXT, target.config.max_position_embeddings)
        self.max_context = most if max_context is None else max_context
        self._rejection = use_rejection_sampling
        self._clock = clock or WallClock(target.device)
        self.taps = taps if draft is None else draft.config.taps
        self._sessions: WeakSet[LocalSession] = WeakSet()  # those that nobody holds are gone
        self._warm: set[tuple[int, Plan, bool]] = set()
        self._graph_memory: object = None
        self._static = target.device.startswith("cuda") if static is None else static

    def __deepcopy__(self, memo: dict[int, object]) -> LocalEngine:
        """Itself: an engine stands for its device (Gymnasium copies the arguments of environments)."""
        return self

    @property
    def clock(self) -> Clock:
        """The clock its rounds are timed on."""
        return self._clock

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve; 0 before any was loaded."""
        return 0 if self._serving is None else self._serving.version

    def facts(self) -> dict[str, Any]:
        """Device, dtype and how drafts are accepted."""
        return {
            "engine": "local",
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": self.target.device,
            "use_rejection_sampling": self._rejection,
        }

    def supports(self, plan: Plan) -> bool:
        """Whether a session can run `plan`: with a draft, up to 64 tokens, no wider than its vocabulary; else 0."""
        if self._serving is None:
            return plan.num_steps == 0
        if plan.topk > self._serving.config.draft_vocab_size:
            return False
        return max(plan.num_draft_tokens, (plan.num_steps - 1) * plan.topk) <= MOST_NODES

    def start(
        self,
        workload: Workload,
        *,
        batch_size: int,
        seed: int,
        max_batch_size: int | None = None,
        plain: bool = False,
        trace: bool = False,
    ) -> LocalSession:
        """Prefill `batch_size` requests, where the caches of all fit the memory."""
        most, draft = max_batch_size or batch_size, None if plain or self._serving is None else self._serving.config
        config, dtype, device = self.target.config, self.target.dtype, self.target.device
        check_room(
            config,
            draft,
            dtype,
            device,
            batch_size=most,
            max_context=self.max_context,
            draft_headroom=MOST_NODES + 1,
        )
        session = LocalSession(
            self.target,
            None if plain else self._serving,
            workload.requests(seed),
            batch_size=batch_size,
            max_batch_size=batch_size if max_batch_size is None else max_batch_size,
            max_context=self.max_context,
            seed=seed,
            clock=self._clock,
            use_rejection_sampling=self._rejection,
            trace=trace,
            warm=self._warm,
            taps=() if plain else self.taps,
            graphs=Graphs(self.target.device, pool=self._pool()) if self._static else None,
        )
        self._sessions.add(session)
        return session

    def _pool(self) -> object:
        """Memory that the graphs of all sessions share, for one round runs at a time."""
        if self._graph_memory is None and self.target.device.startswith("cuda"):
            self._graph_memory = torch.cuda.graph_pool_handle()
        return self._graph_memory

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on.

        Raises:
            ValueError: the engine has no draft, or the weights do not fit the one that serves.
        """
        if self._serving is None:
            raise ValueError("the engine decodes without a draft, so none can be loaded; start it with one (new_draft)")
        self._serving.load(weights, version=version)

    def close(self) -> None:
        """Close every session; idempotent."""
        for session in list(self._sessions):
            session.close()
        self._sessions.clear()
