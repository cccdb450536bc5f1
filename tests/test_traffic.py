from itertools import islice

import pytest

from specrl.core.batch_schedule import BatchSizes, Phase, batch_sizes, parse_traffic, reached_bound, read_schedules


def test_a_schedule_is_read_as_it_is_written() -> None:
    assert parse_traffic("8") == (Phase(8, 1),)
    assert parse_traffic("16x96, 4x24 ,1") == (Phase(16, 96), Phase(4, 24), Phase(1, 1))
    assert list(islice(batch_sizes(parse_traffic("3x2,1")), 8)) == [3, 3, 1, 3, 3, 1, 3, 3]


@pytest.mark.parametrize(
    ("batch_size", "schedules"),
    [
        (4, ((Phase(4),),)),
        ([1, 4], ((Phase(1),), (Phase(4),))),
        ("1x2,4", ((Phase(1, 2), Phase(4)),)),
        ([Phase(1, 2), Phase(4)], ((Phase(1, 2), Phase(4)),)),
    ],
)
def test_each_episode_has_one_of_the_schedules(batch_size: BatchSizes, schedules: object) -> None:
    assert read_schedules(batch_size) == schedules


def test_a_batch_size_takes_the_largest_bound_that_it_reaches() -> None:
    assert [reached_bound((2, 8), size) for size in (1, 2, 7, 8, 99)] == [2, 2, 2, 8, 8]


@pytest.mark.parametrize("text", ["", "4y2", "x3", "4x", "4x2x1", "-4", "4.5", "4x2,", "four", "4²"])
def test_another_form_is_refused_with_the_part_that_is_wrong(text: str) -> None:
    with pytest.raises(ValueError, match=f"traffic is written .* but got '{text.split(',')[-1]}'$"):
        parse_traffic(text)


@pytest.mark.parametrize("text", ["0", "4x0", "2,0x5"])
def test_numbers_below_1_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="batch_size and rounds .* at least 1"):
        parse_traffic(text)
