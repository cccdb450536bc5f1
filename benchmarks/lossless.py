"""Greedy decoding with a draft against plain decoding, token by token, on the embedded target in fp32.

    python benchmarks/lossless.py [--tokens 100000] [--seed 0] [--draft DIR]

Every plan, and a plan and batch size drawn anew for every round, at batch sizes 1 to 16, with the whole vocabulary and
a reduced one. Where a request first differs from plain decoding is a divergence; it is allowed only where plain
decoding's two best logits are less than 1e-4 apart, because the order of a sum decides there. Without --draft one is
trained for half a minute first. Prints a table and, last, one line of JSON; exits with 1 if one is not allowed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice

import numpy as np
import torch

import specrl
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.measure.machine import keep_large_blocks
from specrl.models.draft import Draft
from specrl.models.embedded import embedded_directory
from specrl.models.target import Target
from specrl.models.tokenizer import load_tokenizer
from specrl.workloads.text import TextWorkload, load_workload

PLANS = parse_plans("1/1/2,2/1/3,3/1/4,5/1/6,2/2/4,3/2/6,3/4/10")
BATCH_SIZES = range(1, 17)
NEW, PROMPTS, MOST_PROMPT = 48, 256, 64
REDUCED = 192  # of 512 tokens
GAP = 1e-4


@dataclass(frozen=True)
class Listed:
    """These requests, over and over, from the one with the number that the seed names."""

    listed: list[Request]

    def requests(self, seed: int) -> Iterator[Request]:
        """An endless repetition."""
        return (self.listed[(seed + i) % len(self.listed)] for i in count())


def workload(split: str) -> TextWorkload:
    tokenizer = load_tokenizer(embedded_directory())
    return load_workload(
        "stdlib", tokenizer, prompt_tokens=(1, MOST_PROMPT), max_new_tokens=NEW, temperature=0.0, split=split
    )  # type: ignore[arg-type]


def trained(target: Target, updates: int, seed: int) -> Draft:
    """A draft that learnt from plain decoding of 256 requests."""
    draft = specrl.new_draft(target, intermediate_size=256, seed=seed)
    engine = specrl.LocalEngine(target, draft, max_context=MOST_PROMPT + NEW)
    session = engine.start(workload("train"), batch_size=16, seed=seed, trace=True)
    done = 0
    while done < 256:
        done += len(session.round(Plan(0)).finished)
    learner = OnlineLearner(draft, target.embedding, LearnerConfig(updates_per_request=updates / 256), seed=seed)
    learner.learn(session.drain())
    session.close()
    return Draft(draft.config, learner.weights()[1])


def reduced(draft: Draft, texts: list[tuple[int, ...]]) -> Draft:
    """The draft with only the tokens that are most frequent in `texts`."""
    often = torch.tensor([token for text in texts for token in text]).bincount(minlength=draft.config.vocab_size)
    ids = often.topk(REDUCED).indices.sort().values
    tensors = {**draft.tensors, "lm_head.weight": draft.tensors["lm_head.weight"][ids].clone()}
    return Draft(replace(draft.config, draft_vocab_size=REDUCED), {**tensors, "d2t": ids - torch.arange(REDUCED)})


@dataclass
class Tally:
    """What came out under one plan (or under switching) with one vocabulary."""

    tokens: int = 0
    divergences: int = 0
    allowed: int = 0
    rounds: int = 0
    accept_length: float = 0.0  # sum over rounds


class Comparison:
    """Plain decoding of the requests, and how anything else compares with it."""

    def __init__(self, target: Target, requests: list[Request]) -> None:
        self.target, self.requests = target, requests
        engine = specrl.LocalEngine(target, max_context=MOST_PROMPT + NEW)
        session = engine.start(Listed(requests), batch_size=16, seed=0, plain=True)
        done: dict[int, tuple[int, ...]] = {}
        while not all(i in done for i in range(len(requests))):
            done |= {c.request_id: c.tokens for c in session.round(Plan(0)).finished}
        self.plain = [done[i] for i in range(len(requests))]

    def add(self, tally: Tally, index: int, tokens: tuple[int, ...]) -> None:
        """Compare a request's tokens up to the first that differs."""
        plain = self.plain[index]
        if tokens == plain:
            tally.tokens += len(plain)
            return
        at = next((i for i, pair in enumerate(zip(tokens, plain, strict=False)) if pair[0] != pair[1]), None)
        at = min(len(tokens), len(plain)) if at is None else at
        tally.tokens += at + 1
        tally.divergences += 1
        if at < len(plain):
            best = self.target(torch.tensor([self.requests[index].prompt + plain[:at]]))[0, -1].topk(2).values
            gap = float(best[0] - best[1])
            tally.allowed += gap < GAP
            print(f"request {index} differs at token {at}, where plain decoding's gap is {gap:.2e}", file=sys.stderr)


def serve(
    engine: specrl.LocalEngine, against: Comparison, tally: Tally, plan: Plan | None, batch: int, share: int, seed: int
) -> None:
    """Decode at least `share` tokens at one plan and batch size; without a plan, both change every round."""
    rng, size = np.random.default_rng(seed), len(against.requests)
    first = int(rng.integers(size))
    session = engine.start(Listed(against.requests), batch_size=batch, max_batch_size=16, seed=first)
    wanted, done = max(batch, -(-share // NEW)), set[int]()
    while not all(i in done for i in range(wanted)):
        now = plan
        if now is None:
            now = (Plan(0), *PLANS)[rng.integers(len(PLANS) + 1)]
            session.resize(int(rng.integers(1, 17)) if rng.random() < 0.5 else batch)
        round_ = session.round(now)
        tally.rounds += 1
        tally.accept_length += round_.accept_length
        for c in round_.finished:
            done.add(c.request_id)
            against.add(tally, (first + c.request_id) % size, c.tokens)
    session.close()


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000, help="compared at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draft", default=None, help="directory; None: train one")
    parser.add_argument("--updates", type=int, default=400, help="of the training")
    args = parser.parse_args()
    keep_large_blocks()
    target = specrl.load_target("embedded")
    requests = list(islice(workload("held_out").requests(args.seed), PROMPTS))
    against = Comparison(target, requests)
    draft = specrl.load_draft(args.draft) if args.draft else trained(target, args.updates, args.seed)
    drafts = {"whole": draft}
    if draft.target_ids is None:
        drafts[f"{REDUCED}"] = reduced(draft, against.plain)
    engines = {name: specrl.LocalEngine(target, d, max_context=MOST_PROMPT + NEW) for name, d in drafts.items()}
    tallies = {(name, plan): Tally() for name in drafts for plan in (*PLANS, None)}
    share = -(-args.tokens // (len(tallies) * len(BATCH_SIZES)))
    passes = 0
    while sum(tally.tokens for tally in tallies.values()) < args.tokens:
        for number, ((name, plan), tally) in enumerate(tallies.items()):
            for batch in BATCH_SIZES:
                seed = args.seed + 1000 * (passes * len(tallies) + number) + batch
                serve(engines[name], against, tally, plan, batch, share, seed)
        passes += 1
    print("vocabulary  plan           tokens  accept length  divergences  allowed")
    rows = []
    for (name, plan), tally in tallies.items():
        label, length = str(plan or "switching"), tally.accept_length / tally.rounds
        print(
            f"{name:10s}  {label:12s}  {tally.tokens:7,d}  {length:13.2f}  {tally.divergences:11d}  {tally.allowed:7d}"
        )
        rows.append(
            {
                "vocabulary": name,
                "plan": label,
                "tokens": tally.tokens,
                "accept_length": length,
                "divergences": tally.divergences,
                "allowed": tally.allowed,
            }
        )
    total = {key: sum(int(row[key]) for row in rows) for key in ("tokens", "divergences", "allowed")}
    print(json.dumps({**total, "gap": GAP, "seed": args.seed, "configurations": rows}))
    return int(total["divergences"] > total["allowed"])


if __name__ == "__main__":
    sys.exit(main())
