"""`specrl profile`: record a run of an engine and fit what a simulated engine needs of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from specrl.core.interfaces import Engine, Session, Workload
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import PlainSample
from specrl.decoding.engine import LocalEngine
from specrl.io.output import OutputDir, environment, progress, show, table
from specrl.measure.sglang_arms import launch, plain_steps, served_facts
from specrl.models.draft import load_draft, new_draft
from specrl.models.target import default_device, load_target
from specrl.simulation.fit import Block, fit_recording
from specrl.simulation.profile import Profile
from specrl.workloads.stream import held_out

_ROUNDS, _UNCOUNTED = 8, 2  # rounds or plain steps of a block, and rounds before it
_LEAST = 4  # passes


PLANS = "0,1/1/2,2/1/3,3/1/4,4/1/5,3/2/6"
CHAINS = "0,1/1/2,2/1/3,3/1/4,4/1/5"  # of SGLang, which cannot switch to a tree
Steps = Callable[[Session, int], Sequence[PlainSample | None]]


def profile(
    *,
    engine: Literal["local", "sglang"] = "local",
    target: str = "embedded",
    draft: Path | None = None,
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    plans: str | None = None,
    temperature: float = 0.7,
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    use_rejection_sampling: bool = True,
    device: str | None = None,
    dtype: str = "float32",
    sglang_python: Path | None = None,
    sglang_flags: str = "",
    seconds: float = 120.0,
    seed: int = 0,
    name: str = "recorded",
    output_dir: Path | None = None,
) -> Profile:
    """Record rounds of every plan and plain steps at every batch size, and fit a profile for simulation.

    Passes over batch sizes and plans, there and back in turns, take blocks of 8 rounds of each plan (after two that are
    not counted) and of as many plain steps, so that a drift of the machine meets all alike. Then
    'SpecRL/Simulated-v0' with profile='DIR/profile.json' is this machine in simulation, and 'specrl evaluate --profiles
    DIR/profile.json' compares choosers there. Let nothing else run meanwhile.

    With SGLang two servers are launched, with and without speculation, in lock-step, each still while it is the other's
    turn. Rounds do not overlap there, so that a chooser knows each before the next: the profile's delay is 0.

    Args:
        engine: 'local' decodes here; 'sglang' launches SGLang.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        draft: EAGLE3 draft directory; by default a random one, which accepts next to nothing.
        batch_sizes: requests decoded together.
        plans: num_steps/topk/num_draft_tokens, separated by commas; the only ones that the profile will offer. By
            default 0,1/1/2,2/1/3,3/1/4,4/1/5,3/2/6 (SGLang: without the tree).
        temperature: of sampling; 0 is greedy.
        workload: 'stdlib', a .txt, .jsonl or directory of prompts, or a stream of them (see `specrl train`).
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        use_rejection_sampling: local: sample chains from the draft; else drafts are its best tokens (SGLang's default).
        device: local: 'cpu' or 'cuda'; by default a GPU where there is one.
        dtype: local: of the target.
        sglang_python: Python of an environment with SGLang and this package; by default this one.
        sglang_flags: further flags for sglang.launch_server, both times.
        seconds: of recording; at least four passes are made.
        seed: of prompts and sampling.
        name: of the profile.
        output_dir: where profile.json goes; by default runs/profile-<time>.

    Raises:
        ValueError: an argument out of range.

    Example:
        specrl profile --draft runs/quickstart/draft --batch_sizes 1,4,16 --plans 0,1/1/2,3/1/4
        specrl profile --engine sglang --draft exported/bundle/draft --sglang_python ../sglang/bin/python
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be numbers of at least 1, but got {list(batch_sizes)}; for example 1,4,16")
    if not 0 < seconds < float("inf"):
        raise ValueError(f"seconds must be above 0, but got {seconds}")
    served = engine == "sglang"
    parsed, flags = parse_plans(plans or (CHAINS if served else PLANS)), shlex.split(sglang_flags)
    source = held_out(workload, target, prompt_tokens, max_new_tokens, temperature)
    if served:
        show("launching SGLang with speculation, and without")
        decoder = launch(target, draft, parsed, sglang_python, flags)
        facts = served_facts(decoder, flags)
    else:
        decoder, facts = _local(
            target, draft, prompt_tokens + max_new_tokens, use_rejection_sampling, device=device, dtype=dtype
        )
    try:
        sizes = sorted(set(batch_sizes))
        steps = plain_steps if served else one_by_one
        blocks = record(decoder, source, sizes, parsed, seconds=seconds, seed=seed, steps=steps)
    finally:
        decoder.close()
    measured = {
        "target": target,
        "draft": "random" if draft is None else str(draft),
        **facts,
        "temperature": temperature,
        "workload": workload,
        "blocks": len(blocks),
    }
    provenance = {"kind": "recording", "source": "specrl profile", **measured, "environment": environment()}
    fitted = fit_recording(name, provenance, blocks, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
    fitted = replace(fitted, delay=getattr(decoder, "result_delay", 0))
    show(table(summary(fitted), title=f"{name}: {target}, temperature {temperature}"))
    if output_dir is not None:
        show(f"written: {OutputDir(output_dir).write_text('profile.json', fitted.to_json())}")
    return fitted


def _local(
    target: str,
    draft: Path | None,
    max_context: int,
    use_rejection_sampling: bool,
    *,
    device: str | None,
    dtype: str,
) -> tuple[Engine, dict[str, object]]:
    """The local engine, and what the profile says of it."""
    device = default_device(device)
    model = load_target(target, device=device, dtype=dtype)
    drafted = load_draft(draft) if draft is not None else new_draft(model, intermediate_size=256)
    engine = LocalEngine(model, drafted, max_context=max_context, use_rejection_sampling=use_rejection_sampling)
    return engine, {
        "engine": "local",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "use_rejection_sampling": use_rejection_sampling,
    }


def one_by_one(session: Session, count: int) -> Sequence[PlainSample | None]:
    """Plain steps as a session measures them between rounds."""
    return [session.measure_plain() for _ in range(count)]


def record(
    engine: Engine,
    workload: Workload,
    batch_sizes: Sequence[int],
    plans: Sequence[Plan],
    *,
    seconds: float,
    seed: int,
    steps: Steps = one_by_one,
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
                plain = steps(session, _ROUNDS)  # warm of themselves
                if passes:
                    blocks += [Block(tuple(done[_UNCOUNTED:])), Block(_plain(plain))]
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
