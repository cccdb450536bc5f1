import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Encoder
from tokenizers import models, pre_tokenizers, processors

from specrl.core.interfaces import Request, Workload
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import Tokenizer, load_tokenizer
from specrl.workloads.jsonl import Text
from specrl.workloads.stdlib import library_root
from specrl.workloads.text import Split, TextWorkload, load_workload

SPLITS: tuple[Split, ...] = ("train", "held_out", "all")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(embedded_directory())


def first(workload: Workload, count: int, seed: int = 0) -> list[Request]:
    return list(islice(workload.requests(seed), count))


def test_the_standard_library_gives_endless_reproducible_prompts(tokenizer: Tokenizer) -> None:
    workload = load_workload("stdlib", tokenizer, prompt_tokens=48, max_new_tokens=32, temperature=0.9, ignore_eos=True)
    requests = first(workload, 200)
    assert requests == first(workload, 200) != first(workload, 200, seed=1)
    assert {len(r.prompt) for r in requests} == {48}
    assert {(r.max_new_tokens, r.temperature, r.ignore_eos) for r in requests} == {(32, 0.9, True)}
    assert all(0 <= token < 512 for r in requests for token in r.prompt)
    assert len({r.prompt for r in requests}) > 195


def test_held_out_files_are_never_trained_on(tokenizer: Tokenizer) -> None:
    train, held_out, both = (
        {text.content for text in load_workload("stdlib", tokenizer, split=split).texts} for split in SPLITS
    )
    encoder = (library_root() / "json" / "encoder.py").read_text()
    decoder = (library_root() / "json" / "decoder.py").read_text()
    assert encoder in held_out - train and decoder in train - held_out
    assert both == train | held_out and 10 < len(held_out) < len(train) / 10


def test_prompts_are_windows_that_begin_at_a_line_tokenized_as_in_the_whole(tokenizer: Tokenizer) -> None:
    content = (library_root() / "json" / "decoder.py").read_text()
    ids = tokenizer.encode(content)
    whole = ",".join(map(str, ids))
    for request in first(TextWorkload((Text(content),), tokenizer, (20, 40)), 100):
        assert ",".join(map(str, request.prompt)) in whole
        assert request.prompt[0] == 0 or tokenizer.decode(request.prompt).startswith("\n")
        assert 20 <= len(request.prompt) <= 40


def test_a_document_start_has_the_bos_token(tokenizer: Tokenizer) -> None:
    requests = first(TextWorkload((Text("a b c d e f g h"),), tokenizer, (4, 4)), 5)
    assert {r.prompt[0] for r in requests} == {0}
    assert tokenizer.decode(requests[0].prompt) == "a b c"


def test_documents_are_drawn_by_length(tokenizer: Tokenizer) -> None:
    """3:1 by characters; 1,000 draws stray by 0.05 with odds below 1 in 3,000 (and the seed is fixed)."""
    workload = TextWorkload((Text("x\n" * 3000), Text("y\n" * 1000)), tokenizer, (8, 8))
    drawn = Counter("x" in tokenizer.decode(r.prompt) for r in first(workload, 1000))
    assert abs(drawn[True] / 1000 - 0.75) < 0.05


def test_temperatures_are_drawn_from_a_list(tokenizer: Tokenizer) -> None:
    drawn = Counter(r.temperature for r in first(load_workload("stdlib", tokenizer, temperature=[0, 0.7]), 200))
    assert set(drawn) == {0, 0.7} and min(drawn.values()) > 50


def test_a_short_tail_is_not_lost(tokenizer: Tokenizer) -> None:
    """Wherever the draw falls, the window has its length."""
    workload = TextWorkload((Text("one two three\n" * 10),), tokenizer, (30, 30))
    assert {len(r.prompt) for r in first(workload, 100)} == {30}


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_jsonl_prompts_are_used_from_their_start(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "not this"}]
    shared = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "not this"}]
    path = write_lines(
        tmp_path / "p.jsonl",
        {"prompt": "hello"},
        {"messages": turns},
        {"conversations": shared},
        {"prompt": "hello" * 50},
    )
    requests = first(load_workload(path, tokenizer, prompt_tokens=16, split="all"), 100)
    assert {tokenizer.decode(r.prompt)[:5] for r in requests} == {"hello"}
    assert {len(r.prompt) for r in requests} == {len(tokenizer.encode("hello")), 16}


def test_jsonl_texts_are_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "t.jsonl", {"text": "\n".join(f"line {i}" for i in range(400))})
    assert len({r.prompt for r in first(load_workload(path, tokenizer, prompt_tokens=16), 50)}) > 30


def test_a_directory_is_searched(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("a.py", "deep/b.md", ".git/c.txt", "d.rst", "e.txt"):
        (tmp_path / name).write_text(f"{name}\n" * 50 if name != "e.txt" else "")
    workload = load_workload(tmp_path, tokenizer, prompt_tokens=8, split="all")
    assert [text.content[:4] for text in workload.texts] == ["a.py", "deep"]


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_any_text_can_be_split(tmp_path: Path, tokenizer: Tokenizer, count: int) -> None:
    path = write_lines(tmp_path / "t.jsonl", *({"text": f"text {i}\n" * 100} for i in range(count)))
    train, held_out, both = (
        "".join(text.content for text in load_workload(path, tokenizer, prompt_tokens=4, split=split).texts)
        for split in SPLITS
    )
    assert len(train) + len(held_out) == len(both) and 0 < len(held_out) <= len(train)
    if count > 1:
        assert not set(train.split("\n")) & set(held_out.split("\n")) - {""}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("a.pdf", b"x", "is of another kind"),
        ("empty.txt", b" \n", "must hold text, but .* has none"),
        ("short.txt", b"too short", "at least 64 tokens, but its longest has [0-9]+; lower prompt_tokens"),
        ("latin.txt", b"caf\xe9" * 100, "must be UTF-8, but .*latin.txt is not at byte 3"),
        (
            "keys.jsonl",
            b'{"prompt": "x"}\n{"question": "x"}\n',
            "'turns', but .*keys.jsonl:2 has only 'question'; rename its key",
        ),
        ("list.jsonl", b"[1]\n", "list.jsonl:1 has no object"),
        ("broken.jsonl", b'{"prompt": \n', "must be JSON, but .*broken.jsonl:1 is not"),
        ("number.jsonl", b'{"prompt": 3}\n', "'prompt' must hold text, but .*:1 has 3"),
        (
            "turns.jsonl",
            b'{"messages": ["x"]}\n',
            r"'messages' must hold turns .*:1 has \[\"x\"\]; correct or remove the line",
        ),
        ("latin.jsonl", b'{"prompt": "x"}\n{"prompt": "\xe9"}', "must be UTF-8, but .*latin.jsonl:2 is not at byte 28"),
        (
            "role.jsonl",
            b'{"messages": [{"role": "x", "content": ""}]}',
            'role must be one of system, .*:1 has "x"; correct',
        ),
        ("roles.jsonl", b'{"messages": [{"content": ""}]}', "role must be one of .*:1 has null"),
        (
            "image.jsonl",
            b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            "content must be text or a list of text parts, but .*:1 has .*image_url",
        ),
        ("mtbench.jsonl", b'{"turns": "x"}', "'turns' must hold texts, but .*:1 has \"x\""),
        ("learn.jsonl", b'{"prompt": "x", "learn": 1}', "'learn' must be true or false, but .*:1 has 1"),
        ("nothing.jsonl", b'{"messages": []}\n{"turns": []}\n\n', "must hold text, but .* has none"),
        ("sharegpt.json", b"[]", "is of another kind; make one line of each entry: jq -c '.\\[\\]'"),
    ],
)
def test_unusable_sources_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_workload(str(tmp_path / name), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "1 <= low <= high"),
        ({"prompt_tokens": (9, 8)}, "1 <= low <= high"),
        ({"prompt_tokens": (1, 2, 3)}, "a length or two"),
        ({"prompt_tokens": ()}, "a length or two"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be finite"),
        ({"temperature": []}, "temperature must be a number"),
        ({"split": "test"}, "split must be"),
    ],
)
def test_options_out_of_range_are_refused(tokenizer: Tokenizer, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_workload("stdlib", tokenizer, **options)  # type: ignore[arg-type]


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
    assert len(tokenizer.encode("a " * 9)) >= 9  # a truncation saved with it is not applied


def test_unusable_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a directory"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold a tokenizer .* download it again or add tokenizer\.json"):
        load_tokenizer(tmp_path)
    for content in ("{}", "no"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="must hold a tokenizer that transformers can read") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("bos", "bos_id", "tokens"), [("<s>", 0, 5), ("<new>", 5, 6)])  # transformers adds <new>
def test_the_tokenizer_must_fit_the_model(tmp_path: Path, bos: str, bos_id: int, tokens: int) -> None:
    save_tokenizer(tmp_path, {"bos_token": bos})
    for vocab_size in (tokens, tokens + 4):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": vocab_size}))
        assert load_tokenizer(tmp_path).encode("a b") == [bos_id, 1, 2]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": tokens - 1}))
    with pytest.raises(ValueError, match=f"a tokenizer of {tokens} tokens and vocab_size {tokens - 1} .* use the tok"):
        load_tokenizer(tmp_path)
