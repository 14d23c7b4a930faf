"""Token Recycling (Luo et al. 2024): a matrix holds the k likeliest successors of every token, as
the target's own logits last said, and a fixed tree is read off it.

Training-free. Shapes: B batch, S newly committed tokens, N drafted nodes, M = N + 1 (root first),
W nodes of a level, V vocabulary, k successors, n tokens that teach.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter

# The published tree ("2.2.2"): 80 nodes in levels of 8, 21, 25, 15, 8 and 3. Each number is how
# many children a node has; they are its likeliest successors.
TEMPLATE = [
    [8],
    [8, 4, 3, 2, 1, 1, 1, 1],
    [8, 3, 2, 1, 1, 1, 1, 1, 2, 1, 0, 0, 1, 0, 0, 1, 0, 1, 1, 0, 0],
    [5, 2, 1, 1, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0],
    [3, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0],
    [2, 0, 0, 1, 0, 0, 0, 0],
]
PROMPT_CHUNK = 256  # tokens of a prompt whose logits exist at once


@dataclass
class RecyclingState:
    """The token that each row's last draft grew from; None before the first."""

    root_B: Tensor | None = None

    def select(self, rows: list[int]) -> None:
        if self.root_B is not None:
            self.root_B = self.root_B[torch.tensor(rows, device=self.root_B.device)]


class TokenRecycling(Drafter):
    """Drafts the tree whose nodes have `children[level][node]` children each (None: the published
    tree), filled from memory_Vk.

    Every scored node teaches, rejected ones too; of two that teach the same token the later in
    breadth-first order wins, and of rows the later. The memory is shared by all requests.

    Two departures. `prefill`: the prompt teaches too (the published code discards its logits); this
    costs the target's head over the prompt. And a token without a known successor has no children
    here, where the published matrix starts as zeros and drafts token 0: a cold tree is small.
    """

    remembers = True

    def __init__(
        self, *, k: int = 8, children: list[list[int]] | None = None, prefill: bool = True
    ) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"token_recycling has k {k}; it must be at least 1")
        self.k, self.prefill = k, prefill
        self.levels = _levels(_narrowed(TEMPLATE, k) if children is None else children, k)
        self.memory_Vk: Tensor | None = None  # -1: not known yet

    def forget(self) -> None:
        self.memory_Vk = None

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> RecyclingState:
        V = target.shape.vocab_size
        if self.k > V:
            raise ValueError(
                f"token_recycling has k {self.k}, but {target.name} has {V} tokens; lower k"
            )
        if self.memory_Vk is None or len(self.memory_Vk) != V:
            self.memory_Vk = torch.full((V, self.k), -1, device=target.device)
        return RecyclingState()

    def propose(self, state: RecyclingState, seen: Seen, target: Target) -> Draft:
        if seen.draft is not None and seen.scored is not None and state.root_B is not None:
            self._learn_round(state.root_B, seen.draft, seen.scored.logits_BMV)
        elif state.root_B is None and self.prefill:
            self._learn_prompts(seen, target)
        last_B = torch.tensor(seen.count, device=seen.ids_BS.device) - 1
        state.root_B = seen.ids_BS.gather(1, last_B[:, None])[:, 0]
        return self._grow(state.root_B)

    def _learn_round(self, root_B: Tensor, draft: Draft, logits_BMV: Tensor) -> None:
        """Root and nodes of every row, by the logits behind each."""
        ids_BM = torch.cat([root_B[:, None], draft.ids_BN], dim=1)
        size_B1 = torch.tensor(draft.size, device=ids_BM.device)[:, None]
        real_BM = torch.arange(ids_BM.shape[1], device=ids_BM.device) <= size_B1
        self._learn(ids_BM[real_BM], logits_BMV[real_BM])

    def _learn_prompts(self, seen: Seen, target: Target) -> None:
        """Every token of a prompt but its last, by the state before the next one."""
        for ids_S, hidden_SD, count in zip(seen.ids_BS, seen.hidden_BSD, seen.count, strict=True):
            for begin in range(0, count - 1, PROMPT_CHUNK):
                end = min(begin + PROMPT_CHUNK, count - 1)
                self._learn(ids_S[begin:end], target.logits(hidden_SD[begin + 1 : end + 1]))

    def _learn(self, ids_n: Tensor, logits_nV: Tensor) -> None:
        """The last of equal ids wins: a scatter alone leaves open which."""
        assert self.memory_Vk is not None, "start comes first"
        latest = {token: n for n, token in enumerate(ids_n.tolist())}
        index = torch.tensor(list(latest.values()), device=ids_n.device)
        self.memory_Vk[ids_n[index]] = logits_nV[index].topk(self.k, dim=-1).indices

    def _grow(self, root_B: Tensor) -> Draft:
        """The tree under each root, [B, N], without what the memory does not know."""
        assert self.memory_Vk is not None, "start comes first"
        level_BW = root_B[:, None]
        ids, parents, first = [], [], -1  # number of the level's first node
        for above_W, rank_W in self.levels:
            parents.append(first + above_W)
            first += level_BW.shape[1]
            asked_BW = level_BW[:, above_W]
            found_BW = self.memory_Vk[asked_BW.clamp(min=0), rank_W.to(root_B.device)]
            level_BW = torch.where(asked_BW < 0, -1, found_BW)
            ids.append(level_BW)
        ids_BN = torch.cat(ids, dim=1)
        return _compact(ids_BN, torch.cat(parents).to(root_B.device).expand_as(ids_BN))


def _levels(children: Any, k: int) -> list[tuple[Tensor, Tensor]]:
    """For each level: the place of every node's parent in the level above, and its rank there."""
    levels, above = [], 1
    for n, counts in enumerate(children):
        if len(counts) != above or min(counts) < 0 or not 1 <= max(counts) <= k:
            raise ValueError(
                f"children[{n}] of token_recycling is {list(counts)}; it must list how many "
                f"children, from 0 to k = {k} and not all 0, each of the {above} nodes above has"
            )
        places = [(place, rank) for place, count in enumerate(counts) for rank in range(count)]
        above_W, rank_W = torch.tensor(places).T
        levels.append((above_W, rank_W))
        above = len(places)
    if not levels:
        raise ValueError("token_recycling has no children; give each level of the tree a list")
    return levels


def _narrowed(children: list[list[int]], k: int) -> list[list[int]]:
    """The same tree without what stands under a rank of k or more."""
    kept, out = [True], []
    for counts in children:
        fewer = [min(count, k) for count, on in zip(counts, kept, strict=True) if on]
        out.append(fewer)
        pairs = [
            (on, rank) for count, on in zip(counts, kept, strict=True) for rank in range(count)
        ]
        kept = [on and rank < k for on, rank in pairs]
    return out


def _compact(ids_BN: Tensor, parents_BN: Tensor) -> Draft:
    """Moves the known nodes (id >= 0; with a node its ancestors) to the front of each row."""
    known_BN = ids_BN >= 0
    size_B = known_BN.sum(1)
    if bool(known_BN.all()):
        return Draft(ids_BN, parents_BN, size_B.tolist())
    N = int(size_B.max())
    order_BN = known_BN.long().argsort(dim=1, descending=True, stable=True)[:, :N]
    place_BN = known_BN.cumsum(1) - 1
    above_BN = parents_BN.gather(1, order_BN)
    moved_BN = torch.where(above_BN < 0, -1, place_BN.gather(1, above_BN.clamp(min=0)))
    real_BN = torch.arange(N, device=ids_BN.device) < size_B[:, None]
    ids_BN = ids_BN.gather(1, order_BN).where(real_BN, 0)
    return Draft(ids_BN, moved_BN.where(real_BN, -1), size_B.tolist())
