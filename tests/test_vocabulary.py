import math

import pytest
import torch
from tiny import TAPS, tiny_target

from specrl.agents.sequences import Sequence
from specrl.agents.vocabulary import coverage, token_counts, top_tokens
from specrl.models.draft import new_draft


def said(*tokens: int, prompt: int = 0) -> Sequence:
    count = len(tokens)
    return Sequence(torch.tensor(tokens), torch.zeros(count, 6), torch.zeros(count, 10), 1.0, 0, prompt)


TRAFFIC = [said(7, 7, 7, 2, 2, 9), said(5, 2, 7, 1, prompt=1)]


def test_the_most_frequent_tokens_ascending_with_what_they_cover() -> None:
    counts = token_counts(TRAFFIC, 10)
    assert counts.tolist() == [0, 1, 3, 0, 0, 1, 0, 4, 0, 1]
    found = top_tokens(counts, 3)
    assert found.ids.tolist() == [1, 2, 7]  # of the equals 1, 5 and 9 the lowest
    assert found.coverage == 0.8 and found.seen == 5
    assert coverage(found.ids, token_counts([said(1, 9, 9, 9)], 10)) == 0.25
    assert math.isnan(coverage(found.ids, torch.zeros(10, dtype=torch.int64)))


def test_prompts_may_be_left_out() -> None:
    assert token_counts(TRAFFIC, 10, prompts=False)[5] == 0


def test_it_makes_a_draft() -> None:
    found = top_tokens(token_counts(TRAFFIC, 10), 7)  # more than were seen
    assert found.ids.tolist() == [0, 1, 2, 3, 5, 7, 9] and found.coverage == 1.0
    draft = new_draft(tiny_target(), vocabulary=found.ids, intermediate_size=16, taps=TAPS)
    assert draft.target_ids is not None and torch.equal(draft.target_ids, found.ids)


def test_what_cannot_be_is_refused() -> None:
    counts = token_counts(TRAFFIC, 10)
    for size in (0, 11):
        with pytest.raises(ValueError, match=f"must have 1 to 10 tokens, the target's, but got {size}"):
            top_tokens(counts, size)
    with pytest.raises(ValueError, match="no token was counted"):
        top_tokens(torch.zeros(10, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\), .* but got 1..9"):
        token_counts([said(1, 9)], 5)
