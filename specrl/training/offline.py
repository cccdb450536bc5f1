"""Learning a draft from recorded traces, epoch by epoch, without serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.sequences import TrainingSequence
from specrl.core.clock import WallClock
from specrl.io.output import OutputDir, show
from specrl.measure.machine import environment
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from specrl.training.trace_files import Traces

HOLDOUT_FRACTION = 0.1  # share of the sequences that is held out, unless the config has one
MAX_COMPARED = 64  # held-out sequences that accept lengths are computed on
NUM_STEPS = 3  # drafts at which accept lengths are computed
_KIND = "offline"


def learn_from(
    traces: Traces,
    model: Target,
    draft: Draft,
    config: LearnerConfig,
    directory: OutputDir,
    *,
    target: str,
    epochs: int,
    seed: int = 0,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Learn `draft` from recorded sequences, each once an epoch; writes draft/, log.csv and checkpoint/ after each.

    `target` is the name of `model`. `epochs` include those before a resumption. The order of the sequences depends on
    `seed` and the epoch only.

    Returns:
        A row for each epoch, from 0 (no updates): updates, loss, alpha, and the accept length on held-out sequences.

    Raises:
        ValueError: traces of another target, too few of them, or fewer than one epoch; nothing to resume.
    """
    ours = {"target": target, "vocab_size": model.config.vocab_size, "taps": list(draft.config.aux_layers)}
    if wrong := {name: traces.about.get(name) for name, value in ours.items() if traces.about.get(name) != value}:
        raise ValueError(f"traces must be of the draft's target, {ours}, but got {wrong}; name that target, or record")
    if epochs < 1 or len(traces) < 4:
        raise ValueError(f"learning from traces needs an epoch and 4 sequences, but got {epochs} and {len(traces)}")
    if config.rejected_weight and not traces.about.get("rejected"):
        raise ValueError(
            "learner.rejected_weight must be 0 for traces without rejected drafts; record them with --rejected"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(traces)).tolist()
    held_out_count = max(2, round((config.holdout_fraction or HOLDOUT_FRACTION) * len(traces)))
    held_out = _long_enough(traces, order[: min(held_out_count, MAX_COMPARED)])
    trained = np.array(order[held_out_count:])
    learner = OnlineLearner(draft, model.embedding, config, seed=seed)
    sampled = config.draft_sampling == "sampled"
    gate = Gate(draft.config, model.embedding, num_steps=NUM_STEPS, sampled=sampled, seed=seed)
    clock, rows, last_epoch = WallClock(), list[dict[str, Any]](), -1
    began, checkpoint = clock.now(), directory.path / "checkpoint"
    split = {"seed": seed, "sequences": len(traces), "holdout_fraction": config.holdout_fraction}
    if resume:
        state = load_checkpoint(checkpoint, _KIND).state
        if wrong := {name: state.get(name) for name, value in split.items() if state.get(name) != value}:
            raise ValueError(f"--resume must hold out the same sequences, by {split}, but the checkpoint has {wrong}")
        if state["epoch"] >= epochs:
            raise ValueError(f"--epochs must be above the {state['epoch']} epochs of the checkpoint, but got {epochs}")
        rows, last_epoch = state["rows"], state["epoch"]
        learner.load_state_dict(state["learner"])
        began -= rows[-1]["seconds"]
    for epoch in range(epochs + 1):
        if epoch > last_epoch:
            losses, alphas = _learn_epoch(learner, traces, trained.tolist()) if epoch else ([], [])
            weights = learner.weights()[1]
            length = float(gate.accept_lengths(weights, held_out).mean())
            row = {"epoch": epoch, "updates": learner.updates, "accept_length": length}
            row |= {"loss": _mean(losses), "alpha": _mean(alphas), "seconds": round(clock.now() - began, 1)}
            rows.append(row)
            directory.write_csv("log.csv", rows)
            Draft(draft.config, weights).save(directory.path / "draft")
            text = f"epoch {epoch:3d}  {learner.updates:6d} updates  accept length {length:.3f}"
            show(f"{text} on {len(held_out)} held-out sequences")
            state = {"epoch": epoch, **split, "rows": rows, "learner": learner.state_dict()}
            save_checkpoint(checkpoint, _KIND, Checkpoint(state))
        rng.shuffle(trained)  # also in resumed epochs: the order of each epoch depends on the seed only
    directory.write_json("learner.json", asdict(config))
    directory.write_json("environment.json", environment())
    return rows


def _long_enough(traces: Traces, numbers: list[int]) -> list[TrainingSequence]:
    """Return the sequences of these numbers that are long enough to compare drafts on."""
    sequences = [s for s in traces.read(numbers) if len(s.tokens) > max(s.prompt_tokens, NUM_STEPS + 1)]
    if not sequences:
        raise ValueError(f"held-out sequences must have more than {NUM_STEPS + 1} tokens, but all are shorter")
    return sequences


def _learn_epoch(learner: OnlineLearner, traces: Traces, order: list[int]) -> tuple[list[float], list[float]]:
    """Make one update for every batch of sequences; return loss and alpha of good updates."""
    losses, alphas = [], []
    size = learner.config.batch_size
    for start in range(0, len(order), size):
        numbers = [number for number in order[start : start + size] if traces.length(number) > 1]
        batch = [sequence.to(learner.device) for sequence in traces.read(numbers)]
        if batch and (metrics := learner.update(batch)):
            losses.append(metrics["loss"])
            alphas.append(metrics["alpha_1"])
    return losses, alphas


def _mean(numbers: Sequence[float]) -> float:
    return float(np.mean(numbers)) if numbers else float("nan")
