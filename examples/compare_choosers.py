"""Compares our chooser with SGLang's rule and a fixed plan, when drafts become more expensive half way.

    python examples/compare_choosers.py [folder]

The same as 'specrl evaluate' with these options. Running it again gives the same numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from specrl.commands.evaluate import evaluate
from specrl.evaluation.simulation import Schedule


def main(folder: Path) -> None:
    """Simulate, show the table, and write tables and regret curves."""
    evaluate(
        profiles=("aurora-qwen3-coder-next-fp8",),
        choosers=("adaptive", "sglang-same", "throughput", "5/1/6"),
        reference="sglang-same",
        seeds=2,
        schedule=Schedule(rounds=480, shifts="at=240,cost=1.3,from_steps=3"),
        leaderboard=folder / "leaderboard.csv",
        output_dir=folder / "compare-choosers",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
