import math
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

import pytest
from tiny import Listed, prompts, tiny_draft, tiny_target, with_vocabulary
from torch import Tensor

from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round
from specrl.decoding.engine import LocalEngine
from specrl.decoding.session import LocalSession
from specrl.testing.engine import CHECKS, Case

LISTED = Listed([
    Request(prompt, 8 + i % 9, temperature)
    for i, (prompt, temperature) in enumerate(zip(prompts(24, 4), cycle((0.0, 1.0, 0.7)), strict=False))
])  # fmt: skip


REDUCED = (1, 2, 4, 5, 8)


def local(rejection: bool = True, vocabulary: tuple[int, ...] | None = None) -> Case:
    draft = tiny_draft() if vocabulary is None else with_vocabulary(tiny_draft(), vocabulary)

    def make() -> LocalEngine:
        return LocalEngine(tiny_target(), draft, max_context=32, use_rejection_sampling=rejection)

    return Case(make, LISTED, draft.state_dict())


@pytest.mark.parametrize(("rejection", "vocabulary"), [(True, None), (False, None), (True, REDUCED)])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engines_conform(check: Callable[[Case], None], rejection: bool, vocabulary: tuple[int, ...] | None) -> None:
    check(local(rejection, vocabulary))


class CommitsThePlainToken(LocalSession):
    def measure_plain(self) -> PlainSample:
        sample = super().measure_plain()
        super().round(Plan(0))
        return sample


class CountsDraftsTwice(LocalSession):
    def round(self, plan: Plan) -> Round:
        done = super().round(plan)
        done.tokens[:] += done.correct_drafts
        return done


class IgnoresNewWeights(LocalEngine):
    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        pass


@pytest.mark.parametrize(
    ("check", "name", "broken"),
    [
        ("check_measuring_plain_changes_nothing", "specrl.decoding.engine.LocalSession", CommitsThePlainToken),
        ("check_rounds_add_up", "specrl.decoding.engine.LocalSession", CountsDraftsTwice),
        ("check_a_draft_serves_from_the_next_round_on", f"{__name__}.LocalEngine", IgnoresNewWeights),
    ],
)
def test_the_checks_find_errors(check: str, name: str, broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name, broken)
    with pytest.raises(AssertionError):
        next(c for c in CHECKS if c.__name__ == check)(local())


def test_an_engine_without_a_draft_decodes_plainly() -> None:
    engine = LocalEngine(tiny_target(), max_context=32)
    session = engine.start(LISTED, batch_size=2, seed=0)
    assert engine.draft_version == 0 and session.round(Plan(0)).tokens.tolist() == [1, 1]
    with pytest.raises(ValueError, match="the engine must have a draft"):
        engine.load_draft(tiny_draft().state_dict(), version=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("prompt", ()), ("max_new_tokens", 0), *(("temperature", value) for value in (-0.1, math.inf, math.nan))],
)
def test_requests_are_checked_when_they_are_made(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must"):
        Request(**{"prompt": (1,), name: value})
