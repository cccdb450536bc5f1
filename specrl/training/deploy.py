"""Serving learnt draft weights only if they are better.

Better weights pass two tests. Their accept length on recent held-out sequences must be
significantly greater (`Gate.compare`). Then they take turns with the serving draft in a live trial, and must not be
significantly slower (`judge_trial`). A turn has `TURN` rounds, and a trial is judged after 8, 16 and 32 pairs of turns,
so a bad draft serves in half of 512 rounds at most, and in half of 128 if it is clearly worse.

Worse weights are rolled back. If a trial refuses a candidate that the held-out sequences approved, these sequences do
not represent the traffic: they are deleted, and the next trial waits, twice as long after every further refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
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
MAX_WAIT = 64  # calls of the learner between two trials, after refusals in a row
RECENT = 32  # held-out sequences that drafts are compared on

Weights = tuple[int, Mapping[str, Tensor]]  # version; tensors by SGLang's names
Trial = Generator[Step, None, None]  # its rounds, decoded as they are iterated


class DeployIfBetter:
    """Serves a candidate that is better on held-out sequences and no slower in a live trial.

    Args:
        engine: serves the draft.
        learner: made with `gated=True` and with a `holdout_fraction` above 0.
        gate: compares drafts on held-out sequences.
        plans: of the chooser. If it chooses plan 0 in a trial, the shortest plan with drafts runs instead.
        seed: of the bootstrap in a trial.
        on_decision: called with every decision: version, look, passed, harmful and reason.
    """

    def __init__(
        self,
        engine: Engine,
        learner: OnlineLearner,
        gate: Gate,
        plans: tuple[Plan, ...],
        *,
        seed: int = 0,
        on_decision: Callable[[dict[str, object]], None] = lambda decision: None,
    ) -> None:
        self._engine, self._learner, self._gate = engine, learner, gate
        self._seed, self._on_decision = seed, on_decision
        self._drafting = min((plan for plan in plans if plan.num_steps), key=lambda p: p.num_steps, default=None)
        self._serving: Weights = learner.weights()
        self._judged, self._refused, self._wait = self.version, 0, 0  # version, trials in a row, calls to wait

    @property
    def version(self) -> int:
        """Version of the weights that serve."""
        return self._serving[0]

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that passed last, by SGLang's names."""
        return self._serving[1]

    def after_learning(self, rollout: Rollout, chooser: PlanChooser) -> Trial | None:
        """Compare the learner's weights with those that serve; called after every call of the learner.

        Returns:
            If they pass, a trial, decoded by `rollout`. Closing it early ends it without a decision.
        """
        if self._wait:
            self._wait -= 1
            return None
        if self._learner.version == self._judged:
            return None
        candidate = self._learner.weights()
        verdict = self._gate.compare(self.weights(), candidate[1], list(self._learner.held_out)[-RECENT:])
        self._report(candidate[0], "held-out", verdict)
        if verdict.passed and self._drafting is not None:
            return self._trial(candidate, rollout, _PairedChooser(chooser, self._drafting, self.version))
        self._judged = candidate[0]
        if verdict.harmful:
            self._roll_back()
        if verdict.passed:
            self._accept(candidate)
        return None

    def _trial(self, candidate: Weights, rollout: Rollout, chooser: _PairedChooser) -> Trial:
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

    def _decide(self, candidate: Weights, speeds: list[tuple[float, float]]) -> bool:
        """Judge a trial; returns whether it is over."""
        rng = np.random.default_rng([self._seed, candidate[0]])
        verdict = judge_trial(*np.array(speeds).T, rng=rng)
        if not (verdict.passed or verdict.harmful or len(speeds) == PAIRS[-1]):
            return False
        self._judged = candidate[0]
        self._report(candidate[0], "trial", verdict)
        if verdict.passed:
            self._accept(candidate)
        else:
            self._refused += 1
            self._wait = min(2**self._refused, MAX_WAIT)
            if verdict.harmful:
                self._learner.forget()
                self._roll_back()
        self._load(self._serving)
        return True

    def _accept(self, candidate: Weights) -> None:
        self._serving, self._refused = candidate, 0
        self._learner.snapshot()
        self._load(candidate)

    def _roll_back(self) -> None:
        self._learner.roll_back()
        self._judged = self._learner.version

    def _load(self, draft: Weights) -> None:
        if self._engine.draft_version != draft[0]:
            self._engine.load_draft(draft[1], version=draft[0])

    def _report(self, version: int, look: str, verdict: Verdict) -> None:
        decision = {"version": version, "look": look, "passed": verdict.passed, "harmful": verdict.harmful}
        self._on_decision({**decision, "reason": str(verdict)})

    def state_dict(self) -> dict[str, Any]:
        """The state without weights, which are the learner's snapshot."""
        counts = {"judged": self._judged, "refused": self._refused, "wait": self._wait}
        return {"policy": "better", "version": self.version, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, and serve the learner's snapshot."""
        self._serving = state["version"], self._learner.snapshot_weights()
        self._judged, self._refused, self._wait = state["judged"], state["refused"], state["wait"]
        self._load(self._serving)


class _PairedChooser(PlanChooser):
    """A chooser in a trial: both turns of a pair run the same plans, with drafts.

    It runs `drafting` if `chooser` chooses plan 0, which learns only from rounds of the draft with this version.
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
