"""Learning a draft from recorded traces, epoch by epoch, without serving."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from specrl.agents.draft.gate import Gate
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.clock import WallClock
from specrl.io.output import OutputDir, show
from specrl.measure.machine import environment
from specrl.models.draft import Draft
from specrl.models.target import Target
from specrl.training.epochs import read_state, read_tensors, save_epoch
from specrl.training.trace_files import Traces

HELD_OUT, MOST = 0.1, 64  # share of the sequences that is not learnt from, and how many of them are judged on


class Part(Protocol):
    """This process's part of learning that several share.

    Attributes:
        leads: whether it judges and writes; one of them does.
    """

    leads: bool

    def join(self, learner: OnlineLearner) -> None:
        """Let a learner learn with the others."""
        ...

    def mine(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Of a batch's sequences, by number, those that are read here; told once before every update."""
        ...

    def to_whole(self, tensor: Tensor) -> Tensor:
        """One of the learner's tensors, of which this process may keep a shard; asked for by all at once."""
        ...

    def to_part(self, tensor: Tensor) -> Tensor:
        """What this process keeps of such a tensor."""
        ...


class Alone:
    """A process that shares with none."""

    leads = True

    def join(self, learner: OnlineLearner) -> None:
        """Nobody to join."""

    def mine(self, numbers: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """All of them."""
        return list(numbers)

    def to_whole(self, tensor: Tensor) -> Tensor:
        """Itself."""
        return tensor

    def to_part(self, tensor: Tensor) -> Tensor:
        """All of it."""
        return tensor


def learn_from(
    traces: Traces,
    model: Target,
    draft: Draft,
    config: LearnerConfig,
    directory: OutputDir,
    *,
    target: str,
    epochs: int,
    num_steps: int = 3,
    seed: int = 0,
    print_line: Callable[[str], None] = show,
    share: Part = Alone(),  # noqa: B008  (has no state)
    resume: bool = False,
) -> list[dict[str, object]]:
    """Learn `draft` from recorded sequences, each once an epoch; writes draft/, log.csv and checkpoint/ after each.

    With a `share`, other processes do the same at the same time and each reads its part of every batch; the one that
    leads judges and writes. With `resume` it goes on after the last epoch in checkpoint/, with as many processes as
    there are now.

    Returns:
        A row per epoch, the first, 0, before any: updates, loss, alpha, and the accept length on held-out sequences
        of a chain of `num_steps`.

    Raises:
        ValueError: traces of another target, too few of them, or fewer than one epoch; nothing to resume.
    """
    about = traces.about
    ours = {"target": target, "vocab_size": model.config.vocab_size, "taps": list(draft.config.taps)}
    if wrong := {name: about.get(name) for name, value in ours.items() if about.get(name) != value}:
        raise ValueError(f"traces must be of the draft's target, {ours}, but got {wrong}; name that target, or record")
    if epochs < 1 or len(traces) < 4:
        raise ValueError(f"learning from traces needs an epoch and 4 sequences, but got {epochs} and {len(traces)}")
    if config.rejected and not about.get("rejected"):
        raise ValueError("learner.rejected needs rejected drafts, which these traces lack; record with --rejected")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(traces)).tolist()
    apart = max(2, round((config.held_out or HELD_OUT) * len(traces)))
    held_out = [
        s for s in traces.read(order[: min(apart, MOST)]) if len(s.tokens) > max(s.prompt_tokens, num_steps + 1)
    ]
    if not held_out:
        raise ValueError(f"held-out sequences must have more than {num_steps + 1} tokens, but all are shorter")
    learnt = np.array(order[apart:])
    learner = OnlineLearner(draft, model.embedding, config, seed=seed)
    share.join(learner)
    judge = Gate(draft.config, model.embedding, num_steps=num_steps, sampled=config.drafts == "sampled", seed=seed)
    clock, rows, done = WallClock(), list[dict[str, Any]](), -1
    began, kept = clock.now(), directory.path / "checkpoint"
    if resume:
        state = check_resumable(directory, traces, config, epochs=epochs, seed=seed)
        rows, done = state["rows"], state["epoch"]
        learner.load_state({name: share.to_part(tensor) for name, tensor in read_tensors(kept)}, state["learner"])
        began -= rows[-1]["seconds"]
    for epoch in range(epochs + 1):
        if epoch <= done:
            rng.shuffle(learnt)  # as it was: every epoch's order follows from the seed
            continue
        seen: list[dict[str, float]] = []
        for start in range(0, len(learnt) if epoch else 0, config.batch_size):
            numbers = [n for n in learnt[start : start + config.batch_size].tolist() if traces.length(n) > 1]
            mine = share.mine(numbers, [traces.length(n) for n in numbers])
            if numbers and (metrics := learner.update(list(traces.read(mine)))):
                seen.append(metrics)
        rng.shuffle(learnt)
        weights = {name: share.to_whole(tensor) for name, tensor in learner.weights()[1].items()}
        if share.leads:
            length = float(judge.accept_lengths(weights, held_out).mean())
            row: dict[str, Any] = {"epoch": epoch, "updates": learner.updates, "accept_length": length}
            row |= {name: _mean(seen, key) for name, key in (("loss", "loss"), ("alpha", "alpha_1"))}
            rows.append({**row, "seconds": round(clock.now() - began, 1)})
            directory.write_csv("log.csv", rows)
            Draft(draft.config, weights).save(directory.path / "draft")
            judged = f"accept length {length:.3f} on {len(held_out)} held out"
            print_line(f"epoch {epoch:3d}  {learner.updates:6d} updates  {judged}")
        tensors, state_of = learner.state()
        now = {"epoch": epoch, **_split(traces, config, seed), "rows": rows, "learner": state_of}
        save_epoch(kept, tensors, now, share.to_whole, leads=share.leads)
    if share.leads:
        directory.write_json("learner.json", asdict(config))
        directory.write_json("environment.json", environment())
    return rows


def check_resumable(
    directory: OutputDir, traces: Traces, config: LearnerConfig, *, epochs: int, seed: int
) -> dict[str, Any]:
    """What checkpoint/ says of the epochs that were learnt.

    Raises:
        ValueError: there is none, it has held out other sequences, or no epoch is left.
    """
    state, ours = read_state(directory.path / "checkpoint"), _split(traces, config, seed)
    if wrong := {name: state.get(name) for name, value in ours.items() if state.get(name) != value}:
        raise ValueError(f"--resume must hold out the same sequences, by {ours}, but the checkpoint has {wrong}")
    if state["epoch"] >= epochs:
        raise ValueError(f"--epochs counts those that are learnt, {state['epoch']}, but got {epochs}; ask for more")
    return state


def _split(traces: Traces, config: LearnerConfig, seed: int) -> dict[str, Any]:
    """What sequences are held out by, and in what order the others are learnt."""
    return {"seed": seed, "sequences": len(traces), "held_out": config.held_out}


def _mean(seen: list[dict[str, float]], key: str) -> float:
    return float(np.mean([metrics[key] for metrics in seen])) if seen else float("nan")
