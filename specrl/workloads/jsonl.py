"""The texts that prompts are cut from: in memory, or the lines of a .jsonl file, which are read when they are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from specrl.models.tokenizer import Message, Tokenizer

KEYS = ("prompt", "text", "messages", "conversations", "turns")
_ROLES = {  # in data sets -> in chat templates
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"},
}


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
    chat: ClassVar[None] = None  # see `PromptRecord`

    @property
    def size(self) -> int:
        """Number of characters."""
        return len(self.content)


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line of a .jsonl file, which is read from the file each time its content is needed.

    Args:
        path, number, offset: the position: file, line number from 1, byte offset.
        size: number of characters, without those of the chat template.
        whole, learn: as in `Text`.
        chat: the tokenizer whose chat template renders the conversation, with all its special tokens; such a text is
            never cut. None: there is no conversation or no template.
    """

    path: Path
    number: int
    offset: int
    size: int
    whole: bool
    learn: bool
    chat: Tokenizer | None = None

    @property
    def content(self) -> str:
        """The text: the prompt, the document, or the rendered conversation.

        Raises:
            ValueError: the file has changed, or the chat template does not accept the conversation.
        """
        where = f"{self.path}:{self.number}"
        with self.path.open("rb") as file:
            file.seek(self.offset)
            record = _parse(file.readline(), where, self.offset)
        if self.chat is None:
            return _plain_text(record, where)
        try:
            return self.chat.render_chat(read_conversation(record, where), record.get("tools"))
        except ValueError as error:
            raise ValueError(f"a conversation must fit the target's chat template, but {where}: {error}") from error


def read_lines(path: Path, tokenizer: Tokenizer) -> Iterator[PromptRecord]:
    """Check every line of a .jsonl file and yield those that hold a prompt, without their text.

    Raises:
        ValueError: a line is not UTF-8 or JSON, or has no known layout; it is named by number.
    """
    end, template = 0, tokenizer if tokenizer.has_chat_template else None
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            offset, end = end, end + len(line)
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = _parse(line, where, offset)
            content, key = _plain_text(record, where), _key(record)
            if content.strip():
                chat = None if key in ("prompt", "text") else template
                yield PromptRecord(path, number, offset, len(content), key != "text", record.get("learn", True), chat)


def read_conversation(record: Mapping[str, Any], where: str) -> list[Message]:
    """Return the messages up to the last one from the user or a tool; empty if there is none.

    Args:
        record: with 'messages' or 'conversations', a list of {'role', 'content'} (content: text, or a list of text
            parts) or {'from', 'value'} (ShareGPT), and an optional 'system' prompt; or with 'turns', the user's texts.
            Only the first of these is used.
        where: file and line, for errors.

    Raises:
        ValueError: the record has another layout.
    """
    key = _key(record)
    turns = record[key]
    kind, rule = (str, "texts") if key == "turns" else (dict, "turns with 'role' and 'content' or 'from' and 'value'")
    if not isinstance(turns, list) or not all(isinstance(turn, kind) for turn in turns):
        raise _wrong(f"{key!r} must hold {rule}", where, turns)
    if key == "turns":
        return [{"role": "user", "content": turn} for turn in turns[:1]]
    messages = [_message(turn, where) for turn in turns]
    while messages and messages[-1]["role"] not in ("user", "tool"):
        messages.pop()
    system = record.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system and messages else []
    return [*first, *messages]


def _message(turn: Mapping[str, Any], where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise _wrong(f"a turn's role must be one of {', '.join(_ROLES)}", where, role)
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            content = "\n".join(texts)
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise _wrong("a turn's content must be text or a list of text parts", where, content)
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    return {"role": _ROLES[role], "content": content, **rest}


def _parse(line: bytes, where: str, offset: int) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise ValueError(f"a workload's files must be UTF-8, but {where} is not at byte {at}; convert it") from error
    except ValueError as error:
        raise ValueError(f"every line of a .jsonl workload must be JSON, but {where} is not: {error}") from error
    if not isinstance(record, dict) or not _key(record):
        has = f"only {', '.join(map(repr, record))}" if isinstance(record, dict) else "no object"
        raise ValueError(f"every line of a .jsonl workload must hold one of {KEYS}, but {where} has {has}")
    if not isinstance(record.get("learn", True), bool):
        raise _wrong("'learn' must be true or false", where, record["learn"])
    return record


def _key(record: Mapping[str, Any]) -> str:
    """Return the first of `KEYS` that a record has; '' if it has none."""
    return next((key for key in KEYS if key in record), "")


def _plain_text(record: Mapping[str, Any], where: str) -> str:
    """Return the text of a line without a chat template. Of a conversation: the contents, separated by blank lines."""
    key = _key(record)
    if key not in ("prompt", "text"):
        return "\n\n".join(message["content"] for message in read_conversation(record, where))
    if not isinstance(record[key], str):
        raise _wrong(f"{key!r} must hold text", where, record[key])
    return str(record[key])


def _wrong(rule: str, where: str, value: object) -> ValueError:
    return ValueError(f"{rule}, but {where} has {json.dumps(value)[:60]}; correct or remove the line")
