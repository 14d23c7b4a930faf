"""What passes between the parts of one round: propose -> score -> verify -> keep.

Shapes: B batch, S newly committed tokens, N drafted nodes, M = N + 1 (root first), K longest path,
D target width, L tapped layers, V vocabulary. p is the target's law, q the drafter's.
The root is the last committed token; neither model has read it when a round begins.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from decoding.tree import depths

Law = Literal["one_hot", "iid", "without_replacement"]


@dataclass
class Draft:
    """A tree of guesses for each row.

    parents_BN: -1 is the root; parents stand before children, siblings in draw order. Nodes past
    `size[b]` do not exist (0: no draft in this row). Row m of q_BMV is the law that the children
    of node m were drawn from (row 0: the root's); rows of nodes without children may be absent.
    `law` says how: "one_hot" (independent of the verifier's randomness given the prefix), "iid"
    or "without_replacement" draws from q.
    """

    ids_BN: Tensor
    parents_BN: Tensor
    size: list[int]
    law: Law = "one_hot"
    q_BMV: Tensor | None = None
    is_chain: bool = False

    @classmethod
    def chain(
        cls, ids_BN: Tensor, size: list[int], law: Law = "one_hot", q_BMV: Tensor | None = None
    ) -> "Draft":
        """The tree -1, 0, 1, ...: each token follows the one before it."""
        B, N = ids_BN.shape
        parents_BN = torch.arange(-1, N - 1).expand(B, N)
        return cls(ids_BN, parents_BN, size, law, q_BMV, is_chain=True)

    def depth(self) -> list[int]:
        """Each row's longest path."""
        if self.is_chain:
            return list(self.size)
        depth_BM = depths(self.parents_BN)
        pairs = zip(depth_BM.tolist(), self.size, strict=True)
        return [max(row[: n + 1]) for row, n in pairs]

    @classmethod
    def empty(cls, rows: int, device: torch.device | str = "cpu") -> "Draft":
        """No draft in any row: a round of plain autoregressive decoding."""
        return cls.chain(torch.zeros(rows, 0, dtype=torch.long, device=device), [0] * rows)


@dataclass
class Scored:
    """The target's view of the root and every node, rejected ones too. Row 0 is the root."""

    logits_BMV: Tensor
    hidden_BMD: Tensor
    taps_BMLD: Tensor | None = None


@dataclass
class Verdict:
    """path[b]: the accepted nodes, root side first; next[b]: the target's own token after them."""

    path: list[list[int]]
    next: list[int]


@dataclass
class Seen:
    """Newly committed tokens, each with the target state that predicted it.

    ids_BS is padded on the right; row b holds count[b] tokens. `length` is each row's committed
    length with these tokens in it. hidden_BSD[b, s] is the state before token s; row 0 of a
    prefill has no such state (zeros; read only where the prompt is one token). `draft` and
    `scored` are the last round's, None after prefill.
    """

    ids_BS: Tensor
    count: list[int]
    length: list[int]
    hidden_BSD: Tensor
    taps_BSLD: Tensor | None = None
    draft: Draft | None = None
    scored: Scored | None = None

    def select(self, rows: list[int]) -> "Seen":
        """The same, for some of the rows (`draft` and `scored` go: they belong to whole rounds)."""
        index = torch.tensor(rows, device=self.ids_BS.device)
        return Seen(
            self.ids_BS[index],
            [self.count[r] for r in rows],
            [self.length[r] for r in rows],
            self.hidden_BSD[index],
            None if self.taps_BSLD is None else self.taps_BSLD[index],
        )
