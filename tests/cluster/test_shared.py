"""Processes that share a batch make the update that one would make."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from small import LEARNER, small_draft, write_target

from specrl.agents.draft_learner import LearnerConfig
from specrl.agents.objective import Objective, Share
from specrl.agents.sequences import Sequence
from specrl.apps.cluster.shared import SharedObjective, learn_over_ray
from specrl.apps.offline import learn_from
from specrl.apps.output import OutputDir
from specrl.apps.shards import ShardWriter, Traces
from specrl.models.draft import load_draft
from specrl.models.target import load_target


def sequences(*lengths: int) -> list[Sequence]:
    """Random ones of these numbers of tokens."""
    generator = torch.Generator().manual_seed(len(lengths))
    return [
        Sequence(
            torch.randint(1, 10, (n,), generator=generator),
            torch.randn(n, 96, generator=generator),
            torch.randn(n, 10, generator=generator),
            1.0,
            0,
        )
        for n in lengths
    ]


def test_the_mean_over_parts_is_the_whole_batchs_gradient(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    draft = small_draft(target)
    objective = Objective(draft, load_target(target).embedding, LEARNER)
    whole = sequences(9, 4, 12, 2, 7)
    share = Share(tuple(len(s.tokens) for s in whole), 2)

    def gradients(parts: list[list[Sequence]], share: Share | None) -> tuple[dict[str, torch.Tensor], float]:
        parameters = {n: t.clone().requires_grad_() for n, t in draft.tensors.items() if n not in ("d2t", "t2d")}
        loss = sum(objective.gradients(parameters, part, share)["loss"] for part in parts)
        return {n: p.grad / len(parts) for n, p in parameters.items() if p.grad is not None}, loss / len(parts)

    (one, loss), (two, shared) = gradients([whole], None), gradients([whole[::2], whole[1::2]], share)
    assert shared == pytest.approx(loss, rel=1e-5) and one.keys() == two.keys()
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, rtol=1e-4, atol=1e-6), name
    careless, _ = gradients([whole[::2], whole[1::2]], None)
    assert not torch.allclose(careless["fc.weight"], one["fc.weight"], rtol=1e-2, atol=1e-4), "lengths differ"


def test_two_workers_learn_from_traces_what_one_process_does(two_nodes: str, tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    model, draft = load_target(target), small_draft(target)
    draft.save(tmp_path / "first")
    about = {"target": target, "vocab_size": 10, "taps": list(draft.config.taps)}
    writer = ShardWriter(OutputDir(tmp_path / "traces"), about, 8)
    writer.add(sequences(*range(5, 26)))  # 19 to learn from: the last batch of an epoch leaves a part of one
    writer.close()
    config = LearnerConfig(dtype="float32", batch_size=6, passes=2, learning_rate=1e-3)
    alone = OutputDir(tmp_path / "alone")
    traces = Traces(tmp_path / "traces")
    learn_from(traces, model, draft, config, alone, target=target, epochs=2, seed=1, print_line=lambda line: None)
    both = OutputDir(tmp_path / "both")
    learn_over_ray(two_nodes, traces.path, target, tmp_path / "first", config, both, epochs=2, seed=1, workers=2)
    rows = [list(csv.DictReader((out.path / "log.csv").open())) for out in (alone, both)]
    assert [row["updates"] for row in rows[0]] == [row["updates"] for row in rows[1]] == ["0", "4", "8"]
    for one, two in zip(rows[0][1:], rows[1][1:], strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-3)
        assert float(two["alpha"]) == pytest.approx(float(one["alpha"]), rel=1e-3)
    first, learnt, shared = (
        load_draft(path).tensors for path in (tmp_path / "first", alone.path / "draft", both.path / "draft")
    )
    for name in learnt:
        moved = (learnt[name] - first[name]).abs().max()
        assert (learnt[name] - shared[name]).abs().mean() <= 0.02 * moved, name


def test_a_loss_that_is_no_mean_over_slots_is_refused(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    config = LearnerConfig(loss="accept_length")
    with pytest.raises(ValueError, match="a mean over slots, but got the loss 'accept_length'"):
        SharedObjective(Objective(small_draft(target), load_target(target).embedding, config), 0, 2)
