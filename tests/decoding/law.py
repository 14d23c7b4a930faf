"""Exact and empirical laws of what decoding emits, and wrong rules that must show in them.

Toy models are lookup tables: p(. | last token). Random choices are enumerated by handing the real
drafting and verification code chosen uniforms; how likely each choice is comes out of the code
too, by bisecting for the uniform at which it changes its mind.

Shapes: R rows (one per branch of the enumeration), V vocabulary, G draft length.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.loop import decode
from decoding.round import Draft, Scored, Seen, Verdict
from decoding.sampling import Purpose, Sampling, draw
from decoding.target import Shape, Target
from decoding.verify import Block, Chain, Rule
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
        self.table, self.name, self.taps = table_VV, "table", ()
        self.shape = Shape(len(table_VV), 1, 0, 1, 1, 1, 10**6)

    device = torch.device("cpu")  # type: ignore[assignment]
    dtype = torch.float64  # type: ignore[assignment]
    end_ids = frozenset()  # type: ignore[assignment]

    def prefill(self, ids_BS: Tensor, count: list[int], cache: Cache) -> Seen:
        cache.length = [c - 1 for c in count]
        return Seen(ids_BS, list(count), list(count), torch.zeros(*ids_BS.shape, 1))

    def score(self, root_B: Tensor, draft: Draft, cache: Cache) -> Scored:
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

    def start(self, target, cache, sampling, requests, max_len) -> LMState:
        return LMState(Cache(0, len(requests), 1), sampling, list(requests))

    def _step(self, ids_BS: Tensor, new: list[int], cache: Cache) -> Tensor:
        cache.length = [n + k for n, k in zip(cache.length, new, strict=True)]
        return self.table[ids_BS[torch.arange(len(new)), torch.tensor(new) - 1]]


# --- wrong drafters (mix into LM or TableLM) and wrong rules -------------------------------------


class DrawsArgmax:
    """Takes the likeliest token but says that it was drawn from q."""

    def _guess(self, guesses, logits_BV, sampling, u_B) -> None:
        super()._guess(guesses, logits_BV, sampling, u_B)  # type: ignore[misc]
        guesses.ids[-1] = logits_BV.argmax(-1)


class DrawsCooler:
    """Draws at temperature 0.7 and records q at temperature 1."""

    def _guess(self, guesses, logits_BV, sampling, u_B) -> None:
        super()._guess(guesses, logits_BV, sampling, u_B)  # type: ignore[misc]
        guesses.ids[-1] = draw((logits_BV / 0.7).softmax(-1), u_B)


class DrawsTopTwo:
    """Draws among its two likeliest tokens and records q before that filter."""

    def _guess(self, guesses, logits_BV, sampling, u_B) -> None:
        super()._guess(guesses, logits_BV, sampling, u_B)  # type: ignore[misc]
        second = logits_BV.topk(2, dim=-1).values[:, 1:]
        few_BV = logits_BV.masked_fill(logits_BV < second, -torch.inf)
        guesses.ids[-1] = draw(few_BV.softmax(-1), u_B)


class DropsTrigger:
    """Leaves out the token whose low probability stopped the draft."""

    def propose(self, state, seen, target) -> Draft:
        draft = super().propose(state, seen, target)  # type: ignore[misc]
        assert draft.q_BMV is not None
        size = list(draft.size)
        for b, n in enumerate(size):
            if draft.q_BMV[b, n - 1, draft.ids_BN[b, n - 1]] < self.stop_below:  # type: ignore
                size[b] = n - 1
        return replace(draft, size=size)


class _WrongResidual(Chain):
    def _verify(self, logits_BMV, draft, sampling, requests, starts) -> Verdict:
        verdict = super()._verify(logits_BMV, draft, sampling, requests, starts)
        p_BMV = sampling.law(logits_BMV)
        count = [len(path) for path in verdict.path]
        places = (torch.tensor(starts) + torch.tensor(count))[:, None]
        u_B = sampling.uniforms_at(requests, places)[:, 0]
        following = list(verdict.next)
        for b, n in enumerate(count):
            if n < draft.size[b]:
                assert draft.q_BMV is not None
                law_V = self.residual(p_BMV[b, n], draft.q_BMV[b, n])
                following[b] = int(draw(law_V, u_B[b]))
        return Verdict(verdict.path, following)

    def residual(self, p_V: Tensor, q_V: Tensor) -> Tensor:
        raise NotImplementedError


class ResamplesFromP(_WrongResidual):
    def residual(self, p_V: Tensor, q_V: Tensor) -> Tensor:
        return p_V


class SoftmaxOfResidual(_WrongResidual):
    def residual(self, p_V: Tensor, q_V: Tensor) -> Tensor:
        return (p_V - q_V).clamp(min=0).softmax(-1)


class BlockForgetsWeight(Block):
    """Draws from norm((p - q)+) where block verification needs norm((pi p - q)+)."""

    def _verify(self, logits_BMV, draft, sampling, requests, starts) -> Verdict:
        import decoding.verify as verify

        true = verify._finish
        verify._finish = lambda p, q, weight, *rest: true(p, q, torch.ones_like(weight), *rest)
        try:
            return super()._verify(logits_BMV, draft, sampling, requests, starts)
        finally:
            verify._finish = true


class SharedPurposes(Sampling):
    """Decides acceptance with the numbers that the draft was drawn with."""

    def uniforms(self, purpose, requests, starts, n) -> Tensor:
        return super().uniforms(Purpose.DRAFT, requests, starts, n)


class SamePosition(Sampling):
    """Draws the target's own token with one number a request: each first token is right."""

    def uniforms_at(self, requests, positions_BM) -> Tensor:
        return super().uniforms_at(requests, torch.zeros_like(positions_BM))


class KeyedByPosition(Sampling):
    """Keys accept and draft numbers by absolute position: a later round meets them again."""

    def uniforms(self, purpose, requests, starts, n) -> Tensor:
        places = np.array(starts)[:, None] + np.arange(n)[None, :]
        return self._hash(purpose, requests, places, np.zeros((1, 1)))


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
class _Branches:
    """Rows of the enumeration: context, chosen uniforms, probability of the choices so far."""

    context: Tensor
    uniforms: list[Tensor]
    weight: Tensor

    def take(self, rows: Tensor) -> "_Branches":
        return _Branches(self.context[rows], [u[rows] for u in self.uniforms], self.weight[rows])


class Enumerator:
    """All outcomes of one round of the real code, each with its exact probability."""

    def __init__(self, target: TableTarget, drafter: LM, rule: Rule, sampling: Sampling) -> None:
        self.target, self.drafter, self.rule, self.sampling = target, drafter, rule, sampling
        self.vocab, self.length = target.shape.vocab_size, drafter.draft_length

    def round(self, contexts: list[int]) -> dict[int, dict[Block_, float]]:
        """For each last token: emitted block -> probability."""
        rows, G = len(contexts), self.length
        branches = _Branches(
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

    def _chosen(self, branches: _Branches) -> tuple[Chosen, list[int]]:
        s = self.sampling
        chosen = Chosen(s.temperature, s.top_k, s.top_p, tables=branches.uniforms)
        return chosen, list(range(len(branches.context)))

    def _draft(self, branches: _Branches) -> Draft:
        chosen, requests = self._chosen(branches)
        R = len(requests)
        cache = self.target.new_cache(R, 1)
        seen = self.target.prefill(branches.context[:, None], [1] * R, cache)
        state = self.drafter.start(self.target, cache, chosen, requests, 1)
        return self.drafter.propose(state, seen, self.target)

    def _play(self, branches: _Branches) -> list[Block_]:
        """The block that each branch emits."""
        chosen, requests = self._chosen(branches)
        draft = self._draft(branches)
        cache = self.target.new_cache(len(requests), 1)
        cache.length = [0] * len(requests)
        scored = self.target.score(branches.context, draft, cache)
        verdict = self.rule(scored, draft, chosen, requests, [1] * len(requests))
        seen = self.target.keep(draft, scored, verdict, cache)
        pairs = zip(seen.ids_BS.tolist(), seen.count, strict=True)
        return [tuple(ids[:count]) for ids, count in pairs]

    def _token(self, branches: _Branches, i: int) -> Tensor:
        return torch.tensor([b[i] if i < len(b) else 0 for b in self._play(branches)])

    def _split(
        self, branches: _Branches, which: int, i: int, answer: Callable[[_Branches], Tensor]
    ) -> _Branches:
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

    def thresholds(self, branches: _Branches) -> Tensor:
        """[R, G]: acceptance test i succeeds below this uniform."""
        R, G = len(branches.context), self.length
        found = torch.zeros(R, G, dtype=torch.float64)
        for i in range(G):
            probe = branches.take(torch.arange(R))
            probe.uniforms[1][:, :i] = 0.0
            probe.uniforms[1][:, i + 1 :] = ALMOST_ONE

            def failed(u: Tensor, probe: _Branches = probe, i: int = i) -> Tensor:
                probe.uniforms[1][:, i] = u
                return torch.tensor([len(block) <= i + 1 for block in self._play(probe)])

            found[:, i] = bisect(failed, R)
        return found

    def _accept(self, branches: _Branches) -> _Branches:
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


# --- (ii) Monte Carlo through decode() -----------------------------------------------------------


def exact_law(
    target: Target, prompt: list[int], length: int, sampling: Sampling
) -> dict[Block_, float]:
    """Every continuation's probability, from the target's plain forward pass."""
    vocab = target.shape.vocab_size
    law: dict[Block_, float] = {(): 1.0}
    for _ in range(length):
        prefixes = list(law)
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.inference_mode():
            p = reference_law(target.logits(target(ids).hidden_BTD[:, -1]), sampling)
        law = {
            (*prefix, token): law[prefix] * p[row, token]
            for row, prefix in enumerate(prefixes)
            for token in range(vocab)
        }
    return law


def p_value(
    target: Target,
    drafter: Any,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    rule: Rule | None = None,
    length: int = 4,
    n: int = 12_000,
    batch: int = 2_000,
) -> float:
    """G-test of the first `length` tokens of n requests, all prompts together, on `exact_law`."""
    laws = [exact_law(target, prompt, length, sampling) for prompt in prompts]
    counts: list[dict[Block_, int]] = [{} for _ in prompts]
    for begin in range(0, n, batch):
        numbers = list(range(begin, min(n, begin + batch)))
        answers = decode(
            target,
            drafter,
            [prompts[i % len(prompts)] for i in numbers],
            sampling=sampling,
            max_new_tokens=length,
            end_ids=frozenset(),
            rule=rule,
            requests=numbers,
        ).answers
        for i, answer in zip(numbers, answers, strict=True):
            seen = counts[i % len(prompts)]
            seen[tuple(answer.ids)] = seen.get(tuple(answer.ids), 0) + 1
    return g_test(
        [c.get(key, 0) for law, c in zip(laws, counts, strict=True) for key in law],
        [p * sum(c.values()) for law, c in zip(laws, counts, strict=True) for p in law.values()],
        groups=len(prompts),
    )


def g_test(observed: list[int], expected: list[float], groups: int = 1) -> float:
    """p-value; cells with an expectation below 5 are merged with their like. 0 if the impossible
    was observed."""
    seen, due = np.array(observed, dtype=float), np.array(expected)
    if seen[due == 0].any():
        return 0.0
    order = np.argsort(due[due > 0], kind="stable")
    seen, due = seen[due > 0][order], due[due > 0][order]
    cells: list[list[float]] = [[0.0, 0.0]]
    for s, d in zip(seen, due, strict=True):
        cells[-1][0] += s
        cells[-1][1] += d
        if cells[-1][1] >= 5:
            cells.append([0.0, 0.0])
    last = cells.pop()
    cells[-1] = [cells[-1][0] + last[0], cells[-1][1] + last[1]]
    o, e = np.array(cells).T
    g = 2 * np.sum(o[o > 0] * np.log(o[o > 0] / e[o > 0]))
    return float(chi2.sf(g, len(cells) - groups))
