"""Prompt sources: endless, reproducible requests cut from text.

A `text` is a document: prompts are windows of it, begun at a line and drawn in proportion to length. A `prompt` (a
line of a .jsonl file that says so) is used from its start. Windows are encoded when they are drawn: a fraction of a
millisecond each, however large the source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from specrl.engines.base import Request
from specrl.models.embedded import embedded_directory
from specrl.models.embedded.corpus import library_files, library_root
from specrl.models.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Split", "Text", "TextWorkload", "Tokenizer", "load_tokenizer", "load_workload"]

Split = Literal["train", "held_out", "all"]
_SUFFIXES = (".py", ".txt", ".md", ".jsonl")
_KEYS = ("prompt", "text", "messages", "conversations")


@dataclass(frozen=True)
class Text:
    """One source text: a document to cut windows from, or a whole prompt; and whether a draft may learn from it."""

    content: str
    whole: bool = False
    learn: bool = True


@dataclass(frozen=True)
class TextWorkload:
    """Requests cut from texts (see the module's text; `specrl.engines.base.Workload`).

    Args:
        texts: at least one; documents and prompts may mix (the prompts share their total length evenly).
        tokenizer: of the target.
        prompt_tokens: least and greatest prompt length; a request's is uniform between them. A whole prompt is cut
            to it, or shorter.
        max_new_tokens: tokens to generate at most.
        temperatures: each request draws one.
        ignore_eos: always generate `max_new_tokens`.
        source: what to call the texts in messages.

    Raises:
        ValueError: an argument out of range, or no text as long as the longest prompt.
    """

    texts: tuple[Text, ...]
    tokenizer: Tokenizer
    prompt_tokens: tuple[int, int] = (64, 64)
    max_new_tokens: int = 128
    temperatures: tuple[float, ...] = (0.7,)
    ignore_eos: bool = False
    source: str = "the workload"

    def __post_init__(self) -> None:
        low, high = self.prompt_tokens
        if not 1 <= low <= high:
            raise ValueError(f"prompt_tokens must be a length or two with 1 <= low <= high, but got {low}, {high}")
        if not self.temperatures:
            raise ValueError("temperature must be a number or a list of at least one, but got none; 0 is greedy")
        for temperature in self.temperatures:
            Request((0,), self.max_new_tokens, temperature)
        longest = 0
        for text in sorted(self.texts, key=lambda text: -len(text.content)):
            found = len(self._encode(text, 0, high))
            longest = max(longest, found)
            if found >= (1 if text.whole else high):
                return
        raise ValueError(
            f"{self.source} must hold a text of at least {high} tokens, but its longest has {longest}; "
            "lower prompt_tokens or name longer texts"
        )

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless stream; the same seed gives the same requests."""
        rng = np.random.default_rng(seed)
        lengths = np.array([len(text.content) for text in self.texts], dtype=np.float64)
        whole = np.array([text.whole for text in self.texts])
        weights = np.where(whole, lengths[whole].mean() if whole.any() else 0.0, lengths)
        until = np.cumsum(weights / weights.sum())
        low, high = self.prompt_tokens
        while True:
            text = self.texts[min(int(np.searchsorted(until, rng.random(), side="right")), len(self.texts) - 1)]
            count = int(rng.integers(low, high + 1))
            start = 0 if text.whole else _line_start(text.content, int(rng.integers(len(text.content))))
            prompt = self._encode(text, start, count)
            if len(prompt) < count and not text.whole:  # the end of the text is nearer: take its last window
                prompt = self._last(text, count)
            temperature = self.temperatures[int(rng.integers(len(self.temperatures)))]
            if len(prompt) == count or (text.whole and prompt):
                yield Request(tuple(prompt), self.max_new_tokens, temperature, self.ignore_eos, text.learn)

    def _encode(self, text: Text, start: int, count: int) -> list[int]:
        """The first `count` tokens from character `start` on; fewer at the end of the text."""
        span = 8 * count + 32
        while True:
            part = text.content[start : start + span]
            ids = self.tokenizer.encode(part, document_start=start == 0)
            whole = start + span >= len(text.content)
            if whole or len(ids) > count + 8:  # not the last few, whose words the cut may have broken
                return ids[:count]
            span *= 4

    def _last(self, text: Text, count: int) -> list[int]:
        """The first `count` tokens of the shortest tail, begun at a line where it can be, that has as many."""
        back = 4 * count
        while True:
            start = _line_start(text.content, max(0, len(text.content) - back))
            ids = self._encode(text, start, count)
            if len(ids) == count or start == 0:
                return ids
            back *= 2


def _line_start(content: str, near: int) -> int:
    """The line break at or before `near`, if there is one within 1,000 characters; else `near`; 0 is the start.

    The window begins with the line break itself, so that indentation becomes the tokens it is in the whole text.
    """
    if near < 1000 and content.rfind("\n", 0, near + 1) < 0:
        return 0
    found = content.rfind("\n", max(0, near - 1000), near + 1)
    return near if found < 0 else found


def load_workload(
    spec: str | Path,
    tokenizer: Tokenizer,
    *,
    prompt_tokens: int | Sequence[int] = 64,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.7,
    ignore_eos: bool = False,
    split: Split = "train",
) -> TextWorkload:
    """A workload by name.

    Args:
        spec: 'stdlib' (the running interpreter's standard library sources), a .jsonl or .txt file, or a directory
            (searched for .py, .txt, .md and .jsonl). Lines of .jsonl hold 'prompt', 'text' (a document), 'messages'
            or 'conversations'; of a conversation the contents are joined, without a chat template, up to the last
            that is not the assistant's. A line with "learn": false is served, and never learnt from.
        tokenizer: of the target (`load_tokenizer`).
        prompt_tokens: prompt length, or the least and the greatest.
        max_new_tokens: tokens to generate at most.
        temperature: of every request, or several to draw from.
        ignore_eos: always generate `max_new_tokens`.
        split: 'train', 'held_out' or 'all'. Of the standard library, held out are the files that the embedded
            targets never saw; of other texts every twentieth, of fewer the last, of one document its last tenth.

    Raises:
        ValueError: an argument out of range, or nothing usable at `spec`.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split must be 'train', 'held_out' or 'all', but got {split!r}")
    low, *rest = [prompt_tokens] if isinstance(prompt_tokens, int) else [*prompt_tokens] or [0]
    if len(rest) > 1:
        raise ValueError(f"prompt_tokens must be a length or two, least and greatest, but got {prompt_tokens}")
    temperatures = (temperature,) if isinstance(temperature, (int, float)) else tuple(temperature)
    texts = _stdlib_texts(split) if str(spec) == "stdlib" else _part(_texts(Path(spec)), split)
    return TextWorkload(
        tuple(texts),
        tokenizer,
        (low, rest[0] if rest else low),
        max_new_tokens,
        temperatures,
        ignore_eos,
        source=f"workload {str(spec)!r} ({split})",
    )


def _stdlib_texts(split: Split) -> list[Text]:
    root = library_root()
    held_out = set(_read(embedded_directory() / "held_out.txt").split())
    texts = []
    for path in library_files(root):
        if split in ("all", "held_out" if path.relative_to(root).as_posix() in held_out else "train"):
            texts.append(Text(path.read_text(encoding="utf-8", errors="replace")))
    return [text for text in texts if text.content]


def _part(texts: list[Text], split: Split) -> list[Text]:
    if split == "all":
        return texts
    if len(texts) == 1 and not texts[0].whole:
        cut = len(texts[0].content) * 9 // 10
        return [Text(texts[0].content[:cut] if split == "train" else texts[0].content[cut:])]
    held_out = range(19, len(texts), 20) if len(texts) >= 20 else range(max(1, len(texts) - 1), len(texts))
    return [text for i, text in enumerate(texts) if (i in held_out) == (split == "held_out")]


def _texts(path: Path) -> list[Text]:
    if path.is_dir():
        found = (p for p in sorted(path.rglob("*")) if p.suffix in _SUFFIXES and p.is_file())
        files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif path.is_file() and path.suffix in _SUFFIXES:
        files = [path]
    else:
        has = "is of another kind" if path.exists() else "does not exist"
        raise ValueError(f"a workload is 'stdlib', a .jsonl or .txt file, or a directory, but {str(path)!r} {has}")
    texts = [text for file in files for text in (_lines(file) if file.suffix == ".jsonl" else [Text(_read(file))])]
    texts = [text for text in texts if text.content.strip()]
    if not texts:
        raise ValueError(f"a workload must hold text, but {str(path)!r} has none in {', '.join(_SUFFIXES)} files")
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a workload's files must be UTF-8, but {path} is not at byte {error.start}; convert it"
        ) from error


def _lines(path: Path) -> list[Text]:
    texts = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"every line of a .jsonl workload must be JSON, but {path}:{number} is not: {error}"
            ) from error
        keys = [key for key in _KEYS if isinstance(record, dict) and key in record]
        if not keys:
            has = f"only {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
            raise ValueError(
                f"every line of a .jsonl workload must hold one of {', '.join(map(repr, _KEYS))}, "
                f"but {path}:{number} has {has}"
            )
        value = record[keys[0]]
        content = _conversation(value) if keys[0] in ("messages", "conversations") else value
        if not isinstance(content, str):
            raise ValueError(f"{keys[0]!r} must hold text, but {path}:{number} has {json.dumps(value)[:60]}")
        learn = record.get("learn", True)
        if not isinstance(learn, bool):
            raise ValueError(f"'learn' must be true or false, but {path}:{number} has {json.dumps(learn)[:60]}")
        texts.append(Text(content, whole=keys[0] != "text", learn=learn))
    return texts


def _conversation(turns: object) -> str | None:
    """The contents of all turns up to the last that is not the assistant's, blank lines between; None: not turns."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    asked = [i for i, turn in enumerate(turns) if turn.get("role", turn.get("from")) not in ("assistant", "gpt")]
    contents = [turn.get("content", turn.get("value")) for turn in turns[: asked[-1] + 1 if asked else 0]]
    return "\n\n".join(contents) if all(isinstance(content, str) for content in contents) else None
