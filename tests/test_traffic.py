from itertools import islice

import pytest

from specrl.core.batch_schedule import Phase, batch_sizes, parse_traffic


@pytest.mark.parametrize(
    ("text", "phases"),
    [
        ("8", (Phase(8, 1),)),
        ("16x96", (Phase(16, 96),)),
        ("16x96,4x24,1x24", (Phase(16, 96), Phase(4, 24), Phase(1, 24))),
        (" 2x3 , 1 ", (Phase(2, 3), Phase(1, 1))),
    ],
)
def test_traffic_is_read_as_written(text: str, phases: tuple[Phase, ...]) -> None:
    assert parse_traffic(text) == phases


def test_the_schedule_repeats_for_ever() -> None:
    assert list(islice(batch_sizes(parse_traffic("3x2,1")), 8)) == [3, 3, 1, 3, 3, 1, 3, 3]
    assert list(islice(batch_sizes([Phase(5)]), 3)) == [5, 5, 5]


@pytest.mark.parametrize("text", ["", "4y2", "x3", "4x", "4x2x1", "-4", "4.5", "4x2,", "four", "4²"])
def test_another_form_is_refused_by_the_part_that_is_wrong(text: str) -> None:
    wrong = text.split(",")[-1]
    with pytest.raises(ValueError, match=f"traffic is written .* as in '16x96,4x24,1x24', but got '{wrong}'$"):
        parse_traffic(text)


@pytest.mark.parametrize(("text", "got"), [("0", "0, 1"), ("4x0", "4, 0"), ("2,0x5", "0, 5")])
def test_numbers_below_1_are_refused(text: str, got: str) -> None:
    with pytest.raises(ValueError, match=f"batch_size and rounds of traffic must be at least 1, but got .{got}"):
        parse_traffic(text)
