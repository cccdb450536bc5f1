"""The texts that prompts are cut from: in memory, or the lines of a .jsonl file, which are read when they are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specrl.models.tokenizer import Tokenizer
from specrl.workloads.conversation import read_conversation

KEYS = ("prompt", "text", "messages", "conversations", "turns")


@dataclass(frozen=True)
class Text:
    """A source text.

    Args:
        content: the text.
        whole: whether it is a prompt, used from its start, and not a document to cut windows from.
        learn: whether a draft may learn from its requests.
    """

    content: str
    whole: bool = False
    learn: bool = True

    @property
    def size(self) -> int:
        """Number of characters."""
        return len(self.content)

    @property
    def is_chat(self) -> bool:
        """Whether a chat template wrote the text, with all its special tokens. Such a text is never cut."""
        return False


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a .jsonl file, which is read from the file each time its content is needed.

    Args:
        path, offset, number: the position: file, byte offset, line number from 1.
        size: number of characters, without those of the chat template.
        whole, learn: as in `Text`.
        chat: the tokenizer whose chat template renders the conversation; None: there is no conversation or template.
    """

    path: Path
    offset: int
    number: int
    size: int
    whole: bool
    learn: bool
    chat: Tokenizer | None = None

    @property
    def is_chat(self) -> bool:
        """As in `Text`."""
        return self.chat is not None

    @property
    def content(self) -> str:
        """The text: the prompt, the document, or the rendered conversation.

        Raises:
            ValueError: the file has changed, or the chat template does not accept the conversation.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            record = _record(file.readline(), self.path, self.number, self.offset)
        if self.chat is None:
            return _plain(record, self.path, self.number)
        where = f"{self.path}:{self.number}"
        try:
            return self.chat.render_chat(read_conversation(record, where), record.get("tools"))
        except ValueError as error:
            raise ValueError(
                f"a conversation must fit the target's chat template, but {where}: {error}; correct or remove the line"
            ) from error


def read_lines(path: Path, tokenizer: Tokenizer) -> Iterator[Line]:
    """Check every line of a .jsonl file and give those that hold a prompt, without keeping their text.

    Raises:
        ValueError: a line is not UTF-8 or JSON, or has no known layout; it is named by number.
    """
    offset, chat = 0, tokenizer if tokenizer.has_chat_template else None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if not line.strip():
                continue
            record = _record(line, path, number, start)
            content, key = _plain(record, path, number), _key(record)
            if content.strip():
                yield Line(
                    path,
                    start,
                    number,
                    size=len(content),
                    whole=key != "text",
                    learn=record.get("learn", True),
                    chat=None if key in ("prompt", "text") else chat,
                )


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
            f"every line of a .jsonl workload must be JSON, but {path}:{number} is not: {error}; correct it"
        ) from error
    if not isinstance(record, dict) or _key(record) is None:
        has = f"only {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        raise ValueError(
            f"every line of a .jsonl workload must hold one of {', '.join(map(repr, KEYS))}, "
            f"but {path}:{number} has {has}; rename its key"
        )
    if not isinstance(record.get("learn", True), bool):
        raise ValueError(
            f"'learn' must be true or false, but {path}:{number} has {json.dumps(record['learn'])[:60]}; correct it"
        )
    return record


def _plain(record: dict[str, Any], path: Path, number: int) -> str:
    """The text of a line without a chat template. Of a conversation: the contents, separated by blank lines."""
    key = _key(record)
    if key in ("prompt", "text"):
        if not isinstance(record[key], str):
            raise ValueError(
                f"{key!r} must hold text, but {path}:{number} has {json.dumps(record[key])[:60]}; correct it"
            )
        return str(record[key])
    return "\n\n".join(message["content"] for message in read_conversation(record, f"{path}:{number}"))
