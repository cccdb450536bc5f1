"""Fit the shipped profiles to their published tables again.

python tools/fit_profiles.py [--check]

Writes specrl/simulation/profiles/<name>.json for every <name>.csv beside it; with --check, only reports differences.

A table has tokens/s per request and accept length by batch size and lookahead. With E[τ] the mean over batch sizes of
a lookahead's accept length, T(B, plan) = E[τ] / tokens/s, so that every cell's tokens/s is reproduced exactly. Accept
lengths of lookaheads γ1 < γ2 < ... give P_1 + ... + P_γ only, so log-odds are taken as equal up to γ1, and between two
lookaheads. The spread over requests is ln(P95/P05) / 3.29, as for a log-normal. At the smallest batch size, that of
chains, less that of plain decoding, gives the spread of requests, and that of plain decoding the slow noise. What it
does not explain at a batch size, pooled over its lookaheads, is taken as noise of every round. How it varies in time is
not published (much of it is batches that run empty), so simulated requests, which average over rounds, spread less at
large batch sizes than the published ones.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specrl.core.plan import Plan
from specrl.simulation.acceptance_model import accept_length, round_survival, solve, spread_of_length
from specrl.simulation.profile import CHAIN, Cost, Profile

FOLDER = Path(__file__).parent.parent / "specrl" / "simulation" / "profiles"
P95_TO_P05 = 3.29  # standard deviations between the 5th and the 95th percentile of a normal distribution
OUTPUT_TOKENS = 512  # of a request; assumed, as it is not published
MIN_JITTER = 0.03  # log standard deviation of one round, if the table leaves less; assumed
MEMORY = 200.0  # rounds that slow noise lasts, about those of a request at batch size 1; assumed


@dataclass(frozen=True, slots=True)
class Row:
    """One published cell; `accept_length` is None for lookahead 0."""

    batch_size: int
    lookahead: int
    mean_tps: float
    p05_tps: float
    p95_tps: float
    accept_length: float | None

    @property
    def spread(self) -> float:
        """Log standard deviation over requests."""
        return math.log(self.p95_tps / self.p05_tps) / P95_TO_P05


def read_table(path: str | Path) -> tuple[str, tuple[Row, ...]]:
    """Read the source (the file's first line, after '#') and the cells.

    Raises:
        ValueError: a column is missing, or a value is not a number.
    """
    first, *lines = Path(path).read_text(encoding="utf-8").splitlines()
    if not first.startswith("#"):
        raise ValueError(f"a table's first line must name its source after '#', but {path} starts with {first[:40]!r}")
    try:
        rows = tuple(
            Row(
                int(row["batch_size"]),
                int(row["lookahead"]),
                float(row["mean_tps"]),
                float(row["p05_tps"]),
                float(row["p95_tps"]),
                float(row["accept_length"]) if row["accept_length"] else None,
            )
            for row in csv.DictReader(lines)
        )
    except KeyError as error:
        raise ValueError(f"a table must have a column {error}, but {path} has none") from error
    return first.lstrip("# "), rows


def fit_table(name: str, source: str, rows: Sequence[Row]) -> Profile:
    """The profile that reproduces every cell; it offers the lookaheads of the table only."""
    lengths: dict[int, float] = {}
    for lookahead in sorted({row.lookahead for row in rows} - {0}):
        found = [row.accept_length for row in rows if row.lookahead == lookahead and row.accept_length is not None]
        lengths[lookahead] = float(np.mean(found))
    plain = {row.batch_size: row for row in rows if row.lookahead == 0}
    smallest = min(plain)
    measured = [row for row in rows if row.batch_size == smallest and row.lookahead]
    wanted = float(np.mean([row.spread**2 for row in measured])) - plain[smallest].spread ** 2

    def explained(spread: float) -> float:
        odds = _log_odds(lengths, spread)
        return float(np.mean([_request_variance(odds[: row.lookahead], spread) for row in measured]))

    spread = solve(explained, wanted, 0.0, 2.0)
    odds = _log_odds(lengths, spread)
    unexplained: dict[tuple[int, bool], list[float]] = {}  # (batch size, speculative?) -> variances
    for row in rows:
        variance = row.spread**2 - (_request_variance(odds[: row.lookahead], spread) if row.lookahead else 0.0)
        unexplained.setdefault((row.batch_size, row.lookahead > 0), []).append(variance)
    costs = []
    for row in rows:
        length = accept_length(odds[: row.lookahead], spread) if row.lookahead else 1.0
        jitter = math.sqrt(max(float(np.mean(unexplained[row.batch_size, row.lookahead > 0])), MIN_JITTER**2))
        for plan in (None, Plan(0)) if row.lookahead == 0 else (Plan(row.lookahead),):
            costs.append(Cost(row.batch_size, plan, length / row.mean_tps, jitter, plain[smallest].spread))
    return Profile(
        name=name,
        provenance=_provenance(source, lengths),
        costs=tuple(costs),
        log_odds={CHAIN: odds},
        request_spread=spread,
        memory=MEMORY,
        prompt_tokens=OUTPUT_TOKENS,
        max_new_tokens=OUTPUT_TOKENS,
    )


def _log_odds(lengths: Mapping[int, float], spread: float) -> tuple[float, ...]:
    """b_1 .. b_K that give E[τ] of every lookahead; equal between two lookaheads."""
    odds: tuple[float, ...] = ()
    for lookahead, length in sorted(lengths.items()):
        known, more = odds, lookahead - len(odds)
        b = solve(lambda b: accept_length((*known, *[b] * more), spread), length, -10.0, 10.0)  # noqa: B023
        odds = (*known, *[b] * more)
    return odds


def _request_variance(odds: Sequence[float], spread: float) -> float:
    """Variance over requests of log mean accept length, from their effects and from finitely many rounds."""
    reached = round_survival(odds, spread)
    mean = 1.0 + float(reached.sum())
    second = float(((2 * np.arange(len(reached)) + 1) * reached).sum())  # E[correct²] = Σ (2k - 1) P_k
    chance = (second - (mean - 1.0) ** 2) / mean**2 * mean / OUTPUT_TOKENS
    return spread_of_length(odds, spread) ** 2 + chance


def _provenance(source: str, lengths: Mapping[int, float]) -> dict[str, Any]:
    least = min(lengths)
    return {
        "kind": "published table",
        "source": source,
        "fit": "tools/fit_profiles.py",
        "published": "tokens/s per request (mean, P05, P95) and accept length by batch size and lookahead",
        "assumed": f"requests of {OUTPUT_TOKENS} output tokens, a jitter of at least {MIN_JITTER}, slow noise "
        f"over {MEMORY:.0f} rounds, equal log-odds of the first {least} drafts, plan 0 at the cost of plain decoding",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a profile differs")
    check = parser.parse_args().check
    changed = 0
    for table in sorted(FOLDER.glob("*.csv")):
        text, path = fit_table(table.stem, *read_table(table)).to_json(), table.with_suffix(".json")
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if not same and not check:
            path.write_text(text, encoding="utf-8")
        changed += not same
        print(f"{path.name}: {'as fitted' if same else 'differs' if check else 'written'}")
    return int(check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
