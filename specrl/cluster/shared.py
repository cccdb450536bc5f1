"""Offline learning by several processes: each takes its part of every batch, and all make the same update.

Gradients are averaged as `DistributedDataParallel` does it, or as `fully_shard` does where the draft is in shards (see
`sharded.py`). Both hang on autograd's hooks, and the head's gradient is not autograd's: it is summed pass by pass, so
that no logits are ever held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.objective import Objective, Share
from specrl.agents.draft.sequences import Sequence as Traced
from specrl.cluster.connect import connected, need_resource
from specrl.cluster.sharded import mean, sharded, to_shard, to_whole
from specrl.io.output import OutputDir, show
from specrl.models.draft import load_draft
from specrl.models.target import load_target
from specrl.training.offline import check_resumable, learn_from
from specrl.training.trace_files import Traces


class SharedObjective:
    """An objective whose gradients are those of a whole batch, of which this process sees its part.

    Args:
        inner: the objective of this process.
        rank: of this process in the group of `torch.distributed`.
        parts: processes in it.
        shard: each keeps its rows of the draft; else all keep all.

    Raises:
        ValueError: a loss that is not a mean over slots.
    """

    def __init__(self, inner: Objective, rank: int, parts: int, *, shard: bool = False) -> None:
        if inner.mixture.chain or inner.config.rejected:
            raise ValueError(
                "processes share a loss that is a mean over slots, but got the loss "
                f"{inner.config.loss!r} and rejected {inner.config.rejected:g}; use a loss by slot, and rejected 0"
            )
        self.inner, self.mixture, self._rank, self._parts = inner, inner.mixture, rank, parts
        self._share, self._shard, self.leads = Share((), parts), shard, rank == 0

    def mine(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This process's part of the next batch: every `parts`-th of these sequences, of these numbers of tokens."""
        self._share = Share(tuple(lengths), self._parts)
        return list(numbers[self._rank :: self._parts])

    def gradients(self, parameters: Mapping[str, Tensor], sequences: list[Traced]) -> dict[str, float]:
        """The whole batch's gradients, loss and mean α of every pass, the same in every process."""
        passes = min(self.inner.config.passes, max(self._share.lengths) - 1)
        whole = {name: to_whole(parameter.detach()).requires_grad_() for name, parameter in parameters.items()}
        found = self.inner.gradients(whole, sequences, self._share) if sequences else {}
        own = Share(tuple(len(s.tokens) for s in sequences), 1)
        told = [found.get("loss", 0.0)]
        for k in range(passes):
            told.append(found.get(f"alpha_{k + 1}", 0.0) * own.slots(k) / max(self._share.slots(k), 1e-9))
        for name, parameter in parameters.items():
            used = whole.pop(name)
            parameter.grad = mean(torch.zeros_like(used) if used.grad is None else used.grad, parameter)
        loss, *alphas = mean(here := torch.tensor(told), here).tolist()
        return {"loss": loss, **{f"alpha_{k + 1}": alpha for k, alpha in enumerate(alphas)}}

    def join(self, learner: OnlineLearner) -> None:
        """Let a learner learn with the others."""
        learner.replace_objective(self)

    def to_whole(self, tensor: Tensor) -> Tensor:
        """All rows of one of the learner's tensors."""
        return to_whole(tensor)

    def to_part(self, tensor: Tensor) -> Tensor:
        """What this process keeps of one."""
        return to_shard(tensor) if self._shard else tensor


def learn_over_ray(
    address: str,
    traces: Path,
    target: str,
    first: Path,
    config: LearnerConfig,
    directory: OutputDir,
    *,
    epochs: int,
    seed: int,
    workers: int,
    shard: bool = False,
    resume: bool = False,
) -> None:
    """`learn_from` by Ray Train's workers, a CPU each; the first of them writes.

    Args:
        address: of the cluster (see `connected`).
        traces: directory of `specrl record`, which every node must have.
        target: as `load_target` takes it.
        first: directory of the draft to start from.
        config: how it learns.
        directory: where results go.
        epochs: through the traces.
        seed: of the order of sequences.
        workers: processes that share every batch.
        shard: each keeps its rows of the weights and of what the optimiser knows of them, instead of all of them.
        resume: go on from the checkpoint in `directory`, whatever number of workers made it.

    Raises:
        ValueError: more workers than CPUs or sequences in a batch, a loss that cannot be shared, a GPU to
            learn on, or nothing to resume.
    """
    if not 1 <= workers <= config.batch_size:
        raise ValueError(
            f"workers share a batch of {config.batch_size} sequences, so they must be 1 to that many, but got {workers}"
        )
    if config.device not in (None, "cpu"):
        raise ValueError(
            f"processes that share traces learn on CPUs, but got learner.device {config.device!r}; omit it"
        )
    model, draft = load_target(target), load_draft(first)
    SharedObjective(Objective(draft, model.embedding, config), 0, workers)  # raises here, not on a worker
    if resume:
        check_resumable(directory, Traces(traces), config, epochs=epochs, seed=seed)
    said: dict[str, Any] = {
        "traces": str(traces.resolve()),
        "target": target,
        "first": str(first.resolve()),
        "config": config,
        "directory": str(directory.path.resolve()),
        "epochs": epochs,
        "seed": seed,
        "shard": shard,
        "resume": resume,
    }
    with connected(address):
        need_resource("CPU", workers, "workers")
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        TorchTrainer(
            _worker,
            train_loop_config=said,
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(name="learn", storage_path=str(directory.path.resolve() / "ray")),
        ).fit()
    show(f"{workers} processes learned from {traces}")


def _worker(said: dict[str, Any]) -> None:
    """What a worker of Ray Train runs, in a group of `torch.distributed`."""
    model, draft = load_target(said["target"]), load_draft(said["first"])
    rank, parts = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share = SharedObjective(Objective(draft, model.embedding, said["config"]), rank, parts, shard=said["shard"])
    learn_from(
        Traces(Path(said["traces"])),
        model,
        sharded(draft) if said["shard"] else draft,
        said["config"],
        OutputDir(said["directory"]),
        target=said["target"],
        epochs=said["epochs"],
        seed=said["seed"],
        share=share,
        resume=said["resume"],
    )
