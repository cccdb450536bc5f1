"""Fit the shipped profiles to their published tables again.

python tools/fit_profiles.py [--check]

Writes specrl/simulation/profiles/<name>.json for every <name>.csv beside it; with --check, only says whether they
differ.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from specrl.simulation.fit_table import fit_table, read_table

FOLDER = Path(__file__).parent.parent / "specrl" / "engines" / "profiles"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a profile differs")
    check = parser.parse_args().check
    differs = 0
    for table in sorted(FOLDER.glob("*.csv")):
        text, path = fit_table(table.stem, *read_table(table)).to_json(), table.with_suffix(".json")
        same = path.exists() and path.read_text(encoding="utf-8") == text
        if not same and not check:
            path.write_text(text, encoding="utf-8")
        differs += not same
        print(f"{path.name}: {'as fitted' if same else 'differs' if check else 'written'}")
    return int(check and differs > 0)


if __name__ == "__main__":
    sys.exit(main())
