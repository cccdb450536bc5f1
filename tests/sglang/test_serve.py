"""A learned draft, exported and served by SGLang: the same tokens and the same accepted drafts as our own engine's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learned import Decoded, decode, margin, prompts
from server import Server, export
from torch import Tensor

from specrl.core.plan import Plan
from specrl.decoding import propose as proposal
from specrl.models.draft import Draft
from specrl.models.target import Target

PROMPTS, NEW, AT_ONCE = 50, 40, 8
NEAR_TIE = 1e-3  # logits closer than this may be ordered either way by two implementations in float32


def compare(
    target: Target,
    listed: list[tuple[int, ...]],
    ours: list[Decoded],
    answers: list[dict[str, Any]],
    *,
    drafts: bool,
) -> int:
    """How many prompts differ from a near-tie on; all else must be equal, the accepted drafts too where `drafts`."""
    ties = 0
    for prompt, own, answer in zip(listed, ours, answers, strict=True):
        tokens = tuple(answer["output_ids"])
        if tokens != own.tokens:
            at = next(i for i, (a, b) in enumerate(zip(tokens, own.tokens, strict=True)) if a != b)
            assert margin(target, [*prompt, *tokens[:at]]) < NEAR_TIE, f"other tokens from {at} on"
            ties += 1
        elif drafts:
            found = tuple(answer["meta_info"]["spec_correct_drafts_histogram"])  # without zeros at its end
            found += (0,) * (len(own.histogram) - len(found))
            assert found == own.histogram, "other drafts stood than with us"
    print(f"{len(listed) - ties} of {len(listed)} prompts token by token, {ties} from a near-tie on")
    return ties


def test_an_adaptive_chain_gives_our_tokens_and_accepted_drafts(
    target: Target, draft: Draft, start: Callable[..., Server], tmp_path: Path
) -> None:
    server = start(export(draft, {1: Plan(3), 4: Plan(1)}, tmp_path / "bundle"))
    listed = prompts(PROMPTS)
    ours = decode(target, draft, listed, Plan(3), NEW)
    assert sum(sum(d.histogram[1:]) for d in ours) > sum(d.histogram[0] for d in ours), "the draft learned something"
    alone = [server.generate(prompt, NEW) for prompt in listed]
    assert compare(target, listed, ours, alone, drafts=True) <= 1
    # Eight at once are in the tier with one step; only once most are done may more drafts stand.
    together = server.generate_together(listed[:AT_ONCE], NEW)
    assert compare(target, listed[:AT_ONCE], ours[:AT_ONCE], together, drafts=False) <= 1
    answers = alone[:AT_ONCE], together
    long = [sum(sum(a["meta_info"]["spec_correct_drafts_histogram"][2:]) for a in x) for x in answers]
    assert long[1] < long[0] / 2, long
    assert not [line for line in server.log_lines("plugin") if "specrl plugin" in line.lower()], "the plugin is inert"


def beams_see_their_own_rows(inside: Tensor, starts: Tensor, length: int, *fixed: bool) -> Tensor:
    """SGLang's way to draft a tree: the mask of a step of its `topk` beams, in place of `proposal.tree_mask`.

    After each step SGLang picks the best `topk` nodes anew, and gives each its parent's hidden state. The draft's keys
    and values stay: beam j reads, of every step before, what beam j wrote then, even where its parent was another beam
    (`build_draft_decode_metadata` and `generate_draft_decode_kv_indices` give each beam slots of its own, and nothing
    moves them; known upstream: github.com/sgl-project/sglang/pull/8409, closed). Our nodes see their true ancestors.
    So from the third step on a node's scores may differ where beams have crossed. The target verifies true ancestors in
    both, so that the output is the same.
    """
    batch, beams, width = inside.shape
    rows = torch.eye(beams, dtype=torch.bool).repeat(1, width // beams)  # slots are step by step, beams in each
    return _TREE_MASK(rows.expand(batch, beams, width), starts, length, *fixed)


_TREE_MASK = proposal.tree_mask


def test_a_tree_gives_our_tokens_and_accepted_drafts(
    target: Target, draft: Draft, start: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = Plan(3, 2, 6)
    server = start(export(draft, {1: tree}, tmp_path / "bundle"))
    listed = prompts(PROMPTS)
    answers = [server.generate(prompt, NEW) for prompt in listed]
    true = decode(target, draft, listed, tree, NEW)
    compare(target, listed, true, answers, drafts=False)
    monkeypatch.setattr(proposal, "tree_mask", beams_see_their_own_rows)  # of drafting alone, not of verifying
    ours = decode(target, draft, listed, tree, NEW)
    assert compare(target, listed, ours, answers, drafts=True) <= 1
    others = sum(a.histogram != b.histogram for a, b in zip(true, ours, strict=True))
    print(f"with true ancestors in the draft's cache, other drafts stand for {others} of {PROMPTS} prompts")
