"""Processes that share a batch make the update that one would make."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from small import LEARNER, small_draft, write_target
from torch.distributed.tensor import DTensor

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.objective import Objective, Share
from specrl.agents.draft.sequences import Sequence
from specrl.cluster.sharded import sharded
from specrl.cluster.shared import SharedObjective, learn_over_ray
from specrl.io.output import OutputDir
from specrl.models.draft import load_draft
from specrl.models.target import load_target
from specrl.training.offline import learn_from
from specrl.training.trace_files import ShardWriter, Traces

CONFIG = LearnerConfig(dtype="float32", batch_size=6, passes=2, learning_rate=1e-3)


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


def record(tmp_path: Path) -> tuple[str, Traces]:
    """A target and traces of it: 19 to learn from, so that the last batch of an epoch leaves a part of one."""
    target = write_target(tmp_path / "target")
    small_draft(target).save(tmp_path / "first")
    about = {"target": target, "vocab_size": 10, "taps": list(small_draft(target).config.taps)}
    writer = ShardWriter(OutputDir(tmp_path / "traces"), about, 8)
    writer.add(sequences(*range(5, 26)))
    writer.close()
    return target, Traces(tmp_path / "traces")


def alone(tmp_path: Path, target: str, traces: Traces, name: str, epochs: int, resume: bool = False) -> OutputDir:
    """What one process learns."""
    out, model = OutputDir(tmp_path / name), load_target(target)
    options: dict[str, Any] = {"target": target, "epochs": epochs, "seed": 1, "resume": resume}
    learn_from(traces, model, small_draft(target), CONFIG, out, print_line=lambda line: None, **options)
    return out


def assert_learnt_the_same(one: OutputDir, two: OutputDir, first: Path, updates: list[str]) -> None:
    rows = [list(csv.DictReader((out.path / "log.csv").open())) for out in (one, two)]
    assert [row["updates"] for row in rows[0]] == [row["updates"] for row in rows[1]] == updates
    for mine, theirs in zip(rows[0][1:], rows[1][1:], strict=True):
        assert float(theirs["loss"]) == pytest.approx(float(mine["loss"]), rel=1e-3)
        assert float(theirs["alpha"]) == pytest.approx(float(mine["alpha"]), rel=1e-3)
    before, learnt, shared = (load_draft(path).tensors for path in (first, one.path / "draft", two.path / "draft"))
    for name in learnt:
        moved = (learnt[name] - before[name]).abs().max()
        assert (learnt[name] - shared[name]).abs().mean() <= 0.02 * moved, name


def test_two_workers_learn_from_traces_what_one_process_does(two_nodes: str, tmp_path: Path) -> None:
    target, traces = record(tmp_path)
    both, first = OutputDir(tmp_path / "both"), tmp_path / "first"
    learn_over_ray(two_nodes, traces.path, target, first, CONFIG, both, epochs=2, seed=1, workers=2)
    assert_learnt_the_same(alone(tmp_path, target, traces, "alone", 2), both, first, ["0", "4", "8"])


def test_what_workers_learn_in_shards_any_number_of_them_goes_on_with(two_nodes: str, tmp_path: Path) -> None:
    target, traces = record(tmp_path)
    out, first = OutputDir(tmp_path / "shards"), tmp_path / "first"
    given = (two_nodes, traces.path, target, first, CONFIG, out)
    learn_over_ray(*given, epochs=1, seed=1, workers=2, shard=True)
    learn_over_ray(*given, epochs=2, seed=1, workers=3, shard=True, resume=True)
    assert_learnt_the_same(alone(tmp_path, target, traces, "alone", 2), out, first, ["0", "4", "8"])
    alone(tmp_path, target, traces, "shards", 3, resume=True)
    assert_learnt_the_same(alone(tmp_path, target, traces, "alone", 3), out, first, ["0", "4", "8", "12"])
    for changes, refused in (({"epochs": 3}, "ask for more"), ({"seed": 2}, "hold out the same sequences")):
        with pytest.raises(ValueError, match=refused):
            learn_over_ray(*given, **{"epochs": 4, "seed": 1, "workers": 1, "resume": True, **changes})


@ray.remote(num_cpus=1)
def held(rank: int, parts: int, meet: str, target: str, shard: bool) -> dict[str, int]:
    """Numbers that a process of `parts` holds after two updates, by what they are."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=parts)
    try:
        draft, model = small_draft(target), load_target(target)
        share = SharedObjective(Objective(draft, model.embedding, CONFIG), rank, parts, shard=shard)
        learner = OnlineLearner(sharded(draft) if shard else draft, model.embedding, CONFIG)
        share.join(learner)
        for _ in range(2):
            whole = sequences(9, 4, 12, 2, 7)
            numbers = share.mine(range(5), [len(s.tokens) for s in whole])
            assert learner.update([whole[n] for n in numbers])
        found: dict[str, int] = {}
        tensors = learner.state()[0] | {f"grad.{n}": p.grad for n, p in learner.parameters.items()}
        tensors |= {f"good.{n}": t for n, t in learner.good().items()}
        for name, tensor in tensors.items():
            here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if shard:
                behind = here.untyped_storage().nbytes()
                assert behind == here.numel() * here.element_size(), f"{name} keeps {behind} bytes alive"
            kind = name.split(".")[0]
            found[kind] = found.get(kind, 0) + here.numel()
        return found
    finally:
        torch.distributed.destroy_process_group()


def test_each_worker_holds_its_part_of_what_a_learner_keeps(two_nodes: str, tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    draft = small_draft(target)
    count = sum(t.numel() for t in draft.tensors.values())
    kinds = ("parameters", "served", "good", "grad", "exp_avg", "exp_avg_sq")
    for shard in (False, True):
        meet = str(tmp_path / f"meet-{shard}")
        one, two = ray.get([held.remote(rank, 2, meet, target, shard) for rank in range(2)])
        for kind in kinds:
            if shard:
                assert one[kind] + two[kind] == count
                assert one[kind] == pytest.approx(count / 2, rel=0.05) == two[kind]
            else:
                assert one[kind] == two[kind] == count


def test_a_loss_that_is_no_mean_over_slots_is_refused(tmp_path: Path) -> None:
    target = write_target(tmp_path / "target")
    config = LearnerConfig(loss="accept_length")
    with pytest.raises(ValueError, match="a mean over slots, but got the loss 'accept_length'"):
        SharedObjective(Objective(small_draft(target), load_target(target).embedding, config), 0, 2)


def test_a_device_that_processes_do_not_share_is_refused(tmp_path: Path) -> None:
    config, out = LearnerConfig(device="cuda"), OutputDir(tmp_path)
    with pytest.raises(ValueError, match="learn on CPUs, but got learner.device 'cuda'"):
        learn_over_ray("local", tmp_path, "none", tmp_path, config, out, epochs=1, seed=0, workers=2)
