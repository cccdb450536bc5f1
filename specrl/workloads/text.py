"""Endless, reproducible requests cut from texts.

Prompts are windows of a document, which begin at a line and are drawn in proportion to its length. A line of a .jsonl
file may be a whole prompt or a conversation instead. Lines are read and windows encoded when they are drawn, so large
.jsonl files are never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from specrl.core.interfaces import Request
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import Tokenizer
from specrl.workloads.jsonl import PromptRecord, Text, read_lines
from specrl.workloads.stdlib import SHIFTED, library_files, library_root, shifted_texts

Split = Literal["train", "held_out", "all"]
_SUFFIXES = (".py", ".txt", ".md", ".jsonl")


@dataclass(frozen=True)
class TextWorkload:
    """Requests cut from texts (a `specrl.core.interfaces.Workload`).

    Args:
        texts: documents and whole prompts, at least one. The prompts share their total length evenly.
        tokenizer: of the target.
        prompt_tokens: minimum and maximum prompt length; each request's is uniform between them. A whole prompt may be
            shorter. A conversation in a chat template is never cut, but left out if it is longer than the maximum.
        max_new_tokens: tokens to generate at most.
        temperatures: each request draws one.
        ignore_eos: always generate `max_new_tokens`.
        source: name of the texts in error messages.

    Raises:
        ValueError: an argument out of range, or no text that is long enough and no conversation that is short enough.
    """

    texts: tuple[Text | PromptRecord, ...]
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
        chats = [text for text in self.texts if text.chat is not None]
        shortest = len(self.tokenizer.encode_chat(min(chats, key=lambda chat: chat.size).content)) if chats else 0
        if 1 <= shortest <= high:
            return
        longest = 0
        for text in sorted((text for text in self.texts if text.chat is None), key=lambda text: -text.size):
            length = len(self._encode(text.content, 0, high))
            longest = max(longest, length)
            if length >= (1 if text.whole else high):
                return
        rule, has = f"a text of at least {high} tokens", f"its longest has {longest}; lower prompt_tokens"
        if chats:
            rule, has = f"a conversation of at most {high} tokens", f"its shortest has {shortest}; raise prompt_tokens"
        raise ValueError(f"{self.source} must hold {rule}, but {has}")

    def requests(self, seed: int) -> Iterator[Request]:
        """Yield an endless stream; the same seed gives the same requests."""
        rng = np.random.default_rng(seed)
        lengths = np.array([text.size for text in self.texts], dtype=np.float64)
        whole = np.array([text.whole for text in self.texts])
        weights = np.where(whole, lengths[whole].mean() if whole.any() else 0.0, lengths)
        ends = np.cumsum(weights)
        ends /= ends[-1]
        low, high = self.prompt_tokens
        while True:
            text = self.texts[int(np.searchsorted(ends, rng.random(), side="right"))]
            count, content = int(rng.integers(low, high + 1)), text.content
            start = 0 if text.whole else _line_start(content, int(rng.integers(len(content))))
            if text.chat is not None:
                prompt = self.tokenizer.encode_chat(content)
            else:
                prompt = self._encode(content, start, count)
            if len(prompt) < count and not text.whole:
                prompt = self._last(content, count)
            temperature = self.temperatures[int(rng.integers(len(self.temperatures)))]
            if len(prompt) == count or (text.whole and 1 <= len(prompt) <= high):
                yield Request(tuple(prompt), self.max_new_tokens, temperature, self.ignore_eos, text.learn)

    def _encode(self, content: str, start: int, count: int) -> list[int]:
        """Return the first `count` tokens from character `start` on; fewer at the end of the text."""
        span = 8 * count + 32
        while True:
            ids = self.tokenizer.encode(content[start : start + span], document_start=start == 0)
            whole = start + span >= len(content)
            if whole or len(ids) > count + 8:  # the cut may have broken the words of the last few tokens
                return ids[:count]
            span *= 4

    def _last(self, content: str, count: int) -> list[int]:
        """The first `count` tokens of the last part of the text that has as many; it begins at a line if possible."""
        back = 4 * count
        while True:
            start = _line_start(content, max(0, len(content) - back))
            ids = self._encode(content, start, count)
            if len(ids) == count or start == 0:
                return ids
            back *= 2


def _line_start(content: str, near: int) -> int:
    """Return the line break at or before `near`, if there is one within 1,000 characters; else `near`; 0 is the start.

    A window begins with the line break itself, so that indentation has the same tokens as in the whole text.
    """
    if near < 1000 and content.rfind("\n", 0, near + 1) < 0:
        return 0
    line_break = content.rfind("\n", max(0, near - 1000), near + 1)
    return near if line_break < 0 else line_break


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
    """Load a workload by name.

    Args:
        spec: 'stdlib' (sources of the running interpreter's standard library); 'pydoc_data' (prose), 'encodings'
            (tables) or 'tests' (test code), parts of it that no embedded target was trained on; a .jsonl or .txt file;
            or a directory (searched for .py, .txt, .md and .jsonl). Lines of .jsonl are described in
            docs/guides/model.md. A line with "learn": false is served, and never learnt from.
        tokenizer, max_new_tokens, ignore_eos: as in `TextWorkload`.
        prompt_tokens: prompt length, or the minimum and the maximum.
        temperature: of every request, or several to draw from.
        split: 'train', 'held_out' or 'all'. Of 'stdlib', the files that the embedded targets never saw are held out.
            Of other texts it is every twentieth, of fewer than 20 the last, of one document its last tenth.

    Raises:
        ValueError: an argument out of range, or nothing usable at `spec`.
    """
    if split not in ("train", "held_out", "all"):
        raise ValueError(f"split must be 'train', 'held_out' or 'all', but got {split!r}")
    lengths = (prompt_tokens, prompt_tokens) if isinstance(prompt_tokens, int) else tuple(prompt_tokens)
    if len(lengths) != 2:
        raise ValueError(f"prompt_tokens must be a length or two, minimum and maximum, but got {prompt_tokens}")
    temperatures = (temperature,) if isinstance(temperature, (int, float)) else tuple(temperature)
    if str(spec) == "stdlib":
        texts = _stdlib_texts(split)
    elif str(spec) in SHIFTED:
        texts = _part([Text(text) for text in shifted_texts(str(spec))], split)
    else:
        texts = _part(_texts(Path(spec), tokenizer), split)
    return TextWorkload(
        tuple(texts),
        tokenizer,
        (lengths[0], lengths[1]),
        max_new_tokens,
        temperatures,
        ignore_eos,
        source=f"workload {str(spec)!r} ({split})",
    )


def _stdlib_texts(split: Split) -> list[Text | PromptRecord]:
    root = library_root()
    held_out = set(_read(embedded_directory() / "held_out.txt").split())
    texts: list[Text | PromptRecord] = []
    for path in library_files(root):
        if split in ("all", "held_out" if path.relative_to(root).as_posix() in held_out else "train"):
            texts.append(Text(path.read_text(encoding="utf-8", errors="replace")))
    return [text for text in texts if text.size]


def _part(texts: list[Text | PromptRecord], split: Split) -> list[Text | PromptRecord]:
    if split == "all":
        return texts
    if len(texts) == 1 and not texts[0].whole:
        content, cut = texts[0].content, texts[0].size * 9 // 10
        return [Text(content[:cut] if split == "train" else content[cut:], learn=texts[0].learn)]
    held_out = range(19, len(texts), 20) if len(texts) >= 20 else range(max(1, len(texts) - 1), len(texts))
    return [text for i, text in enumerate(texts) if (i in held_out) == (split == "held_out")]


def _texts(path: Path, tokenizer: Tokenizer) -> list[Text | PromptRecord]:
    if path.is_dir():
        candidates = (p for p in sorted(path.rglob("*")) if p.suffix in _SUFFIXES and p.is_file())
        files = [p for p in candidates if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    elif path.is_file() and path.suffix in _SUFFIXES:
        files = [path]
    else:
        has = "is of another kind" if path.exists() else "does not exist"
        lines = "; make one line of each entry: jq -c '.[]'" if path.is_file() and path.suffix == ".json" else ""
        raise ValueError(
            f"a workload is 'stdlib', a .jsonl or .txt file, or a directory, but {str(path)!r} {has}{lines}"
        )
    texts: list[Text | PromptRecord] = []
    for file in files:
        if file.suffix == ".jsonl":
            texts += read_lines(file, tokenizer)
        elif (content := _read(file)).strip():
            texts.append(Text(content))
    if not texts:
        raise ValueError(f"a workload must hold text, but {str(path)!r} has none in {', '.join(_SUFFIXES)} files")
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        raise ValueError(f"a workload's files must be UTF-8, but {path} is not at byte {at}; convert it") from error
