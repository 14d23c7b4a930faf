"""Constraints on q: a drafter that is asked level by level does not guess what is forbidden.

Every tree of drafters/trees.py asks through a `Growth`, so this one place masks all of them.

Shapes: B batch, W nodes of a level, V vocabulary.
"""

from torch import Tensor

from decoding.constraint import allowed
from decoding.sampling import Path
from drafters.trees import Growth


def confined(growth: Growth) -> Growth:
    """The same questions, answered with -inf where a request's constraint forbids a token."""
    return Confined(growth) if growth.dice.sampling.matchers else growth


class Confined:
    """A growth under constraints. Remembers the path of each node that it was asked about."""

    def __init__(self, growth: Growth) -> None:
        self.growth, self.dice = growth, growth.dice
        self.paths: list[list[Path]] = [[()] for _ in growth.dice.requests]

    def begin(self) -> Tensor:
        return allowed(self.growth.begin()[:, None], self.paths, self.dice)[:, 0]

    def deepen(self, ids_BW: Tensor, parents_BW: Tensor, depth: int) -> Tensor:
        level: list[list[Path]] = []
        for known, ids, parents in zip(
            self.paths, ids_BW.tolist(), parents_BW.tolist(), strict=True
        ):
            level.append([(*known[p], token) for token, p in zip(ids, parents, strict=True)])
            known += level[-1]
        return allowed(self.growth.deepen(ids_BW, parents_BW, depth), level, self.dice)
