from functools import cache

import pytest
import torch
from tiny import AUX_LAYERS, prompts, tiny_draft, tiny_target, with_vocabulary
from torch import Tensor

from specrl.core.plan import Plan, parse_plans
from specrl.decoding.propose import Proposal, Start, propose, tree_mask
from specrl.decoding.sampling import Temperatures
from specrl.models.attention import KVCache
from specrl.models.draft import Draft, ServingDraft

LENGTHS = (5, 9, 2)
TREES = parse_plans("1/2/3,1/4/5,2/2/4,2/2/7,3/2/6,3/3/4,3/4/10,4/3/20,3/4/37")
REDUCED = (1, 2, 4, 5, 8)


@cache
def drafts() -> dict[str, Draft]:
    """Their attention is so strong that what a node sees decides what it says."""
    learnt = tiny_draft()
    tensors = {name: t * (4.0 if "self_attn" in name else 1.0) for name, t in learnt.tensors.items()}
    strong = Draft(learnt.config, tensors)
    return {"full": strong, "reduced": with_vocabulary(strong, REDUCED)}


class Stand:
    """A draft that has read three prompts of different lengths; the last token of each is committed, not read."""

    def __init__(self, draft: Draft) -> None:
        self.draft, self.target = ServingDraft(draft, tiny_target()), tiny_target()
        self.prompts = [prompts(1, length, seed=length)[0] for length in LENGTHS]
        self.cache = self.draft.new_cache(len(LENGTHS), 128)
        with torch.inference_mode():
            hidden = torch.cat([self._read(self.cache, row, tokens) for row, tokens in enumerate(self.prompts)])
        slots = torch.tensor(LENGTHS) - 1
        last = torch.tensor([tokens[-1] for tokens in self.prompts])
        self.start = Start(hidden, slots, max(LENGTHS) - 1, last)

    def _read(self, cache: KVCache, row: int, tokens: tuple[int, ...]) -> Tensor:
        ids = torch.tensor([tokens])
        features = self.target.prefill(
            ids[:, :-1], self.target.new_cache(1, len(tokens)), aux_layers=AUX_LAYERS
        ).aux_hidden_states
        assert features is not None
        slots = torch.arange(len(tokens) - 1)[None]
        fused = self.draft.fuse(features)
        return self.draft.decode(ids[:, 1:], fused, cache, slots, length=len(tokens) - 1, first_row=row)[:, -1]

    def log_probabilities(self, row: int, path: tuple[int, ...]) -> Tensor:
        """The draft's over its vocabulary, after it has drafted `path`: alone, from the beginning, token by token."""
        tokens = self.prompts[row]
        cache = self.draft.new_cache(1, 128)
        hidden = self._read(cache, 0, tokens)
        for index, token in enumerate(path):
            slot = len(tokens) - 1 + index
            where = torch.tensor([[slot]])
            hidden = self.draft.decode(torch.tensor([[token]]), hidden[:, None], cache, where, length=slot + 1)[:, 0]
        return torch.log_softmax(self.draft.logits(hidden), -1)[0]

    def chain(self, steps: int, temperatures: Temperatures | None, seed: int = 0) -> Proposal:
        generator = torch.Generator().manual_seed(seed)
        return propose(self.draft, self.cache, self.start, Plan(steps), temperatures, generator)


def eagle_2(stand: Stand, row: int, plan: Plan, ids: tuple[int, ...]) -> set[tuple[int, ...]]:
    """The paths that EAGLE-2 verifies, straight from its definition."""

    def children(path: tuple[int, ...], score: float) -> list[tuple[float, tuple[int, ...]]]:
        best = stand.log_probabilities(row, path).topk(plan.topk)
        return [
            (score + logp, (*path, ids[i])) for logp, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    level = children((), 0.0)
    everything = list(level)
    for _ in range(plan.num_steps - 1):
        level = [child for score, path in sorted(level)[::-1][: plan.topk] for child in children(path, score)]
        everything += level
    return {path for _, path in sorted(everything)[::-1][: plan.num_draft_tokens - 1]}


def paths(proposal: Proposal, row: int) -> list[tuple[int, ...]]:
    """The drafted tokens from the committed one to each node."""
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposal.tokens[row, 1:].tolist(), proposal.parents[row, 1:].tolist(), strict=True):
        found.append((*found[parent], token))  # IndexError if a child came before its parent
    return found


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
@pytest.mark.parametrize("plan", TREES, ids=str)
def test_a_tree_holds_the_best_paths_by_cumulative_score(plan: Plan, vocabulary: str) -> None:
    stand = Stand(drafts()[vocabulary])
    ids = tuple(range(10)) if vocabulary == "full" else REDUCED
    proposal = propose(stand.draft, stand.cache, stand.start, plan, None, torch.Generator())
    assert proposal.tokens.shape == (3, plan.num_draft_tokens) and proposal.distributions is None
    assert torch.equal(proposal.tokens[:, 0], stand.start.last_tokens) and proposal.parents[:, 0].eq(-1).all()
    for row in range(3):
        found = paths(proposal, row)
        assert len(set(found)) == plan.num_draft_tokens
        assert set(found[1:]) == eagle_2(stand, row, plan, ids)


@torch.inference_mode()
@pytest.mark.parametrize("plan", TREES, ids=str)
def test_a_node_sees_its_ancestors_and_itself_and_stands_as_deep_as_they_are_many(plan: Plan) -> None:
    stand = Stand(drafts()["full"])
    proposal = propose(stand.draft, stand.cache, stand.start, plan, None, torch.Generator())
    assert proposal.attention_mask is not None
    for row in range(3):
        above = proposal.parents[row].tolist()
        for node in range(plan.num_draft_tokens):
            line, at = set(), node
            while at >= 0:
                line.add(at)
                at = above[at]
            assert set(proposal.attention_mask[row, node].nonzero()[:, 0].tolist()) == line
            assert proposal.depths[row, node] == len(line) - 1


@torch.inference_mode()
def test_the_best_two_of_one_step_are_the_drafts_two_best_tokens() -> None:
    stand = Stand(drafts()["full"])
    proposal = propose(stand.draft, stand.cache, stand.start, Plan(1, 2, 3), None, torch.Generator())
    for row in range(3):
        assert proposal.tokens[row, 1:].tolist() == stand.log_probabilities(row, ()).topk(2).indices.tolist()


def test_the_tree_mask_shows_everything_before_and_the_tree_behind() -> None:
    inside = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]] * 2).bool()
    mask = tree_mask(inside, torch.tensor([2, 0]), 5)
    assert mask.int().tolist() == [
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0]],
    ]


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
@pytest.mark.parametrize("temperatures", [None, Temperatures.of([0.0] * 3, "cpu")], ids=["best tokens", "greedy"])
def test_a_greedy_chain_takes_the_best_token_every_time(vocabulary: str, temperatures: Temperatures | None) -> None:
    stand = Stand(drafts()[vocabulary])
    proposal = stand.chain(4, temperatures)
    assert proposal.distributions is None and proposal.attention_mask is None
    assert proposal.parents.tolist() == [[-1, 0, 1, 2, 3]] * 3
    ids = range(10) if vocabulary == "full" else REDUCED
    for row in range(3):
        path: tuple[int, ...] = ()
        for _ in range(4):
            path = (*path, ids[int(stand.log_probabilities(row, path).argmax())])
        assert proposal.tokens[row].tolist() == [stand.prompts[row][-1], *path]


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
def test_a_sampled_chain_reports_the_distributions_that_it_was_drawn_from(vocabulary: str) -> None:
    stand = Stand(drafts()[vocabulary])
    heat = (0.5, 1.0, 0.0)
    ids = torch.arange(10) if vocabulary == "full" else torch.tensor(REDUCED)
    seen = set()
    for seed in range(5):
        proposal = stand.chain(3, Temperatures.of(list(heat), "cpu"), seed)
        assert proposal.distributions is not None and proposal.distributions.shape == (3, 3, 10)
        seen.add(tuple(proposal.tokens[0].tolist()))
        for row, temperature in enumerate(heat):
            drafted = tuple(proposal.tokens[row, 1:].tolist())
            for step in range(3):
                logp = stand.log_probabilities(row, drafted[:step])
                q = torch.zeros(10)
                q[ids] = torch.softmax(logp / temperature, -1) if temperature else (logp == logp.max()).float()
                torch.testing.assert_close(proposal.distributions[row, step], q)
                assert q[drafted[step]] > 0
    assert len(seen) > 1
