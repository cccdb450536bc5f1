"""Chat templates: a conversation as the text that a checkpoint was trained on; and conversations as they are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]  # 'role' and 'content', a string; what else a template reads (tool_calls, name) stays
_ROLES = {  # as they are written -> as templates know them
    **{name: name for name in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"},
}


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's own content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _environment() -> Environment:
    """A sandbox: templates come with checkpoints, whoever wrote these. They are not told the date."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    found.filters["tojson"] = _tojson
    found.globals["raise_exception"] = _refuse
    return found


def _tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


@cache
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template (Jinja).

    Args:
        source: of the template.
        tokens: special tokens by the names under which it reads them ('bos_token', 'eos_token').
    """

    source: str
    tokens: tuple[tuple[str, str], ...] = ()

    def render(self, messages: Sequence[Message], tools: object = None) -> str:
        """The conversation as text, up to where the assistant's answer begins.

        The template is not told the date, so that a prompt is the same every day; those that ask for one have a
        default.

        Raises:
            ValueError: it is no template, or refuses the conversation.
        """
        try:
            template = _compiled(self.source)
            return template.render(messages=messages, tools=tools, add_generation_prompt=True, **dict(self.tokens))
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"the target's chat template refuses it ({' '.join(str(error).split())})") from error


def read_chat_template(directory: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """That of a checkpoint: chat_template.jinja, or else what tokenizer_config.json, read as `config`, holds."""
    beside = Path(directory) / "chat_template.jinja"
    source = beside.read_text(encoding="utf-8") if beside.is_file() else config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {each.get("name"): each.get("template") for each in source}.get("default")
    if not isinstance(source, str):
        return None
    named = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    tokens = ((key, text) for key, text in named.items() if key.endswith("_token") and isinstance(text, str))
    return ChatTemplate(source, tuple(sorted(tokens)))


def asked(record: Mapping[str, Any], where: str) -> list[Message]:
    """A stored conversation up to the last turn that is not the assistant's; empty where nothing is asked.

    Known are 'messages' or 'conversations' of turns {'role', 'content'} (content: text, or a list of text parts) or
    {'from', 'value'} (ShareGPT), with a 'system' prompt beside them, and 'turns', the user's alone: the first is asked.

    Raises:
        ValueError: another form, by what is wrong with it at `where`.
    """
    if "turns" in record:
        turns = record["turns"]
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"'turns' must hold texts, but {where} has {json.dumps(turns)[:60]}; mend or remove it")
        return [{"role": "user", "content": turn} for turn in turns[:1]]
    key = "messages" if "messages" in record else "conversations"
    turns = record[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(
            f"{key!r} must hold turns, each with 'role' and 'content' or 'from' and 'value', but {where} has "
            f"{json.dumps(turns)[:60]}; mend or remove it"
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
            f"a turn's content must be text or a list of text parts, but {where} has {json.dumps(content)[:60]}; mend "
            "or remove it"
        )
    rest = {key: value for key, value in turn.items() if key not in ("role", "from", "content", "value")}
    return {"role": _ROLES[role], "content": content, **rest}
