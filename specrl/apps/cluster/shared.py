"""Offline learning by several processes: each takes its part of every batch, and all make the same update.

Gradients are averaged by `all_reduce`, as `DistributedDataParallel` does. That class itself hangs on autograd's hooks,
and the head's gradient is not autograd's: it is summed pass by pass, so that no logits are ever held whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specrl.agents.draft_learner import LearnerConfig, OnlineLearner
from specrl.agents.objective import Objective, Share
from specrl.agents.sequences import Sequence as Traced
from specrl.apps.cluster.connect import connected, need_resource
from specrl.apps.offline import learn_from
from specrl.apps.output import OutputDir, show
from specrl.apps.shards import Traces
from specrl.models.draft import load_draft
from specrl.models.target import load_target


class SharedObjective:
    """An objective whose gradients are those of a whole batch, of which this process sees its part.

    Args:
        inner: the objective of this process.
        rank: of this process in the group of `torch.distributed`.
        parts: processes in it.

    Raises:
        ValueError: a loss that is not a mean over slots.
    """

    def __init__(self, inner: Objective, rank: int, parts: int) -> None:
        if inner.mixture.chain or inner.config.rejected:
            raise ValueError(
                "processes share a loss that is a mean over slots, but got the loss "
                f"{inner.config.loss!r} and rejected {inner.config.rejected:g}; use a loss by slot, and rejected 0"
            )
        self.inner, self.mixture, self._rank, self._parts = inner, inner.mixture, rank, parts
        self._share = Share((), parts)

    def mine(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This process's part of the next batch: every `parts`-th of these sequences, of these numbers of tokens."""
        self._share = Share(tuple(lengths), self._parts)
        return list(numbers[self._rank :: self._parts])

    def gradients(self, parameters: Mapping[str, Tensor], sequences: list[Traced]) -> dict[str, float]:
        """The whole batch's gradients, loss and mean α of every pass, the same in every process."""
        passes = min(self.inner.config.passes, max(self._share.lengths) - 1)
        found = self.inner.gradients(parameters, sequences, self._share) if sequences else {}
        own = Share(tuple(len(s.tokens) for s in sequences), 1)
        told = [found.get("loss", 0.0)]
        for k in range(passes):
            told.append(found.get(f"alpha_{k + 1}", 0.0) * own.slots(k) / max(self._share.slots(k), 1e-9))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.tensor(told)])
        torch.distributed.all_reduce(flat)
        flat /= self._parts
        *means, metrics = flat.split([*(grad.numel() for grad in grads), len(told)])
        for parameter, mean in zip(parameters.values(), means, strict=True):
            parameter.grad = mean.view_as(parameter).clone()
        loss, *alphas = metrics.tolist()
        return {"loss": loss, **{f"alpha_{k + 1}": alpha for k, alpha in enumerate(alphas)}}

    def join(self, learner: OnlineLearner) -> None:
        """Let a learner learn with the others."""
        learner.replace_objective(self)


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

    Raises:
        ValueError: more workers than CPUs or sequences in a batch, or a loss that cannot be shared.
    """
    if not 1 <= workers <= config.batch_size:
        raise ValueError(
            f"workers share a batch of {config.batch_size} sequences, so they must be 1 to that many, but got {workers}"
        )
    model, draft = load_target(target), load_draft(first)
    SharedObjective(Objective(draft, model.embedding, config), 0, workers)  # raises here, not on a worker
    said: dict[str, Any] = {
        "traces": str(traces.resolve()),
        "target": target,
        "first": str(first.resolve()),
        "config": config,
        "directory": str(directory.path.resolve()),
        "epochs": epochs,
        "seed": seed,
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
    share = SharedObjective(Objective(draft, model.embedding, said["config"]), rank, parts)
    learn_from(
        Traces(Path(said["traces"])),
        model,
        draft,
        said["config"],
        OutputDir(said["directory"]),
        target=said["target"],
        epochs=said["epochs"],
        seed=said["seed"],
        share=share,
        leads=rank == 0,
    )
