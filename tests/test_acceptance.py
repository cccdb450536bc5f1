from itertools import product

import pytest
import torch
from torch import Tensor

from specrl.decoding.sampling import Temperatures, distribution
from specrl.decoding.verify import accept_chain, accept_tree, reject_chain

V = 4


def test_a_chain_stands_as_far_as_the_target_chose_it() -> None:
    drafted = torch.tensor([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 6, 7]])
    chosen = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 8], [5, 1, 7, 8], [1, 6, 7, 8]])
    correct, bonus = accept_chain(chosen, drafted)
    assert correct.tolist() == [3, 2, 1, 0] and bonus.tolist() == [8, 1, 1, 1]


def test_in_a_tree_the_walk_follows_the_target_from_parent_to_child() -> None:
    #        9 ─┬─ 1 ─┬─ 2 (3)      the same token, 2, follows different parents
    #   (row 0) │ (1) └─ 3 (4)
    #           └─ 2 (2) ── 2 (5)
    tokens, parents = [9, 1, 2, 2, 3, 2], [-1, 0, 0, 1, 1, 2]
    cases = [
        ([7, 0, 0, 0, 0, 0], [0]),  # no child was chosen
        ([1, 3, 0, 0, 8, 0], [0, 1, 4]),
        ([1, 9, 0, 0, 0, 0], [0, 1]),
        ([2, 2, 2, 2, 2, 2], [0, 2, 5]),
        ([1, 2, 0, 2, 0, 2], [0, 1, 3]),  # row 3 has no child 2, though row 2 has
    ]
    paths = accept_tree([chosen for chosen, _ in cases], [tokens] * len(cases), [parents] * len(cases))
    assert paths == [path for _, path in cases]


def test_a_tree_without_branches_is_a_chain() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 2, (40, 4), generator=generator)
    drafted = torch.randint(0, 2, (40, 3), generator=generator)
    nodes = torch.cat([torch.zeros(40, 1, dtype=torch.int64), drafted], 1).tolist()
    paths = accept_tree(chosen.tolist(), nodes, [[-1, 0, 1, 2]] * 40)
    assert [len(path) - 1 for path in paths] == accept_chain(chosen, drafted).correct.tolist()


def grid(*counts: int) -> Tensor:
    """Every combination of the middles of `count` equal intervals of [0, 1): [prod(counts), len(counts)]."""
    axes = [(torch.arange(count) + 0.5) / count for count in counts]
    return torch.cartesian_prod(*axes)


def test_rejection_sampling_yields_the_targets_distribution_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """By enumeration, without chance: every draft, every coin and every draw of the replacement, on grids fine enough
    for these probabilities (multiples of 1/8, residuals of 1/4 and 1/2)."""
    p1, q1 = torch.tensor([4, 2, 1, 1]) / 8, torch.tensor([1, 1, 2, 4]) / 8
    p2 = torch.tensor([[1, 1, 1, 5], [2, 2, 2, 2], [0, 4, 4, 0], [6, 0, 2, 0]]) / 8  # after each first token
    q2 = torch.tensor([[2, 2, 2, 2], [2, 2, 2, 2], [2, 2, 2, 2], [4, 2, 2, 0]]) / 8
    p3 = torch.tensor([1, 3, 0, 4]) / 8  # after two accepted drafts
    chance = grid(8, 8, 24)
    size = len(chance)
    first, second = torch.zeros(V), torch.zeros(V, V)
    for x1, x2 in product(range(V), range(V)):
        weight = float(q1[x1] * q2[x1, x2]) / size
        if weight == 0.0:
            continue
        rolls = iter([chance[:, :2], chance[:, 2:]])
        monkeypatch.setattr(torch, "rand", lambda *_, rolls=rolls, **__: next(rolls))
        correct, bonus = reject_chain(
            torch.stack([p1, p2[x1], p3]).log().expand(size, 3, V),
            torch.tensor([x1, x2]).expand(size, 2),
            torch.stack([q1, q2[x1]]).expand(size, 2, V),
            Temperatures.of([1.0] * size, "cpu"),
            torch.Generator(),
        )
        fell, once, twice = (bonus[correct == c] for c in range(3))
        first += weight * torch.bincount(fell, minlength=V)
        first[x1] += weight * (len(once) + len(twice))
        second[x1] += weight * torch.bincount(once, minlength=V)
        second[x1, x2] += weight * len(twice)
        torch.testing.assert_close(torch.bincount(twice, minlength=V) / max(1, len(twice)), p3 * bool(len(twice)))
    torch.testing.assert_close(first, p1)
    accepted = second.sum(-1, keepdim=True)  # P(first token is an accepted draft) = min(p, q)
    torch.testing.assert_close(accepted[:, 0], torch.minimum(p1, q1))
    torch.testing.assert_close(second / accepted, p2)


def test_greedy_rows_accept_the_targets_best_token_only_whoever_shares_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(400, 4, 6, generator=generator)
    temperatures = Temperatures.of([0.0, 1.0] * 200, "cpu")
    best = logits.argmax(-1)
    drafted = best[:, :3].clone()
    wrong = torch.rand(400, 3, generator=generator) < 0.3
    drafted[wrong] = (drafted[wrong] + 1) % 6
    proposals = torch.nn.functional.one_hot(drafted, 6).float()  # as sampled rows have where q is certain
    mixed = reject_chain(logits, drafted, proposals, temperatures, generator)
    wanted = accept_chain(best, drafted)
    for got, want in zip(mixed, wanted, strict=True):
        assert torch.equal(got[::2], want[::2])
    assert not torch.equal(mixed.bonus[1::2], wanted.bonus[1::2])  # the others are sampled
    greedy = reject_chain(logits, drafted, proposals, Temperatures.of([0.0] * 400, "cpu"), generator)
    assert all(torch.equal(got, want) for got, want in zip(greedy, wanted, strict=True))


def test_drafts_from_the_target_itself_always_stand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, heat = torch.randn(500, 3, 5, generator=generator), Temperatures.of([0.7] * 500, "cpu")
    p = distribution(logits, heat)
    drafted = torch.multinomial(p[:, :2].flatten(0, 1), 1, generator=generator).view(500, 2)
    assert reject_chain(logits, drafted, p[:, :2], heat, generator).correct.eq(2).all()


def test_drafts_that_the_target_never_says_always_fall() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.0, 0.0, -1e9, -1e9]).expand(300, 3, 4)
    q = torch.tensor([0.0, 0.0, 0.5, 0.5]).expand(300, 2, 4)
    drafted = torch.randint(2, 4, (300, 2), generator=generator)
    correct, bonus = reject_chain(logits, drafted, q, Temperatures.of([1.0] * 300, "cpu"), generator)
    assert correct.eq(0).all() and set(bonus.tolist()) == {0, 1}
