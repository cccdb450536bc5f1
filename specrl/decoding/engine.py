"""The local engine: decoding in this process with torch, on a CPU or one GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from specrl.core.checks import require
from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import Engine, Workload
from specrl.core.plan import Plan
from specrl.decoding.cuda_graphs import Graphs
from specrl.decoding.propose import MAX_DRAFT_TOKENS, unsupported
from specrl.decoding.session import LocalSession
from specrl.decoding.state import SessionConfig
from specrl.models.draft import Draft, ServingDraft
from specrl.models.memory import cache_bytes, check_room
from specrl.models.target import Target

_DEFAULT_CONTEXT = 2048


class LocalEngine(Engine):
    """A target in this process, with or without a draft (see `specrl.core.interfaces.Engine`).

    Args:
        target: the model (`specrl.load_target`).
        draft: its draft; None: plain decoding only.
        max_context: tokens that a request may reach, prompt included; None: the target's positions, at most 2048.
        use_rejection_sampling: sample chains from the draft and accept them by rejection sampling (SGLang's option of
            that name). Otherwise, and for every tree, the draft's best tokens are proposed, and accepted where the
            target itself chooses them (SGLang's default).
        clock: times the rounds; None: the machine's clock, synchronised with the target's device.
        aux_layers: without a draft: layers whose inputs traces hold as features, for drafting outside the engine.
        static: decode in fixed shapes, captured as CUDA graphs on a GPU; None: on a GPU only, because on a CPU it costs
            more than it saves. So far it has been tested on CPUs only (docs/decisions/0009-gpu.md).

    Raises:
        ValueError: the draft was made for another target, `aux_layers` are passed together with a draft or are not
            layers of the target, or `max_context` is larger than the target's positions.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft | None = None,
        *,
        max_context: int | None = None,
        use_rejection_sampling: bool = True,
        clock: Clock | None = None,
        aux_layers: tuple[int, ...] = (),
        static: bool | None = None,
    ) -> None:
        layers, positions = target.config.num_layers, target.config.max_position_embeddings
        require(draft is None or not aux_layers, "aux_layers", "left out with a draft, which has its own", aux_layers)
        in_target = all(0 <= layer < layers for layer in aux_layers)
        require(in_target, "aux_layers", f"layers of the target, in [0, {layers})", aux_layers)
        self.max_context = min(_DEFAULT_CONTEXT, positions) if max_context is None else max_context
        rule = f"in [2, {positions}], the target's positions"
        require(2 <= self.max_context <= positions, "max_context", rule, max_context)
        self.target = target
        self._serving = None if draft is None else ServingDraft(draft, target)
        self._use_rejection_sampling = use_rejection_sampling
        self._clock = clock or WallClock(target.device)
        self.aux_layers = aux_layers if draft is None else draft.config.aux_layers
        self._sessions: WeakSet[LocalSession] = WeakSet()  # weak, so that a session without other references is freed
        self._warm: set[tuple[int, Plan, bool]] = set()
        self._graph_pool: object = None  # shared by all sessions, because only one round runs at a time
        self._static = target.device.startswith("cuda") if static is None else static

    def __deepcopy__(self, memo: dict[int, object]) -> LocalEngine:
        return self  # Gymnasium copies the arguments of environments

    @property
    def clock(self) -> Clock:
        """The clock that times the rounds."""
        return self._clock

    @property
    def draft_version(self) -> int:
        """Version of the draft weights that serve; 0 before any were loaded."""
        return 0 if self._serving is None else self._serving.version

    def facts(self) -> dict[str, Any]:
        """Return device, dtype and the kind of acceptance."""
        return {
            "engine": "local",
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": self.target.device,
            "use_rejection_sampling": self._use_rejection_sampling,
        }

    def supports(self, plan: Plan) -> bool:
        """Return whether a session can run `plan`: without a draft only 0, else one of up to 64 tokens."""
        return unsupported(plan, self._serving) is None

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
        """Prefill `batch_size` requests, if the caches of all `max_batch_size` fit the memory."""
        target, serving = self.target, None if plain else self._serving
        largest, rejection = batch_size if max_batch_size is None else max_batch_size, self._use_rejection_sampling
        require(1 <= batch_size <= largest, "batch_size", f"in [1, max_batch_size={largest}]", batch_size)
        aux_layers = () if plain else self.aux_layers
        config = SessionConfig(batch_size, largest, self.max_context, seed, rejection, trace, aux_layers)
        per_token = cache_bytes(target.config, target.dtype, None if serving is None else serving.config)
        headroom = MAX_DRAFT_TOKENS + 1
        check_room(per_token, target.device, config.max_batch_size, self.max_context, draft_headroom=headroom)
        if self._graph_pool is None and target.device.startswith("cuda"):
            self._graph_pool = torch.cuda.graph_pool_handle()
        graphs = Graphs(target.device, pool=self._graph_pool) if self._static else None
        requests = workload.requests(seed)
        session = LocalSession(target, serving, requests, config, clock=self._clock, warm=self._warm, graphs=graphs)
        self._sessions.add(session)
        return session

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        """Serve these draft weights (SGLang's names) from the next round on.

        Raises:
            ValueError: the engine has no draft, or the weights do not fit the serving draft.
        """
        if self._serving is None:
            raise ValueError("the engine must have a draft to load weights; pass draft=specrl.new_draft(target)")
        self._serving.load(weights, version=version)

    def close(self) -> None:
        """Close every session; idempotent."""
        for session in list(self._sessions):
            session.close()
        self._sessions.clear()
