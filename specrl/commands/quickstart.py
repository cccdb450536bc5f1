"""`specrl quickstart`: train a draft and measure its speedup on the embedded target."""

from __future__ import annotations

import json
from pathlib import Path

from specrl.core.checks import require
from specrl.io.output import OutputDir, to_json
from specrl.training.quickstart import run_quickstart


def quickstart(
    *,
    train_seconds: float = 165.0,
    measure_seconds: float = 145.0,
    idle_seconds: float = 8.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> dict[str, object]:
    """Train an EAGLE3 draft from random initialisation while serving, and measure its speedup.

    Serves continuations of the Python standard library's sources with the embedded target at temperature 0.7, at
    batch sizes 1, 4 and 16. The draft learns from the requests, and a chooser learns the best plan (how many tokens to
    draft) of each batch size. Then every batch size is measured on held-out prompts, in turns with plain decoding in
    its fastest setting on this machine. Takes less than 6 minutes on two cores; run nothing else meanwhile.

    Args:
        train_seconds: seconds of serving and learning.
        measure_seconds: maximum seconds of the final measurement.
        idle_seconds: seconds of serving without learning, for comparison.
        seed: of prompts, initialisation and sampling.
        output_dir: where draft/, plans.json, rounds.csv and the plots go; by default runs/quickstart-<time>.

    Example:
        specrl quickstart
        specrl quickstart --train_seconds 600
    """
    durations = {"train_seconds": train_seconds, "measure_seconds": measure_seconds, "idle_seconds": idle_seconds}
    for name, value in durations.items():
        require(value > 0, name, "above 0", value)
    directory = OutputDir(output_dir or Path("runs/quickstart"))
    summary = run_quickstart(directory, **durations, seed=seed)
    print(json.dumps(json.loads(to_json(summary))))
    return summary
