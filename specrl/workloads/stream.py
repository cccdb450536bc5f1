"""Traffic that changes: workloads one after the other, and several at once.

A stream is written as parts with numbers of requests, and a part as one or several workloads with weights:

    stdlib@500,pydoc_data@500            500 requests of each in turn, repeated
    stdlib@500,encodings                 500 requests, then only the other
    stdlib*3+tests*1@400,notes.txt       3 in 4 requests from one, 1 in 4 from the other; then a file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from specrl.core.interfaces import Request, Workload
from specrl.models.embedded import target_directory
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.stdlib import SHIFTED
from specrl.workloads.text import Split, load_workload

_FORM = "a stream is written 'name@requests,…', each part 'name' or 'name*weight+name*weight'"


@dataclass(frozen=True)
class Mixture:
    """Requests of several workloads at once, each drawn with its weight (a `specrl.core.interfaces.Workload`).

    Args:
        workloads: at least one.
        weights: for each workload, finite and above 0.
    """

    workloads: tuple[Workload, ...]
    weights: tuple[float, ...]

    def requests(self, seed: int) -> Iterator[Request]:
        """Yield an endless stream; the same seed gives the same requests."""
        rng, sources = np.random.default_rng([seed, 1]), _start(self.workloads, seed)
        ends = np.cumsum(self.weights)
        while True:
            yield next(sources[int(np.searchsorted(ends / ends[-1], rng.random(), side="right"))])


@dataclass(frozen=True)
class Shifting:
    """Workloads one after the other (a `specrl.core.interfaces.Workload`).

    Args:
        workloads: in order.
        counts: requests of each. None, for the last one only: without end. Otherwise the stream begins again after the
            last, and each workload continues where it stopped.
        names: of the parts, for logs.
    """

    workloads: tuple[Workload, ...]
    counts: tuple[int | None, ...]
    names: tuple[str, ...] = ()

    def requests(self, seed: int) -> Iterator[Request]:
        """Yield an endless stream; the same seed gives the same requests."""
        sources = _start(self.workloads, seed)
        while True:
            for source, count in zip(sources, self.counts, strict=True):
                yield from islice(source, count)

    def part_of(self, request: int) -> int:
        """Return the number of the part that request number `request` belongs to, both from 0."""
        ends = np.cumsum([math.inf if count is None else count for count in self.counts])
        return int(np.searchsorted(ends, request % ends[-1], side="right"))


def _start(workloads: Sequence[Workload], seed: int) -> list[Iterator[Request]]:
    """Start each workload with a seed of its own; the first one with `seed`, as if it were alone."""
    return [workload.requests(seed + 1_000_003 * i) for i, workload in enumerate(workloads)]


def open_stream(
    spec: str | Path,
    target: str | Path,
    *,
    split: Split = "train",
    prompt_tokens: int | Sequence[int] = 64,
    max_new_tokens: int = 128,
    temperature: float | Sequence[float] = 0.7,
    ignore_eos: bool = False,
) -> Workload:
    """Open a workload or a stream of workloads, in the tokens of a target.

    Args:
        spec: a file or directory, or a stream as the module describes it. Files whose names contain one of ',+*@'
            cannot be part of a longer stream.
        target: name of an embedded target, or a checkpoint directory.
        split: as in `load_workload`; a file or directory by itself is used as a whole.
        prompt_tokens, max_new_tokens, temperature, ignore_eos: as in `load_workload`.

    Raises:
        ValueError: another form, or a workload that cannot be loaded.
    """
    load = partial(
        load_workload,
        tokenizer=load_tokenizer(target_directory(target)),
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
    )
    if str(spec) not in ("stdlib", *SHIFTED) and Path(spec).exists():
        return load(spec, split="all")
    parts, counts = [], []
    names = tuple(part.strip() for part in str(spec).split(","))
    for part in names:
        mixed, at, count = part.partition("@")
        if at and not (count.isdecimal() and int(count) >= 1):
            raise ValueError(f"{_FORM}, with at least 1 request after '@', but got {part!r}")
        counts.append(int(count) if at else None)
        parts.append(_mixture(mixed, part, partial(load, split=split)))
    if None in counts[:-1]:
        raise ValueError(f"only a stream's last part may lack its number of requests, but got {str(spec)!r}")
    return parts[0] if len(parts) == 1 else Shifting(tuple(parts), tuple(counts), names)


def _mixture(mixed: str, part: str, load: Callable[[str], Workload]) -> Workload:
    workloads, weights = [], []
    for each in mixed.split("+"):
        name, star, number = (piece.strip() for piece in each.partition("*"))
        try:
            weight = float(number) if star else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise ValueError(f"{_FORM}, weights above 0, but got {part!r}")
        weights.append(weight)
        workloads.append(load(name))
    return workloads[0] if len(workloads) == 1 else Mixture(tuple(workloads), tuple(weights))
