"""The texts that prompts are cut from: whole in memory, or the lines of a .jsonl file, each read when it is drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.models.chat import ChatTemplate, asked

KEYS = ("prompt", "text", "messages", "conversations", "turns")


@dataclass(frozen=True)
class Text:
    """One source text: a document to cut windows from, or a whole prompt; and whether a draft may learn from it."""

    content: str
    whole: bool = False
    learn: bool = True

    @property
    def size(self) -> int:
        """Characters."""
        return len(self.content)

    @property
    def templated(self) -> bool:
        """Whether a chat template made it: then it says itself how it begins, and is never cut."""
        return False


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a .jsonl file, which stays in the file until it is asked for.

    Args:
        path, offset, number: where it is; the offset in bytes, the number from 1 on.
        size: characters, those of a chat template not counted.
        whole, learn: as of `Text`.
        template: of conversations; None: the line is none, or the target has no template.
    """

    path: Path
    offset: int
    number: int
    size: int
    whole: bool
    learn: bool
    template: ChatTemplate | None = None

    @property
    def templated(self) -> bool:
        """Whether a chat template makes it: then it says itself how it begins, and is never cut."""
        return self.template is not None

    @property
    def content(self) -> str:
        """Read from the file, and put through the template.

        Raises:
            ValueError: the file has changed, or the template refuses the conversation.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            record = _record(file.readline(), self.path, self.number, self.offset)
        if self.template is None:
            return _plain(record, self.path, self.number)
        try:
            return self.template.render(asked(record, f"{self.path}:{self.number}"), record.get("tools"))
        except ValueError as error:
            raise ValueError(
                f"a conversation must fit the target's template, but {self.path}:{self.number}: {error}; mend the "
                "line or leave it out"
            ) from error


def read_lines(path: Path, template: ChatTemplate | None) -> Iterator[Line]:
    """The lines of a .jsonl file that hold or ask something, every one checked, none kept.

    Raises:
        ValueError: a line that is not UTF-8 or JSON, or holds no prompt, by its number.
    """
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            here, offset = offset, offset + len(line)
            if not line.strip():
                continue
            record = _record(line, path, number, here)
            content = _plain(record, path, number)
            if content.strip():
                chat = template if _key(record) not in ("prompt", "text") else None
                learn = record.get("learn", True)
                yield Line(path, here, number, len(content), _key(record) != "text", learn, chat)


def _key(record: dict[str, Any]) -> str | None:
    return next((key for key in KEYS if key in record), None)


def _record(line: bytes, path: Path, number: int, offset: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a workload's files must be UTF-8, but {path}:{number} is not at byte {offset + error.start}; convert it"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"every line of a .jsonl workload must be JSON, but {path}:{number} is not: {error}; mend or remove it"
        ) from error
    if not isinstance(record, dict) or _key(record) is None:
        has = f"only {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        raise ValueError(
            f"every line of a .jsonl workload must hold one of {', '.join(map(repr, KEYS))}, "
            f"but {path}:{number} has {has}; rename its key"
        )
    if not isinstance(record.get("learn", True), bool):
        raise ValueError(
            f"'learn' must be true or false, but {path}:{number} has {json.dumps(record['learn'])[:60]}; mend it"
        )
    return record


def _plain(record: dict[str, Any], path: Path, number: int) -> str:
    """The text of a line without a template: of a conversation the contents, blank lines between."""
    key = _key(record)
    if key in ("prompt", "text"):
        if not isinstance(record[key], str):
            raise ValueError(
                f"{key!r} must hold text, but {path}:{number} has {json.dumps(record[key])[:60]}; mend or remove it"
            )
        return str(record[key])
    return "\n\n".join(message["content"] for message in asked(record, f"{path}:{number}"))
