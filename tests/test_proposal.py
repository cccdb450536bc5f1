from functools import cache

import pytest
import torch
from tiny import AUX_LAYERS, prompts, tiny_draft, tiny_target, with_vocabulary
from torch import Tensor

from specrl.core.plan import Plan, parse_plans
from specrl.decoding.propose import Proposal, Start, propose, tree_mask
from specrl.decoding.sampling import Temperatures
from specrl.models.attention import KVCache, TokenSlots
from specrl.models.draft import Draft, ServingDraft

LENGTHS = (5, 9, 2)
TREES = parse_plans("1/2/3,1/4/5,2/2/4,2/2/7,3/2/6,3/3/4,3/4/10,4/3/20,3/4/37")
REDUCED = (1, 2, 4, 5, 8)


@cache
def drafts() -> dict[str, Draft]:
    """Drafts with strong attention, so that the visible slots of a node decide its children."""
    learnt = tiny_draft()
    tensors = {name: t * (4.0 if "self_attn" in name else 1.0) for name, t in learnt.tensors.items()}
    strong = Draft(learnt.config, tensors)
    return {"full": strong, "reduced": with_vocabulary(strong, REDUCED)}


class PreparedDraft:
    """A draft that has read three prompts of different lengths, except the last token of each."""

    def __init__(self, vocabulary: str = "full") -> None:
        self.draft, self.target = ServingDraft(drafts()[vocabulary], tiny_target()), tiny_target()
        self.ids = REDUCED if vocabulary == "reduced" else tuple(range(10))
        self.prompts = [prompts(1, length, seed=length)[0] for length in LENGTHS]
        self.cache = self.draft.new_cache(len(LENGTHS), 128)
        hidden = torch.cat([self._read(self.cache, row, tokens) for row, tokens in enumerate(self.prompts)])
        last = torch.tensor([tokens[-1] for tokens in self.prompts])
        self.start = Start(hidden, torch.tensor(LENGTHS) - 1, max(LENGTHS) - 1, last)

    def _read(self, cache: KVCache, row: int, tokens: tuple[int, ...]) -> Tensor:
        ids, count = torch.tensor([tokens]), len(tokens) - 1
        decoded = self.target.prefill(ids[:, :-1], self.target.new_cache(1, len(tokens)), aux_layers=AUX_LAYERS)
        assert decoded.aux_hidden_states is not None
        where = TokenSlots(torch.arange(count)[None], count, first_row=row)
        return self.draft.decode(ids[:, 1:], self.draft.fuse(decoded.aux_hidden_states), cache, where)[:, -1]

    def log_probabilities(self, row: int, path: tuple[int, ...]) -> Tensor:
        """The draft's log-probabilities after it has drafted `path`, computed token by token in a new cache."""
        tokens, cache = self.prompts[row], self.draft.new_cache(1, 128)
        hidden = self._read(cache, 0, tokens)
        for slot, token in enumerate(path, len(tokens) - 1):
            where = TokenSlots(torch.tensor([[slot]]), slot + 1)
            hidden = self.draft.decode(torch.tensor([[token]]), hidden[:, None], cache, where)[:, 0]
        return torch.log_softmax(self.draft.logits(hidden), -1)[0]

    def propose(self, plan: Plan, temperatures: Temperatures | None = None, seed: int = 0) -> Proposal:
        source = torch.Generator().manual_seed(seed)
        return propose(self.draft, self.cache, self.start, plan, temperatures, source)


def eagle_2(prepared: PreparedDraft, row: int, plan: Plan) -> set[tuple[int, ...]]:
    """The paths that EAGLE-2 verifies, from its definition."""

    def children(path: tuple[int, ...], score: float) -> list[tuple[float, tuple[int, ...]]]:
        best = prepared.log_probabilities(row, path).topk(plan.topk)
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [(score + logp, (*path, prepared.ids[i])) for logp, i in pairs]

    level = children((), 0.0)
    nodes = list(level)
    for _ in range(plan.num_steps - 1):
        level = [child for score, path in sorted(level)[::-1][: plan.topk] for child in children(path, score)]
        nodes += level
    return {path for _, path in sorted(nodes)[::-1][: plan.num_draft_tokens - 1]}


def paths(proposal: Proposal, row: int) -> list[tuple[int, ...]]:
    """The drafted tokens from the committed one to each node."""
    nodes: list[tuple[int, ...]] = [()]
    for token, parent in zip(proposal.tokens[row, 1:].tolist(), proposal.parents[row, 1:].tolist(), strict=True):
        nodes.append((*nodes[parent], token))  # IndexError if a child came before its parent
    return nodes


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
@pytest.mark.parametrize("plan", TREES, ids=str)
def test_a_tree_holds_the_best_paths_and_masks_all_but_ancestors(plan: Plan, vocabulary: str) -> None:
    prepared = PreparedDraft(vocabulary)
    proposal = prepared.propose(plan)
    assert proposal.tokens.shape == (3, plan.num_draft_tokens) and proposal.distributions is None
    assert torch.equal(proposal.tokens[:, 0], prepared.start.last_tokens) and proposal.parents[:, 0].eq(-1).all()
    assert proposal.attention_mask is not None
    for row in range(3):
        nodes = paths(proposal, row)
        assert len(set(nodes)) == plan.num_draft_tokens
        assert set(nodes[1:]) == eagle_2(prepared, row, plan)
        for node, path in enumerate(nodes):
            visible = {nodes[i] for i in proposal.attention_mask[row, node].nonzero()[:, 0].tolist()}
            assert visible == {path[:depth] for depth in range(len(path) + 1)}
            assert proposal.depths[row, node] == len(path)


def test_the_tree_mask_shows_all_slots_before_the_tree() -> None:
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
    prepared = PreparedDraft(vocabulary)
    proposal = prepared.propose(Plan(4), temperatures)
    assert proposal.distributions is None and proposal.attention_mask is None
    assert proposal.parents.tolist() == [[-1, 0, 1, 2, 3]] * 3
    for row in range(3):
        path: tuple[int, ...] = ()
        for _ in range(4):
            path = (*path, prepared.ids[int(prepared.log_probabilities(row, path).argmax())])
        assert proposal.tokens[row].tolist() == [prepared.prompts[row][-1], *path]


@torch.inference_mode()
@pytest.mark.parametrize("vocabulary", ["full", "reduced"])
def test_a_sampled_chain_reports_the_distributions_of_its_tokens(vocabulary: str) -> None:
    prepared, temperatures = PreparedDraft(vocabulary), [0.5, 1.0, 0.0]
    drawn = set()
    for seed in range(5):
        proposal = prepared.propose(Plan(3), Temperatures.of(temperatures, "cpu"), seed)
        assert proposal.distributions is not None and proposal.distributions.shape == (3, 3, 10)
        drawn.add(tuple(proposal.tokens[0].tolist()))
        for row, temperature in enumerate(temperatures):
            drafted = tuple(proposal.tokens[row, 1:].tolist())
            for step in range(3):
                logp = prepared.log_probabilities(row, drafted[:step])
                q = torch.zeros(10)
                q[list(prepared.ids)] = (
                    torch.softmax(logp / temperature, -1) if temperature else (logp == logp.max()) * 1.0
                )
                torch.testing.assert_close(proposal.distributions[row, step], q)
                assert q[drafted[step]] > 0
    assert len(drawn) > 1
