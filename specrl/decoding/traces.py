"""Traces of rounds and prefills, kept until somebody drains them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specrl.core.plan import Plan
from specrl.core.round import Ints, Trace
from specrl.decoding.batch import Batch, LiveRequest
from specrl.decoding.propose import MOST_NODES
from specrl.models.draft import ServingDraft


class Record(NamedTuple):
    """What a round leaves for its trace (see `Trace`); path None: a chain's."""

    tokens: Tensor
    parents: Tensor
    features: Tensor
    logits: Tensor
    path: Tensor | None


class Traces:
    """Traces of a batch, in order.

    Args:
        batch: of which requests.
        draft: whose version they note; None: 0.
        device: of the rounds.
    """

    def __init__(self, batch: Batch, draft: ServingDraft | None, device: str) -> None:
        self._batch, self._draft, self._kept = batch, draft, list[Trace]()
        self._arange = torch.arange(MOST_NODES, device=device)

    def drain(self) -> list[Trace]:
        """Take what was kept so far."""
        kept, self._kept = self._kept, []
        return kept

    def keep_round(self, plan: Plan, record: Record, correct: Ints, ids: Ints, context: Ints, ended: list[int]) -> None:
        """Keep a round that is committed, whose ended requests are not replaced yet.

        Args:
            plan, record: what was proposed, and what the round left.
            correct, ids, context: [B], as in `Round`.
            ended: rows whose requests have ended.
        """
        path, live = record.path, self._batch.live
        if path is None:
            rows = self._arange[: plan.num_steps + 1]
            path = torch.where(rows <= self._batch.at(correct)[:, None], rows, -1)
        self._kept.append(
            Trace(
                request_ids=ids,
                positions=context - 1,
                tokens=record.tokens,
                features=record.features,
                logits=record.logits,
                parents=record.parents,
                path=path,
                draft_version=self._version(),
                plan=plan,
                temperatures=tuple(one.request.temperature for one in live),
                finished=tuple(live[row].id for row in ended),
            )
        )

    def keep_prefill(self, one: LiveRequest, tokens: Tensor, features: Tensor, logits: Tensor, ended: bool) -> None:
        """Keep the prefill of a prompt `tokens [1, T]`; `ended`: with its first token."""
        rows = torch.arange(tokens.shape[1], device=tokens.device)[None]
        self._kept.append(
            Trace(
                request_ids=np.array([one.id]),
                positions=np.zeros(1, dtype=np.int64),
                tokens=tokens,
                features=features,
                logits=logits,
                parents=rows - 1,
                path=rows,
                draft_version=self._version(),
                temperatures=(one.request.temperature,),
                finished=(one.id,) if ended else (),
            )
        )

    def _version(self) -> int:
        return 0 if self._draft is None else self._draft.version
