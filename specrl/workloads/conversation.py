"""Stored conversations, in the layouts of common data sets, as messages for a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from specrl.models.tokenizer import Message

_ROLES = {  # in data sets -> in chat templates
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"},
}


def read_conversation(record: Mapping[str, Any], where: str) -> list[Message]:
    """The messages up to the last one from the user or a tool; empty if there is none.

    Args:
        record: with 'messages' or 'conversations', a list of {'role', 'content'} (content: text, or a list of text
            parts) or {'from', 'value'} (ShareGPT), and an optional 'system' prompt; or with 'turns', the user's
            texts, of which the first is used.
        where: file and line, for errors.

    Raises:
        ValueError: the record has another layout.
    """
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"'turns' must hold texts, but {where} has {_short(turns)}; correct or remove the line")
        return [{"role": "user", "content": turn} for turn in turns[:1]]
    key = "messages" if "messages" in record else "conversations"
    turns = record[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"{key!r} must hold turns, each with 'role' and 'content' or 'from' and 'value', but {where} has "
            f"{_short(turns)}; correct or remove the line"
        )
    messages = [_message(turn, where) for turn in turns]
    last = max((i for i, message in enumerate(messages) if message["role"] in ("user", "tool")), default=-1)
    system = record.get("system")
    first = [{"role": "system", "content": system}] if isinstance(system, str) and system and last >= 0 else []
    return [*first, *messages[: last + 1]]


def _message(turn: Mapping[str, Any], where: str) -> Message:
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role not in _ROLES:
        raise ValueError(
            f"a turn's role must be one of {', '.join(_ROLES)}, but {where} has {role!r}; rename it or remove the line"
        )
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "\n".join(texts) if len(texts) == len(parts) else content
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(
            f"a turn's content must be text or a list of text parts, but {where} has {_short(content)}; correct or "
            "remove the line"
        )
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    return {"role": _ROLES[role], "content": content, **rest}


def _short(value: object) -> str:
    return json.dumps(value)[:60]
