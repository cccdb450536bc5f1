"""Checks that every plan chooser must pass: `for check in CHECKS: check(make)`.

`make` returns a new chooser of a tuple of plans. Each check raises AssertionError with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from specrl.core.interfaces import PlanChooser
from specrl.core.observation import Observer
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Round

Make = Callable[[tuple[Plan, ...]], PlanChooser]
PLANS = parse_plans("0,1/1/2,2/1/3,3/1/4,3/2/6")


def made_up_round(
    plan: Plan, batch_size: int, correct: Sequence[int] | None = None, seconds: float = 2e-3, draft_version: int = 0
) -> Round:
    """Return a round for tests, with the correct drafts of each request (default: 0); all seconds are `verify_s`."""
    ids, contexts = np.arange(batch_size), np.full(batch_size, 100)
    drafts = np.zeros(batch_size, dtype=np.int64) if correct is None else np.asarray(correct, dtype=np.int64)
    return Round(plan, ids, drafts + 1, drafts, contexts, 0.0, seconds, 0.0, draft_version=draft_version)


def check_is_a_chooser(make: Make) -> None:
    """It has the attributes that environments and evaluation need."""
    missing = [name for name in ("plans", "choose", "learn") if not hasattr(make(PLANS), name)]
    assert not missing, f"it must have plans, choose and learn, but has no {', '.join(missing)}"


def check_chooses_among_its_plans(make: Make) -> None:
    """It chooses one of its plans from the first round on, at any batch size."""
    chooser, observer = make(PLANS), Observer(PLANS)
    for batch in (1, 3, 32, 1024):
        for _ in range(20):
            plan = chooser.choose(observer.observe(batch, 100.0))
            assert plan in PLANS and plan in chooser.plans, f"it must choose one of its plans, but chose {plan}"
            done = made_up_round(plan, batch)
            chooser.learn(done)
            observer.record(done, 2e-3)


def check_takes_results_late(make: Make) -> None:
    """It may learn from a round after it has chosen the plans of later rounds."""
    chooser, observer = make(PLANS), Observer(PLANS)
    rounds = [made_up_round(chooser.choose(observer.observe(4, 100.0)), 4) for _ in range(3)]
    for _ in range(50):
        rounds.append(made_up_round(chooser.choose(observer.observe(4, 100.0)), 4))
        chooser.learn(rounds.pop(0))


def check_takes_one_plan_only(make: Make) -> None:
    """It chooses the only plan if there is one only."""
    plans = (Plan(2),)
    assert make(plans).choose(Observer(plans).observe(1, 10.0)) == plans[0], "the only plan must be chosen"


def check_survives_hiccups(make: Make) -> None:
    """Rounds that take no time or a hundred times as long do not break it."""
    chooser, observer = make(PLANS), Observer(PLANS)
    for seconds in (1e-9, 2e-3, 0.2, 2e-3, 20.0, 2e-3):
        plan = chooser.choose(observer.observe(2, 50.0))
        assert plan in PLANS, f"it must choose one of its plans, but chose {plan}"
        chooser.learn(made_up_round(plan, 2, seconds=seconds))


CHECKS: tuple[Callable[[Make], None], ...] = (
    check_is_a_chooser,
    check_chooses_among_its_plans,
    check_takes_results_late,
    check_takes_one_plan_only,
    check_survives_hiccups,
)
