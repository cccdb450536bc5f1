"""Watches served traffic for drift: whether first drafts stand less often than they did."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from specrl.agents.draft.drift import DriftDetector
from specrl.core.round import Round

RECENT = 64  # requests over which `level` is the mean
LEAST = 4  # rounds that a request must have had with a chain


class DriftWatch:
    """One value for each finished request: the share of its rounds whose first draft stood.

    Only chains count. The first draft of a chain is the same however long the chain is, so that a chooser may change
    its plans without looking like drift; a better draft, as from learning, raises no alarm. Where no chain is served,
    nothing is watched. The odds of a false alarm are those of `DriftDetector`.

    Attributes:
        alarms: one dict for each: requests seen, `before` and `after` (means of the values before the last `RECENT`
            requests and among them).
    """

    def __init__(self, seed: int = 0) -> None:
        self._detector = DriftDetector(seed=seed)
        self._open: dict[int, list[int]] = {}  # first drafts that stood and rounds, by request
        self._recent, self._older = deque[float](maxlen=RECENT), deque[float](maxlen=4 * RECENT)
        self._seen = 0
        self.alarms: list[dict[str, float]] = []

    @property
    def level(self) -> float:
        """Share of first drafts that stood, over the last 64 requests; nan before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else float("nan")

    def take(self, done: Round) -> bool:
        """Take a round; whether an alarm is raised."""
        if done.plan.num_steps and done.plan.topk == 1:
            for request, correct in zip(done.request_ids.tolist(), done.correct_drafts.tolist(), strict=True):
                counts = self._open.setdefault(request, [0, 0])
                counts[0] += correct > 0
                counts[1] += 1
        raised = False
        for completion in done.finished:
            stood, rounds = self._open.pop(completion.request_id, (0, 0))
            if rounds >= LEAST:
                raised |= self._add(stood / rounds)
        return raised

    def _add(self, value: float) -> bool:
        if len(self._recent) == RECENT:
            self._older.append(self._recent[0])
        self._recent.append(value)
        self._seen += 1
        if not self._detector.add(value):
            return False
        before = sum(self._older) / len(self._older) if self._older else float("nan")
        self.alarms.append({"requests": self._seen, "before": before, "after": self.level})
        return True

    def end_session(self) -> None:
        """The requests in flight are given up; the next session numbers its own from 0."""
        self._open.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; of a session that has ended."""
        return {
            "detector": self._detector.state(),
            "recent": list(self._recent),
            "older": list(self._older),
            "seen": self._seen,
            "alarms": self.alarms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self._detector.load_state(state["detector"])
        self._recent.extend(state["recent"])
        self._older.extend(state["older"])
        self._seen, self.alarms = state["seen"], list(state["alarms"])
