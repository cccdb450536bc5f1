"""SGLang's lookahead by a learned policy: the num_steps of each round, by batch size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from specrl.agents.choosers.table import PlanTable
from specrl.core.clock import Clock, WallClock
from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observer
from specrl.core.plan import Plan
from specrl.core.round import Round
from specrl.sglang.plugin.failsafe import Failsafe, log
from specrl.sglang.plugin.plan_socket import PlanSocket
from specrl.sglang.plugin.policy import LearnedPolicy
from specrl.sglang.plugin.settings import Settings

_LATE = 8  # rounds whose results may still be on their way


class Lookahead:
    """A chooser in SGLang's terms.

    SGLang asks for a round's steps before it, and reports its correct drafts after it, with overlapped scheduling when
    later rounds have begun already. A round's seconds are those since it was chosen, or since the last report if that
    came later: on a busy server, the time from one round to the next.

    Args:
        chooser: of chains.
        clock: that times rounds.
    """

    def __init__(self, chooser: PlanChooser, clock: Clock) -> None:
        self.chooser, self._clock = chooser, clock
        self._observer = Observer(chooser.plans)
        self._begun: deque[tuple[int, Plan, float]] = deque(maxlen=_LATE)
        self._reported = 0.0

    def steps(self, batch_size: int) -> int:
        """num_steps of the next round."""
        plan = self.chooser.choose(self._observer.observe(batch_size, 1.0))  # SGLang does not say how long contexts are
        self._begun.append((batch_size, plan, self._clock.now()))
        return plan.num_steps

    def report(self, correct_drafts: Sequence[int], batch_size: int) -> None:
        """Take a round's correct drafts, by request; one that does not fit a round begun is left out."""
        now = self._clock.now()
        while self._begun:
            batch, plan, began = self._begun.popleft()
            if batch == batch_size == len(correct_drafts) and max(correct_drafts) <= plan.num_steps:
                seconds = now - max(began, self._reported)
                self.chooser.learn(_round(plan, correct_drafts, seconds))
                break
        self._reported = now


def _round(plan: Plan, correct_drafts: Sequence[int], seconds: float) -> Round:
    correct = np.asarray(correct_drafts, np.int64)
    unknown = np.zeros(len(correct), np.int64)
    return Round(plan, np.arange(len(correct)), correct + 1, correct, unknown, 0.0, seconds, 0.0)


def check_steps(plans: Iterable[Plan], union: Sequence[int]) -> None:
    """Refuse plans that SGLang has no buffers for.

    Raises:
        ValueError: a tree, or steps that the adaptive config does not name.
    """
    wrong = sorted({str(plan) for plan in plans if not plan.is_chain or plan.num_steps not in union})
    if wrong:
        raise ValueError(
            f"plans must be chains of {', '.join(map(str, union))} steps, the candidates of the adaptive config, but "
            f"got {', '.join(wrong)}; add them there"
        )


def make_lookahead(settings: Settings, union: Sequence[int], ranks: int, clock: Clock) -> Lookahead:
    """What a policy directory says.

    Args:
        settings: with a policy.
        union: candidate steps of the adaptive config.
        ranks: of tensor parallelism.
        clock: that times rounds.

    Raises:
        ValueError: no policy, plans without buffers, or one that learns on several ranks.
    """
    assert settings.policy is not None
    policy = LearnedPolicy.load(settings.policy)
    check_steps(policy.table.values(), union)
    if settings.pin or policy.state is None:
        return Lookahead(PlanTable(policy.table), clock)
    if ranks > 1:
        raise ValueError(
            f"with tensor parallelism ({ranks} ranks, which would decide apart) a policy must be pinned, but it "
            "learns; set SPECRL_POLICY_PIN=1"
        )
    plans = [plan for plan in policy.plans if plan.is_chain and plan.num_steps in union]
    return Lookahead(policy.chooser(plans, costs=False), clock)  # costs were those of another engine


def make_policy(original: type[Any], settings: Settings, ranks: Callable[[], int]) -> type[Any]:
    """A class that takes the place of SGLang's AdaptiveSpeculativeParams, and hands over to it when ours fails.

    Args:
        original: SGLang's class.
        settings: with a policy, or a socket on which plans are given.
        ranks: gives the ranks of tensor parallelism.
    """

    class LearnedParams(original):
        """SGLang's policy with ours before it."""

        def __init__(self, initial_steps: int, cfg_path: str | None = None) -> None:
            super().__init__(initial_steps, cfg_path)
            self._safe = Failsafe("the policy", "SGLang's own lookahead goes on")
            self._mind = self._safe.call(self._make)

        def _make(self) -> Lookahead | PlanSocket:
            union, count = list(self.candidate_steps), ranks()
            if settings.plans is None:
                mind = make_lookahead(settings, union, count, WallClock())
                kind = type(mind.chooser).__name__
                log.warning("specrl plugin: %s chooses the lookahead among %s", kind, union)
                return mind
            if count > 1:
                raise ValueError(f"plans can be given to one rank only, but tensor parallelism has {count}")
            listener = PlanSocket(settings.plans, lambda table: check_steps(table.values(), union))
            log.warning("specrl plugin: the lookahead follows plans given on %s", settings.plans)
            return listener

        def get_steps_for_batch(self, batch_size: int) -> int:
            steps = None if self._mind is None else self._safe.call(self._mind.steps, batch_size)
            return int(super().get_steps_for_batch(batch_size)) if steps is None else steps

        def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> int | None:
            if self._mind is not None:
                self._safe.call(self._mind.report, num_correct_drafts_per_req, batch_size)
            if self._leads():
                return None  # the next round asks for its steps
            changed: int | None = super().on_verify_complete(num_correct_drafts_per_req, batch_size)
            return changed

        def _leads(self) -> bool:
            """Whether ours decides now: not before plans are given, nor after a failure."""
            given = not isinstance(self._mind, PlanSocket) or self._mind.table is not None
            return self._mind is not None and self._safe.on and given

        def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
            if self._mind is None:
                pruned: list[int] | None = super().cuda_graph_bs_for_step(step)
                return pruned
            return None if self._cuda_graph_bs is None else list(self._cuda_graph_bs)  # any step at any batch size

    return LearnedParams
