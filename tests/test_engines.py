from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle

import pytest
import torch
from tiny import Listed, prompts, tiny_draft, tiny_target, with_vocabulary
from torch import Tensor

from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.round import PlainSample, Round
from specrl.decoding.engine import LocalEngine
from specrl.decoding.session import LocalSession
from specrl.models.draft import Draft
from specrl.testing.engine import CHECKS, Case

LISTED = Listed([
    Request(prompt, 8 + i % 9, temperature)
    for i, (prompt, temperature) in enumerate(zip(prompts(24, 4), cycle((0.0, 1.0, 0.7)), strict=False))
])  # fmt: skip


def local(rejection: bool = True, vocabulary: tuple[int, ...] | None = None) -> Case:
    draft = tiny_draft() if vocabulary is None else with_vocabulary(tiny_draft(), vocabulary)

    def make() -> LocalEngine:
        return LocalEngine(tiny_target(), draft, max_context=32, use_rejection_sampling=rejection)

    return Case(make, LISTED, draft.state_dict())


CASES: dict[str, Callable[[], Case]] = {
    "rejection": local,
    "target-only": lambda: local(rejection=False),
    "reduced": lambda: local(vocabulary=(1, 2, 4, 5, 8)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engines_conform(check: Callable[[Case], None], name: str) -> None:
    check(CASES[name]())


class Meddling(LocalSession):
    """Its probe of plain decoding commits the token."""

    def measure_plain(self) -> PlainSample:
        sample = super().measure_plain()
        super().round(Plan(0))
        return sample


class Generous(LocalSession):
    """Counts the drafts twice."""

    def round(self, plan: Plan) -> Round:
        done = super().round(plan)
        done.tokens[:] += done.correct_drafts
        return done


class Deaf(LocalEngine):
    """Goes on serving the draft that it began with."""

    def load_draft(self, weights: Mapping[str, Tensor], *, version: int) -> None:
        pass


@pytest.mark.parametrize(
    ("check", "broken"),
    [("check_measuring_plain_changes_nothing", Meddling), ("check_rounds_add_up", Generous)],
)
def test_the_checks_find_a_broken_session(
    check: str, broken: type[LocalSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specrl.decoding.engine.LocalSession", broken)
    with pytest.raises(AssertionError):
        next(c for c in CHECKS if c.__name__ == check)(local())


def test_the_checks_find_an_engine_that_ignores_new_weights() -> None:
    draft = tiny_draft()
    case = Case(lambda: Deaf(tiny_target(), draft, max_context=32), LISTED, draft.state_dict())
    with pytest.raises(AssertionError):
        next(c for c in CHECKS if c.__name__ == "check_a_draft_serves_from_the_next_round_on")(case)


def test_new_weights_change_what_is_proposed_from_the_next_round_on() -> None:
    engine = LocalEngine(tiny_target(), tiny_draft(), max_context=200)
    listed = Listed([Request(prompt, 150, ignore_eos=True) for prompt in prompts(16, 4)])
    session = engine.start(listed, batch_size=16, seed=0)
    learnt = [session.round(Plan(3)).accept_length for _ in range(10)]
    worthless = {name: tensor.clone() for name, tensor in tiny_draft().state_dict().items()}
    worthless["lm_head.weight"] = -worthless["lm_head.weight"]
    engine.load_draft(worthless, version=1)
    after = [session.round(Plan(3)).accept_length for _ in range(10)]
    assert sum(learnt) / 10 > 1.7 > 1.3 > sum(after) / 10


def test_a_draft_of_another_vocabulary_is_refused_and_the_old_one_serves_on() -> None:
    draft = with_vocabulary(tiny_draft(), (1, 2, 4, 5, 8))
    engine = LocalEngine(tiny_target(), draft, max_context=32)
    other = with_vocabulary(tiny_draft(), (1, 2, 4, 5, 9)).state_dict()
    with pytest.raises(ValueError, match="the draft vocabulary .d2t. is fixed while a draft serves"):
        engine.load_draft(other, version=1)
    assert engine.draft_version == 0
    assert engine.start(LISTED, batch_size=2, seed=0).round(Plan(2)).draft_version == 0


def test_an_engine_without_a_draft_decodes_plainly() -> None:
    engine = LocalEngine(tiny_target(), max_context=32)
    assert engine.draft_version == 0
    session = engine.start(LISTED, batch_size=2, seed=0)
    assert session.round(Plan(0)).tokens.tolist() == [1, 1]
    with pytest.raises(ValueError, match="decodes without a draft, so none can be loaded; start it with one"):
        engine.load_draft(tiny_draft().state_dict(), version=1)


def test_a_draft_for_another_target_is_refused() -> None:
    draft = tiny_draft()
    config = replace(draft.config, vocab_size=12, draft_vocab_size=12)
    other = Draft(config, {**draft.tensors, "lm_head.weight": torch.zeros(12, 32)})
    with pytest.raises(ValueError, match="the draft's vocab_size must be the target's 10, but got 12"):
        LocalEngine(tiny_target(), other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ()}, "a prompt must hold at least one token, but got none"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, but got 0"),
        ({"temperature": -0.1}, "temperature must be finite and at least 0, but got -0.1"),
        ({"temperature": float("inf")}, "but got inf"),
        ({"temperature": float("nan")}, "but got nan"),
    ],
)
def test_requests_are_checked_when_they_are_made(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**{"prompt": (1,), **arguments})  # type: ignore[arg-type]
