import pytest
import torch
from torch import Tensor

from specrl.decoding.sampling import Drawn, Temperatures, argmax, choose, distribution, sample


def temperatures(*values: float) -> Temperatures:
    return Temperatures.of(list(values), "cpu")


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_row_has_its_own_temperature_and_0_is_one_hot() -> None:
    x = logits(3, 4, 7)
    p = distribution(x, temperatures(0.0, 0.5, 2.0))
    assert torch.equal(p[0], torch.nn.functional.one_hot(x[0].argmax(-1), 7).float())
    torch.testing.assert_close(p[1], torch.softmax(x[1] / 0.5, -1))
    torch.testing.assert_close(p[2], torch.softmax(x[2] / 2.0, -1))


def test_greedy_rows_choose_the_best_token_and_the_first_of_equals() -> None:
    x = torch.tensor([[0.0, 3.0, 3.0, 1.0]]).expand(50, 4)
    generator = torch.Generator().manual_seed(0)
    assert argmax(x).eq(1).all() and choose(x, temperatures(*[0.0] * 50), generator).eq(1).all()
    mixed = choose(x, temperatures(*[0.0, 1.0] * 25), generator)
    assert mixed[::2].eq(1).all() and mixed[1::2].unique().numel() > 1


def test_greedy_choice_leaves_the_generator_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    choose(logits(2, 3, 5), temperatures(0.0, 0.0), generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-8])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    x = logits(1, 9)
    for values in ((temperature,), (temperature, 1.0), (temperature, 0.0)):
        rows = x.expand(len(values), 9)
        assert choose(rows, temperatures(*values), torch.Generator().manual_seed(0))[0] == x.argmax()


def test_samples_follow_their_weights() -> None:
    """200,000 draws; odds of failing falsely below 1e-6 (five standard deviations for each of four weights)."""
    weights = torch.tensor([3.0, 0.0, 1.0, 0.5, 0.0, 0.5])  # any positive total
    draws = sample(weights.expand(200_000, 6), torch.Generator().manual_seed(0))
    p = weights / weights.sum()
    shares = torch.bincount(draws, minlength=6) / 200_000
    assert ((shares - p).abs() <= 5.0 * (p * (1 - p) / 200_000).sqrt()).all()
    assert shares[1] == shares[4] == 0.0


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-24])
def test_no_uniform_number_draws_a_weight_of_0(uniform: float) -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 1e-30, 0.0, 2e-30], [0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 0.0, 5.0]])
    drawn = sample(weights, Drawn(torch.full((4, 1), uniform)))
    assert (weights.gather(-1, drawn[:, None]) > 0).all()


def test_samples_keep_the_leading_shape_and_follow_the_generator() -> None:
    p = distribution(logits(2, 3, 5), temperatures(1.0, 0.0))
    one, again, other = (sample(p, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.shape == (2, 3) and one.dtype == torch.int64
    assert torch.equal(one, again) and torch.equal(one[1], p[1].argmax(-1)) and torch.equal(other[1], one[1])
