"""The plugin inside SGLang: found by its entry point, inert unless asked, and never in the way."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from learned import prompts
from server import Server, export

from specrl.agents.choosers.adaptive import AdaptiveChooser
from specrl.agents.draft.sequences import Assembler
from specrl.core.plan import Plan
from specrl.core.round import Trace
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.sglang.client.trace_subscriber import Subscriber
from specrl.sglang.plugin.hooks import CONTEXT, POLICY, PREFILL, VERIFY, version_note
from specrl.sglang.plugin.policy import LearnedPolicy

NEW = 32
CANDIDATES = {"1": {"candidate_steps": [0, 1, 3]}}


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's (108 bytes)."""
    with tempfile.TemporaryDirectory(prefix="specrl") as name:
        yield Path(name)


def adaptive(draft: Draft, directory: Path) -> Path:
    """An export whose every tier may choose among 0, 1 and 3 steps."""
    bundle = export(draft, {1: Plan(3)}, directory)
    (bundle / "adaptive.json").write_text(json.dumps(CANDIDATES))
    return bundle


def steps_used(answer: dict[str, object]) -> float:
    """Tokens that a round yields at most, seen from below: the largest number of correct drafts."""
    meta = answer["meta_info"]
    assert isinstance(meta, dict)
    return len(meta["spec_correct_drafts_histogram"]) - 1


def test_every_seam_is_as_it_was_read() -> None:
    assert version_note() is None
    for seam in (*CONTEXT, POLICY, VERIFY, PREFILL):
        seam.check()


def test_plans_are_followed_and_a_dead_subscriber_hurts_nobody(
    target: Target, draft: Draft, start: Callable[..., Server], tmp_path: Path, short: Path
) -> None:
    bundle = adaptive(draft, tmp_path / "bundle")
    plain = {}
    server = start(bundle, SPECRL_POLICY=f"unix:{short}/plans", SPECRL_TRACES=f"unix:{short}/traces")
    assert len(server.said("the lookahead follows plans given on")) == 1
    listed = prompts(5)
    for prompt in listed:
        plain[prompt] = server.generate(prompt, NEW)["output_ids"]  # by SGLang's own rule, nobody listening
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(f"{short}/plans")
        stream = peer.makefile("rwb")

        def give(table: dict[str, str]) -> dict[str, object]:
            stream.write(json.dumps({"plans": table}).encode() + b"\n")
            stream.flush()
            answer = json.loads(stream.readline())
            assert isinstance(answer, dict)
            return answer

        for plan, most in (("0", 0), ("1", 1), ("3", 3), ("0", 0)):
            assert "ok" in give({"1": plan})
            answers = [server.generate(prompt, NEW) for prompt in listed]
            assert [a["output_ids"] for a in answers] == [plain[p] for p in listed]
            assert max(map(steps_used, answers)) == most
        assert "the candidates of the adaptive config" in str(give({"1": "2"})["error"])
        assert "ok" in give({"1": "3"})
        stream.close()

    # A subscriber is killed in the middle, with frames on their way: serving does not notice.
    code = "import sys; from specrl.sglang.client.trace_subscriber import Subscriber; s = Subscriber(sys.argv[1], 60.0)"
    loop = "print('up'); next(s.frames()); print('one'); sys.stdin.read()"
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
        kinds = [frame.said["kind"] for frame in islice(again.frames(), 2)]
    assert kinds == ["prefill", "round"]
    assert not server.said("SPECRL PLUGIN")


def test_traces_are_the_targets_own(
    target: Target, draft: Draft, start: Callable[..., Server], tmp_path: Path, short: Path
) -> None:
    """A tree: every verified node's logits and features are those that our own target computes for its path."""
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
        # What opted out does not come; what follows it does.
        server.generate(listed[0], NEW, {"specrl_traces": False})
        server.generate(listed[1], NEW)
        more = next(t for t in subscriber.traces() if t.plan is None)
        assert tuple(more.tokens[0].tolist()) == listed[1]
    assembler = Assembler(torch.float32)
    sequences = {tuple(s.tokens[: len(listed[0])].tolist()): s for s in assembler.add(traces)}
    assert set(sequences) == set(listed) and assembler.skipped == 0
    worst = 0.0
    taps = draft.config.taps
    for prompt, tokens in zip(listed, quiet, strict=True):
        sequence = sequences[prompt]
        text = sequence.tokens
        assert tuple(text[len(prompt) : len(prompt) + len(tokens)].tolist()) == tuple(tokens)[: len(text) - len(prompt)]
        with torch.inference_mode():
            count = len(text)
            step = target.prefill(text[None], target.new_cache(1, count), aux_layers=taps)
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


def test_a_chooser_tries_plans_inside_and_says_nothing_else(
    draft: Draft, start: Callable[..., Server], tmp_path: Path, short: Path
) -> None:
    bundle = adaptive(draft, tmp_path / "bundle")
    plans = (Plan(0), Plan(1), Plan(3))
    LearnedPolicy({1: Plan(3)}, plans, AdaptiveChooser(plans).state_dict()).save(bundle / "policy")
    server = start(bundle, SPECRL_POLICY=str(bundle / "policy"), SPECRL_TRACES=f"unix:{short}/t")
    assert len(server.said("AdaptiveChooser chooses the lookahead among [0, 1, 3]")) == 1
    server.generate(prompts(1)[0], 1)  # no round yet, but the socket is there from the first request on
    with Subscriber(short / "t", timeout_s=60.0) as subscriber:
        answers, rounds, frames = list[dict[str, Any]](), list[dict[str, Any]](), subscriber.frames()
        for prompt in prompts(6):
            answers.append(server.generate(prompt, NEW))
            for frame in frames:  # each request's before the next, so that the ring holds them
                if frame.said["kind"] == "finished":
                    break
                rounds += [frame.said] * (frame.said["kind"] == "round")
    tried = {said["plan"] for said in rounds}
    assert 1 < len(tried) and tried <= {"0", "1/1/2", "3/1/4"}
    assert all(len(a["output_ids"]) == NEW for a in answers)
    assert not server.said("SPECRL PLUGIN")


def test_a_policy_that_does_not_fit_leaves_sglang_serving(
    draft: Draft, start: Callable[..., Server], tmp_path: Path
) -> None:
    bundle = adaptive(draft, tmp_path / "bundle")
    LearnedPolicy({1: Plan(5)}, (Plan(5),)).save(bundle / "policy")
    server = start(bundle, SPECRL_POLICY=str(bundle / "policy"))
    assert len(server.said("SPECRL PLUGIN: the policy is switched off", "but got 5/1/6")) == 1
    assert len(server.generate(prompts(1)[0], NEW)["output_ids"]) == NEW
