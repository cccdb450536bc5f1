"""`specrl profile`: record a run of the local engine and fit what a simulated engine needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specrl.apps.output import OutputDir, environment, progress, show, table
from specrl.engines.base import Engine, Workload
from specrl.engines.fit_recording import Block, fit_recording
from specrl.engines.local import LocalEngine
from specrl.engines.profile import Profile
from specrl.models.draft import load_draft, new_draft
from specrl.models.target import load_target
from specrl.plan import Plan, parse_plans
from specrl.rounds import PlainSample
from specrl.streams import open_stream

_ROUNDS, _UNCOUNTED = 8, 2  # rounds or plain steps of a block, and rounds before it
_LEAST = 4  # passes


def profile(
    *,
    target: str = "embedded",
    draft: Path | None = None,
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    plans: str = "0,1/1/2,2/1/3,3/1/4,4/1/5,3/2/6",
    temperature: float = 0.7,
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    use_rejection_sampling: bool = True,
    device: str | None = None,
    dtype: str = "float32",
    seconds: float = 120.0,
    seed: int = 0,
    name: str = "recorded",
    output_dir: Path | None = None,
) -> Profile:
    """Record rounds of every plan and plain steps at every batch size, and fit a profile for simulation.

    Passes over batch sizes and plans, there and back in turns, take blocks of 8 rounds of each plan (after two that are
    not counted) and of as many plain steps, so that a drift of the machine meets all alike. Then
    'SpecRL/Simulated-v0' with profile='DIR/profile.json' is this machine in simulation. Let nothing else run meanwhile.

    Args:
        target: checkpoint directory, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory; by default a random one, which accepts next to nothing.
        batch_sizes: requests decoded together.
        plans: num_steps/topk/num_draft_tokens, separated by commas; the only ones that the profile will offer.
        temperature: of sampling; 0 is greedy.
        workload: 'stdlib', a .txt, .jsonl or directory of prompts, or a stream of them (see `specrl train`).
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        use_rejection_sampling: sample chains from the draft; else drafts are its best tokens (SGLang's default).
        device: 'cpu' or 'cuda'; by default a GPU where there is one.
        dtype: of the target.
        seconds: of recording; at least four passes are made.
        seed: of prompts and sampling.
        name: of the profile.
        output_dir: where profile.json goes; by default runs/profile-<time>.

    Raises:
        ValueError: an argument out of range.

    Example:
        specrl profile --draft runs/quickstart/draft --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4
    """
    import torch

    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be numbers of at least 1, but got {list(batch_sizes)}; for example 1,4,16")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be above 0, but got {seconds}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    parsed = parse_plans(plans)
    model = load_target(target, device=device, dtype=dtype)
    engine = LocalEngine(
        model,
        load_draft(draft) if draft is not None else new_draft(model, intermediate_size=256),
        max_context=prompt_tokens + max_new_tokens,
        use_rejection_sampling=use_rejection_sampling,
    )
    source = open_stream(
        workload,
        target,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        ignore_eos=True,
        split="held_out",
    )
    blocks = record(engine, source, sorted(set(batch_sizes)), parsed, seconds=seconds, seed=seed)
    engine.close()
    measured = {
        "target": target,
        "draft": "random" if draft is None else str(draft),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "temperature": temperature,
        "workload": workload,
        "use_rejection_sampling": use_rejection_sampling,
        "blocks": len(blocks),
    }
    provenance = {"kind": "recording", "source": "specrl profile", **measured, "environment": environment()}
    fitted = fit_recording(name, provenance, blocks, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
    show(table(summary(fitted), title=f"{name}: {target}, temperature {temperature}"))
    if output_dir is not None:
        show(f"written: {OutputDir(output_dir).write_text('profile.json', fitted.to_json())}")
    return fitted


def record(
    engine: Engine, workload: Workload, batch_sizes: Sequence[int], plans: Sequence[Plan], *, seconds: float, seed: int
) -> list[Block]:
    """Blocks of every plan and of plain steps at every batch size, interleaved, after a pass that is not counted."""
    session = engine.start(workload, batch_size=batch_sizes[0], max_batch_size=batch_sizes[-1], seed=seed)
    blocks: list[Block] = []
    turns = [(batch_size, plan) for batch_size in batch_sizes for plan in plans]
    passes, clock = 0, engine.clock
    with progress("recording", seconds) as advance:
        began = clock.now()
        while passes <= _LEAST or clock.now() - began < seconds:
            for batch_size, plan in turns:
                session.resize(batch_size)
                done = [session.round(plan) for _ in range(_UNCOUNTED + _ROUNDS)]  # caches as another plan left them
                steps = [session.measure_plain() for _ in range(_ROUNDS)]  # warm of themselves
                if passes:
                    blocks += [Block(tuple(done[_UNCOUNTED:])), Block(_plain(steps))]
            turns.reverse()
            passes += 1
            advance(clock.now() - began)
    session.close()
    return blocks


def _plain(steps: Sequence[PlainSample | None]) -> tuple[PlainSample, ...]:
    found = tuple(step for step in steps if step is not None)
    if len(found) < len(steps):
        raise ValueError("the engine must measure plain decoding between rounds, but it does not; use 'local'")
    return found


def summary(fitted: Profile) -> list[dict[str, object]]:
    """What the profile says of every plan and batch size, as rows of a table."""
    return [
        {
            "batch_size": cost.batch_size,
            "plan": str(cost.plan),
            "round ms": cost.seconds * 1e3,
            "jitter": cost.jitter,
            "accept length": fitted.accept_length(cost.plan),
            "speedup": fitted.speedup(cost.batch_size, cost.plan),
        }
        for cost in fitted.costs
        if cost.plan is not None
    ]
