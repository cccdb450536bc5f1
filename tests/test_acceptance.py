from itertools import product

import torch
from torch import Tensor

from specrl.decoding.sampling import Drawn, Temperatures, distribution
from specrl.decoding.verify import Accepted, accept_chain, accept_tree, reject_chain

V = 4


def ancestors(parents: list[int]) -> Tensor:
    """[n, n] bool, ancestors and self of each node."""
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents[1:], 1):
        mask[node] |= mask[parent]
    return mask


def in_tree(chosen: Tensor, tokens: Tensor, parents: list[int], num_steps: int) -> Accepted:
    """Acceptance of `tokens [B, n]` in trees of one shape."""
    above, mask = torch.tensor(parents).expand(tokens.shape), ancestors(parents).expand(len(tokens), -1, -1)
    return accept_tree(chosen, tokens, above, mask, num_steps)


def walk(chosen: list[int], tokens: list[int], parents: list[int]) -> list[int]:
    """The accepted rows, from the root to the child that the target chose, as long as there is one."""
    path = [0]
    while True:
        children = [i for i in range(1, len(tokens)) if parents[i] == path[-1] and tokens[i] == chosen[path[-1]]]
        if not children:
            return path
        path += children


def test_a_chain_is_accepted_up_to_the_first_draft_that_the_target_did_not_choose() -> None:
    drafted = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, -1]])
    chosen = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 8], [1, 6, 7, 8], [5, 6, 7, 8]])
    correct, bonus, path = accept_chain(chosen, drafted)
    assert correct.tolist() == [3, 2, 0, 2] and bonus.tolist() == [8, 1, 1, 7]
    assert path.tolist() == [[0, 1, 2, 3], [0, 1, 2, -1], [0, -1, -1, -1], [0, 1, 2, -1]]


def test_in_a_tree_the_path_follows_the_target_from_parent_to_child() -> None:
    #        9 ─┬─ 1 ─┬─ 2 (3)      the same token, 2, follows different parents
    #   (row 0) │ (1) └─ 3 (4)
    #           └─ 2 (2) ── 2 (5)
    tokens, parents = [9, 1, 2, 2, 3, 2], [-1, 0, 0, 1, 1, 2]
    cases = [
        ([7, 0, 0, 0, 0, 0], [0, -1, -1]),  # no child was chosen
        ([1, 3, 0, 0, 8, 0], [0, 1, 4]),
        ([1, 9, 0, 0, 0, 0], [0, 1, -1]),
        ([2, 2, 2, 2, 2, 2], [0, 2, 5]),
        ([1, 2, 0, 2, 0, 2], [0, 1, 3]),  # row 3 has no child 2, though row 2 has
    ]
    chosen = torch.tensor([chosen for chosen, _ in cases])
    correct, bonus, path = in_tree(chosen, torch.tensor(tokens).expand(len(cases), -1), parents, 2)
    assert path.tolist() == [path for _, path in cases]
    assert correct.tolist() == [0, 2, 1, 2, 2] and bonus.tolist() == [7, 8, 9, 2, 2]


def test_random_trees_are_accepted_as_walked() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randperm(12, generator=generator) for _ in range(200)])  # siblings differ
    parents = [-1, 0, 0, 0, 1, 1, 2, 4, 4, 6, 7, 10]
    chosen = torch.randint(12, (200, 12), generator=generator)
    chosen[:, 0], chosen[::2, 4] = tokens[:, 1], tokens[::2, 7]
    chosen[:, 1] = tokens[:, 4]
    correct, bonus, path = in_tree(chosen, tokens, parents, 5)
    expected = [walk(*rows, parents) for rows in zip(chosen.tolist(), tokens.tolist(), strict=True)]
    assert path.tolist() == [rows + [-1] * (6 - len(rows)) for rows in expected]
    assert correct.tolist() == [len(rows) - 1 for rows in expected] and {1, 2, 3} & set(correct.tolist())
    assert bonus.tolist() == [chosen[i, rows[-1]].item() for i, rows in enumerate(expected)]


def test_rejection_sampling_yields_the_targets_distribution_exactly() -> None:
    """By enumeration of every draft, coin and draw of the replacement, on grids fine enough for these probabilities
    (multiples of 1/8, residuals of 1/4 and 1/2)."""
    p1, q1 = torch.tensor([4, 2, 1, 1]) / 8, torch.tensor([1, 1, 2, 4]) / 8
    p2 = torch.tensor([[1, 1, 1, 5], [2, 2, 2, 2], [0, 4, 4, 0], [6, 0, 2, 0]]) / 8  # after each first token
    q2 = torch.tensor([[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [4, 2, 2, 0]]) / 8
    p3 = torch.tensor([1, 3, 0, 4]) / 8  # after two accepted drafts
    numbers = torch.cartesian_prod(*((torch.arange(count) + 0.5) / count for count in (8, 8, 24)))
    size = len(numbers)
    first, second = torch.zeros(V), torch.zeros(V, V)
    for x1, x2 in product(range(V), range(V)):
        weight = float(q1[x1] * q2[x1, x2]) / size
        if weight == 0.0:
            continue
        correct, bonus, _ = reject_chain(
            torch.stack([p1, p2[x1], p3]).log().expand(size, 3, V),
            torch.tensor([x1, x2]).expand(size, 2),
            torch.stack([q1, q2[x1]]).expand(size, 2, V),
            Temperatures.of([1.0] * size, "cpu"),
            Drawn(numbers),
        )
        none, once, twice = (bonus[correct == c] for c in range(3))
        first += weight * torch.bincount(none, minlength=V)
        first[x1] += weight * (len(once) + len(twice))
        second[x1] += weight * torch.bincount(once, minlength=V)
        second[x1, x2] += weight * len(twice)
        torch.testing.assert_close(torch.bincount(twice, minlength=V) / max(1, len(twice)), p3 * bool(len(twice)))
    torch.testing.assert_close(first, p1)
    accepted = second.sum(-1, keepdim=True)  # P(first token is an accepted draft) = min(p, q)
    torch.testing.assert_close(accepted[:, 0], torch.minimum(p1, q1))
    torch.testing.assert_close(second / accepted, p2)


def test_greedy_rows_accept_the_targets_best_token_only_among_sampled_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(400, 4, 6, generator=generator)
    temperatures = Temperatures.of([0.0, 1.0] * 200, "cpu")
    best = logits.argmax(-1)
    drafted = best[:, :3].clone()
    wrong = torch.rand(400, 3, generator=generator) < 0.3
    drafted[wrong] = (drafted[wrong] + 1) % 6
    proposals = torch.nn.functional.one_hot(drafted, 6).float()  # as sampled rows have if q is certain
    mixed = reject_chain(logits, drafted, proposals, temperatures, generator)
    expected = accept_chain(best, drafted)
    for got, want in zip(mixed, expected, strict=True):
        assert torch.equal(got[::2], want[::2])
    assert not torch.equal(mixed.bonus[1::2], expected.bonus[1::2])  # the others are sampled
    greedy = reject_chain(logits, drafted, proposals, Temperatures.of([0.0] * 400, "cpu"), generator)
    assert all(torch.equal(got, want) for got, want in zip(greedy, expected, strict=True))


def test_drafts_are_accepted_if_sampled_from_p_and_rejected_if_impossible_under_p() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, temperatures = torch.randn(500, 3, 5, generator=generator), Temperatures.of([0.7] * 500, "cpu")
    p = distribution(logits, temperatures)
    drafted = torch.multinomial(p[:, :2].flatten(0, 1), 1, generator=generator).view(500, 2)
    assert reject_chain(logits, drafted, p[:, :2], temperatures, generator).correct_drafts.eq(2).all()
    logits = torch.tensor([0.0, 0.0, -1e9, -1e9]).expand(500, 3, 4)
    q = torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(500, 2, 4)
    drafted = torch.randint(2, 4, (500, 2), generator=generator)
    correct, bonus, path = reject_chain(logits, drafted, q, temperatures, generator)
    assert correct.eq(0).all() and set(bonus.tolist()) == {0, 1} and path.tolist() == [[0, -1, -1]] * 500
