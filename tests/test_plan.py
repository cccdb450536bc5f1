import pytest

from specrl.core.plan import Plan, chains_of, parse_plans


def test_a_chain_is_written_by_its_num_steps_alone() -> None:
    assert Plan(3) == Plan(3, 1) == Plan(3, 1, 4) == Plan.parse("3") == Plan.parse(3) == Plan.parse(" 3/1/4 ")
    assert (Plan(3).num_steps, Plan(3).topk, Plan(3).num_draft_tokens) == (3, 1, 4)
    assert Plan(0) == Plan.parse("0") == Plan.parse("0/1/1") and Plan(0).num_draft_tokens == 1


@pytest.mark.parametrize("plan", [Plan(0), Plan(1), Plan(5), Plan(1, 2, 3), Plan(2, 2, 4), Plan(3, 4, 37)], ids=str)
def test_plans_are_read_as_they_are_written(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan == Plan.parse(plan)
    assert plan.is_chain == (plan.topk == 1)


@pytest.mark.parametrize(("steps", "topk", "most"), [(1, 2, 3), (1, 8, 9), (2, 2, 7), (3, 3, 22)])
def test_a_tree_verifies_at_least_one_path_and_at_most_every_node(steps: int, topk: int, most: int) -> None:
    for tokens in (steps + 1, most):
        assert Plan(steps, topk, tokens).num_draft_tokens == tokens
    for tokens in (steps, most + 1):
        with pytest.raises(ValueError, match=rf"num_draft_tokens must be in \[{steps + 1}, {most}\]"):
            Plan(steps, topk, tokens)


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ((-1,), "num_steps must be at least 0"),
        ((2, 0), "topk must be at least 1"),
        ((0, 2, 1), "topk must be 1"),
        ((0, 1, 2), "num_draft_tokens"),
        ((3, 1, 5), r"num_draft_tokens must be in \[4, 4\]"),
        ((3, 1, -1), "num_draft_tokens"),
        ((3, 2), "num_draft_tokens"),
    ],
)
def test_numbers_that_are_no_proposal_are_refused(numbers: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Plan(*numbers)


@pytest.mark.parametrize("text", ["", "3/1", "3/1/4/2", "3-1-4", "-1", "1.5", "three", "3/1/x", "3/1/0"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a plan is written"):
        Plan.parse(text)


def test_lists_of_plans() -> None:
    plans = (Plan(0), Plan(2), Plan(3, 2, 6))
    assert parse_plans("0, 2/1/3,3/2/6") == parse_plans(["0", "2", "3/2/6"]) == parse_plans(plans) == plans
    assert sorted(parse_plans("3/2/6,1,3,0")) == list(parse_plans("0,1,3,3/2/6"))
    assert chains_of(parse_plans("3/2/6,1,0")) == (Plan(0), Plan(1))
    for wrong, rule in (("2,0,2/1/3", "different"), ((), "at least one"), ("0,,1", "a plan is written")):
        with pytest.raises(ValueError, match=rule):
            parse_plans(wrong)
