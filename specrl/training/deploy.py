"""Serving learned draft weights only if they are better.

Their accept length on recent held-out sequences must be significantly greater (`Gate.compare`). Then they take turns
with the serving draft in a live trial of 128 to 512 rounds, and must not be significantly slower (`judge_trial`).

Worse weights are rolled back. If a trial finds harmful weights that the held-out sequences approved, these sequences do
not represent the traffic: they are deleted. The next trial is delayed, twice as long after every further refusal.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from specrl.agents.draft.gate import Gate, Verdict, judge_trial
from specrl.agents.draft.learner import OnlineLearner
from specrl.core.interfaces import Engine, PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout, Step
from specrl.core.round import Round
from specrl.core.round_stats import RoundStats

TURN = 8  # rounds that one draft serves before the other one's turn
PAIRS = (8, 16, 32)  # pairs of turns after which a trial is judged
MAX_DELAY = 64  # calls of the learner between two trials, after refusals in a row
RECENT = 32  # held-out sequences that drafts are compared on

VersionedWeights = tuple[int, Mapping[str, Tensor]]  # version; tensors by SGLang's names
Trial = Generator[Step, None, None]  # yields its rounds as they are decoded


class DeployIfBetter:
    """Serves a candidate that is better on held-out sequences and no slower in a live trial.

    Args:
        learner: made with `gated=True` and with a `holdout_fraction` above 0.
        plans: of the chooser. If it chooses plan 0 in a trial, the shortest plan with drafts runs instead.
        seed: of the bootstrap in a trial.

    Attributes:
        decisions: version, check ('held-out' or 'trial'), passed, harmful and reason of each.
    """

    def __init__(
        self,
        engine: Engine,
        learner: OnlineLearner,
        gate: Gate,
        plans: tuple[Plan, ...],
        *,
        seed: int = 0,
    ) -> None:
        self._engine, self._learner, self._gate, self._seed = engine, learner, gate, seed
        self.decisions: list[dict[str, object]] = []
        self._drafting = min((plan for plan in plans if plan.num_steps), key=lambda p: p.num_steps, default=None)
        self._serving: VersionedWeights = learner.weights()
        self._judged_version, self._refusals, self._delay = self.version, 0, 0  # refusals in a row, calls to skip

    @property
    def version(self) -> int:
        """Version of the weights that serve."""
        return self._serving[0]

    def weights(self) -> Mapping[str, Tensor]:
        """Return the weights that serve, by SGLang's names."""
        return self._serving[1]

    def after_learning(self, rollout: Rollout, chooser: PlanChooser) -> Trial | None:
        """Compare the learner's weights with those that serve; called after every call of the learner.

        If they pass, return a trial, decoded by `rollout`. Closing it early ends it without a decision.
        """
        if self._delay:
            self._delay -= 1
            return None
        if self._learner.version == self._judged_version:
            return None
        candidate = self._learner.weights()
        verdict = self._gate.compare(self.weights(), candidate[1], list(self._learner.held_out)[-RECENT:])
        self._report(candidate[0], "held-out", verdict)
        if verdict.passed and self._drafting is not None:
            return self._trial(candidate, rollout, _PairedChooser(chooser, self._drafting, self.version))
        self._judged_version = candidate[0]
        if verdict.harmful:
            self._roll_back()
        if verdict.passed:
            self._accept(candidate)
        return None

    def _trial(self, candidate: VersionedWeights, rollout: Rollout, chooser: _PairedChooser) -> Trial:
        """Let both drafts serve in turns; the order of the turns changes from pair to pair."""
        rounds = rollout.play(chooser, self._engine.clock)
        speeds: list[tuple[float, float]] = []  # speedups of the serving draft and of the candidate
        turns = [(0, self._serving), (1, candidate)]
        try:
            while True:
                chooser.start_pair()
                pair = RoundStats(), RoundStats()
                for number, draft in turns:
                    self._load(draft)
                    for step in islice(rounds, TURN):
                        pair[number].add(step.round, step.plain.seconds)
                        if pair[0].rounds == pair[1].rounds == TURN:
                            speeds.append((pair[0].speedup, pair[1].speedup))
                            if len(speeds) in PAIRS and self._decide(candidate, speeds):
                                yield step
                                return
                        yield step
                turns.reverse()
        finally:
            self._load(self._serving)

    def _decide(self, candidate: VersionedWeights, speeds: list[tuple[float, float]]) -> bool:
        """Judge a trial; return whether it is over."""
        rng = np.random.default_rng([self._seed, candidate[0]])
        verdict = judge_trial(*np.array(speeds).T, rng=rng)
        if not (verdict.passed or verdict.harmful or len(speeds) == PAIRS[-1]):
            return False
        self._judged_version = candidate[0]
        self._report(candidate[0], "trial", verdict)
        if verdict.passed:
            self._accept(candidate)
        else:
            self._refusals += 1
            self._delay = min(2**self._refusals, MAX_DELAY)
            if verdict.harmful:
                self._learner.forget()
                self._roll_back()
        self._load(self._serving)
        return True

    def _accept(self, candidate: VersionedWeights) -> None:
        self._serving, self._refusals = candidate, 0
        self._learner.snapshot()
        self._load(candidate)

    def _roll_back(self) -> None:
        self._learner.roll_back()
        self._judged_version = self._learner.version

    def _load(self, draft: VersionedWeights) -> None:
        if self._engine.draft_version != draft[0]:
            self._engine.load_draft(draft[1], version=draft[0])

    def _report(self, version: int, check: str, verdict: Verdict) -> None:
        decision = {"version": version, "check": check, "passed": verdict.passed, "harmful": verdict.harmful}
        self.decisions.append({**decision, "reason": str(verdict)})

    def state_dict(self) -> dict[str, Any]:
        """Return the state without weights, which are the learner's snapshot."""
        counts = self._judged_version, self._refusals, self._delay
        return {"version": self.version, "counts": counts, "decisions": self.decisions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, and serve the learner's snapshot."""
        self._serving, self.decisions = (state["version"], self._learner.snapshot_weights()), list(state["decisions"])
        self._judged_version, self._refusals, self._delay = state["counts"]
        self._load(self._serving)


class _PairedChooser(PlanChooser):
    """A chooser in a trial: both turns of a pair run the same plans.

    If `chooser` chooses plan 0, `drafting` runs instead. `chooser` learns only from rounds of the draft `version`.
    """

    def __init__(self, chooser: PlanChooser, drafting: Plan, version: int) -> None:
        self.plans = chooser.plans
        self._chooser, self._drafting, self._version = chooser, drafting, version
        self._plans: dict[int, Plan] = {}  # of this pair, by batch size

    def start_pair(self) -> None:
        self._plans.clear()

    def choose(self, observation: Observation) -> Plan:
        plan = self._chooser.choose(observation)
        return self._plans.setdefault(observation.batch_size, plan if plan.num_steps else self._drafting)

    def learn(self, done: Round) -> None:
        if done.draft_version == self._version:
            self._chooser.learn(done)
