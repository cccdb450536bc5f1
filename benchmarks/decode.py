"""Plain decoding of the embedded target against transformers' `generate`, and the host's share of a round.

    python benchmarks/decode.py [--threads 2] [--batch_sizes 1,8] [--pairs 12]

Both decode the same prompts greedily to the same length, in one process with the same threads, in ABBA order;
prefill is timed apart on our side and subtracted on theirs (a `generate` of one token). Prints one table and,
last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoModelForCausalLM

import specrl
from specrl.core.clock import WallClock
from specrl.core.interfaces import Request
from specrl.core.plan import Plan
from specrl.core.statistics import abba, paired_speedup
from specrl.measure.machine import keep_large_blocks
from specrl.models.draft import ServingDraft
from specrl.models.embedded import embedded_directory
from specrl.models.target import Target

PROMPT, NEW = 64, 64
CLOCK = WallClock()


class Fixed:
    """The same prompts, over and over."""

    def __init__(self, prompts: list[tuple[int, ...]]) -> None:
        self.prompts = prompts

    def requests(self, seed: int):  # type: ignore[no-untyped-def]
        """An endless repetition."""
        while True:
            yield from (Request(prompt, NEW, ignore_eos=True) for prompt in self.prompts)


def ours(engine: specrl.LocalEngine, prompts: list[tuple[int, ...]]) -> float:
    """Seconds per token of plain rounds until every prompt is done."""
    session = engine.start(Fixed(prompts), batch_size=len(prompts), seed=0, plain=True)
    seconds = sum(session.round(Plan(0)).seconds for _ in range(NEW - 1))
    session.close()
    return seconds / ((NEW - 1) * len(prompts))


def theirs(model: torch.nn.Module, prompts: list[tuple[int, ...]]) -> float:
    """Seconds per token of `generate`, its prefill taken off."""
    ids = torch.tensor(prompts)
    took = []
    for new in (1, NEW):
        began = CLOCK.now()
        with torch.inference_mode():
            model.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        took.append(CLOCK.now() - began)
    return (took[1] - took[0]) / ((NEW - 1) * len(prompts))


def host_share(engine: specrl.LocalEngine, batch: int, plan: Plan, generator: torch.Generator) -> dict[str, float]:
    """Milliseconds of a speculative round, and its share outside the forward passes of target and draft."""
    prompts = [tuple(torch.randint(1, 500, (PROMPT,), generator=generator).tolist()) for _ in range(batch)]
    session = engine.start(Fixed(prompts), batch_size=batch, seed=0)
    with ExitStack() as stack:
        forward = ForwardTime()
        for model, names in ((Target, ("decode",)), (ServingDraft, ("fuse", "decode", "logits"))):
            for name in names:
                stack.enter_context(patch.object(model, name, forward.timed(getattr(model, name))))
        rounds = []
        for index in range(160):
            forward.seconds = 0.0
            done = session.round(plan)
            if index >= 10:
                rounds.append((done.seconds, done.seconds - forward.seconds))
    session.close()
    seconds, host = np.median(np.array(rounds), 0)
    return {"round_ms": seconds * 1e3, "host_ms": host * 1e3, "host_share": host / seconds}


class ForwardTime:
    """Seconds in the functions that it wraps; a call inside another one counts once."""

    def __init__(self) -> None:
        self.seconds, self._inside = 0.0, False

    def timed(self, function):  # type: ignore[no-untyped-def]
        """The function, with its time added to `seconds`."""

        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if self._inside:
                return function(*args, **kwargs)
            self._inside, began = True, CLOCK.now()
            try:
                return function(*args, **kwargs)
            finally:
                self._inside = False
                self.seconds += CLOCK.now() - began

        return call


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch_sizes", default="1,8")
    parser.add_argument("--pairs", type=int, default=12)
    args = parser.parse_args()
    keep_large_blocks()
    torch.set_num_threads(args.threads)
    directory = embedded_directory("embedded")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    target = specrl.load_target("embedded")
    engine = specrl.LocalEngine(target, specrl.new_draft(target, intermediate_size=256))
    generator = torch.Generator().manual_seed(0)
    result: dict[str, dict[str, float]] = {}
    for batch in map(int, args.batch_sizes.split(",")):
        prompts = [tuple(torch.randint(1, 500, (PROMPT,), generator=generator).tolist()) for _ in range(batch)]
        times: dict[str, list[float]] = {"A": [], "B": []}
        theirs(model, prompts), ours(engine, prompts)
        for side in abba(args.pairs):
            times[side].append(theirs(model, prompts) if side == "A" else ours(engine, prompts))
        ratio = paired_speedup(np.array(times["A"]), np.array(times["B"]), rng=np.random.default_rng(0))
        hf, here = (1.0 / np.median(times[side]) for side in "AB")
        share = host_share(engine, batch, Plan(3), generator)
        print(
            f"batch {batch:2d}  transformers {hf:7.0f} tok/s  specrl {here:7.0f} tok/s  ratio {ratio}"
            f"  | round 3/1/4 {share['round_ms']:.2f} ms, host {share['host_ms']:.2f} ms ({share['host_share']:.0%})"
        )
        result[str(batch)] = {
            "transformers_tps": hf,
            "tps": here,
            "ratio": ratio.value,
            "low": ratio.low,
            "high": ratio.high,
            **share,
        }
    print(json.dumps({"threads": args.threads, "batch_sizes": result}))


if __name__ == "__main__":
    main()
