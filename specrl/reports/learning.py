"""The learning curve: what a serving run came to while its draft learnt."""

from __future__ import annotations

from collections.abc import Sequence

from specrl.reports import figures
from specrl.reports.data import RunData, batch_sizes, interval
from specrl.reports.page import Album, Entry, Section, Table, said
from specrl.reports.sections import section


def learning(runs: Sequence[RunData], album: Album) -> Section:
    """Accept length and speedup against requests, with what happened on the way."""
    quantities = {
        "accept_length": ("tokens per request and round", ""),
        "speedup": ("speedup over plain decoding", "×"),
    }
    spans = {name: _span(runs, name) for name in quantities}

    def entry(run: RunData) -> Entry | None:
        if not run.log:
            return None
        swaps = sum(a["draft_version"] != b["draft_version"] for a, b in zip(run.log, run.log[1:], strict=False))
        happened = f"The serving draft changed between {swaps} of {len(run.log) - 1} pairs of lines"
        for word in figures.DECISIONS:
            if count := sum(figures.decision(row) == word for row in run.gate):
                happened += f"; gate: {count} {word}"
        if run.drift:
            happened += f"; {len(run.drift)} alarms of drift"
        pictures = [
            album.picture(
                f"{name} {run.name}",
                figures.learning(run.log, name, run.gate, run.drift, spans[name], label),
                alt=f"{label.capitalize()} against requests served. {_ends(run, name, unit)} {happened}.",
                caption=f"{label.capitalize()} over the last 400 rounds at each batch size. {happened}.",
            )
            for name, (label, unit) in quantities.items()
        ]
        return Entry(run.name, pictures, [_log_table(run), *_events(run)])

    about = (
        "While a draft learns from the traffic it serves. Bands are 95 % intervals over stretches of 16 rounds; an "
        "error of the live plain baseline is not in them, so a measurement apart has the last word on speed."
    )
    return section(
        "learning", "Learning curve", about, runs, entry, "a log of serving", "specrl train --output_dir runs/day0"
    )


def _span(runs: Sequence[RunData], name: str) -> tuple[float, float]:
    keys = [f"{name}_{batch}{end}" for run in runs for batch in batch_sizes(run.log) for end in ("", "_low", "_high")]
    values = [row[key] for run in runs for row in run.log for key in keys if row.get(key) is not None]
    middle = [
        row[key] for run in runs for row in run.log for key in keys if not key.endswith(("w", "h")) and row.get(key)
    ]
    reach = (
        0.8 * min(middle, default=1.0),
        1.25 * max(middle, default=1.0),
    )  # a wild interval must not flatten all else
    low, high = max(min(values, default=1.0), reach[0]), min(max(values, default=1.0), reach[1])
    return min(low, 0.98), max(high, 1.02)


def _ends(run: RunData, name: str, unit: str) -> str:
    out = []
    for batch in batch_sizes(run.log):
        seen = [interval(row, f"{name}_{batch}") for row in run.log if row.get(f"{name}_{batch}") is not None]
        if seen:
            out.append(f"Batch {batch}: from {said(seen[0], unit, 2)} to {said(seen[-1], unit, 2)}.")
    return " ".join(out)


def _log_table(run: RunData) -> Table:
    batches = batch_sizes(run.log)
    head = ["requests", "seconds", "draft version"]
    for batch in batches:
        head += [f"batch {batch}: plan", "speedup [95 %]", "accept length [95 %]"]
    rows = []
    for row in run.log:
        cells = [f"{row['requests']:,.0f}", f"{row['seconds']:,.0f}", f"{row['draft_version']:.0f}"]
        for batch in batches:
            cells += [
                row.get(f"plan_{batch}") or "–",
                said(interval(row, f"speedup_{batch}"), "×"),
                said(interval(row, f"accept_length_{batch}"), "", 2),
            ]
        rows.append(cells)
    return Table(f"Learning curve of {run.name}", head, rows)


def _events(run: RunData) -> list[Table]:
    out = []
    if run.gate:
        rows = [
            [f"{r['requests']:.0f}", f"{r['version']:.0f}", r["look"] or "–", figures.decision(r), r["reason"] or "–"]
            for r in run.gate
        ]
        head = ["requests", "draft version", "look", "decision", "reason"]
        out.append(Table(f"Decisions of the gate of {run.name}", head, rows))
    if run.drift:
        rows = [[f"{r['requests']:.0f}", f"{r['before']:.1%}", f"{r['after']:.1%}"] for r in run.drift]
        head = ["requests", "first drafts that stood, before", "after (64 requests)"]
        out.append(Table(f"Alarms of drift of {run.name}", head, rows))
    return out
