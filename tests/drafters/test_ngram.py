"""Prompt lookup finds what followed: exactness alone would hide a draft that is always wrong."""

import torch
from toys import tiny_target

from decoding.round import Seen
from decoding.sampling import Sampling
from drafters.ngram import Ngram


def drafts(drafter: Ngram, *rounds: list[list[int]]) -> list[list[list[int]]]:
    """What it drafts after each round of newly committed tokens (one list a row)."""
    target = tiny_target(layers=1)
    state = drafter.start(
        target, target.new_cache(1, 1), Sampling(), list(range(len(rounds[0]))), 99
    )
    out, length = [], [0] * len(rounds[0])
    for new in rounds:
        count = [len(ids) for ids in new]
        length = [n + c for n, c in zip(length, count, strict=True)]
        padded = [ids + [63] * (max(count) - len(ids)) for ids in new]
        seen = Seen(torch.tensor(padded), count, list(length), torch.zeros(len(new), max(count), 1))
        draft = drafter.propose(state, seen, target)
        assert draft.law == "one_hot"
        pairs = zip(draft.ids_BN.tolist(), draft.size, strict=True)
        out.append([ids[:size] for ids, size in pairs])
    return out


def test_the_draft_is_what_followed_the_last_occurrence():
    drafter = Ngram(longest=2, draft_length=3)
    prompt = [1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 1, 2]
    assert drafts(drafter, [prompt]) == [[[6, 7, 8]]]
    # the longer match wins over the more recent shorter one; what is committed later counts too
    assert drafts(drafter, [[1, 2, 3, 9, 2, 7, 1]], [[2]], [[3, 1]]) == [
        [[2, 3, 9]],
        [[3, 9, 2]],
        [[2, 3, 1]],
    ]


def test_rows_without_a_match_draft_nothing():
    drafter = Ngram(longest=3, draft_length=4)
    assert drafts(drafter, [[1, 2, 3], [5, 5], [7]]) == [[[], [5], []]]
    assert drafts(drafter, [[1, 2, 3]]) == [[[]]]
