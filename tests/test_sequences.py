from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from tiny import Listed
from torch import Tensor

import specrl
from specrl.agents.draft.learner import LearnerConfig, OnlineLearner
from specrl.agents.draft.objective import collate
from specrl.agents.draft.sequences import Assembler, Replay, TrainingSequence
from specrl.core.interfaces import Request
from specrl.core.plan import Plan, parse_plans
from specrl.core.round import Completion, Trace
from specrl.decoding.session import LocalSession
from specrl.models.draft import Draft
from specrl.models.target import Target

Served = tuple[list[Trace], dict[int, Completion]]
PLANS = parse_plans("3/1/4,0,3/2/6,1/1/2,2/3/7,5/1/6,4/2/9")


class Prompts:
    """Requests of random tokens, alternately greedy and sampled."""

    def requests(self, seed: int) -> Iterator[Request]:
        rng = np.random.default_rng(seed)
        for temperature in cycle((0.0, 0.8)):
            prompt = tuple(rng.integers(1, 512, int(rng.integers(1, 9))).tolist())
            yield Request(prompt, int(rng.integers(4, 25)), temperature, ignore_eos=True)


@pytest.fixture(scope="module")
def target() -> Target:
    return specrl.load_target("embedded")


@pytest.fixture(scope="module")
def draft(target: Target) -> Draft:
    """A draft with a little training, so that drafts are accepted, in trees off the first branch too."""
    draft = specrl.new_draft(target, intermediate_size=64, seed=1)
    session = start(target, draft, batch_size=16, seed=5)
    for _ in range(40):
        session.round(Plan(0))
    config = LearnerConfig(updates_per_request=1.0, batch_size=8, ema_decay=0.5, dtype="float32")
    learner = OnlineLearner(draft, target.embedding, config)
    learner.learn(session.drain())
    return Draft(draft.config, learner.weights()[1])


def start(target: Target, draft: Draft, batch_size: int = 2, seed: int = 0) -> LocalSession:
    engine = specrl.LocalEngine(target, draft, max_context=64)
    return engine.start(Prompts(), batch_size=batch_size, max_batch_size=max(4, batch_size), seed=seed, trace=True)


@pytest.fixture(scope="module")
def served(target: Target, draft: Draft) -> Served:
    """Traces and completions of rounds of many plans, while the batch grows and shrinks."""
    session, completions = start(target, draft), {}
    for index in range(60):
        if index % 6 == 0:
            session.resize((2, 4, 1, 3)[index // 6 % 4])
        for done in session.round(PLANS[index % len(PLANS)]).finished:
            completions[done.request_id] = done
    return session.drain(), completions


def off_the_first_branch(traces: list[Trace]) -> int:
    """Accepted paths of trees that are not the first rows."""
    trees = [trace for trace in traces if trace.plan is not None and not trace.plan.is_chain]
    return sum(int((path > torch.arange(len(path))).any()) for tree in trees for path in tree.path)


def test_sequences_are_those_that_the_target_computes_for_whole_token_sequences(
    target: Target, draft: Draft, served: Served
) -> None:
    traces, completions = served
    assert off_the_first_branch(traces) >= 3
    assembler = Assembler(torch.float32)
    ended = [request for trace in traces for request in trace.finished]
    sequences = assembler.add(traces)
    assert len(sequences) == len(ended) > 10 and assembler.counts["skipped"] == 0
    for request, sequence in zip(ended, sequences, strict=True):
        known = [*completions[request].prompt, *completions[request].tokens]
        # The last token may not be verified yet; drafts beyond the end may be.
        assert len(sequence.tokens) >= len(known) - 1
        assert sequence.tokens.tolist()[: len(known)] == known[: len(sequence.tokens)]
        assert sequence.temperature == (0.0, 0.8)[request % 2]
        tokens = sequence.tokens[None]
        with torch.inference_mode():
            whole = target.prefill(tokens, target.new_cache(1, tokens.shape[1]), aux_layers=draft.config.aux_layers)
        assert whole.aux_hidden_states is not None and sequence.logits.dtype == torch.float32
        torch.testing.assert_close(sequence.logits, whole.logits[0], atol=1e-3, rtol=0.0)
        torch.testing.assert_close(sequence.features, whole.aux_hidden_states[0], atol=1e-3, rtol=0.0)


def test_traces_may_arrive_one_by_one(served: Served) -> None:
    assembler = Assembler()
    parts = [sequence for trace in served[0] for sequence in assembler.add([trace])]
    for part, sequence in zip(parts, Assembler().add(served[0]), strict=True):
        assert torch.equal(part.tokens, sequence.tokens) and torch.equal(part.logits, sequence.logits)
        assert part.logits.dtype == torch.float16  # the default


def test_a_request_that_ends_with_its_prefill_is_a_sequence_too(target: Target, draft: Draft) -> None:
    requests = Listed([Request((5, 6, 7), new_tokens) for new_tokens in (4, 1)])
    session = specrl.LocalEngine(target, draft, max_context=64).start(requests, batch_size=1, seed=0, trace=True)
    for _ in range(6):
        session.round(Plan(0))
    assert [len(s.tokens) for s in Assembler().add(session.drain())] == [6, 3, 6, 3]


def test_requests_without_their_prefill_or_a_round_are_skipped(served: Served) -> None:
    traces, _ = served
    lost_prefill = next(i for i, trace in enumerate(traces) if trace.plan is None)
    lost_round = next(i for i, trace in enumerate(traces) if trace.plan is not None and not trace.finished)
    for lost in (lost_prefill, lost_round):
        incomplete = set(traces[lost].request_ids.tolist())
        assembler = Assembler()
        sequences = assembler.add(traces[:lost] + traces[lost + 1 :])
        assert assembler.counts["skipped"] == len(incomplete)
        assert len(sequences) == sum(request not in incomplete for trace in traces for request in trace.finished) > 0


def prefill(features: Tensor, logits: Tensor, request: int = 0) -> Trace:
    """A request of 3 tokens that ended with its prefill."""
    rows = torch.arange(3)[None]
    ids, zero = np.array([request]), np.zeros(1, dtype=np.int64)
    return Trace(ids, zero, rows, features, logits, rows - 1, rows, 0, None, (1.0,), (request,))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_values_that_are_not_finite_are_skipped_except_logits_of_impossible_tokens(value: float) -> None:
    features, logits = torch.zeros(1, 3, 6), torch.zeros(1, 3, 4)
    bad_features, bad_logits = features.clone(), logits.clone()
    logits[..., 2] = float("-inf")
    bad_features[0, 1, 2] = value if value != 1e6 else float("-inf")
    bad_logits[0, 2, 3] = value  # 1e6 is infinite in float16
    assembler = Assembler()
    traces = [prefill(bad_features, logits), prefill(features, bad_logits, 1), prefill(features, logits, 2)]
    assert len(assembler.add(traces)) == 1
    assert assembler.counts["skipped"] == 2


def numbered(length: int) -> TrainingSequence:
    """A sequence that is identified by its length."""
    return TrainingSequence(torch.arange(length) + 1, torch.ones(length, 6), torch.ones(length, 4), 1.0, 0)


def filled(lengths: Iterable[int], **settings: Any) -> Replay:
    replay = Replay(**{"capacity": 20, "half_life": 5.0, "seed": 0, **settings})
    replay.extend(map(numbered, lengths))
    return replay


def test_the_replay_drops_the_oldest_and_draws_without_repeats() -> None:
    replay = filled(range(1, 6), capacity=3)
    assert len(replay) == 3 and replay.dropped == 2
    assert sorted(len(s.tokens) for s in replay.draw(10)) == [3, 4, 5]


def test_newer_sequences_are_drawn_more_often() -> None:
    """Weights 1, 2, 4 of 7; the seed is fixed, and with another, 3,500 draws miss by 4 sigma once in 5,000 times."""
    replay = filled((1, 2, 3), half_life=1.0)
    counts = Counter(len(s.tokens) for _ in range(3500) for s in replay.draw(1))
    assert [counts[n] for n in (1, 2, 3)] == pytest.approx([500, 1000, 2000], abs=120)


def test_the_same_seed_draws_the_same() -> None:
    one, other = filled(range(1, 21)), filled(range(1, 21))
    draws = [[[len(s.tokens) for s in replay.draw(4)] for _ in range(10)] for replay in (one, other)]
    assert draws[0] == draws[1]


def test_collate_pads_on_the_right() -> None:
    batch = collate([numbered(2), numbered(4)], [1.0, 1.0], None)
    assert batch.tokens.tolist() == [[2, 0, 0], [2, 3, 4]]
    assert batch.inside.tolist() == [[True, False, False], [True] * 3]
    assert batch.features.shape == (2, 3, 6)
    assert batch.features[0, :1].all() and not batch.features[0, 1:].any()
    assert batch.targets.tokens.tolist() == [-1, 3, 4, -1]
