from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from specrl.core.interfaces import Request, Workload
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import Tokenizer, load_tokenizer
from specrl.workloads.stdlib import SHIFTED
from specrl.workloads.stream import Mixture, Shifting, open_stream
from specrl.workloads.text import TextWorkload, load_workload


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(embedded_directory())


class Numbered:
    """Requests (part, index), from the seed on."""

    def __init__(self, part: int) -> None:
        self.part = part

    def requests(self, seed: int):  # type: ignore[no-untyped-def]
        index = seed
        while True:
            yield Request((self.part, index))
            index += 1


def parts(workload: Workload, count: int, seed: int = 0) -> list[int]:
    return [request.prompt[0] for request in islice(workload.requests(seed), count)]


def test_parts_come_in_order_and_go_on_where_they_stopped() -> None:
    stream = Shifting((Numbered(0), Numbered(1)), (3, 2))
    assert parts(stream, 12) == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    seen = [request.prompt for request in islice(stream.requests(5), 10)]
    assert [index for part, index in seen if part == 0] == [5, 6, 7, 8, 9, 10]
    assert len(set(seen)) == 10
    assert [stream.part_of(i) for i in range(12)] == parts(stream, 12)


def test_the_last_part_may_last_for_ever() -> None:
    stream = Shifting((Numbered(0), Numbered(1)), (2, None))
    assert parts(stream, 50) == [0, 0] + [1] * 48 == [stream.part_of(i) for i in range(50)]


def test_a_mixture_draws_by_weight_and_reproducibly() -> None:
    """3:1; 2,000 draws stray by 0.04 with odds below 1 in 20,000 (and the seed is fixed)."""
    mixture = Mixture((Numbered(0), Numbered(1)), (3.0, 1.0))
    drawn = parts(mixture, 2000)
    assert drawn == parts(mixture, 2000) != parts(mixture, 2000, seed=1)
    assert abs(Counter(drawn)[0] / 2000 - 0.75) < 0.04


def test_a_stream_of_one_name_is_that_workload(tokenizer: Tokenizer) -> None:
    alone = load_workload("stdlib", tokenizer, prompt_tokens=16)
    stream = open_stream("stdlib", "embedded", prompt_tokens=16)
    assert isinstance(stream, TextWorkload) and stream.texts == alone.texts


def test_a_description_with_shift_and_mixture(tokenizer: Tokenizer, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("quick brown fox\n" * 400)
    stream = open_stream(f"stdlib@3,pydoc_data*1+{mine}*2@5,encodings", "embedded", prompt_tokens=12)
    assert isinstance(stream, Shifting) and stream.counts == (3, 5, None)
    first, middle, last = stream.workloads
    assert isinstance(middle, Mixture) and middle.weights == (1.0, 2.0)
    requests = list(islice(stream.requests(0), 12))
    assert requests == list(islice(stream.requests(0), 12))
    assert requests[:3] == list(islice(first.requests(0), 3))  # the first part is as if alone
    texts = [tokenizer.decode(request.prompt) for request in requests[3:8]]
    assert any("fox" in text for text in texts)
    assert {len(request.prompt) for request in requests} == {12}


@pytest.mark.parametrize("name", SHIFTED)
def test_the_shifted_parts_of_the_library(tokenizer: Tokenizer, name: str) -> None:
    train, held_out = (open_stream(name, "embedded", prompt_tokens=16, split=split) for split in ("train", "held_out"))
    known = {text.content for text in load_workload("stdlib", tokenizer, split="all").texts}
    mine = {text.content for text in train.texts}  # type: ignore[attr-defined]
    assert not mine & {text.content for text in held_out.texts}  # type: ignore[attr-defined]
    assert len(mine - known) > 0.9 * len(mine) > 20  # the embedded targets never saw it
    if name == "pydoc_data":
        assert all("\\n" not in text or "\n" in text for text in mine)  # prose, not its source
        assert any(text.lstrip().startswith("The ") for text in mine)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("stdlib@0", "at least 1 request after '@', but got 'stdlib@0'"),
        ("stdlib@x,encodings", "but got 'stdlib@x'"),
        ("stdlib,encodings@3", "only a stream's last part may lack its number of requests, but got 'stdlib,"),
        ("stdlib@3,", "a stream is written .* but got ''"),
        ("stdlib*0+encodings", "weights above 0, but got"),
        ("stdlib*nan+encodings", "weights above 0, but got"),
        ("nothing_here@4", "a workload is 'stdlib'.* but 'nothing_here' does not exist"),
    ],
)
def test_a_wrong_description_gets_one_clear_line(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        open_stream(spec, "embedded", prompt_tokens=8)
    assert "\n" not in str(error.value)
