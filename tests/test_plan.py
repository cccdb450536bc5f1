import pytest

from specrl.core.plan import Plan, parse_plans


def test_a_chain_is_written_by_its_steps_alone() -> None:
    assert Plan(3) == Plan(3, 1) == Plan(3, 1, 4) == Plan.parse("3") == Plan.parse(3) == Plan.parse(" 3/1/4 ")
    assert (Plan(3).num_steps, Plan(3).topk, Plan(3).num_draft_tokens) == (3, 1, 4)
    assert len({Plan(3), Plan(3, 1, 4)}) == 1


def test_plan_0_proposes_nothing_and_verifies_the_committed_token() -> None:
    assert Plan(0) == Plan.parse("0") == Plan.parse("0/1/1")
    assert Plan(0).num_draft_tokens == 1 and Plan(0).is_chain


@pytest.mark.parametrize("plan", [Plan(0), Plan(1), Plan(5), Plan(1, 2, 3), Plan(2, 2, 4), Plan(3, 4, 37)], ids=str)
def test_plans_are_read_as_they_are_written(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan == Plan.parse(plan)
    assert plan.is_chain == (plan.topk == 1)


@pytest.mark.parametrize(("steps", "topk", "most"), [(1, 2, 3), (1, 8, 9), (2, 2, 7), (3, 3, 22)])
def test_a_tree_verifies_one_path_at_least_and_every_drafted_node_at_most(steps: int, topk: int, most: int) -> None:
    for tokens in (steps + 1, most):
        assert Plan(steps, topk, tokens).num_draft_tokens == tokens
    for tokens in (steps, most + 1):
        with pytest.raises(ValueError, match=f"between {steps + 1} and {most} tokens, but got num_draft_tokens"):
            Plan(steps, topk, tokens)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((-1,), "num_steps must be at least 0, but got -1"),
        ((2, 0), "topk must be at least 1, but got 0"),
        ((0, 2, 1), "num_steps=0 proposes nothing, but got topk=2, num_draft_tokens=1; write '0'"),
        ((0, 1, 2), "num_steps=0 proposes nothing, but got topk=1, num_draft_tokens=2"),
        ((3, 1, 5), "num_steps [+] 1 = 4 tokens, but got num_draft_tokens=5; write '3/1/4'"),
        ((3, 1, -1), "but got num_draft_tokens=-1"),
        ((3, 2), "a tree of num_steps=3, topk=2 verifies between 4 and 11 tokens, but got num_draft_tokens=0"),
    ],
)
def test_numbers_that_are_no_proposal_get_one_clear_line(numbers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Plan(*numbers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "3/1", "3/1/4/2", "3-1-4", "-1", "1.5", "three", "3/1/x"])
def test_other_forms_are_refused_with_the_forms_that_are_read(text: str) -> None:
    with pytest.raises(ValueError, match="a plan is written '0', .* but got"):
        Plan.parse(text)


def test_0_tokens_are_refused_though_the_constructor_takes_them_for_a_chain() -> None:
    with pytest.raises(ValueError, match="num_draft_tokens must be at least 1, but got 0 in '3/1/0'"):
        Plan.parse("3/1/0")


def test_lists_of_plans() -> None:
    wanted = (Plan(0), Plan(2), Plan(3, 2, 6))
    assert parse_plans("0, 2/1/3,3/2/6") == parse_plans(["0", "2", "3/2/6"]) == parse_plans(wanted) == wanted
    with pytest.raises(ValueError, match="plans must differ, but got 2/1/3 more than once"):
        parse_plans("2,0,2/1/3")
    with pytest.raises(ValueError, match="at least one plan"):
        parse_plans([])
    with pytest.raises(ValueError, match="a plan is written"):
        parse_plans("0,,1")


def test_plans_sort_by_steps_then_width() -> None:
    assert sorted(parse_plans("3/2/6,1,3,0")) == list(parse_plans("0,1,3,3/2/6"))
