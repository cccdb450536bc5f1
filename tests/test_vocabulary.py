import math

import pytest
import torch
from tiny import AUX_LAYERS, tiny_target

from specrl.models.draft import new_draft
from specrl.training.vocabulary import coverage, top_tokens

COUNTS = torch.tensor([0, 1, 3, 0, 0, 1, 0, 4, 0, 1])  # of token ids 0 to 9


def test_the_most_frequent_tokens_ascending_with_what_they_cover() -> None:
    ids = top_tokens(COUNTS, 3)
    assert ids.tolist() == [1, 2, 7]  # of the equals 1, 5 and 9 the lowest
    assert coverage(ids, COUNTS) == 0.8
    assert coverage(ids, torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 0, 3])) == 0.25
    assert math.isnan(coverage(ids, torch.zeros(10, dtype=torch.int64)))


def test_it_makes_a_draft() -> None:
    ids = top_tokens(COUNTS, 7)  # more than were seen
    assert ids.tolist() == [0, 1, 2, 3, 5, 7, 9] and coverage(ids, COUNTS) == 1.0
    draft = new_draft(tiny_target(), vocabulary=ids, intermediate_size=16, aux_layers=AUX_LAYERS)
    assert draft.target_ids is not None and torch.equal(draft.target_ids, ids)


def test_what_cannot_be_is_refused() -> None:
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"must have 1 to 10 tokens, but got {size}"):
            top_tokens(COUNTS, size)
    with pytest.raises(ValueError, match="needs counted tokens"):
        top_tokens(torch.zeros(10, dtype=torch.int64), 3)
