"""The cache holds the committed tokens and nothing else, after every round."""

import numpy as np
import pytest
import torch
from scripted import DRAFTERS, GREEDY, NO_END, PROMPTS, SAMPLED, ids_of, plain
from torch import Tensor
from toys import tiny_model

from decoding.cache import Cache
from decoding.loop import decode
from decoding.round import Draft, Scored, Seen, Verdict
from decoding.target import Target
from drafters.lm import LM


class WatchedCache(Cache):
    """A cache that knows which tokens it should hold."""

    committed: list[list[int]]

    def select(self, rows: list[int]) -> None:
        super().select(rows)
        self.committed = [self.committed[r] for r in rows]


class Watched(Target):
    """Checks in every round that cache and scores are what fresh forward passes give."""

    rounds = 0

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return WatchedCache(self.shape.layers, rows, self.capacity or capacity)

    capacity: int | None = None

    def prefill(self, ids_BS: Tensor, count: list[int], cache: Cache, taps=()) -> Seen:
        seen = super().prefill(ids_BS, count, cache, taps)
        assert isinstance(cache, WatchedCache)
        cache.committed = [ids[:n] for ids, n in zip(ids_BS.tolist(), count, strict=True)]
        self.check(seen, cache)
        return seen

    def score(self, root_B: Tensor, draft: Draft, cache: Cache, taps=()) -> Scored:
        scored = super().score(root_B, draft, cache, taps)
        assert isinstance(cache, WatchedCache)
        for b, committed in enumerate(cache.committed):
            assert root_B[b] == committed[-1]
            self.same(scored.logits_BMV[b, 0], committed)
            for n in range(draft.size[b]):
                path, node = [], n
                while node >= 0:
                    path.append(int(draft.ids_BN[b, node]))
                    node = int(draft.parents_BN[b, node])
                self.same(scored.logits_BMV[b, n + 1], committed + path[::-1])
        return scored

    def keep(self, draft: Draft, scored: Scored, verdict: Verdict, cache: Cache) -> Seen:
        seen = super().keep(draft, scored, verdict, cache)
        assert isinstance(cache, WatchedCache)
        for b, path in enumerate(verdict.path):
            new = [int(draft.ids_BN[b, n]) for n in path] + [verdict.next[b]]
            assert seen.ids_BS[b, : seen.count[b]].tolist() == new
            cache.committed[b] += new
        self.check(seen, cache)
        self.rounds += 1
        return seen

    def check(self, seen: Seen, cache: WatchedCache) -> None:
        lengths = [len(ids) for ids in cache.committed]
        assert seen.length == lengths
        assert cache.length == [n - 1 for n in lengths]
        for b, committed in enumerate(cache.committed):
            if len(committed) == 1:
                continue
            ids = torch.tensor([committed])
            fresh = super().new_cache(1, len(committed))
            super().prefill(ids, [len(committed)], fresh)
            for mine, due in zip(
                cache._keys + cache._values, fresh._keys + fresh._values, strict=True
            ):
                held = mine[b, :, : cache.length[b]]
                torch.testing.assert_close(held, due[0, :, : cache.length[b]], atol=1e-9, rtol=0)
            # each new token stands beside the state that predicted it
            states = self(ids).hidden_BTD[0]
            for s in range(seen.count[b]):
                at = len(committed) - seen.count[b] + s
                due = states[at - 1] if at else torch.zeros_like(states[0])
                torch.testing.assert_close(seen.hidden_BSD[b, s], due, atol=1e-9, rtol=0)

    def same(self, logits_V: Tensor, ids: list[int]) -> None:
        due = self.logits(self(torch.tensor([ids])).hidden_BTD[0, -1])
        torch.testing.assert_close(logits_V, due, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [None, "random, stops", "target", "ngram", "partly", "tree"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_the_cache_contract(name, sampling):
    """After every round: length is committed - 1, keys equal a fresh prefill's (after paths with
    gaps too), every node's logits equal a forward pass over its own path alone."""
    target = Watched(tiny_model(heads=4, kv_heads=2, seed=0))
    truth = plain(target, PROMPTS, 14, sampling=sampling)
    drafter = DRAFTERS[name](target, dict(enumerate(truth))) if name else None
    end = truth[0][6]  # one row finishes early
    target.rounds = 0
    decode(target, drafter, PROMPTS, sampling=sampling, max_new_tokens=14, end_ids=frozenset({end}))
    assert target.rounds > 2


@pytest.mark.parametrize("name", ["random", "tree"])
def test_a_cache_that_outgrows_its_room(name, monkeypatch):
    """Growing keeps what was there, in every round anew."""
    monkeypatch.setattr("decoding.cache.GROWTH", 1)
    target = Watched(tiny_model(seed=10))
    truth = plain(target, PROMPTS, 10)
    target.capacity = 1
    drafter = DRAFTERS[name](target, dict(enumerate(truth)))
    out = decode(target, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=10, end_ids=NO_END)
    assert ids_of(out) == truth


def test_a_cache_grows_far_beyond_its_room(llama):
    """Longer than one growth step, several times."""

    class Narrow(Target):
        def new_cache(self, rows: int, capacity: int) -> Cache:
            return Cache(self.shape.layers, rows, 3)

    model = tiny_model(seed=6, tied=False, max_positions=900)
    truth = plain(Target(model), PROMPTS, 600)
    drafter = LM.around(model, draft_length=12)
    out = decode(
        Narrow(model), drafter, PROMPTS, sampling=GREEDY, max_new_tokens=600, end_ids=NO_END
    )
    assert ids_of(out) == truth


def test_cache_select_and_gather_move_what_they_should():
    """Row by row, slot by slot: distinct numbers show any entry that stands in the wrong place."""
    rows, heads, dim, rng = 3, 2, 4, np.random.default_rng(0)
    cache = Cache(1, rows, 4)
    held: list[list[np.ndarray]] = [[] for _ in range(rows)]

    def run(tokens: int, path: list[list[int]]) -> None:
        keys = torch.from_numpy(rng.random((len(held), heads, tokens, dim)))
        cache.open(tokens, torch.device("cpu"))
        cache.update(keys, -keys, 0)
        cache.keep(path, is_chain=False)
        for b, nodes in enumerate(path):
            held[b] += [keys[b, :, n].numpy() for n in (0, *(n + 1 for n in nodes))]

    def check() -> None:
        assert cache.length == [len(row) for row in held]
        for b, row in enumerate(held):
            for slot, entry in enumerate(row):
                np.testing.assert_array_equal(cache._keys[0][b, :, slot], entry)
                np.testing.assert_array_equal(cache._values[0][b, :, slot], -entry)

    run(1, [[], [], []])
    run(6, [[1, 3], [0, 1, 4], []])
    check()
    run(5, [[0, 3], [2], [1, 2, 3]])
    check()
    cache.select([2, 0])
    held = [held[2], held[0]]
    check()
    run(300, [[0, 250], list(range(5, 290))])
    check()
