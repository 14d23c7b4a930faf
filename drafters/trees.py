"""The shapes a draft can take, for every drafter that can say what follows a node.

Shapes: B batch, N drafted nodes, W nodes of a level, V vocabulary. A `Growth` answers two
questions: which law follows the root, and which laws follow the nodes of a level. Nodes that were
asked about are numbered in the order of asking, the root being 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from decoding.round import Draft
from decoding.sampling import Dice, Purpose, draw


class Growth(Protocol):
    """One round of a drafter that is asked level by level."""

    dice: Dice

    def begin(self) -> Tensor:
        """Logits of what follows the root, [B, V]."""

    def deepen(self, ids_BW: Tensor, parents_BW: Tensor, depth: int) -> Tensor:
        """Logits of what follows nodes at `depth` (the root's children have 1), [B, W, V].

        parents: numbers of nodes asked about before, 0 for the root.
        """


class Tree(ABC):
    """How far and how wide a draft grows. `depth`: its deepest level; `nodes`: at most so many."""

    depth: int
    nodes: int

    @abstractmethod
    def grow(self, growth: Growth) -> Draft:
        """The draft of one round."""


class Chain(Tree):
    """One token after the other: drawn from q (law iid), or the likeliest.

    stop_below: a row stops after a token that the drafter gave less than this (the token stays in
    the draft, so that the law stays exact).
    """

    def __init__(self, length: int, *, stop_below: float = 0.0, sample: bool = True) -> None:
        if length < 1 or not 0 <= stop_below < 1:
            raise ValueError(
                f"a chain has draft_length {length} and stop_below {stop_below}; the first must be "
                "at least 1, the second from 0 to below 1"
            )
        self.depth = self.nodes = length
        self.stop_below, self.sample = stop_below, sample

    def grow(self, growth: Growth) -> Draft:
        dice = growth.dice
        sampled = self.sample and not dice.sampling.greedy
        u_BN = dice.uniforms(Purpose.DRAFT, self.depth) if sampled else None
        rows = len(dice.requests)
        go, size = [True] * rows, [0] * rows
        ids: list[Tensor] = []
        laws: list[Tensor] = []
        logits_BV = growth.begin()
        while True:
            n = len(ids)
            law_BV = dice.sampling.law(logits_BV) if sampled else logits_BV
            ids.append(self.draw(law_BV, u_BN[:, n]) if u_BN is not None else logits_BV.argmax(-1))
            laws.append(law_BV)
            size = [k + on for k, on in zip(size, go, strict=True)]
            if self.stop_below:
                said_BV = law_BV if sampled else logits_BV.float().softmax(-1)
                sure = said_BV.gather(1, ids[-1][:, None])[:, 0] >= self.stop_below
                go = [on and bool(more) for on, more in zip(go, sure.tolist(), strict=True)]
            if n + 1 == self.depth or not any(go):
                break
            parents_B1 = torch.full((rows, 1), n, device=logits_BV.device)
            logits_BV = growth.deepen(ids[-1][:, None], parents_B1, n + 1)[:, 0]
        ids_BN = torch.stack(ids, dim=1)
        if not sampled:
            return Draft.chain(ids_BN, size)
        return Draft.chain(ids_BN, size, "iid", torch.stack(laws, dim=1))

    def draw(self, law_BV: Tensor, u_B: Tensor) -> Tensor:
        """A token of each row."""
        return draw(law_BV, u_B)


class Static(Tree):
    """The same places every round (Medusa): a path names the rank of each node among its parent's
    children by likelihood, so (0, 2) is the third guess after the best first one."""

    def __init__(self, paths: list[list[int]]) -> None:
        places = sorted({tuple(path) for path in paths}, key=lambda path: (len(path), path))
        missing = [p for p in places if len(p) > 1 and p[:-1] not in set(places)]
        if not places or () in places or missing or min(min(p) for p in places) < 0:
            raise ValueError(
                "a static tree needs paths of ranks from 0, each with the path to its parent; "
                f"{f'{list(missing[0])} has none' if missing else f'got {paths[:3]}'}"
            )
        self.paths = places
        self.depth, self.nodes = len(places[-1]), len(places)
        number = {path: n for n, path in enumerate(places)}
        self._parents = [number.get(path[:-1], -1) for path in places]
        inner = {path[:-1] for path in places}
        self._inner = [
            [path for path in places if len(path) == depth and path in inner]
            for depth in range(1, self.depth)
        ]
        asked = [path for level in self._inner for path in level]
        self._asked = {(): 0} | {path: n + 1 for n, path in enumerate(asked)}

    def grow(self, growth: Growth) -> Draft:
        logits_BWV = growth.begin()[:, None]
        asked: list[tuple[int, ...]] = [()]
        ids: dict[tuple[int, ...], Tensor] = {}
        for depth in range(1, self.depth + 1):
            level = [path for path in self.paths if len(path) == depth]
            widest = max(path[-1] for path in level) + 1
            best_BWR = logits_BWV.topk(min(widest, logits_BWV.shape[-1]), dim=-1).indices
            for path in level:
                rank = min(path[-1], best_BWR.shape[-1] - 1)
                ids[path] = best_BWR[:, asked.index(path[:-1]), rank]
            if depth < self.depth:
                asked = self._inner[depth - 1]
                ids_BW = torch.stack([ids[path] for path in asked], dim=1)
                above = [self._asked[path[:-1]] for path in asked]
                parents_BW = torch.tensor(above, device=ids_BW.device).expand(ids_BW.shape)
                logits_BWV = growth.deepen(ids_BW, parents_BW, depth)
        ids_BN = torch.stack([ids[path] for path in self.paths], dim=1)
        parents_BN = torch.tensor(self._parents).expand(len(ids_BN), -1)
        return Draft(ids_BN, parents_BN, [self.nodes] * len(ids_BN))


class Dynamic(Tree):
    """EAGLE-2: the `top_k` likeliest paths of a level are followed, `depth` levels deep, and of all
    nodes met the `nodes` likeliest stay. Deterministic, so that the one-hot rule is exact."""

    def __init__(self, *, top_k: int = 8, depth: int = 5, nodes: int = 32) -> None:
        if min(top_k, depth, nodes) < 1 or nodes > top_k + (depth - 1) * top_k**2:
            raise ValueError(
                f"a dynamic tree has top_k {top_k}, depth {depth}, nodes {nodes}; each must be at "
                "least 1, and nodes no more than the levels hold"
            )
        self.top_k, self.depth, self.nodes = top_k, depth, nodes

    def grow(self, growth: Growth) -> Draft:
        score_BV = growth.begin().float().log_softmax(-1)
        k = min(self.top_k, score_BV.shape[-1])
        score_BW, ids_BW = score_BV.topk(k, dim=-1)
        ids, scores, parents = [ids_BW], [score_BW], [torch.full_like(ids_BW, -1)]
        node_BW = torch.arange(k, device=ids_BW.device).expand_as(ids_BW)  # of the beams
        asked_BW = torch.zeros_like(ids_BW)  # number of each beam's parent among the asked
        first = 0  # number of this level's first asked node, less 1
        for depth in range(1, self.depth):
            next_BWV = growth.deepen(ids_BW, asked_BW, depth).float().log_softmax(-1)
            best_BWk, choice_BWk = next_BWV.topk(k, dim=-1)
            total_Bn = (score_BW[..., None] + best_BWk).flatten(1)
            met = sum(level.shape[1] for level in ids)
            ids.append(choice_BWk.flatten(1))
            scores.append(total_Bn)
            parents.append(node_BW.repeat_interleave(k, dim=1))
            score_BW, at_BW = total_Bn.topk(k, dim=-1)
            ids_BW, node_BW = ids[-1].gather(1, at_BW), met + at_BW
            asked_BW, first = first + 1 + at_BW // k, first + k
        return self._likeliest(*(torch.cat(part, dim=1) for part in (ids, scores, parents)))

    def _likeliest(self, ids_Bn: Tensor, scores_Bn: Tensor, parents_Bn: Tensor) -> Draft:
        """The best nodes of all. No child beats its parent, and of equals the first met wins, so
        what stays is a tree."""
        order_Bn = scores_Bn.argsort(dim=1, descending=True, stable=True)
        kept_BN = order_Bn[:, : self.nodes].sort(dim=1).values
        place_Bn = torch.full_like(ids_Bn, -1)
        numbers = torch.arange(kept_BN.shape[1], device=ids_Bn.device).expand_as(kept_BN)
        place_Bn.scatter_(1, kept_BN, numbers)
        above_BN = parents_Bn.gather(1, kept_BN)
        parents_BN = torch.where(above_BN < 0, -1, place_Bn.gather(1, above_BN.clamp(min=0)))
        size = [kept_BN.shape[1]] * len(ids_Bn)
        return Draft(ids_Bn.gather(1, kept_BN), parents_BN, size)


class Branching(Tree):
    """RSD-C (Jeon et al. 2024): a node at level i has branching[i] children, drawn from q without
    replacement; at temperature 0 the likeliest."""

    def __init__(self, branching: list[int]) -> None:
        if not branching or min(branching) < 1:
            raise ValueError(f"branching is {branching}; it must list children per level, from 1")
        self.branching, self.depth = branching, len(branching)
        widths = [1]
        for children in branching:
            widths.append(widths[-1] * children)
        self.nodes = sum(widths[1:])

    def grow(self, growth: Growth) -> Draft:
        dice = growth.dice
        u_BN = dice.uniforms(Purpose.DRAFT, self.nodes)
        logits_BWV = growth.begin()[:, None]
        ids, parents, laws = [], [], []
        met, asked = -1, 0  # numbers of the level's first node, drafted and asked
        for depth, b in enumerate(self.branching, start=1):
            B, W, _ = logits_BWV.shape
            law_BWV = logits_BWV if dice.sampling.greedy else dice.sampling.law(logits_BWV)
            begin = met + W
            u_BWb = u_BN[:, begin : begin + W * b].view(B, W, b).to(law_BWV.device)
            ids_BW = _children(law_BWV, u_BWb, dice.sampling.greedy).flatten(1)
            place_W = torch.arange(W, device=ids_BW.device).repeat_interleave(b).expand(B, -1)
            ids.append(ids_BW)
            laws.append(law_BWV)
            parents.append(met + place_W)
            if depth < self.depth:
                logits_BWV = growth.deepen(ids_BW, asked + place_W, depth)
            met, asked = met + W, asked + W
        return _drawn(ids, parents, laws, dice.sampling.greedy)


class Beams(Tree):
    """RSD-S (Jeon et al. 2024): stochastic beam search, `width` beams and `depth` levels; siblings
    stand in the order of their perturbed scores."""

    def __init__(self, *, width: int = 4, depth: int = 4) -> None:
        if min(width, depth) < 1:
            raise ValueError(f"beams have width {width} and depth {depth}; each must be at least 1")
        self.width, self.depth, self.nodes = width, depth, width * depth

    def grow(self, growth: Growth) -> Draft:
        dice = growth.dice
        logits_BWV = growth.begin()[:, None]
        B, device, k = len(logits_BWV), logits_BWV.device, self.width
        u_Bn = dice.uniforms(Purpose.DRAFT, self.depth * k * k * 2).to(device)
        score_BW = torch.zeros(B, 1, dtype=torch.float64, device=device)  # log q of each beam
        bound_BW = torch.zeros_like(score_BW)  # its perturbed score
        ids, parents, laws = [], [], []
        met, asked, used = -1, 0, 0
        for depth in range(1, self.depth + 1):
            W = logits_BWV.shape[1]
            law_BWV = dice.sampling.law(logits_BWV) if not dice.sampling.greedy else logits_BWV
            u_BWk2 = u_Bn[:, used : used + W * k * 2].view(B, W, k, 2)
            used += W * k * 2
            if dice.sampling.greedy:
                found_BWk, choice_BWk = _best(law_BWV.double().log_softmax(-1), k)
                rank_BWk = said_BWk = score_BW[..., None] + found_BWk
            else:
                choice_BWk, said_BWk, rank_BWk = _perturbed(law_BWV, score_BW, bound_BW, u_BWk2)
            bound_BW, at_BW = rank_BWk.flatten(1).topk(k, dim=-1)
            ids_BW = choice_BWk.flatten(1).gather(1, at_BW)
            score_BW = said_BWk.flatten(1).gather(1, at_BW)
            place_BW = at_BW // k
            ids.append(ids_BW)
            laws.append(law_BWV)
            parents.append(met + place_BW)
            if depth < self.depth:
                logits_BWV = growth.deepen(ids_BW, asked + place_BW, depth)
            met, asked = met + W, asked + W
        return _drawn(ids, parents, laws, dice.sampling.greedy)


def above(known_Bnn: Tensor, parents_BW: Tensor) -> Tensor:
    """Which asked nodes stand above which (each above itself), those of one more level added,
    Boolean [B, n + W, n + W]. known: the same before it (empty: nothing but the root was asked);
    parents: as `Growth.deepen` has them."""
    B, W = parents_BW.shape
    n = known_Bnn.shape[1] if known_Bnn.numel() else 0
    grown = torch.zeros(B, n + W, n + W, dtype=torch.bool, device=parents_BW.device)
    grown[:, n:, n:] = torch.eye(W, dtype=torch.bool, device=parents_BW.device)
    if n:
        index_BWn = (parents_BW - 1).clamp(min=0)[:, :, None].expand(B, W, n)
        grown[:, n:, :n] = known_Bnn.gather(1, index_BWn) & (parents_BW > 0)[:, :, None]
        grown[:, :n, :n] = known_Bnn
    return grown


KINDS: dict[str, type[Tree]] = {"static": Static, "dynamic": Dynamic, "branching": Branching}
KINDS |= {"beams": Beams}


def tree_of(config: Mapping[str, Any] | None) -> Tree | None:
    """The tree that {kind: ..., and its arguments} describes; None for none."""
    if config is None:
        return None
    kind = config.get("kind")
    if kind not in KINDS:
        raise ValueError(f"tree.kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    try:
        return KINDS[kind](**{k: v for k, v in config.items() if k != "kind"})
    except TypeError as error:
        raise ValueError(f"tree of kind {kind}: {error}") from None


def _children(law_BWV: Tensor, u_BWb: Tensor, greedy: bool) -> Tensor:
    """Draws without replacement, in draw order, [B, W, b]; or the likeliest."""
    b = u_BWb.shape[-1]
    if greedy:
        return _best(law_BWV, b)[1]
    left_BWV, drawn = law_BWV.double(), []
    for i in range(b):
        drawn.append(draw(left_BWV, u_BWb[..., i]).clamp(max=law_BWV.shape[-1] - 1))
        left_BWV = left_BWV.scatter(-1, drawn[-1][..., None], 0.0)
    return torch.stack(drawn, dim=-1)


def _best(scores_BWV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best and their ids, [B, W, k]; the last repeats where the vocabulary is smaller."""
    V = scores_BWV.shape[-1]
    found = scores_BWV.topk(min(k, V), dim=-1)
    rank_k = torch.arange(k, device=scores_BWV.device).clamp(max=V - 1)
    return found.values[..., rank_k], found.indices[..., rank_k]


def _perturbed(
    law_BWV: Tensor, score_BW: Tensor, bound_BW: Tensor, u_BWk2: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The k children of each beam with the highest Gumbel-perturbed scores, best first: ids, log q
    and perturbed scores, [B, W, k].

    Drawn from the top down: the best has its beam's own perturbed score (Kool et al. 2019), and
    the best of what is left is a Gumbel of that mass below the one before.
    """
    left_BWV = law_BWV.double()
    ids, said, rank = [], [], []
    top_BW = bound_BW
    for i in range(u_BWk2.shape[2]):
        x_BW = draw(left_BWV, u_BWk2[:, :, i, 0]).clamp(max=law_BWV.shape[-1] - 1)
        if i:
            mass_BW = left_BWV.sum(-1).log() + score_BW
            noise_BW = (-u_BWk2[:, :, i, 1].clamp(min=2.0**-33).log()).log()
            top_BW = -torch.logaddexp(-top_BW, noise_BW - mass_BW)
        chance_BW = left_BWV.gather(-1, x_BW[..., None])[..., 0]
        ids.append(x_BW)
        rank.append(torch.where(chance_BW > 0, top_BW, -torch.inf))
        said.append(law_BWV.double().gather(-1, x_BW[..., None])[..., 0].log() + score_BW)
        left_BWV = left_BWV.scatter(-1, x_BW[..., None], 0.0)
    return torch.stack(ids, -1), torch.stack(said, -1), torch.stack(rank, -1)


def _drawn(ids: list[Tensor], parents: list[Tensor], laws: list[Tensor], greedy: bool) -> Draft:
    ids_BN, parents_BN = torch.cat(ids, dim=1), torch.cat(parents, dim=1)
    size = [ids_BN.shape[1]] * len(ids_BN)
    if greedy:
        return Draft(ids_BN, parents_BN, size)
    return Draft(ids_BN, parents_BN, size, "without_replacement", torch.cat(laws, dim=1))
