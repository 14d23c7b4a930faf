"""Trees grown over a lookup table, and a notebook for trees.

Shapes: B batch, n nodes asked about, W nodes of a level, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoding.round import Draft, Seen
from decoding.sampling import Dice, Sampling
from decoding.target import Target
from drafters.trees import Growth, Tree

Path = tuple[int, ...]


def after(table_VV: Tensor, root: int, path: Sequence[int]) -> Tensor:
    """The test drafter's logits behind a path. All of the path counts, so that a node that is asked
    about under a wrong parent's number gets another law."""
    said_V = table_VV[root]
    for token in path:
        said_V = table_VV[token] + 0.3 * said_V
    return said_V


@dataclass
class Lookup:
    """`after`, as trees ask for it."""

    table_VV: Tensor
    root_B: Tensor
    dice: Dice

    def begin(self) -> Tensor:
        self.said_BnV = self.table_VV[self.root_B][:, None]
        return self.said_BnV[:, 0]

    def deepen(self, ids_BW: Tensor, parents_BW: Tensor, depth: int) -> Tensor:
        index = parents_BW[..., None].expand(-1, -1, len(self.table_VV))
        said_BWV = self.table_VV[ids_BW] + 0.3 * self.said_BnV.gather(1, index)
        self.said_BnV = torch.cat([self.said_BnV, said_BWV], dim=1)
        return said_BWV


class Grower:
    """A drafter that grows a tree over a table; its own state."""

    taps = ()

    def __init__(self, tree: Tree, table_VV: Tensor) -> None:
        self.tree, self.table, self.draft_length = tree, table_VV, tree.nodes

    def start(self, target, cache, sampling, requests, max_len) -> "Grower":
        self.sampling, self.requests = sampling, list(requests)
        return self

    def select(self, rows: list[int]) -> None:
        self.requests = [self.requests[r] for r in rows]

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        root_B = seen.ids_BS[torch.arange(len(seen.count)), torch.tensor(seen.count) - 1]
        dice = Dice(self.sampling, self.requests, seen.length)
        return self.tree.grow(Lookup(self.table, root_B, dice))


def grown(tree: Tree, table_VV: Tensor, roots: list[int]) -> Draft:
    """One sampled round for requests 0, 1, ... with these last tokens."""
    dice = Dice(Sampling(temperature=1.0), list(range(len(roots))), [1] * len(roots))
    return tree.grow(Lookup(table_VV, torch.tensor(roots), dice))


def paths(draft: Draft, b: int) -> list[Path]:
    """Each node's tokens from the root down; a parent that stands behind its child is an error."""
    found: list[Path] = []
    for token, parent in zip(draft.ids_BN[b].tolist(), draft.parents_BN[b].tolist(), strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found[: draft.size[b]]


class Noting(Tree):
    """Another tree with a notebook: the dice and the draft of each round."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.depth, self.nodes = tree, tree.depth, tree.nodes
        self.rounds: list[tuple[Dice, Draft]] = []

    def grow(self, growth: Growth) -> Draft:
        self.rounds.append((growth.dice, self.tree.grow(growth)))
        return self.rounds[-1][1]
