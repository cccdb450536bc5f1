"""Find phrases that are hard to read in pages, docstrings, comments and messages; exit with 1 if there are any.

    python tools/check_language.py [FILE ...]

Checks Markdown and Python files that git knows, by default all. CONTRIBUTING.md, which quotes bad examples, and the
changelog are skipped. Add a phrase here when a review finds one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHRASES = {
    r"to be had|may be had": "say 'is available' or 'there is'",
    r"comes? to (?:be|naught|nothing|\d)|came to (?:be|\d)": "say 'is' or 'was'",
    r"stands? (?:for all|in for|behind|as it|where|on its own|alone|still|before|by itself)": "say what it does",
    r"(?:too|as|so|how) dear|dearer|dearest": "say 'slow' or 'expensive'",
    r"surely|whoever|whatever becomes|naught|hence(?:forth)?|thereby|whence|lest|ere": "use a usual word",
    r"for no \w+ (?:may|can|does|is)|let no|let nothing|be no": "put the subject first",
    r"such as it is|as ever|by so much|of its own accord|in its stead|for want of": "use a usual phrase",
    r"what is (?:not|no|left|given|asked|said|told|learnt|served|waiting)": "name the thing",
    r"on which it stands|of which the|wherein|whereof|thereof|upon which": "make two sentences",
    r"the one (?:who|that) (?:never|asks|waits)|those who": "name the thing",
    r"is said (?:to|so|of)|are told|was told|hears? (?:of|nothing)": "a program writes, sends and receives",
}
PATTERN = re.compile("|".join(rf"(?P<p{i}>\b(?:{phrase})\b)" for i, phrase in enumerate(PHRASES)), re.IGNORECASE)
SKIPPED = {"CONTRIBUTING.md", "CHANGELOG.md", "tools/check_language.py"}


def findings(text: str) -> list[tuple[int, str, str]]:
    """Line number, phrase and advice for each phrase of `text`."""
    advice = list(PHRASES.values())
    found = []
    for match in PATTERN.finditer(text):
        assert match.lastgroup is not None
        found.append((text.count("\n", 0, match.start()) + 1, match[0], advice[int(match.lastgroup[1:])]))
    return found


def main(names: list[str]) -> int:
    listed = names or subprocess.run(
        ["git", "ls-files", "*.md", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    count = 0
    for name in sorted(set(filter(None, listed)) - SKIPPED):
        for line, phrase, advice in findings((ROOT / name).read_text(encoding="utf-8")):
            print(f"{name}:{line}: {phrase!r}: {advice}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
