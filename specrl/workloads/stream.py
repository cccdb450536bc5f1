"""Traffic that changes: workloads one after the other, and several at once.

A stream is written as parts of so many requests, and a part as one or several workloads:

    stdlib@500,pydoc_data@500            500 requests of each in turn, over and over
    stdlib@500,encodings                 500 requests, then the other for ever
    stdlib*3+tests*1@400,notes.txt       3 in 4 requests from one, 1 in 4 from the other; then a file of one's own

Counts are of requests, not of rounds: a workload knows what is asked, not how it is decoded. Besides what
`load_workload` knows there are the parts of the standard library that no embedded target was trained on:
'pydoc_data' (prose, the texts of `help()`), 'encodings' (tables) and 'tests' (test code).
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from specrl.core.interfaces import Request, Workload
from specrl.models.embedded import target_directory
from specrl.workloads.stdlib import library_root
from specrl.workloads.text import Split, Text, TextWorkload, Tokenizer, load_tokenizer, load_workload

SHIFTED = ("pydoc_data", "encodings", "tests")
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_FORM = "'name@requests,…', each part 'name' or 'name*weight+name*weight'"


@dataclass(frozen=True)
class Mixture:
    """Requests of several workloads at once, each drawn with its weight (`specrl.core.interfaces.Workload`).

    Raises:
        ValueError: no workloads, another number of weights, or one that is not finite and above 0.
    """

    workloads: tuple[Workload, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        good = all(0 < weight < math.inf for weight in self.weights)
        if not self.workloads or len(self.workloads) != len(self.weights) or not good:
            raise ValueError(
                f"a mixture needs a finite weight above 0 for each workload, but got {self.weights} for "
                f"{len(self.workloads)}"
            )

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless stream; the same seed gives the same requests."""
        rng = np.random.default_rng([seed, 1])
        sources = _started(self.workloads, seed)
        until = np.cumsum(self.weights) / sum(self.weights)
        while True:
            yield next(sources[min(int(np.searchsorted(until, rng.random(), side="right")), len(sources) - 1)])


@dataclass(frozen=True)
class Shifting:
    """Workloads one after the other (`specrl.core.interfaces.Workload`).

    Args:
        workloads: in order.
        counts: requests of each; None: for ever, which only the last may be. Else the stream begins again after the
            last, each workload where it stopped.

    Raises:
        ValueError: no workloads, another number of counts, one below 1, or None before the last.
    """

    workloads: tuple[Workload, ...]
    counts: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not self.workloads or len(self.workloads) != len(self.counts):
            raise ValueError(f"a stream needs a count for each of {len(self.workloads)} parts, but got {self.counts}")
        if None in self.counts[:-1]:
            raise ValueError(f"only a stream's last part may lack its count of requests, but got {self.counts}")
        if any(count is not None and count < 1 for count in self.counts):
            raise ValueError(f"a part of a stream must have at least 1 request, but got {self.counts}")

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless stream; the same seed gives the same requests."""
        sources = _started(self.workloads, seed)
        while True:
            for source, count in zip(sources, self.counts, strict=True):
                served = 0
                while count is None or served < count:
                    yield next(source)
                    served += 1

    def part_of(self, request: int) -> int:
        """Which part the request of this number, from 0 on, is of."""
        counts = [math.inf if count is None else count for count in self.counts]
        left = request % sum(counts)
        for part, count in enumerate(counts):
            if left < count:
                return part
            left -= count
        raise AssertionError("a request is of some part")


def _started(workloads: Sequence[Workload], seed: int) -> list[Iterator[Request]]:
    """Each with a seed of its own; the first with `seed` itself, as if it were alone."""
    return [workload.requests(seed + 1_000_003 * i) for i, workload in enumerate(workloads)]


def load_stream(
    spec: str,
    tokenizer: Tokenizer,
    *,
    prompt_tokens: int | Sequence[int] = 64,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.7,
    ignore_eos: bool = False,
    split: Split = "train",
) -> Workload:
    """A workload by its description (see the module's text); a single name is what `load_workload` loads.

    Args:
        spec: the description. Files whose names hold one of ',+*@' cannot be named in it.
        tokenizer, prompt_tokens, max_new_tokens, temperature, ignore_eos, split: as in `load_workload`; of the
            shifted parts of the library, every twentieth text is held out.

    Raises:
        ValueError: another form, or a workload that cannot be loaded.
    """
    settings = _Settings(tokenizer, prompt_tokens, max_new_tokens, temperature, ignore_eos, split)
    parts, counts = [], []
    for part in str(spec).split(","):
        names, at, count = part.strip().rpartition("@") if "@" in part else (part.strip(), "", "")
        if at and not (count.isdecimal() and int(count) >= 1):
            raise ValueError(f"a stream is written {_FORM}, with at least 1 request after '@', but got {part!r}")
        counts.append(int(count) if at else None)
        parts.append(_mixture(names, part, settings))
    if len(parts) == 1:
        return parts[0]
    return Shifting(tuple(parts), tuple(counts))


def open_stream(
    spec: str | Path,
    target: str | Path,
    *,
    split: Split,
    prompt_tokens: int | Sequence[int] = 64,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.7,
    ignore_eos: bool = False,
) -> Workload:
    """What a command's workload names: one's own file or directory, of which all is used, or else a stream's split.

    Its requests are in the tokens of `target`, an embedded one's name or a checkpoint directory.
    """
    own = str(spec) not in ("stdlib", *SHIFTED) and Path(spec).exists()
    load, part = (load_workload, "all") if own else (load_stream, split)
    return load(
        str(spec),
        load_tokenizer(target_directory(target)),
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        split=part,
    )


def _mixture(names: str, part: str, settings: _Settings) -> Workload:
    workloads, weights = [], []
    for each in names.split("+"):
        name, star, number = (piece.strip() for piece in each.partition("*"))
        try:
            weight = float(number) if star else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"a stream is written {_FORM}, weights above 0, but got {part!r}")
        weights.append(weight)
        workloads.append(settings.load(name))
    return workloads[0] if len(workloads) == 1 else Mixture(tuple(workloads), tuple(weights))


@dataclass(frozen=True)
class _Settings:
    """What all workloads of a stream share (see `load_workload`)."""

    tokenizer: Tokenizer
    prompt_tokens: int | Sequence[int]
    max_new_tokens: int
    temperature: float | Sequence[float]
    ignore_eos: bool
    split: Split

    def load(self, name: str) -> TextWorkload:
        """The workload of this name."""
        usual = load_workload(
            name if name not in SHIFTED else "stdlib",
            self.tokenizer,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            ignore_eos=self.ignore_eos,
            split=self.split,
        )
        if name not in SHIFTED:
            return usual
        texts = [text for text in _library_texts(name) if text.content.strip()]
        if not texts:
            raise ValueError(
                f"workload {name!r} must be part of the standard library, but {library_root()} has none of it; "
                "install it, or name a directory"
            )
        held_out = self.split == "held_out"
        kept = [text for i, text in enumerate(texts) if self.split == "all" or (i % 20 == 19) == held_out]
        return replace(usual, texts=tuple(kept), source=f"workload {name!r} ({self.split})")


def _library_texts(name: str) -> list[Text]:
    root = library_root()
    if name == "pydoc_data":
        return _strings(root / "pydoc_data" / "topics.py")
    if name == "encodings":
        return [_read(path) for path in sorted((root / "encodings").glob("*.py"))]
    inside = (path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts)
    return [_read(path) for path in inside if _TEST_FOLDERS & set(path.relative_to(root).parts[:-1])]


def _strings(path: Path) -> list[Text]:
    """The texts that a module's dictionaries hold as values, in order."""
    if not path.is_file():
        return []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    values = (value for node in ast.walk(tree) if isinstance(node, ast.Dict) for value in node.values)
    held = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    for node in ast.walk(tree):  # newer interpreters assign one by one: topics['name'] = '...'
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                held.append(node.value.value)
    return [Text(text) for text in held]


def _read(path: Path) -> Text:
    return Text(path.read_text(encoding="utf-8", errors="replace"))
