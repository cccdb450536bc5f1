"""Requests from texts, files and the standard library; streams and mixtures of them; tokenizers."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers, processors

from specrl.core.interfaces import Request, Workload
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import Tokenizer, load_tokenizer
from specrl.workloads.jsonl import Text
from specrl.workloads.stdlib import SHIFTED, library_root
from specrl.workloads.stream import Mixture, Shifting, open_stream
from specrl.workloads.text import Split, TextWorkload, load_workload

SPLITS: tuple[Split, ...] = ("train", "held_out", "all")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(embedded_directory())


def first(workload: Workload, count: int, seed: int = 0) -> list[Request]:
    return list(islice(workload.requests(seed), count))


def contents(workload: Workload) -> list[str]:
    assert isinstance(workload, TextWorkload)
    return [text.content for text in workload.texts]


def test_the_standard_library_gives_reproducible_prompts(tokenizer: Tokenizer) -> None:
    workload = load_workload(
        "stdlib", tokenizer, prompt_tokens=48, max_new_tokens=32, temperature=[0, 0.7], ignore_eos=True
    )
    requests = first(workload, 200)
    assert requests == first(workload, 200) != first(workload, 200, seed=1)
    assert {(len(r.prompt), r.max_new_tokens, r.ignore_eos) for r in requests} == {(48, 32, True)}
    assert len({r.prompt for r in requests}) > 195
    temperatures = Counter(r.temperature for r in requests)
    assert set(temperatures) == {0, 0.7} and min(temperatures.values()) > 50
    assert contents(open_stream("stdlib", "embedded", prompt_tokens=48)) == contents(workload)


def test_held_out_files_are_never_trained_on(tokenizer: Tokenizer) -> None:
    train, held_out, both = (set(contents(load_workload("stdlib", tokenizer, split=split))) for split in SPLITS)
    encoder, decoder = ((library_root() / "json" / name).read_text() for name in ("encoder.py", "decoder.py"))
    assert encoder in held_out - train and decoder in train - held_out
    assert both == train | held_out and 10 < len(held_out) < len(train) / 10


@pytest.mark.parametrize("name", SHIFTED)
def test_embedded_targets_never_saw_the_shifted_parts(tokenizer: Tokenizer, name: str) -> None:
    train, held_out = (set(contents(open_stream(name, "embedded", prompt_tokens=16, split=s))) for s in SPLITS[:2])
    known = set(contents(load_workload("stdlib", tokenizer, split="all")))
    assert not train & held_out and len(train - known) > 0.9 * len(train) > 20
    if name == "pydoc_data":
        assert any(text.lstrip().startswith("The ") for text in train), "prose, not its source"


def test_prompts_are_windows_that_begin_at_a_line(tokenizer: Tokenizer) -> None:
    """Their tokens are those of the whole text; a document begins with the BOS token."""
    content = (library_root() / "json" / "decoder.py").read_text()
    whole = ",".join(map(str, tokenizer.encode(content)))
    for request in first(TextWorkload((Text(content),), tokenizer, (20, 40)), 100):
        assert ",".join(map(str, request.prompt)) in whole
        assert request.prompt[0] == 0 or tokenizer.decode(request.prompt).startswith("\n")
        assert 20 <= len(request.prompt) <= 40
    start = first(TextWorkload((Text("a b c d e f g h"),), tokenizer, (4, 4)), 1)[0].prompt
    assert start[0] == 0 and tokenizer.decode(start) == "a b c"
    short = TextWorkload((Text("one two three\n" * 10),), tokenizer, (30, 30))
    assert {len(request.prompt) for request in first(short, 100)} == {30}, "also at the end of the text"


def test_documents_are_drawn_by_length(tokenizer: Tokenizer) -> None:
    """3:1 by characters; 1,000 draws differ by 0.05 with odds below 1 in 3,000 (and the seed is fixed)."""
    workload = TextWorkload((Text("x\n" * 3000), Text("y\n" * 1000)), tokenizer, (8, 8))
    drawn = Counter("x" in tokenizer.decode(r.prompt) for r in first(workload, 1000))
    assert abs(drawn[True] / 1000 - 0.75) < 0.05


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_jsonl_prompts_are_used_from_their_start_and_texts_are_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "not this"}]
    shared = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "not this"}]
    prompts = ({"prompt": "hello"}, {"messages": turns}, {"conversations": shared}, {"prompt": "hello" * 50})
    path = write_lines(tmp_path / "prompts.jsonl", *prompts)
    requests = first(load_workload(path, tokenizer, prompt_tokens=16, split="all"), 100)
    assert {tokenizer.decode(r.prompt)[:5] for r in requests} == {"hello"}
    assert {len(r.prompt) for r in requests} == {len(tokenizer.encode("hello")), 16}
    path = write_lines(tmp_path / "texts.jsonl", {"text": "\n".join(f"line {i}" for i in range(400))})
    assert len({r.prompt for r in first(load_workload(path, tokenizer, prompt_tokens=16), 50)}) > 30


def test_a_directory_is_searched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("a.py", "deep/b.md", ".git/c.txt", "d.rst", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n" * 50 if name != "e.txt" else "")
    workload = load_workload(tmp_path, tokenizer, prompt_tokens=8, split="all")
    assert [text[:4] for text in contents(workload)] == ["a.py", "deep"]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_any_text_can_be_split(tmp_path: Path, tokenizer: Tokenizer, count: int) -> None:
    path = write_lines(tmp_path / "t.jsonl", *({"text": f"text {i}\n" * 100} for i in range(count)))
    train, held_out, both = (
        "".join(contents(load_workload(path, tokenizer, prompt_tokens=4, split=split))) for split in SPLITS
    )
    assert len(train) + len(held_out) == len(both) and 0 < len(held_out) <= len(train)
    if count > 1:
        assert not set(train.split("\n")) & set(held_out.split("\n")) - {""}


IMAGE = b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("a.pdf", b"x", "is of another kind"),
        ("empty.txt", b" \n", "must hold text"),
        ("short.txt", b"too short", "at least 64 tokens, but its longest has [0-9]+"),
        ("latin.txt", b"caf\xe9" * 100, "UTF-8, but .*latin.txt is not at byte 3"),
        ("keys.jsonl", b'{"prompt": "x"}\n{"question": "x"}\n', "keys.jsonl:2 has only 'question'"),
        ("list.jsonl", b"[1]\n", "list.jsonl:1 has no object"),
        ("broken.jsonl", b'{"prompt": \n', "JSON, but .*broken.jsonl:1 is not"),
        ("number.jsonl", b'{"prompt": 3}\n', "'prompt' .*:1 has 3"),
        ("turns.jsonl", b'{"messages": ["x"]}\n', "'messages' must hold turns"),
        ("latin.jsonl", b'{"prompt": "x"}\n{"prompt": "\xe9"}', "UTF-8, but .*latin.jsonl:2 is not at byte 28"),
        ("role.jsonl", b'{"messages": [{"role": "x", "content": ""}]}', 'role must be one of system, .*:1 has "x"'),
        ("image.jsonl", IMAGE, "content must be text .*:1 has .*image_url"),
        ("mtbench.jsonl", b'{"turns": "x"}', "'turns' must hold texts"),
        ("learn.jsonl", b'{"prompt": "x", "learn": 1}', "'learn' must be true or false"),
        ("nothing.jsonl", b'{"messages": []}\n{"turns": []}\n\n', "must hold text"),
        ("sharegpt.json", b"[]", "make one line of each entry: jq -c"),
        ("stdlib@0", None, "at least 1 request after '@', but got 'stdlib@0'"),
        ("stdlib,encodings@3", None, "only a stream's last part may lack its number of requests"),
        ("stdlib@3,", None, "a stream is written .* but got ''"),
        ("stdlib*nan+encodings", None, "weights above 0, but got"),
        ("stdlib", {"prompt_tokens": 0}, "1 <= low <= high"),
        ("stdlib", {"prompt_tokens": (9, 8)}, "1 <= low <= high"),
        ("stdlib", {"prompt_tokens": (1, 2, 3)}, "a length or two"),
        ("stdlib", {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ("stdlib", {"temperature": -1.0}, "temperature must be finite"),
        ("stdlib", {"temperature": []}, "temperature"),
        ("stdlib", {"split": "half"}, "split must be"),
    ],
)
def test_unusable_sources_and_options_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_stream(name, "embedded", **(content if isinstance(content, dict) else {}))
    assert "\n" not in str(caught.value)


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
    return [request.prompt[0] for request in first(workload, count, seed)]


def test_parts_come_in_order_and_continue_where_they_stopped() -> None:
    stream = Shifting((Numbered(0), Numbered(1)), (3, 2))
    assert parts(stream, 12) == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0] == [stream.part_of(i) for i in range(12)]
    seen = [request.prompt for request in first(stream, 10, seed=5)]
    assert [index for part, index in seen if part == 0] == [5, 6, 7, 8, 9, 10] and len(set(seen)) == 10
    endless = Shifting((Numbered(0), Numbered(1)), (2, None))
    assert parts(endless, 50) == [0, 0] + [1] * 48 == [endless.part_of(i) for i in range(50)]


def test_a_mixture_draws_by_weight_and_reproducibly() -> None:
    """3:1; 2,000 draws differ by 0.04 with odds below 1 in 20,000 (and the seed is fixed)."""
    mixture = Mixture((Numbered(0), Numbered(1)), (3.0, 1.0))
    drawn = parts(mixture, 2000)
    assert drawn == parts(mixture, 2000) != parts(mixture, 2000, seed=1)
    assert abs(Counter(drawn)[0] / 2000 - 0.75) < 0.04


def test_a_stream_of_parts_and_mixtures(tokenizer: Tokenizer, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("quick brown fox\n" * 400)
    stream = open_stream(f"stdlib@3,pydoc_data*1+{mine}*2@5,encodings", "embedded", prompt_tokens=12)
    assert isinstance(stream, Shifting) and stream.counts == (3, 5, None)
    mixture = stream.workloads[1]
    assert isinstance(mixture, Mixture) and mixture.weights == (1.0, 2.0)
    requests = first(stream, 12)
    assert requests == first(stream, 12)
    assert requests[:3] == first(stream.workloads[0], 3), "the first part is as if alone"
    assert any("fox" in tokenizer.decode(request.prompt) for request in requests[3:8])


def save_tokenizer(directory: Path, config: dict[str, object], *, adds: bool = False) -> Path:
    encoder = Encoder(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "\n": 3, "?": 4}, unk_token="?"))
    encoder.pre_tokenizer = pre_tokenizers.Whitespace()
    if adds:
        encoder.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    encoder.enable_truncation(3)
    encoder.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "adds", "at_start", "within"),
    [
        ({}, False, [1, 2], [1, 2]),
        ({"bos_token": "<s>"}, False, [0, 1, 2], [1, 2]),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>"}, "add_bos_token": True}, False, [0, 1, 2], [0, 1, 2]),
        ({"bos_token": "<s>", "add_bos_token": False}, False, [1, 2], [1, 2]),
        ({"bos_token": "<s>"}, True, [0, 1, 2], [0, 1, 2]),
    ],
)
def test_bos_is_put_where_the_checkpoint_puts_it(
    tmp_path: Path, config: dict[str, object], adds: bool, at_start: list[int], within: list[int]
) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, config, adds=adds))
    assert tokenizer.encode("a b") == at_start
    assert tokenizer.encode("a b", document_start=False) == within
    assert len(tokenizer.encode("a " * 9)) >= 9, "a truncation saved with it is not applied"


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold a tokenizer .* tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="must hold a tokenizer that transformers can read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("bos", "bos_id", "tokens"), [("<s>", 0, 5), ("<new>", 5, 6)])  # transformers adds <new>
def test_the_tokenizer_must_fit_the_model(tmp_path: Path, bos: str, bos_id: int, tokens: int) -> None:
    save_tokenizer(tmp_path, {"bos_token": bos})
    for vocab_size in (tokens, tokens + 4, tokens - 1):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
        if vocab_size >= tokens:
            assert load_tokenizer(tmp_path).encode("a b") == [bos_id, 1, 2]
    with pytest.raises(ValueError, match=f"vocab_size={tokens - 1} tokens, but got {tokens}"):
        load_tokenizer(tmp_path)
