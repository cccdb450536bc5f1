"""The plugin inside SGLang: found by its entry point, off unless asked for, and never in the way."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import zmq
from learned import prompts
from server import Server, export

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.draft.sequences import Assembler
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.sglang.client.trace_subscriber import Subscriber
from specrl.sglang.plugin.hooks import ALL_TARGETS, check_targets, version_note
from specrl.sglang.plugin.policy import LearnedPolicy

NEW = 32
CANDIDATES = {"1": {"candidate_steps": [0, 1, 3]}}


def adaptive(draft: Draft, directory: Path) -> Path:
    """An export whose every tier may choose among 0, 1 and 3 steps."""
    bundle = export(draft, {1: Plan(3)}, directory)
    (bundle / "adaptive.json").write_text(json.dumps(CANDIDATES))
    return bundle


def most_correct_drafts(answer: dict[str, Any]) -> int:
    """The largest number of correct drafts in a round of this request."""
    return len(answer["meta_info"]["spec_correct_drafts_histogram"]) - 1


def test_the_hooked_functions_are_as_expected() -> None:
    assert version_note() is None
    check_targets(ALL_TARGETS)


def test_plans_are_followed_and_a_killed_subscriber_hurts_nobody(
    target: Target, draft: Draft, start: Callable[..., Server], tmp_path: Path, short: Path
) -> None:
    bundle = adaptive(draft, tmp_path / "bundle")
    plain = {}
    server = start(bundle, SPECRL_POLICY=f"unix:{short}/plans", SPECRL_TRACES=f"unix:{short}/traces")
    assert len(server.log_lines("the lookahead follows the plans sent to")) == 1
    listed = prompts(5)
    for prompt in listed:
        plain[prompt] = server.generate(prompt, NEW)["output_ids"]  # by SGLang's own rule, without a subscriber
    with zmq.Context.instance().socket(zmq.REQ) as sender:
        sender.linger, sender.rcvtimeo = 0, 60_000
        sender.connect(f"ipc://{short}/plans")

        def give(table: dict[str, str]) -> Any:
            sender.send_json({"plans": table})
            return sender.recv_json()

        for plan, most in (("0", 0), ("1", 1), ("3", 3), ("0", 0)):
            assert "ok" in give({"1": plan})
            answers = [server.generate(prompt, NEW) for prompt in listed]
            assert [a["output_ids"] for a in answers] == [plain[p] for p in listed]
            assert max(map(most_correct_drafts, answers)) == most
        assert "the candidates of the adaptive config" in str(give({"1": "2"})["error"])
        assert "ok" in give({"1": "3"})

    # A subscriber is killed with messages on their way: serving does not notice.
    code = "import sys; from specrl.sglang.client.trace_subscriber import Subscriber; s = Subscriber(sys.argv[1], 60.0)"
    loop = "print('up'); next(s.messages()); print('one'); sys.stdin.read()"
    dies = subprocess.Popen(
        [sys.executable, "-uc", f"{code}; {loop}", f"{short}/traces"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert dies.stdout is not None and dies.stdout.readline() == b"up\n"
    assert [server.generate(prompt, NEW)["output_ids"] for prompt in listed] == [plain[p] for p in listed]
    assert dies.stdout.readline() == b"one\n"
    dies.kill()
    dies.wait()
    assert [server.generate(prompt, NEW)["output_ids"] for prompt in listed] == [plain[p] for p in listed]
    with Subscriber(f"{short}/traces", timeout_s=60.0) as again:
        server.generate(listed[0], NEW)
        kinds = [message.header["kind"] for message in islice(again.messages(), 2)]
    assert kinds == ["prefill", "round"]
    assert not server.log_lines("SPECRL PLUGIN")


def test_traces_are_the_targets_own(
    target: Target, draft: Draft, start: Callable[..., Server], tmp_path: Path, short: Path
) -> None:
    """A tree: every verified node has the logits and features that our own target computes for its path."""
    bundle = export(draft, {1: Plan(3, 2, 6)}, tmp_path / "bundle")
    server = start(bundle, SPECRL_TRACES=f"unix:{short}/t")
    listed = prompts(4)
    quiet = [server.generate(prompt, NEW)["output_ids"] for prompt in listed]
    with Subscriber(short / "t", timeout_s=60.0) as subscriber:
        loud = server.generate_together(listed, NEW)
        assert sorted(tuple(a["output_ids"]) for a in loud) == sorted(map(tuple, quiet))
        traces: list[Trace] = []
        ended = 0
        for trace in subscriber.traces():
            traces.append(trace)
            ended += len(trace.finished)
            if ended == len(listed):
                break
        assert subscriber.incomplete == subscriber.dropped == 0
        # A request that opted out does not come; the next one does.
        server.generate(listed[0], NEW, {"specrl_traces": False})
        server.generate(listed[1], NEW)
        more = next(t for t in subscriber.traces() if t.plan is None)
        assert tuple(more.tokens[0].tolist()) == listed[1]
    assembler = Assembler(torch.float32)
    sequences = {tuple(s.tokens[: len(listed[0])].tolist()): s for s in assembler.add(traces)}
    assert set(sequences) == set(listed) and assembler.counts["skipped"] == 0
    worst = 0.0
    layers = draft.config.aux_layers
    for prompt, tokens in zip(listed, quiet, strict=True):
        sequence = sequences[prompt]
        text = sequence.tokens
        assert tuple(text[len(prompt) : len(prompt) + len(tokens)].tolist()) == tuple(tokens)[: len(text) - len(prompt)]
        with torch.inference_mode():
            count = len(text)
            step = target.prefill(text[None], target.new_cache(1, count), aux_layers=layers)
            assert step.aux_hidden_states is not None
            logits = target(text[None])[0]
        rounds = slice(len(prompt), count)
        worst = max(
            worst,
            float((sequence.features - step.aux_hidden_states[0]).abs().max()),
            float((sequence.logits[rounds] - logits[rounds]).abs().max()),
        )
    print(f"largest difference of features and logits on accepted paths: {worst:.1e}")
    assert worst < 1e-3
    # Rejected nodes too: each one's logits after the path that leads to it.
    known: dict[int, list[int]] = {}
    checked, worst = 0, 0.0
    for trace in traces:
        text = known.setdefault(int(trace.request_ids[0]), [])
        rows = [row for row in trace.path[0].tolist() if row >= 0]
        if trace.plan is not None and checked < 60:
            for row in range(trace.tokens.shape[1]):
                lineage = [row]
                while int(trace.parents[0, lineage[0]]) >= 0:
                    lineage.insert(0, int(trace.parents[0, lineage[0]]))
                if row in rows:
                    continue
                with torch.inference_mode():
                    own = target(torch.tensor([[*text, *trace.tokens[0, lineage].tolist()]]))[0, -1]
                worst = max(worst, float((trace.logits[0, row] - own).abs().max()))
                checked += 1
        text += trace.tokens[0, rows].tolist()
    print(f"largest difference of logits at {checked} rejected nodes: {worst:.1e}")
    assert checked >= 30 and worst < 1e-3


def test_a_chooser_tries_plans_inside_sglang(
    draft: Draft, start: Callable[..., Server], tmp_path: Path, short: Path
) -> None:
    bundle = adaptive(draft, tmp_path / "bundle")
    plans = (Plan(0), Plan(1), Plan(3))
    LearnedPolicy({1: Plan(3)}, plans, AdaptiveChooser(plans).state_dict()).save(bundle / "policy")
    server = start(bundle, SPECRL_POLICY=str(bundle / "policy"), SPECRL_TRACES=f"unix:{short}/t")
    assert len(server.log_lines("AdaptiveChooser chooses the lookahead among [0, 1, 3]")) == 1
    with Subscriber(short / "t", timeout_s=60.0) as subscriber:
        answers, tried, messages = list[dict[str, Any]](), set[str](), subscriber.messages()
        for prompt in prompts(6):
            answers.append(server.generate(prompt, NEW))
            for message in messages:
                if message.header["kind"] == "finished":
                    break
                if message.header["kind"] == "round":
                    tried.add(message.header["plan"])
    assert 1 < len(tried) and tried <= {"0", "1/1/2", "3/1/4"}
    assert all(len(a["output_ids"]) == NEW for a in answers)
    assert not server.log_lines("SPECRL PLUGIN")


def test_a_policy_that_does_not_fit_leaves_sglang_serving(
    draft: Draft, start: Callable[..., Server], tmp_path: Path
) -> None:
    bundle = adaptive(draft, tmp_path / "bundle")
    LearnedPolicy({1: Plan(5)}, (Plan(5),)).save(bundle / "policy")
    server = start(bundle, SPECRL_POLICY=str(bundle / "policy"))
    assert len(server.log_lines("SPECRL PLUGIN: the policy is switched off", "but got 5/1/6")) == 1
    assert len(server.generate(prompts(1)[0], NEW)["output_ids"]) == NEW
