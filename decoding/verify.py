"""The acceptance rules: which drafted nodes stand, and what the target says after them.

Shapes: B batch, N drafted nodes, M = N + 1 (root first), V vocabulary. p is the target's law, q
the drafter's, both after the same processors. Every rule here but one returns samples of exactly
p; that one says so (`lossless`).
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from decoding.round import Draft, Scored, Verdict
from decoding.sampling import Dice, Purpose, Sampling, draw
from decoding.tree import depths


class Rule(ABC):
    """Verifies drafts of the laws that it is exact for; a lossy rule (not `lossless`) verifies any,
    and reports and names say which is not."""

    name: str
    lossless: bool
    laws: frozenset[str]

    def __call__(self, scored: Scored, draft: Draft, dice: Dice) -> Verdict:
        assert draft.law in self.laws, f"{self.name} is not exact for drafts of law {draft.law}"
        return self._verify(scored.logits_BMV, draft, dice)

    @abstractmethod
    def _verify(self, logits_BMV: Tensor, draft: Draft, dice: Dice) -> Verdict: ...


class OneHot(Rule):
    """For drafts that are a function of the prefix: draw x ~ p at each node, follow it if drafted.

    A child y is then entered with probability p(y) and any other token ends the walk with its own
    p: exact for every tree built independently of these draws (decoding.md a.3). At temperature 0
    the draw is the argmax, and the walk is greedy verification of any draft.
    """

    name = "one-hot"
    lossless = True
    laws = frozenset({"one_hot"})

    def _verify(self, logits_BMV: Tensor, draft: Draft, dice: Dice) -> Verdict:
        if dice.sampling.greedy:
            choice_BM = logits_BMV.argmax(-1)
        else:
            u_BM = dice.next(depths(draft.parents_BN))
            choice_BM = draw(dice.sampling.law(logits_BMV), u_BM)
        return _walk(choice_BM.tolist(), draft)


class Chain(Rule):
    """Leviathan, Kalman, Matias 2023, algorithm 1: accept x with min(1, p/q), else norm((p-q)+)."""

    name = "chain"
    lossless = True
    laws = frozenset({"iid"})

    def _verify(self, logits_BMV: Tensor, draft: Draft, dice: Dice) -> Verdict:
        p_BMV, q_BNV, N = _laws(logits_BMV, draft, dice.sampling)
        u_BN = dice.uniforms(Purpose.ACCEPT, N).to(p_BMV.device)
        px_BN, qx_BN = _chosen(p_BMV, draft), _chosen(q_BNV, draft)
        stands_BN = (u_BN * qx_BN < px_BN).cumprod(dim=1).tolist()
        count = [sum(row[:n]) for row, n in zip(stands_BN, draft.size, strict=True)]
        weight_B = torch.ones(len(count), 1, device=p_BMV.device)
        return _finish(p_BMV, q_BNV, weight_B, draft, count, dice)


class Block(Rule):
    """Block verification (Sun et al. 2025, algorithm 2): the longest prefix that jointly stands.

    pi_i = min(1, pi_{i-1} p_i/q_i); position i stands with h_i = s_i / (s_i + 1 - pi_i), where
    s_i = sum (pi_i p_{i+1} - q_{i+1})+, the last with pi. The last success wins, and its
    successor is drawn from norm((pi p - q)+). Never accepts fewer tokens than `Chain` on average.
    """

    name = "block"
    lossless = True
    laws = frozenset({"iid"})

    def _verify(self, logits_BMV: Tensor, draft: Draft, dice: Dice) -> Verdict:
        p_BMV, q_BNV, N = _laws(logits_BMV, draft, dice.sampling)
        B = p_BMV.shape[0]
        ratio_BN = _chosen(p_BMV, draft) / _chosen(q_BNV, draft)
        pi_BM = torch.ones(B, N + 1, dtype=ratio_BN.dtype, device=p_BMV.device)
        for i in range(N):
            pi_BM[:, i + 1] = (pi_BM[:, i] * ratio_BN[:, i]).clamp(max=1)
        surplus_BN = torch.zeros_like(ratio_BN)  # s of position i + 1; the last has none
        if N > 1:
            gap = pi_BM[:, 1:N, None] * p_BMV[:, 1:N] - q_BNV[:, 1:N]
            surplus_BN[:, : N - 1] = gap.clamp(min=0).sum(-1)
        slack_BN = surplus_BN + 1 - pi_BM[:, 1:]
        # no slack and no surplus: p = q behind position i, so any h_i is exact; 1 keeps most
        h_BN = torch.where(slack_BN > 0, surplus_BN / slack_BN, 1.0)
        u_BN = dice.uniforms(Purpose.ACCEPT, N).to(h_BN.device)
        count = []
        for b, n in enumerate(draft.size):
            if n:
                h_BN[b, n - 1] = pi_BM[b, n]
            success = (u_BN[b, :n] < h_BN[b, :n]).nonzero()
            count.append(int(success[-1]) + 1 if len(success) else 0)
        weight_B = pi_BM.gather(1, torch.tensor(count, device=pi_BM.device)[:, None])
        return _finish(p_BMV, q_BNV, weight_B, draft, count, dice)


class WithoutReplacement(Rule):
    """Recursive rejection for siblings drawn without replacement (Jeon et al. 2024, RSD).

    Children are tried in draw order: accept x with min(1, p/q), else p becomes norm((p - q)+) and
    q loses x. If no child stands, the next token is drawn from what is left of p.
    """

    name = "recursive rejection"
    lossless = True
    laws = frozenset({"without_replacement"})

    def _verify(self, logits_BMV: Tensor, draft: Draft, dice: Dice) -> Verdict:
        assert draft.q_BMV is not None, "sampled drafts carry q"
        p_BMV = dice.sampling.law(logits_BMV).double()
        ids, parents = draft.ids_BN.tolist(), draft.parents_BN.tolist()
        u_BN = dice.uniforms(Purpose.ACCEPT, draft.ids_BN.shape[1]).tolist()
        paths, left = [], []
        for b, size in enumerate(draft.size):
            path: list[int] = []
            while True:
                node = path[-1] if path else -1
                children = [n for n in range(size) if parents[b][n] == node]
                q_V = draft.q_BMV[b, node + 1].double() if children else p_BMV[b, 0]
                found, rest_V = _try(children, ids[b], u_BN[b], p_BMV[b, node + 1], q_V)
                if found is None:
                    break
                path.append(found)
            paths.append(path)
            left.append(rest_V)
        u_B = dice.next(torch.tensor([[len(path)] for path in paths]))[:, 0]
        return Verdict(paths, draw(torch.stack(left), u_B).tolist())


class Typical(Rule):
    """Medusa's typical acceptance (Cai et al. 2024): a drafted token stands where the target gives
    it more than min(epsilon, delta exp(-entropy)); the longest such path wins, the likelier of
    equals, and the token after it is the target's likeliest.

    LOSSY: the answers do not follow the target's law. At temperature 0 it is greedy verification.
    """

    name = "typical acceptance"
    lossless = False
    laws = frozenset({"one_hot", "iid", "without_replacement"})

    def __init__(self, *, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not (0 < epsilon < 1 and delta > 0):
            raise ValueError(
                f"epsilon is {epsilon} and delta {delta}; epsilon must lie between 0 and 1, delta "
                "above 0"
            )
        self.epsilon, self.delta = epsilon, delta

    def _verify(self, logits_BMV: Tensor, draft: Draft, dice: Dice) -> Verdict:
        best_BM = logits_BMV.argmax(-1)
        if dice.sampling.greedy:
            return _walk(best_BM.tolist(), draft)
        p_BMV = dice.sampling.law(logits_BMV)
        entropy_BM = torch.special.entr(p_BMV).sum(-1)
        floor_BM = (self.delta * torch.exp(-entropy_BM)).clamp(max=self.epsilon)
        paths, best = [], best_BM.tolist()
        for b, size in enumerate(draft.size):
            stands: dict[int, tuple[int, float]] = {-1: (0, 0.0)}  # node -> depth, log-likelihood
            for n in range(size):
                parent, token = int(draft.parents_BN[b, n]), int(draft.ids_BN[b, n])
                likely = float(p_BMV[b, parent + 1, token])
                if parent in stands and likely > floor_BM[b, parent + 1]:
                    depth, said = stands[parent]
                    stands[n] = (depth + 1, said + math.log(max(likely, 1e-30)))
            node = max(stands, key=lambda n: stands[n])
            paths.append(_path_to(node, draft.parents_BN[b].tolist()))
        following = [best[b][path[-1] + 1 if path else 0] for b, path in enumerate(paths)]
        return Verdict(paths, following)


def default_rule(law: str) -> Rule:
    """The exact rule for drafts of this law that accepts most."""
    rules: dict[str, type[Rule]] = {"iid": Block, "without_replacement": WithoutReplacement}
    return rules.get(law, OneHot)()


def _try(
    children: list[int], ids: list[int], u: list[float], p_V: Tensor, q_V: Tensor
) -> tuple[int | None, Tensor]:
    """The first child that stands, or None and what is left of p after all were rejected."""
    q_V = q_V.clone()
    for n in children:
        x = ids[n]
        if q_V[x] <= 0:  # drawn after the support was exhausted: it is no draw at all
            continue
        if u[n] * q_V[x] < p_V[x]:
            return n, p_V
        rest_V = (p_V - q_V).clamp(min=0)
        # rounding can leave nothing of a residual; p is then its limit
        p_V = rest_V / rest_V.sum() if rest_V.sum() > 0 else p_V
        q_V[x] = 0
        q_V = q_V / q_V.sum().clamp(min=torch.finfo(q_V.dtype).tiny)
    return None, p_V


def _path_to(node: int, parents: list[int]) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


def _walk(choice_BM: list[list[int]], draft: Draft) -> Verdict:
    """From the root to the child that equals the choice there, while there is one."""
    ids, parents = draft.ids_BN.tolist(), draft.parents_BN.tolist()
    paths, following = [], []
    for b, choice in enumerate(choice_BM):
        path, node = [], -1
        for n in range(draft.size[b]):  # parents stand before children: one sweep suffices
            if parents[b][n] == node and ids[b][n] == choice[node + 1]:
                path.append(n)
                node = n
        paths.append(path)
        following.append(choice[node + 1])
    return Verdict(paths, following)


def _laws(logits_BMV: Tensor, draft: Draft, sampling: Sampling) -> tuple[Tensor, Tensor, int]:
    assert draft.q_BMV is not None, "sampled drafts carry q"
    assert draft.is_chain, "these rules verify chains"
    N = draft.ids_BN.shape[1]
    return sampling.law(logits_BMV), draft.q_BMV[:, :N], N


def _chosen(law_BMV: Tensor, draft: Draft) -> Tensor:
    N = draft.ids_BN.shape[1]
    return law_BMV[:, :N].gather(2, draft.ids_BN[:, :, None])[:, :, 0]


def _finish(
    p_BMV: Tensor,
    q_BNV: Tensor,
    weight_B1: Tensor,
    draft: Draft,
    count: list[int],
    dice: Dice,
) -> Verdict:
    """Draws each row's next token: p after a whole draft, else norm((weight * p - q)+)."""
    rows = torch.arange(len(count), device=p_BMV.device)
    at = torch.tensor(count, device=p_BMV.device)
    law_BV = p_BMV[rows, at]
    cut = [b for b, n in enumerate(draft.size) if count[b] < n]
    if cut:
        index = torch.tensor(cut, device=p_BMV.device)
        rest = (weight_B1[index] * law_BV[index] - q_BNV[index, at[index]]).clamp(min=0)
        # rounding can leave nothing of a residual; p is then its limit
        law_BV[index] = torch.where(rest.sum(-1, keepdim=True) > 0, rest, law_BV[index])
    u_B = dice.next(torch.tensor(count)[:, None])[:, 0]
    return Verdict([list(range(n)) for n in count], draw(law_BV, u_B).tolist())
