"""Conversations of every layout become the prompts that transformers makes of them."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import processors

from specrl.core.interfaces import Request
from specrl.models.embedded import embedded_directory
from specrl.models.tokenizer import Tokenizer, load_tokenizer
from specrl.workloads.text import load_workload

MARKS = ("<|bos|>", "<|start|>", "<|end|>")
# Templates with the constructs of those of Llama and Qwen checkpoints.
PLAIN = """{% for message in messages %}
<|start|>{{ message.role }}
{{ message.content | trim }}<|end|>
{% endfor %}
{% if add_generation_prompt %}
<|start|>assistant
{% endif %}
"""
INTRICATE = """{{- bos_token -}}
{%- set seen = namespace(users=0) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = date | default("no date") -%}{%- set turns = messages -%}
{%- endif -%}
{{- '<|start|>system\\n' + system -}}
{%- if tools is not none -%}
    {%- for tool in tools %}{{ '\\n' }}{{ tool | tojson }}{% endfor -%}
    {{- tools | tojson(indent=2) -}}
{%- endif -%}
{{- '<|end|>' -}}
{%- for turn in turns -%}
    {%- if turn.role == 'user' -%}{%- set seen.users = seen.users + 1 -%}
    {%- elif turn.role not in ['assistant', 'tool'] -%}{{ raise_exception('no turns of ' + turn.role) }}{%- endif -%}
    {%- if turn.content == 'skip' -%}{%- continue -%}{%- endif -%}
    {{- '<|start|>' + turn.role + seen.users | string + '\\n' -}}
    {%- if turn.role == 'assistant' -%}
        {% generation %}{{ turn.content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}
        {%- for call in turn.tool_calls or [] -%}{{ call.function | tojson }}{%- endfor -%}
    {%- else -%}{{ turn.content }}{%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start|>assistant\\n' }}{%- endif -%}
"""
SYSTEM = {"role": "system", "content": "Be brief."}
ASKS = [{"role": "user", "content": "  What is <2> & 'é'? \n"}]
GOES_ON = [*ASKS, {"role": "assistant", "content": "<think>hm</think>\n\nTwo."}, {"role": "user", "content": "And 3?"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}
TOOL: list[dict[str, Any]] = [
    *ASKS,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds é <", "parameters": {}}}]
ANSWER = {"role": "assistant", "content": "not this"}


def checkpoint(
    directory: Path, template: str | None, *, adds: bool = False, beside: bool = True, **config: Any
) -> Tokenizer:
    """The embedded tokenizer with marks; `adds`: it puts bos before every text; `beside`: the template has a file."""
    encoder = tokenizers.Tokenizer.from_file(str(embedded_directory() / "tokenizer.json"))
    encoder.add_special_tokens(list(MARKS))
    if adds:
        bos = encoder.token_to_id("<|bos|>")
        encoder.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    encoder.save(str(directory / "tokenizer.json"))
    end = {"__type": "AddedToken", "content": "<|end|>", "special": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>", "eos_token": end, **config}
    if template is not None and beside:
        (directory / "chat_template.jinja").write_text(template)
    elif template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def requests(path: Path, tokenizer: Tokenizer, count: int = 1, **options: Any) -> list[Request]:
    options = {"prompt_tokens": 400, "split": "all", **options}
    return list(islice(load_workload(path, tokenizer, **options).requests(0), count))


@pytest.mark.parametrize("template", [PLAIN, INTRICATE])
@pytest.mark.parametrize(("beside", "adds"), [(False, True), (True, False)])
def test_prompts_are_those_of_transformers(template: str, beside: bool, adds: bool, tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, template, adds=adds, beside=beside)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    conversations: list[list[dict[str, Any]]] = [ASKS, [SYSTEM, *ASKS], GOES_ON, [SYSTEM, *GOES_ON], TOOL]
    for asks, tools in product(conversations, (None, TOOLS)):
        text = theirs.apply_chat_template(asks, tools=tools, tokenize=False, add_generation_prompt=True)
        ids = theirs.apply_chat_template(asks, tools=tools, add_generation_prompt=True, return_dict=False)
        assert tokenizer.render_chat(asks, tools) == text
        record = {"messages": [*asks, ANSWER], **({} if tools is None else {"tools": tools})}
        (request,) = requests(write(tmp_path / "x.jsonl", record), tokenizer)
        assert list(request.prompt) == ids
        assert ids.count(tokenizer.bos_token_id) == (template == INTRICATE)  # only INTRICATE writes it


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    *({"from": {"user": "human"}.get(t["role"], "gpt"), "value": t["content"]} for t in [*GOES_ON, ANSWER]),
]
PARTS = {"role": "user", "content": [{"type": "text", "text": ASKS[0]["content"]}]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [SYSTEM, *GOES_ON]},
        {"messages": [SYSTEM, *GOES_ON, ANSWER, ANSWER]},
        {"messages": [SYSTEM, PARTS, *GOES_ON[1:]]},
        {"messages": GOES_ON, "system": "Be brief."},
        {"id": "x_0", "conversations": SHAREGPT},
    ],
)
@pytest.mark.parametrize("template", [PLAIN, None])
def test_layouts_of_one_conversation_are_one_prompt(record: Any, template: str | None, tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, template)
    (request,) = requests(write(tmp_path / "x.jsonl", record), tokenizer)
    messages = [SYSTEM, *GOES_ON]
    if template is None:
        assert list(request.prompt) == tokenizer.encode("\n\n".join(m["content"] for m in messages))
    else:
        assert list(request.prompt) == tokenizer.encode_chat(tokenizer.render_chat(messages))


def test_text_parts_are_joined_and_the_first_turn_is_asked(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, PLAIN)
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    path = write(
        tmp_path / "x.jsonl",
        {"messages": [{"role": "user", "content": parts}]},
        {"turns": ["one\ntwo", "later"]},
        {"prompt": "<|start|>user\none\ntwo<|end|>\n<|start|>assistant\n"},
        {"messages": [ANSWER]},  # has no question
        {"conversations": []},
    )
    drawn = requests(path, tokenizer, 40)
    (text,) = {tokenizer.decode(r.prompt) for r in drawn}
    assert "one\ntwo" in text
    assert {r.prompt[0] == tokenizer.bos_token_id for r in drawn} == {True, False}  # a prompt starts with bos


@pytest.mark.parametrize("adds", [False, True])
def test_bos_is_not_doubled_before_a_prompt_that_begins_with_it(adds: bool, tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, None, adds=adds)
    path = write(tmp_path / "x.jsonl", {"prompt": "<|bos|>hello"}, {"prompt": "hello"})
    (prompt,) = {r.prompt for r in requests(path, tokenizer, 20)}
    assert prompt.count(tokenizer.bos_token_id) == 1 and prompt[0] == tokenizer.bos_token_id


def test_a_conversation_is_never_cut_and_too_long_ones_are_left_out(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, PLAIN)
    asks = [{"messages": [{"role": "user", "content": "word " * n}]} for n in (5, 10, 200)]
    drawn = {r.prompt for r in requests(write(tmp_path / "x.jsonl", *asks), tokenizer, 50, prompt_tokens=(1, 100))}
    assert len(drawn) == 2 and all(tokenizer.decode(prompt).endswith("assistant\n") for prompt in drawn)
    with pytest.raises(ValueError, match="conversation of at most 8 tokens"):
        requests(tmp_path / "x.jsonl", tokenizer, prompt_tokens=8)


def test_a_conversation_that_the_template_refuses_is_named_by_line(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, INTRICATE)
    path = write(tmp_path / "x.jsonl", {"prompt": "fine"}, {"messages": [{**SYSTEM, "role": "developer"}, *ASKS]})
    with pytest.raises(ValueError, match=r"x.jsonl:2: .*chat template .*\(no turns of dev"):
        requests(path, tokenizer, 50)


@pytest.mark.parametrize(
    "template",
    ["{% for %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}"],
)
def test_templates_that_fail_or_leave_the_sandbox_are_refused(template: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat template"):
        checkpoint(tmp_path, template).render_chat(ASKS)


def test_one_of_several_templates_and_none(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    assert not checkpoint(tmp_path / "none", None).has_chat_template
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}yes"}]
    tokenizer = checkpoint(tmp_path, None, chat_template=several)
    assert tokenizer.render_chat(ASKS) == "<|end|>yes" and tokenizer.render_chat(ASKS, TOOLS) == "tools"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("more tools")
    tokenizer = checkpoint(tmp_path, "plain")
    assert tokenizer.render_chat(ASKS) == "plain" and tokenizer.render_chat(ASKS, TOOLS) == "more tools"


def test_prompts_do_not_depend_on_the_date(tmp_path: Path) -> None:
    date = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}no date{% endif %}"
    dated = "{% macro m() %}DATE{% endmacro %}DATE{% for x in messages %}, {{ m() }}, DATE{% endfor %}"
    assert checkpoint(tmp_path, dated.replace("DATE", date)).render_chat(ASKS) == "no date, no date, no date"


def test_a_large_file_stays_on_disk(tmp_path: Path) -> None:
    """Of a file with 10,000 lines (20 MB), a few MB are in memory."""
    tokenizer, path = checkpoint(tmp_path, PLAIN), tmp_path / "x.jsonl"
    with path.open("w") as file:
        for i in range(10_000):
            turns = [{"role": "user", "content": f"{i} " + "word " * 400}]
            file.write(json.dumps({"messages": turns, "learn": i % 2 == 0}) + "\n")
    tracemalloc.start()
    workload = load_workload(path, tokenizer, prompt_tokens=2000, split="held_out")
    drawn = list(islice(workload.requests(0), 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(workload.texts) == 500 and path.stat().st_size > 20e6 > 4 * peak
    numbers = [int(tokenizer.decode(r.prompt).split()[1]) for r in drawn]
    assert all(number % 20 == 19 for number in numbers) and len(set(numbers)) > 10
    assert not any(r.learn for r in drawn)  # as in each line
