"""What the environments over live decoding share: the plain baseline, what `info` tells, workloads by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specrl.baseline import PlainCost
from specrl.engines.base import Session, Workload
from specrl.envs.rewards import Outcome
from specrl.rounds import Round

_FIRST_SAMPLES = 3  # plain steps measured when a batch size is met for the first time


def check_episode(max_rounds: int | None, max_tokens: int | None, reward: str) -> None:
    """Raise a ValueError unless exactly one length of an episode is given, and it suits the reward."""
    if (max_rounds is None) == (max_tokens is None):
        raise ValueError(
            f"exactly one of max_rounds and max_tokens must be given, but got {max_rounds} and {max_tokens}"
        )
    if min(v for v in (max_rounds, max_tokens) if v is not None) < 1:
        raise ValueError(f"an episode must have at least 1 round or token, but got {max_rounds or max_tokens}")
    if reward == "time_saved" and max_tokens is None:
        raise ValueError("reward 'time_saved' is right only in episodes of max_tokens, but got max_rounds")


def measure_plain(session: Session, baseline: PlainCost, context: float) -> None:
    """Re-measure plain decoding where it is due; outside every timed window.

    Args:
        session: about to run a round.
        baseline: takes the samples.
        context: mean tokens known per live request.

    Raises:
        ValueError: the engine does not measure plain decoding between rounds.
    """
    batch = session.batch_size
    baseline.tick(batch, context)
    if not baseline.due(batch, context):
        return
    first = not baseline.known(batch)
    for _ in range(_FIRST_SAMPLES if first else 1):
        sample = session.measure_plain()
        if sample is None:
            raise ValueError("the engine must measure plain decoding between rounds, but it does not; use 'local'")
        baseline.add(sample)


def describe(done: Round, outcome: Outcome, thinking_s: float, error_s: float, speedup: float) -> dict[str, Any]:
    """What `info` tells of a round.

    Args:
        done: the round.
        outcome: what its reward was computed from.
        thinking_s: that the agent took.
        error_s: standard error of the plain round's seconds.
        speedup: of the episode so far.
    """
    correct = done.correct_drafts.tolist()
    return {
        "tokens": outcome.tokens,
        "seconds": outcome.seconds,
        "draft_s": done.draft_s,
        "verify_s": done.verify_s,
        "other_s": done.other_s,
        "thinking_s": thinking_s,
        "prefill_s": done.prefill_s,
        "accept_length": 1.0 + sum(correct) / len(correct),
        "histogram": [correct.count(k) for k in range(done.plan.num_steps + 1)],
        "plan": str(done.plan),
        "draft_version": done.draft_version,
        "batch_size": outcome.batch_size,
        "t0_s": outcome.plain_s,
        "t0_error_s": error_s,
        "episode_speedup": speedup,
        "round": done,
    }


def named_workload(
    spec: str | Path, target: str | Path, prompt_tokens: int, max_new_tokens: int, temperature: float, ignore_eos: bool
) -> Workload:
    """A workload or stream by name, in the tokens of a target by name or directory (see `specrl.streams`)."""
    from specrl.streams import open_stream

    return open_stream(
        spec,
        target,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=ignore_eos,
        split="train",
    )
