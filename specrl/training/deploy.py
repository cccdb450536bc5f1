"""When learnt draft weights serve: always, or only if they are better.

Weights that are better (`DeployIfBetter`) pass two tests. Their accept length on recent held-out sequences must be
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
from specrl.core.interfaces import DraftLearner, Engine, PlanChooser
from specrl.core.observation import Observation
from specrl.core.plan import Plan
from specrl.core.rollout import Rollout, Step
from specrl.core.round import Round
from specrl.core.round_stats import RoundStats

TURN = 8  # rounds that one draft serves before the other one's turn
PAIRS = (8, 16, 32)  # pairs of turns after which a trial is judged
MAX_WAIT = 64  # calls of the learner between two trials, after refusals in a row
RECENT = 32  # held-out sequences that drafts are compared on

Trial = Generator[Step, None, None]  # its rounds, decoded as they are iterated


class DeployAlways:
    """Serves the learner's newest weights, from the beginning."""

    def __init__(self, engine: Engine, learner: DraftLearner) -> None:
        self._engine, self._learner = engine, learner
        self._deploy()

    def _deploy(self) -> None:
        version, weights = self._learner.weights()
        if version != self._engine.draft_version:
            self._engine.load_draft(weights, version=version)

    def after_learning(self, rollout: Rollout, chooser: PlanChooser) -> Trial | None:
        """Serve the learner's newest weights, without a trial."""
        self._deploy()
        return None

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that serve, by SGLang's names."""
        return self._learner.weights()[1]

    def state_dict(self) -> dict[str, Any]:
        """The name of the policy."""
        return {"policy": "always"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Serve the weights of the restored learner."""
        self._deploy()


class DeployIfBetter:
    """Serves a candidate that is better on held-out sequences and no slower in a live trial.

    Args:
        engine: serves the draft.
        learner: made with `gated=True` and with a `holdout_fraction` above 0.
        gate: compares drafts on held-out sequences.
        plans: of the chooser. If it chooses plan 0 in a trial, the shortest plan with drafts runs instead.
        seed: of the bootstrap in a trial.
        on_decision: called with every decision: version, look, passed, harmful and reason.

    Attributes:
        version: version of the weights that serve.
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
        if not learner.config.holdout_fraction:
            raise ValueError(
                "learner.holdout_fraction must be above 0 to compare drafts, but got 0; set it to 0.125, perhaps"
            )
        self._engine, self._learner, self._gate = engine, learner, gate
        self._seed, self._on_decision = seed, on_decision
        self._drafting = min((plan for plan in plans if plan.num_steps), key=lambda p: p.num_steps, default=None)
        self.version, self._weights = learner.weights()
        self._judged, self._refused, self._wait = self.version, 0, 0  # version, trials in a row, calls to wait

    def weights(self) -> Mapping[str, Tensor]:
        """The weights that passed last, by SGLang's names."""
        return self._weights

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
        version, candidate = self._learner.weights()
        verdict = self._gate.compare(self._weights, candidate, list(self._learner.held_out)[-RECENT:])
        self._report(version, "held-out", verdict)
        if verdict.passed and self._drafting is not None:
            return self._trial(version, candidate, rollout, _PairedChooser(chooser, self._drafting, self.version))
        self._judged = version
        if verdict.harmful:
            self._roll_back()
        if verdict.passed:
            self._accept(version, candidate)
        return None

    def _trial(self, version: int, candidate: Mapping[str, Tensor], rollout: Rollout, chooser: _PairedChooser) -> Trial:
        """Let both drafts serve in turns; the order of the turns changes from pair to pair."""
        rounds = rollout.play(chooser, self._engine.clock)
        speeds: list[tuple[float, float]] = []  # speedups of the serving draft and of the candidate
        try:
            while True:
                chooser.start_pair()
                pair = RoundStats(), RoundStats()
                for turn in (False, True) if len(speeds) % 2 == 0 else (True, False):
                    self._load(*((version, candidate) if turn else (self.version, self._weights)))
                    for step in islice(rounds, TURN):
                        pair[turn].add(step.round, step.plain.seconds)
                        if pair[0].rounds == pair[1].rounds == TURN:
                            speeds.append((pair[0].speedup, pair[1].speedup))
                            if len(speeds) in PAIRS and self._decide(version, candidate, speeds):
                                yield step
                                return
                        yield step
        finally:
            self._load(self.version, self._weights)

    def _decide(self, version: int, candidate: Mapping[str, Tensor], speeds: list[tuple[float, float]]) -> bool:
        """Judge a trial; returns whether it is over."""
        serving_speeds, candidate_speeds = np.array(speeds).T
        rng = np.random.default_rng([self._seed, version])
        verdict = judge_trial(serving_speeds, candidate_speeds, least=PAIRS[0], rng=rng)
        if not (verdict.passed or verdict.harmful or len(speeds) == PAIRS[-1]):
            return False
        self._judged = version
        self._report(version, "trial", verdict)
        if verdict.passed:
            self._accept(version, candidate)
        else:
            self._refused += 1
            self._wait = min(2**self._refused, MAX_WAIT)
            if verdict.harmful:
                self._learner.forget()
                self._roll_back()
        self._load(self.version, self._weights)
        return True

    def _accept(self, version: int, weights: Mapping[str, Tensor]) -> None:
        self.version, self._weights, self._refused = version, weights, 0
        self._learner.snapshot()
        self._load(version, weights)

    def _roll_back(self) -> None:
        self._learner.roll_back()
        self._judged = self._learner.version

    def _load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        if self._engine.draft_version != version:
            self._engine.load_draft(weights, version=version)

    def _report(self, version: int, look: str, verdict: Verdict) -> None:
        decision = {"version": version, "look": look, "passed": verdict.passed, "harmful": verdict.harmful}
        self._on_decision({**decision, "reason": str(verdict)})

    def state_dict(self) -> dict[str, Any]:
        """The state without weights, which are the learner's snapshot."""
        counts = {"judged": self._judged, "refused": self._refused, "wait": self._wait}
        return {"policy": "better", "version": self.version, **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a `state_dict`, and serve the learner's snapshot."""
        self.version, self._weights = state["version"], self._learner.snapshot_weights()
        self._judged, self._refused, self._wait = state["judged"], state["refused"], state["wait"]
        self._load(self.version, self._weights)


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


DeployPolicy = DeployAlways | DeployIfBetter
