"""Check that pyproject.toml's version ranges still resolve, without downloading any package.

uv resolves each case below from the package index's metadata alone (no wheel is fetched, nothing is built or
installed). It shows that versions exist that satisfy every requirement at once, ours and those of the whole
dependency closure; it does not show that the code runs with them. Where no index can be reached, nothing is
checked, and the last line and the exit status 3 say so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Case(NamedTuple):
    """One resolution: its meaning, uv's arguments, and what must come out."""

    title: str
    arguments: tuple[str, ...]
    expected: tuple[str, ...] = ()


CASES = (
    Case(
        "with SGLang 0.5.23 and its pins",
        ("--extra=sglang", "--python-version=3.12"),
        ("sglang==0.5.23", "torch==2.14.1", "transformers==5.19.0", "tokenizers==0.23.2"),
    ),
    Case(
        "with constraints.txt, for development",
        ("--extra=dev", "--constraint=constraints.txt", "--python-version=3.11"),
        ("torch==2.13.0",),
    ),
    Case("with Ray", ("--extra=ray", "--python-version=3.12")),
    Case("the newest of all, on the newest Python", ("--extra=dev", "--python-version=3.13")),
    Case("the oldest of our ranges, on the oldest Python", ("--resolution=lowest-direct", "--python-version=3.10")),
)


def compile_requirements(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run uv's resolver on metadata only; what it chose is in `stdout`, one 'name==version' a line."""
    uv = [sys.executable, "-m", "uv", "pip", "compile"]
    command = [*uv, "--quiet", "--no-build", "--no-header", "--no-annotate", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def index_is_reachable() -> bool:
    """Whether even the simplest requirement resolves, with no help from the cache."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as requirement:
        requirement.write("packaging\n")
        requirement.flush()
        return compile_requirements("--no-cache", requirement.name).returncode == 0


def main() -> int:
    """Resolve every case; 0 if all hold, 1 if one does not, 3 if there is no index to ask."""
    failed = False
    for case in CASES:
        result = compile_requirements("pyproject.toml", *case.arguments)
        if result.returncode != 0:
            if not index_is_reachable():
                print("resolve: SKIPPED, no package index can be reached")
                return 3
            print(f"resolve: {case.title}: FAILED\n{result.stderr.strip()}")
            failed = True
            continue
        chosen = result.stdout.splitlines()
        missing = [pin for pin in case.expected if pin not in chosen]
        failed |= bool(missing)
        verdict = f"FAILED, not chosen: {', '.join(missing)}" if missing else "ok"
        print(f"resolve: {case.title}: {verdict} ({len(chosen)} packages)")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
