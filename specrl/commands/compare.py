"""`specrl compare`: two drafts or runs, measured in turns; or two finished benchmarks, which nothing pairs any more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from specrl.core.plan import Plan
from specrl.core.statistics import Interval, paired_speedup, probability_of_improvement
from specrl.export.bundle import PLANS, read_plans
from specrl.io.output import OutputDir, environment, show, table
from specrl.measure.compare import compare_benches, intervals, is_bench, unlike
from specrl.measure.local_arms import fastest_plain, measure_plans
from specrl.measure.paired import PLAIN, Measured
from specrl.models.draft import Draft, load_draft
from specrl.models.target import default_device, load_target
from specrl.workloads.stream import held_out

Floats = NDArray[np.float64]


class Drafted(NamedTuple):
    """A draft, and the plan that its run chose at each batch size, if it did."""

    draft: Draft
    plans: Mapping[int, Plan] | None

    def plan(self, batch_size: int, given: Plan | None) -> Plan:
        """The given one, else the run's at the nearest batch size from below, else 3/1/4."""
        if given is not None or self.plans is None:
            return given or Plan(3)
        return self.plans[max([b for b in self.plans if b <= batch_size], default=min(self.plans))]


def compare(
    *,
    a: Path,
    b: Path,
    target: str = "embedded",
    plan: str | None = None,
    batch_sizes: tuple[int, ...] = (1, 4, 16),
    temperature: float = 0.7,
    workload: str = "stdlib",
    prompt_tokens: int = 64,
    max_new_tokens: int = 128,
    use_rejection_sampling: bool = True,
    device: str | None = None,
    precision: float = 0.02,
    seconds: float = 60.0,
    seed: int = 0,
    output_dir: Path | None = None,
) -> list[dict[str, object]]:
    """How much faster is B than A?

    Two drafts, or two runs that learned one, are measured here: both and plain decoding take turns in one process on
    the same prompts, and blocks are compared in pairs. Two directories of 'specrl bench' are compared as they are:
    what they measured at different times nothing can pair, so that the ratio is of their speedups, each over plain
    decoding in its own run, and only what both measured under the same name is compared.

    Args:
        a: EAGLE3 draft directory, output directory of 'specrl train' or 'quickstart', or of 'specrl bench'.
        b: of the same kind.
        target: checkpoint directory, Hugging Face id, or 'embedded', 'embedded-easy', 'embedded-strong'.
        plan: num_steps/topk/num_draft_tokens for both; by default what each run chose, and 3/1/4 where none did.
        batch_sizes: requests decoded together.
        temperature: of sampling; 0 is greedy.
        workload: 'stdlib', a .txt, .jsonl or directory of prompts, or a stream of them (see `specrl train`).
        prompt_tokens: tokens of a prompt.
        max_new_tokens: tokens generated per request.
        use_rejection_sampling: sample chains from the draft; else drafts are its best tokens (SGLang's default).
        device: 'cpu' or 'cuda'; by default a GPU where there is one.
        precision: measure until the ratio's 95 % interval has a half-width of at most this.
        seconds: or until this much time is spent at a batch size.
        seed: of prompts and sampling.
        output_dir: where compare.json and compare.csv go; by default runs/compare-<time>.

    Raises:
        ValueError: a directory of none of these kinds, two of different kinds, or an argument out of range.

    Example:
        specrl compare runs/day0 runs/day0-lk
        specrl compare runs/bench-monday runs/bench-tuesday
    """
    if not 0 < precision < 1 or not 0 < seconds < float("inf"):
        raise ValueError(f"precision must be in (0, 1) and seconds above 0, but got {precision} and {seconds}")
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes must be numbers of at least 1, but got {list(batch_sizes)}; for example 1,4,16")
    finished = [is_bench(path) for path in (a, b)]
    if finished[0] != finished[1]:
        raise ValueError(f"a benchmark can only be compared with another, but got {str(a)!r} and {str(b)!r}")
    if finished[0]:
        lines = compare_benches(a, b)
        said = [
            "Not paired: A and B were measured at different times, so their ratio is of speedups that each had over "
            "plain decoding in its own run, with an interval of a bootstrap over the blocks of both.",
            *unlike(a, b),
        ]
    else:
        given = None if plan is None else Plan.parse(plan)
        device = default_device(device)
        one, two = read_drafted(a), read_drafted(b)
        model = load_target(target, device=device)
        source = held_out(workload, target, prompt_tokens, max_new_tokens, temperature)
        lines = []
        for batch in batch_sizes:
            results = measure_plans(
                model,
                {"A": (one.draft, one.plan(batch, given)), "B": (two.draft, two.plan(batch, given))},
                source,
                fastest_plain(target, source, batch, device=device),
                target=target,
                batch_size=batch,
                max_context=prompt_tokens + max_new_tokens,
                block_tokens=max_new_tokens,
                precision=precision,
                seconds=seconds,
                use_rejection_sampling=use_rejection_sampling,
                null=False,
                each=True,
                reference="A",
                seed=seed,
            )
            lines.append(paired_line({m.name: m for m in results}))
        said = ["Paired: A, B and plain decoding took turns in one process on the same prompts."]
    show(table([_shown(line) for line in lines], title=f"A: {a}; B: {b}"), *said)
    if output_dir is not None:
        directory = OutputDir(output_dir)
        directory.write_csv("compare.csv", lines)
        report = {"a": a, "b": b, "paired": not finished[0], "said": said, "rows": lines, "environment": environment()}
        show(f"written: {directory.write_json('compare.json', report)}")
    return lines


def read_drafted(path: Path) -> Drafted:
    """A draft directory, or a run's draft and plans.

    Raises:
        ValueError: neither.
    """
    if (path / "draft").is_dir():
        return Drafted(load_draft(path / "draft"), read_plans(path / PLANS) if (path / PLANS).is_file() else None)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"what is compared must be a draft (config.json), a run (draft/) or a benchmark (bench.json, blocks.csv), "
            f"but {str(path)!r} is none"
        )
    return Drafted(load_draft(path), None)


def paired_line(lanes: Mapping[str, Measured]) -> dict[str, object]:
    """The row of a batch size, of lanes 'A', 'B' and plain, measured with A as the reference."""
    ratio = lanes["B"].speedup
    assert ratio is not None, "A is the reference"
    speedups = {}
    for name in ("A", "B"):
        pairs = min(len(lanes[name].blocks), len(lanes[PLAIN].blocks))
        mine, plain = (_per_token(lanes[lane].blocks[:pairs]) for lane in (name, PLAIN))
        speedups[name] = paired_speedup(plain, mine, rng=np.random.default_rng(0))
    pairs = len(lanes["B"].blocks)
    gains = np.log(_per_token(lanes["A"].blocks[:pairs]) / _per_token(lanes["B"].blocks))
    return {
        "batch_size": lanes["A"].batch_size,
        **{f"plan_{name.lower()}": lanes[name].plan for name in ("A", "B")},
        **intervals(speedups["A"], speedups["B"], ratio),
        "probability": probability_of_improvement(gains, [0.0]),  # of pairs
        **{f"accept_length_{name.lower()}": lanes[name].accept_length for name in ("A", "B")},
        **{f"tps_{name.lower()}": lanes[name].mean_tps for name in ("A", "B")},
        "blocks_a": len(lanes["A"].blocks),
        "blocks_b": pairs,
    }


def _per_token(blocks: Sequence[tuple[float, float]]) -> Floats:
    return np.array([seconds / tokens for tokens, seconds in blocks])


def _shown(line: Mapping[str, Any]) -> dict[str, object]:
    """A row for people."""

    def interval(name: str) -> str:
        return str(Interval(line[name], line[f"{name}_low"], line[f"{name}_high"]))

    return {
        **({"temperature": line["temperature"]} if line.get("temperature") is not None else {}),
        "batch": line["batch_size"],
        "plans": line["plan_a"] if line["plan_a"] == line["plan_b"] else f"{line['plan_a']} and {line['plan_b']}",
        "A over plain [95 %]": interval("speedup_a"),
        "B over plain [95 %]": interval("speedup_b"),
        "B over A [95 %]": interval("ratio"),
        "P(B faster)": f"{line['probability']:.2f}",
        "accept length A": line["accept_length_a"],
        "B": line["accept_length_b"],
    }
