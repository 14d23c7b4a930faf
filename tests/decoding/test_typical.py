"""Typical acceptance by hand.

Shapes: M root and nodes, V vocabulary.
"""

import math

import pytest
import torch
from torch import Tensor

from decoding.round import Draft, Scored, Verdict
from decoding.sampling import Dice, Sampling
from decoding.verify import OneHot, Rule, Typical


def verdict(
    law_MV: Tensor, ids: list[int], parents: list[int], rule: Rule, sampling: Sampling
) -> Verdict:
    """What one row's tree of guesses becomes under these laws of the target."""
    draft = Draft(torch.tensor([ids]), torch.tensor([parents]), [len(ids)])
    scored = Scored(law_MV.log()[None], torch.zeros(1, len(law_MV), 1))
    return rule(scored, draft, Dice(sampling, [0], [1]))


def typical(law_MV: Tensor, ids: list[int], parents: list[int]) -> Verdict:
    return verdict(law_MV, ids, parents, Typical(), Sampling(temperature=1.0))


SPREAD = [0.3, *[0.05] * 13, 0.02, 0.03]


@pytest.mark.parametrize(
    ("law", "token", "stands"),
    [
        ([0.85, 0.15], 1, True),  # above epsilon; delta exp(-H) is 0.20
        ([0.93, 0.07], 1, False),
        (SPREAD, 1, True),  # below epsilon; delta exp(-H) is 0.026
        (SPREAD, 14, False),
    ],
)
def test_a_token_stands_above_the_smaller_of_two_floors(law, token, stands):
    entropy = -sum(p * math.log(p) for p in law)
    assert (law[token] > min(0.09, 0.3 * math.exp(-entropy))) == stands
    found = typical(torch.tensor([law, law]), [token], [-1])
    assert (found.path, found.next) == ([[0]] if stands else [[]], [0])


def laws(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


FLAT = [0.25] * 4
LAST = [0.1, 0.1, 0.2, 0.6]


@pytest.mark.parametrize(
    ("ids", "parents", "law", "path", "following"),
    [
        # two tokens of 0.2 and 0.15 before one of 0.6
        ([0, 1, 2], [-1, -1, 1], laws([0.6, 0.2, 0.1, 0.1], FLAT, [0.7, 0.1, 0.15, 0.05], LAST),
         [1, 2], 3),
        # siblings: the likelier, not the first or the last
        ([1, 0, 2], [-1, -1, -1], laws([0.5, 0.2, 0.3, 0.0], FLAT, LAST, FLAT), [1], 3),
        # paths of two: 0.3 x 0.9 before 0.5 x 0.4
        ([0, 1, 2, 3], [-1, -1, 0, 1],
         laws([0.5, 0.3, 0.1, 0.1], [0.2, 0.2, 0.4, 0.2], [0.04, 0.03, 0.03, 0.9], FLAT, LAST),
         [1, 3], 3),
        # 0.3 x 0.9 after 0.5 x 0.6
        ([0, 1, 2, 3], [-1, -1, 0, 1],
         laws([0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.04, 0.03, 0.03, 0.9], LAST, FLAT),
         [0, 2], 3),
        # nothing stands below a token that does not
        ([3, 2], [-1, 0], laws([0.9, 0.05, 0.04, 0.01], LAST, LAST), [], 0),
    ],
    ids=["longest", "likelier sibling", "likelier end", "likelier start", "below a rejected one"],
)  # fmt: skip
def test_the_longest_path_wins_and_of_equals_the_likelier(ids, parents, law, path, following):
    found = typical(law, ids, parents)
    assert (found.path, found.next) == ([path], [following])


def test_at_temperature_0_it_is_greedy_verification():
    generator, lengths = torch.Generator().manual_seed(0), set()
    for _ in range(200):
        law_MV = torch.rand(7, 3, generator=generator)
        ids = torch.randint(3, (6,), generator=generator).tolist()
        parents = [int(torch.randint(-1, n, (1,), generator=generator)) for n in range(6)]
        found, due = (verdict(law_MV, ids, parents, r, Sampling()) for r in (Typical(), OneHot()))
        assert (found.path, found.next) == (due.path, due.next)
        lengths.add(len(due.path[0]))
    assert lengths >= {0, 1, 2, 3}
