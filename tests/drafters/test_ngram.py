"""Prompt lookup finds what followed: exactness alone would hide a draft that is always wrong."""

import random
from itertools import pairwise

import pytest
import torch
from toys import tiny_target

from decoding.round import Seen
from decoding.sampling import Sampling
from drafters.ngram import Ngram, joined


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


@pytest.mark.parametrize(
    ("occurrence", "continuation", "due"),
    [
        ("last", "partial", [6, 1, 2]),
        ("last", "full", [5, 1, 2, 6]),
        ("first", "partial", [3, 1, 2, 4]),
        ("first", "full", [3, 1, 2, 4]),
    ],
)
def test_which_occurrence_counts_and_how_much_must_follow_it(occurrence, continuation, due):
    text = [1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2, 6, 1, 2]
    drafter = Ngram(longest=2, draft_length=4, occurrence=occurrence, continuation=continuation)
    assert drafts(drafter, [text]) == [[due]]


def searched(text: list[int], longest: int, length: int, first: bool, full: bool) -> list[int]:
    """The draft by brute force."""
    for n in range(min(longest, len(text)), 0, -1):
        ends = [e for e in range(n, len(text)) if text[e - n : e] == text[-n:]]
        ends = [e for e in ends if not full or len(text) - e >= length]
        if ends:
            end = ends[0] if first else ends[-1]
            return text[end : end + length]
    return []


@pytest.mark.parametrize("occurrence", ["first", "last"])
@pytest.mark.parametrize("continuation", ["full", "partial"])
def test_it_agrees_with_brute_force(occurrence, continuation):
    """Random texts over few tokens, committed in random blocks."""
    rng = random.Random(5)
    for _ in range(25):
        longest, length = rng.randint(1, 4), rng.randint(1, 5)
        text = [rng.randrange(4) for _ in range(30)]
        cuts = [0, *sorted(rng.sample(range(1, 30), 8)), 30]
        blocks = [[text[a:b]] for a, b in pairwise(cuts)]
        drafter = Ngram(
            longest=longest,
            draft_length=length,
            occurrence=occurrence,
            continuation=continuation,
        )
        how = (longest, length, occurrence == "first", continuation == "full")
        due = [[searched(text[:b], *how)] for b in cuts[1:]]
        assert drafts(drafter, *blocks) == due


def test_wrong_choices_are_named():
    with pytest.raises(ValueError, match="occurrence 'newest'; it must be first or last"):
        Ngram(occurrence="newest")
    with pytest.raises(ValueError, match="continuation 'whole'; it must be full or partial"):
        Ngram(continuation="whole")


def test_guesses_of_all_rows_become_one_draft():
    chains = joined([([4, 5], [-1, 0]), ([], []), ([6], [-1])], torch.device("cpu"))
    assert chains.is_chain
    assert (chains.ids_BN.tolist(), chains.size) == ([[4, 5], [0, 0], [6, 0]], [2, 0, 1])
    trees = joined([([4, 5, 6], [-1, -1, 1]), ([7], [-1])], torch.device("cpu"))
    assert not trees.is_chain
    assert trees.parents_BN.tolist() == [[-1, -1, 1], [-1, -1, -1]]
    nothing = joined([([], []), ([], [])], torch.device("cpu"))
    assert (nothing.is_chain, nothing.ids_BN.shape, nothing.size) == (True, (2, 0), [0, 0])
