"""Records of evaluated choosers that can be replayed: a JSON file and an .npz of plain arrays beside it, no pickle."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan, parse_plans
from specrl.core.statistics import Interval
from specrl.evaluation.scores import speedup_interval
from specrl.io.output import OutputDir

FORMAT = "specrl-record-1"
_NEEDED = ("format", "kind", "source", "chooser", "seeds", "plans", "config", "claimed", "tokens_sha256", "npz_sha256")


@dataclass(frozen=True, slots=True)
class Record:
    """What a chooser did on a source, and the speedup that is claimed for it.

    Attributes:
        kind: 'simulated' or 'live'.
        source: name of the profile, or 'live'.
        chooser: its name.
        seeds: of the plays.
        plans: on offer.
        config: all else that a replay needs.
        choices: [seeds, R] int64, the plan of each round as an index into `plans`.
        samples: [n] float64, the speedups that the claim is the geometric mean of.
        claimed: speedup and interval.
        tokens_sha256: of the tokens that came: each round's in simulation, the greedy continuations live.
    """

    kind: str
    source: str
    chooser: str
    seeds: tuple[int, ...]
    plans: tuple[Plan, ...]
    config: Mapping[str, Any]
    choices: NDArray[np.int64]
    samples: NDArray[np.float64]
    claimed: Interval
    tokens_sha256: str


def digest(values: Sequence[object]) -> str:
    """sha256 of numbers or lists of them."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def write_record(directory: OutputDir, record: Record) -> Path:
    """Write `record-<source>-<chooser>.json` and its .npz; the path of the former."""
    name = f"record-{record.source}-{record.chooser.replace('/', '_')}"
    arrays = directory.path / f"{name}.npz"
    with arrays.open("wb") as file:
        np.savez_compressed(file, choices=record.choices.astype(np.int16), samples=record.samples)
    claim = record.claimed
    head = {
        "format": FORMAT,
        "kind": record.kind,
        "source": record.source,
        "chooser": record.chooser,
        "seeds": list(record.seeds),
        "plans": [str(plan) for plan in record.plans],
        "config": record.config,
        "claimed": {"speedup": claim.value, "low": claim.low, "high": claim.high, "level": claim.level},
        "tokens_sha256": record.tokens_sha256,
        "npz_sha256": hashlib.sha256(arrays.read_bytes()).hexdigest(),
    }
    return directory.write_json(f"{name}.json", head)


def read_record(path: Path) -> Record:
    """Read a record and check that it is whole and that its claim is what its own samples say.

    Raises:
        ValueError: it is not, with what is wrong.
    """
    try:
        head = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"a record must be a JSON file, but {path} is not: {error}") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise ValueError(f"a record must say format {FORMAT!r}, but {path} does not; 'specrl evaluate' writes them")
    for key in _NEEDED:
        if key not in head:
            raise ValueError(f"a record must hold {', '.join(_NEEDED)}, but {path} has no {key!r}")
    arrays = path.with_suffix(".npz")
    if hashlib.sha256(arrays.read_bytes()).hexdigest() != head["npz_sha256"]:
        raise ValueError(f"choices must be those that were recorded, but {arrays} has another sha256 than {path} says")
    with np.load(arrays, allow_pickle=False) as loaded:
        choices, samples = loaded["choices"].astype(np.int64), loaded["samples"].astype(np.float64)
    plans, seeds = parse_plans(head["plans"]), tuple(map(int, head["seeds"]))
    if choices.ndim != 2 or len(choices) != len(seeds) or choices.min() < 0 or choices.max() >= len(plans):
        raise ValueError(f"choices must be [seeds, rounds] of {len(plans)} plans, but {arrays} holds others")
    claim = head["claimed"]
    high = math.inf if claim["high"] is None else claim["high"]
    claimed = Interval(claim["speedup"], claim["low"], high, claim["level"])
    check_claim(claimed, speedup_interval(samples), "the samples of the record itself")
    return Record(
        head["kind"], head["source"], head["chooser"], seeds, plans, head["config"], choices, samples, claimed,
        head["tokens_sha256"],
    )  # fmt: skip


def check_claim(claimed: Interval, found: Interval, where: str) -> None:
    """Let a claim pass that is what was found, to a millionth.

    Raises:
        ValueError: it is something else.
    """
    pairs = zip((claimed.value, claimed.low, claimed.high), (found.value, found.low, found.high), strict=True)
    if not all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs) or claimed.level != found.level:
        raise ValueError(f"the claimed speedup must be what was measured, but it is {claimed}, and {found} by {where}")
