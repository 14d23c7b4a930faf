"""The exact law of what decoding emits, by enumeration on toy models.

Toy models are lookup tables: p(. | last token). Random choices are enumerated by handing the real
drafting and verification code chosen uniforms; how likely each choice is comes out of the code
too, by bisecting for the uniform at which it changes its mind.

Shapes: R rows (one per branch of the enumeration), V vocabulary, G draft length.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.round import Draft, Scored, Seen
from decoding.sampling import Dice, Purpose, Sampling
from decoding.target import Shape, Target
from decoding.verify import Rule
from drafters.lm import LM, LMState

BISECTIONS = 46  # a boundary is known to 2^-46 = 1.4e-14
ALMOST_ONE = 1 - 2.0**-53
Block_ = tuple[int, ...]


def reference_law(logits: Any, sampling: Sampling) -> np.ndarray:
    """Temperature, top-k, top-p, softmax: one row at a time in float64, as the words say."""
    logits = np.asarray(logits, dtype=np.float64)
    rows, place = np.unique(logits.reshape(-1, logits.shape[-1]), axis=0, return_inverse=True)
    out = np.zeros_like(rows)
    for at, row in enumerate(rows):
        scores = row / sampling.temperature
        order = np.argsort(-scores, kind="stable")
        keep = order[: sampling.top_k] if sampling.top_k else order
        weight = np.exp(scores[keep] - scores.max())
        weight /= weight.sum()
        before = np.cumsum(weight) - weight
        chosen = (before < sampling.top_p) if sampling.top_p < 1 else np.ones(len(keep), dtype=bool)
        out[at, keep[chosen]] = weight[chosen] / weight[chosen].sum()
    return out[place.reshape(-1)].reshape(logits.shape)


# --- lookup-table models -----------------------------------------------------------------------


def tables(vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log-probabilities [V, V] of target and drafter: q = 0.55 p + 0.45 Dirichlet(0.9)."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(vocab, 0.9), vocab)
    q = 0.55 * p + 0.45 * rng.dirichlet(np.full(vocab, 0.9), vocab)
    return torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q))


class TableTarget(Target):
    """p(. | last token) from a table; `keep` and the cache's lengths are the real ones."""

    def __init__(self, table_VV: Tensor) -> None:
        nn.Module.__init__(self)
        self.table, self.name = table_VV, "table"
        self.shape = Shape(len(table_VV), 1, 0, 1, 1, 1, 10**6)

    device = torch.device("cpu")  # type: ignore[assignment]
    dtype = torch.float64  # type: ignore[assignment]
    end_ids = frozenset()  # type: ignore[assignment]

    def prefill(self, ids_BS: Tensor, count: list[int], cache: Cache, taps=()) -> Seen:
        cache.length = [c - 1 for c in count]
        return Seen(ids_BS, list(count), list(count), torch.zeros(*ids_BS.shape, 1))

    def score(self, root_B: Tensor, draft: Draft, cache: Cache, taps=()) -> Scored:
        ids_BM = torch.cat([root_B[:, None], draft.ids_BN], dim=1)
        return Scored(self.table[ids_BM], torch.zeros(*ids_BM.shape, 1))


class TableLM(LM):
    """The family lm with a lookup table for a model: `propose` and its draws are the real ones."""

    def __init__(self, table_VV: Tensor, **drafting: Any) -> None:
        nn.Module.__init__(self)
        self.table = table_VV
        self.draft_length = drafting.get("draft_length", 2)
        self.stop_below = drafting.get("stop_below", 0.0)
        self.sample = drafting.get("sample", True)
        self.tree = None
        self.model = SimpleNamespace(get_output_embeddings=lambda: lambda logits: logits)

    def start(self, target, cache, sampling, requests, max_len) -> LMState:
        return LMState(Cache(0, len(requests), 1), sampling, list(requests))

    def _read(self, ids_BS: Tensor, cache: Cache, above_Bnn=None, depth: int = 0) -> Tensor:
        return self.table[ids_BS]


# --- (i) exact enumeration ---------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen(Sampling):
    """Uniforms from tables whose row is the request; laws in float64. Prompts have one token."""

    tables: Any = None  # draft [R, G], accept [R, G], following [R, G + 1]

    def law(self, logits: Tensor) -> Tensor:
        if self.top_k == 0 and self.top_p == 1:
            return (logits / self.temperature).softmax(-1)
        return torch.from_numpy(reference_law(logits, self))

    def uniforms(self, purpose, requests, starts, n) -> Tensor:
        return self.tables[0 if purpose is Purpose.DRAFT else 1][requests][:, :n]

    def uniforms_at(self, requests, positions_BM) -> Tensor:
        return self.tables[2][torch.tensor(requests)[:, None], positions_BM - 1]


@dataclass
class Branches:
    """Rows of the enumeration: context, chosen uniforms, probability of the choices so far."""

    context: Tensor
    uniforms: list[Tensor]
    weight: Tensor

    def take(self, rows: Tensor) -> "Branches":
        return Branches(self.context[rows], [u[rows] for u in self.uniforms], self.weight[rows])


class Enumerator:
    """All outcomes of one round of the real code, each with its exact probability."""

    def __init__(self, target: TableTarget, drafter: LM, rule: Rule, sampling: Sampling) -> None:
        self.target, self.drafter, self.rule, self.sampling = target, drafter, rule, sampling
        self.vocab, self.length = target.shape.vocab_size, drafter.draft_length

    def round(self, contexts: list[int]) -> dict[int, dict[Block_, float]]:
        """For each last token: emitted block -> probability."""
        rows, G = len(contexts), self.length
        branches = Branches(
            torch.tensor(contexts),
            [torch.full((rows, n), 0.5, dtype=torch.float64) for n in (G, G, G + 1)],
            torch.ones(rows, dtype=torch.float64),
        )
        for i in range(G):
            branches = self._split(branches, 0, i, lambda b, i=i: self._draft(b).ids_BN[:, i])
        branches = self._accept(branches)
        for i in range(G + 1):
            branches = self._split(branches, 2, i, lambda b, i=i: self._token(b, i))
        laws: dict[int, dict[Block_, float]] = {c: {} for c in contexts}
        outcomes = zip(
            branches.context.tolist(), self._play(branches), branches.weight.tolist(), strict=True
        )
        for context, block, weight in outcomes:
            laws[context][block] = laws[context].get(block, 0.0) + weight
        return laws

    def _chosen(self, branches: Branches) -> tuple[Chosen, list[int]]:
        s = self.sampling
        chosen = Chosen(s.temperature, s.top_k, s.top_p, tables=branches.uniforms)
        return chosen, list(range(len(branches.context)))

    def _draft(self, branches: Branches) -> Draft:
        chosen, requests = self._chosen(branches)
        R = len(requests)
        cache = self.target.new_cache(R, 1)
        seen = self.target.prefill(branches.context[:, None], [1] * R, cache)
        state = self.drafter.start(self.target, cache, chosen, requests, 1)
        return self.drafter.propose(state, seen, self.target)

    def _play(self, branches: Branches) -> list[Block_]:
        """The block that each branch emits."""
        chosen, requests = self._chosen(branches)
        draft = self._draft(branches)
        cache = self.target.new_cache(len(requests), 1)
        cache.length = [0] * len(requests)
        scored = self.target.score(branches.context, draft, cache)
        verdict = self.rule(scored, draft, Dice(chosen, requests, [1] * len(requests)))
        seen = self.target.keep(draft, scored, verdict, cache)
        pairs = zip(seen.ids_BS.tolist(), seen.count, strict=True)
        return [tuple(ids[:count]) for ids, count in pairs]

    def _token(self, branches: Branches, i: int) -> Tensor:
        return torch.tensor([b[i] if i < len(b) else 0 for b in self._play(branches)])

    def _split(
        self, branches: Branches, which: int, i: int, answer: Callable[[Branches], Tensor]
    ) -> Branches:
        """One branch for each token that uniform i may choose; `answer` never falls in u."""
        R, V = len(branches.context), self.vocab
        ends = []
        for u in (0.0, ALMOST_ONE):
            probe = branches.take(torch.arange(R))
            probe.uniforms[which][:, i] = u
            ends.append(answer(probe))
        edge_RV = torch.zeros(R, V + 1, dtype=torch.float64)  # token k: from edge k to edge k + 1
        edge_RV[:, 1:] = 1.0
        least, most = ends[0][:, None], ends[1][:, None]
        edge_RV[:, :V][torch.arange(V) <= least] = 0.0
        row, k = ((torch.arange(V) > least) & (torch.arange(V) <= most)).nonzero(as_tuple=True)
        edge_RV[:, :V][torch.arange(V) > most] = 1.0
        if len(row):
            probe = branches.take(row)

            def reached(u: Tensor) -> Tensor:
                probe.uniforms[which][:, i] = u
                return answer(probe) >= k

            edge_RV[row, k] = bisect(reached, len(row))
        width_RV = edge_RV.diff(dim=1)
        row, k = (width_RV > 1e-13).nonzero(as_tuple=True)
        out = branches.take(row)
        out.uniforms[which][:, i] = (edge_RV[row, k] + edge_RV[row, k + 1]) / 2
        out.weight *= width_RV[row, k]
        assert (answer(out) == k).all(), "a choice is not monotone in its uniform"
        return out

    def thresholds(self, branches: Branches) -> Tensor:
        """[R, G]: acceptance test i succeeds below this uniform."""
        R, G = len(branches.context), self.length
        found = torch.zeros(R, G, dtype=torch.float64)
        for i in range(G):
            probe = branches.take(torch.arange(R))
            probe.uniforms[1][:, :i] = 0.0
            probe.uniforms[1][:, i + 1 :] = ALMOST_ONE

            def failed(u: Tensor, probe: Branches = probe, i: int = i) -> Tensor:
                probe.uniforms[1][:, i] = u
                return torch.tensor([len(block) <= i + 1 for block in self._play(probe)])

            found[:, i] = bisect(failed, R)
        return found

    def _accept(self, branches: Branches) -> Branches:
        """One branch for each outcome of the G acceptance tests."""
        G = self.length
        limit_RG = self.thresholds(branches)
        cells = torch.tensor(list(itertools.product([True, False], repeat=G)))  # succeeds?
        row = torch.arange(len(branches.context)).repeat_interleave(len(cells))
        succeeds = cells.repeat(len(branches.context), 1)
        limit = limit_RG[row]
        width = torch.where(succeeds, limit, 1 - limit).prod(dim=1)
        real = width > 1e-13
        row, succeeds, limit, width = row[real], succeeds[real], limit[real], width[real]
        out = branches.take(row)
        # twice: near the thresholds, where an off-by-a-little rule differs, and far from them
        near = torch.where(succeeds, limit - 1e-10, limit + 1e-10).clamp(0, ALMOST_ONE)
        out.uniforms[1][:] = near
        first = [len(block) for block in self._play(out)]
        out.uniforms[1][:] = torch.where(succeeds, limit / 2, (1 + limit) / 2)
        assert first == [len(block) for block in self._play(out)], "acceptance is no threshold"
        out.weight *= width
        return out


def bisect(reached: Callable[[Tensor], Tensor], rows: int) -> Tensor:
    """The least u in [0, 1] from which `reached` holds, per row (1 if nowhere)."""
    low, high = torch.zeros(rows, dtype=torch.float64), torch.ones(rows, dtype=torch.float64)
    at_zero = reached(low)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        yes = reached(middle)
        high, low = torch.where(yes, middle, high), torch.where(yes, low, middle)
    result = torch.where(high == 1.0, 1.0, (low + high) / 2)
    return torch.where(at_zero, 0.0, result)


def joint(rounds: dict[int, dict[Block_, float]], context: int, length: int) -> dict[Block_, float]:
    """The law of the next `length` tokens when one round follows another."""
    out: dict[Block_, float] = {}
    for block, weight in rounds[context].items():
        rest = length - len(block)
        tails = {(): 1.0} if rest <= 0 else joint(rounds, block[-1], rest)
        for tail, share in tails.items():
            whole = (block + tail)[:length]
            out[whole] = out.get(whole, 0.0) + weight * share
    return out


def product(p_VV: np.ndarray, context: int, length: int) -> dict[Block_, float]:
    """p^L: the law of `length` tokens drawn one by one."""
    out = {}
    for whole in itertools.product(range(len(p_VV)), repeat=length):
        steps = zip((context, *whole), whole, strict=False)
        out[whole] = float(np.prod([p_VV[a, b] for a, b in steps]))
    return out


def distance(a: dict[Block_, float], b: dict[Block_, float]) -> float:
    """Total variation."""
    return 0.5 * sum(abs(a.get(k, 0.0) - b.get(k, 0.0)) for k in a.keys() | b.keys())
