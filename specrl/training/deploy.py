"""When learnt weights serve: always, or only when they are better.

`Always` serves what the learner has after every call, as the learner's own guard lets it. `Better` serves a candidate
after two looks: its accept length on held-out recent sequences must surely be the greater (`Gate.compare`), and then
its speed on the live traffic, in short turns with the draft that serves, must surely not be less (`trial`). Turns last
`TURN` rounds, and a trial is judged after 8, 16 and 32 pairs of them, so that a bad draft serves half of 512 rounds at
most, and half of 128 where it is plainly worse.

What is worse is rolled back. Where the held-out sequences promised a gain that the traffic denies, they are not what
is served: they are thrown away, and the next trial waits, longer after every refusal in a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from specrl.agents.draft.gate import Gate, Verdict, trial
from specrl.agents.draft.learner import OnlineLearner
from specrl.core.interfaces import DraftLearner, Engine
from specrl.core.plan import Plan
from specrl.core.round import Round

TURN = 8  # rounds that one draft serves before the other has its turn
PAIRS = (8, 16, 32)  # of turns, after which a trial is judged
LONGEST_WAIT = 64  # calls of the learner, after refusals in a row
RECENT = 32  # held-out sequences that are compared on


class Updates(Protocol):
    """What the loop asks of a policy."""

    @property
    def trying(self) -> bool:
        """A trial is under way: the learner waits."""
        ...

    def prepare(self) -> None:
        """Load what is to serve in the next round."""
        ...

    def plan(self, batch_size: int, chosen: Plan) -> Plan:
        """The plan of the next round."""
        ...

    def took(self, done: Round, plain_s: float) -> bool:
        """Take a round; whether the chooser may learn from it."""
        ...

    def offer(self) -> None:
        """The learner has learnt."""
        ...

    def serving(self) -> Mapping[str, Tensor]:
        """The weights that serve, by SGLang's names."""
        ...


class Always:
    """The learner's newest weights serve."""

    trying = False

    def __init__(self, engine: Engine, learner: DraftLearner) -> None:
        self._engine, self._learner = engine, learner

    def prepare(self) -> None:
        """Nothing: it is loaded."""

    def plan(self, batch_size: int, chosen: Plan) -> Plan:
        """The chooser's."""
        return chosen

    def took(self, done: Round, plain_s: float) -> bool:
        """Every round is the chooser's."""
        return True

    def offer(self) -> None:
        """Serve what the learner has."""
        version, weights = self._learner.weights()
        if version != self._engine.draft_version:
            self._engine.load_draft(weights, version=version)

    def serving(self) -> Mapping[str, Tensor]:
        """The learner's weights."""
        return self._learner.weights()[1]


class Better:
    """A candidate serves when it is surely better on held-out sequences and surely no slower on the live traffic.

    Args:
        engine: that serves.
        learner: made with `gated=True`, and with a `held_out` share above 0.
        gate: that compares on held-out sequences.
        plans: of the chooser. Where it would not draft, the shortest of them that does is run in a trial.
        seed: of the trial's bootstrap.
        on_decision: called with every decision: version, look, passed, harmful and reason.

    Attributes:
        version: of the weights that serve.
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
        if not learner.config.held_out:
            raise ValueError(
                "a gate needs sequences to compare on, but learner.held_out is 0; set it, to 0.125 perhaps"
            )
        self._engine, self._learner, self._gate, self._seed, self._tell = engine, learner, gate, seed, on_decision
        self._drafting = min((plan for plan in plans if plan.num_steps), key=lambda p: p.num_steps, default=None)
        self.version, self._weights = learner.weights()
        self._looked, self._refused, self._wait = self.version, 0, 0
        self._trial: _Trial | None = None

    @property
    def trying(self) -> bool:
        """Whether a trial is under way."""
        return self._trial is not None

    def serving(self) -> Mapping[str, Tensor]:
        """The weights that passed last."""
        return self._weights

    def offer(self) -> None:
        """Look at the learner's weights, and begin a trial if they pass."""
        version, candidate = self._learner.weights()
        if self._wait:
            self._wait -= 1
            return
        if version == self._looked:
            return
        self._looked = version
        verdict = self._gate.compare(self._weights, candidate, list(self._learner.held_out)[-RECENT:])
        self._decide(version, "held-out", verdict)
        if verdict.harmful:
            self._back()
        if verdict.passed and self._drafting is None:
            self._accept(version, candidate)
        elif verdict.passed:
            self._trial = _Trial(version, candidate)

    def prepare(self) -> None:
        """In a trial: load the draft whose turn it is."""
        if self._trial is not None:
            self._serve(self._trial.candidate_serves)

    def plan(self, batch_size: int, chosen: Plan) -> Plan:
        """The chooser's; in a trial, the same for both turns of a pair, and one that drafts."""
        if self._trial is None:
            return chosen
        assert self._drafting is not None
        return self._trial.plans.setdefault(batch_size, chosen if chosen.num_steps else self._drafting)

    def took(self, done: Round, plain_s: float) -> bool:
        """Take a round; the chooser learns from those of the draft that serves."""
        if self._trial is None:
            return True
        of_candidate = self._trial.candidate_serves
        self._trial.add(done, plain_s)
        if len(self._trial.speeds) in PAIRS and self._trial.rounds % (2 * TURN) == 0:
            self._judge(self._trial)
        return not of_candidate

    def abandon(self) -> None:
        """End a trial without a word, so that the candidate is looked at again."""
        if self._trial is not None:
            self._trial, self._looked = None, self.version
            self._serve(False)

    def _judge(self, tried: _Trial) -> None:
        serving, candidate = np.array(tried.speeds).T
        rng = np.random.default_rng([self._seed, tried.version])
        verdict = trial(serving, candidate, least=PAIRS[0], rng=rng)
        if not (verdict.passed or verdict.harmful or len(serving) == PAIRS[-1]):
            return
        self._trial = None
        self._decide(tried.version, "trial", verdict)
        if verdict.passed:
            self._accept(tried.version, tried.weights)
            return
        self._serve(False)
        self._refused += 1
        self._wait = min(2**self._refused, LONGEST_WAIT)
        if verdict.harmful:
            self._learner.forget()
            self._back()

    def _accept(self, version: int, weights: Mapping[str, Tensor]) -> None:
        self.version, self._weights, self._refused = version, weights, 0
        self._learner.keep()
        self._serve(False)

    def _back(self) -> None:
        self._learner.roll_back()
        self._looked = self._learner.version

    def _serve(self, candidate: bool) -> None:
        """Load the candidate's weights, or those that serve, unless they are loaded."""
        version, weights = self.version, self._weights
        if candidate and self._trial is not None:
            version, weights = self._trial.version, self._trial.weights
        if self._engine.draft_version != version:
            self._engine.load_draft(weights, version=version)

    def _decide(self, version: int, look: str, verdict: Verdict) -> None:
        self._tell(
            {
                "version": version,
                "look": look,
                "passed": verdict.passed,
                "harmful": verdict.harmful,
                "reason": str(verdict),
            }
        )

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on, JSON-able, but the weights (see `OnlineLearner.state`)."""
        return {"version": self.version, "looked": self._looked, "refused": self._refused, "wait": self._wait}

    def load_state_dict(self, state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict` and the weights that served then."""
        self.version, self._looked = state["version"], state["looked"]
        self._refused, self._wait, self._weights = state["refused"], state["wait"], dict(weights)
        self._serve(False)


class _Trial:
    """Two drafts in turns; the order of a pair's turns changes from pair to pair."""

    def __init__(self, version: int, weights: Mapping[str, Tensor]) -> None:
        self.version, self.weights = version, weights
        self.rounds = 0
        self.plans: dict[int, Plan] = {}  # of this pair, by batch size
        self.speeds: list[tuple[float, float]] = []  # serving, candidate; over plain decoding
        self._sums = np.zeros((2, 2))  # [serving, candidate][plain seconds, seconds] of this pair

    @property
    def candidate_serves(self) -> bool:
        """Whether the next round is the candidate's."""
        pair, turn = divmod(self.rounds // TURN, 2)
        return pair % 2 != turn

    def add(self, done: Round, plain_s: float) -> None:
        """Take a round."""
        self._sums[int(self.candidate_serves)] += float(done.tokens.sum()) / done.batch_size * plain_s, done.seconds
        self.rounds += 1
        if self.rounds % (2 * TURN) == 0:
            serving, candidate = (self._sums[:, 0] / self._sums[:, 1]).tolist()
            self.speeds.append((serving, candidate))
            self._sums[:] = 0.0
            self.plans.clear()
