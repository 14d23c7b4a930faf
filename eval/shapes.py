"""The shapes of draft that a measurement tries: chains of several lengths, and trees."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafters.base import Trained
from drafters.trees import tree_of


@dataclass(frozen=True)
class Shape:
    """A chain of `length` tokens, or a tree (drafters/trees.py)."""

    length: int | None = None
    tree: dict[str, Any] | None = None
    tuned: bool = False

    def __str__(self) -> str:
        tree = tree_of(self.tree)
        if self.tree is None or tree is None:
            return f"chain of {self.length}"
        told = {k: v for k, v in self.tree.items() if k not in ("kind", "paths", "depth", "nodes")}
        said = ", ".join(f"{key} {value}" for key, value in told.items())
        kind = f"{'tuned ' if self.tuned else ''}{self.tree['kind']} tree"
        size = f"{tree.nodes} nodes, {tree.depth} deep"
        return f"{kind} of {size}" + (f" ({said})" if said else "")

    def give(self, drafter: Any) -> None:
        """Makes the drafter draft in this shape."""
        if self.length is not None:
            drafter.draft_length = self.length
        drafter.tree = tree_of(self.tree)

    def arguments(self) -> dict[str, Any]:
        """The shape as arguments of a family."""
        return {"draft_length": self.length} if self.tree is None else {"tree": self.tree}


def shapes_of(
    drafter: Trained, lengths: list[int], trees: list[dict[str, Any]], tuned: Path | None
) -> list[Shape]:
    """What this drafter can draft: chains and trees no deeper than it has heads, and the tree that
    a tune_tree stage found for it."""
    deepest = getattr(drafter, "deepest", None)
    lengths = sorted({min(n, deepest or n) for n in lengths})
    found = [Shape(length=n) for n in lengths]
    if tuned is not None:
        tree = json.loads((tuned / "tree.json").read_text(encoding="utf-8"))
        found.append(Shape(tree=tree, tuned=True))
    for tree in trees:
        made = tree_of(tree)
        if made is not None and (deepest is None or made.depth <= deepest):
            found.append(Shape(tree=tree))
    return found
