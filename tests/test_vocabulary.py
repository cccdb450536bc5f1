import math

import pytest
import torch

from specrl.training.vocabulary import coverage, top_tokens

COUNTS = torch.tensor([0, 1, 3, 0, 0, 1, 0, 4, 0, 1])  # of token ids 0 to 9


def test_the_most_frequent_tokens_and_their_coverage() -> None:
    ids = top_tokens(COUNTS, 3)
    assert ids.tolist() == [1, 2, 7]  # of the equals 1, 5 and 9 the lowest
    assert coverage(ids, COUNTS) == 0.8
    assert math.isnan(coverage(ids, torch.zeros(10, dtype=torch.int64)))
    assert top_tokens(COUNTS, 7).tolist() == [0, 1, 2, 3, 5, 7, 9]  # more than occur


def test_a_vocabulary_out_of_range_is_refused() -> None:
    for size in (0, 11):
        with pytest.raises(ValueError, match="draft.vocab_size must be"):
            top_tokens(COUNTS, size)
    with pytest.raises(ValueError, match="needs counted tokens"):
        top_tokens(torch.zeros(10, dtype=torch.int64), 3)
