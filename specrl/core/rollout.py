"""The one round loop, for environments, training and evaluation: observe, choose a plan, decode a round, learn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

from specrl.core.clock import Clock
from specrl.core.interfaces import PlanChooser, Session
from specrl.core.observation import Observation, Observer
from specrl.core.plain_cost import PlainEstimate
from specrl.core.plan import Plan
from specrl.core.round import Round


class Baseline(Protocol):
    """The cost of plain decoding, which every speedup is measured against."""

    def update(self, session: Session, context: float) -> None:
        """Prepare for the next round of `session`, before it is timed; may measure plain decoding.

        `context` is the mean number of known tokens per live request.

        Raises:
            ValueError: the baseline must measure plain decoding, but the engine cannot.
        """

    def estimate(self, batch_size: int, context: float) -> PlainEstimate:
        """Estimate the seconds of one plain decoding step at this batch size and mean context."""


@dataclass(frozen=True, slots=True)
class Step:
    """One round of a rollout."""

    round: Round
    plain: PlainEstimate  # of a plain decoding step at the batch size and context of the round
    thinking_s: float  # seconds that choosing the plan took

    @property
    def seconds(self) -> float:
        """Seconds of the round, the choice of the plan included and prefill excluded."""
        return self.round.seconds + self.thinking_s


class Rollout:
    """Decodes the rounds of a session.

    Args:
        session: decodes the rounds.
        plans: the plans that may be chosen, in the order of the observation.
        baseline: the cost of plain decoding.
        batch_sizes: the batch size of each round, endless; None: the session's present batch size.
        result_delay: rounds by which results arrive late, on engines that overlap rounds.
    """

    def __init__(
        self,
        session: Session,
        plans: Sequence[Plan],
        baseline: Baseline,
        *,
        batch_sizes: Iterator[int] | None = None,
        result_delay: int = 0,
    ) -> None:
        self.session, self.baseline, self.observer = session, baseline, Observer(plans)
        self._batch_sizes = repeat(session.batch_size) if batch_sizes is None else batch_sizes
        self._result_delay = result_delay
        self._late: deque[Step] = deque()
        self._ready = False  # the session has the batch size of the next round
        self._context = 0.0

    def prepare(self) -> None:
        """Resize the session to the batch size of the next round. `observe` and `step` do it too."""
        if self._ready:
            return
        batch = next(self._batch_sizes)
        if batch != self.session.batch_size:
            self.session.resize(batch)
        lengths = self.session.context_lengths
        self._context = sum(lengths) / len(lengths)  # mean number of known tokens per live request
        self._ready = True

    def observe(self) -> Observation:
        """Return the observation before the next round, at the batch size of that round."""
        self.prepare()
        return self.observer.observe(self.session.batch_size, self._context)

    def step(self, plan: Plan, thinking_s: float = 0.0) -> Step:
        """Decode one round with this plan; errors are those of `Session.round` and `Baseline.update`."""
        step = self.decode(lambda: self.session.round(plan), thinking_s)
        self._late.append(step)
        return step

    def decode(self, decode_round: Callable[[], Round], thinking_s: float = 0.0) -> Step:
        """Decode one round in another way, such as with drafts from outside; the observation does not include it."""
        self.prepare()
        batch, context = self.session.batch_size, self._context
        self.baseline.update(self.session, context)
        done = decode_round()
        self._ready = False
        return Step(done, self.baseline.estimate(batch, context), thinking_s)

    def arrived(self) -> Iterator[Step]:
        """Yield the steps whose results are known by now, each once; the observation includes them from then on."""
        while len(self._late) > self._result_delay:
            step = self._late.popleft()
            self.observer.record(step.round, step.plain.seconds)
            yield step

    def play(self, chooser: PlanChooser, clock: Clock) -> Iterator[Step]:
        """Decode rounds with the plans that `chooser` chooses, endlessly; it learns from each result that arrives."""
        while True:
            observation = self.observe()
            began = clock.now()
            plan = chooser.choose(observation)
            step = self.step(plan, clock.now() - began)
            for known in self.arrived():
                chooser.learn(known.round)
            yield step
