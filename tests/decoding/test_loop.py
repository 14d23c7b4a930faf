"""Whatever is drafted, the answer is the target's own, and the cache holds what it should."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import sharpen, tiny_model, tiny_target
from torch import Tensor

from decoding.cache import Cache
from decoding.loop import Decoded, decode
from decoding.round import Draft, Scored, Seen, Verdict
from decoding.sampling import Sampling
from decoding.target import Pretrained, Target
from decoding.verify import Block, Chain
from drafters.lm import LM
from drafters.ngram import Ngram

GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.0, seed=3)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]  # one token, ragged, and one to look up in
NO_END: frozenset[int] = frozenset()


# --- drafters that the loop must survive ---------------------------------------------------------


class Scripted:
    """Drafts from the true continuation of each request, as `guess` makes of it."""

    def __init__(self, truth: dict[int, list[int]], guess: Callable[..., Draft]) -> None:
        self.truth, self.guess = truth, guess

    def start(self, target, cache, sampling, requests, max_len) -> "Scripted":
        self.requests = list(requests)
        self.begin: list[int] | None = None
        return self

    def select(self, rows: list[int]) -> None:
        self.requests = [self.requests[r] for r in rows]
        assert self.begin is not None
        self.begin = [self.begin[r] for r in rows]

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        if self.begin is None:
            self.begin = list(seen.length)
        done = [n - b for n, b in zip(seen.length, self.begin, strict=True)]
        coming = [
            (self.truth[r][n:] + [0] * 40)[:40] for r, n in zip(self.requests, done, strict=True)
        ]
        return self.guess(coming, target.shape.vocab_size, seen)


def wrong(coming: list[list[int]], vocab: int, seen: Seen) -> Draft:
    """Never right: the worst drafter there is."""
    return Draft.chain(
        torch.tensor([[(t + 1) % vocab for t in row[:4]] for row in coming]), [4] * len(coming)
    )


def partly(coming: list[list[int]], vocab: int, seen: Seen) -> Draft:
    """Right for as many tokens as the committed length says, modulo 5; sizes differ, some are 0."""
    rows, size = [], []
    for row, n in zip(coming, seen.length, strict=True):
        right = n % 5
        rows.append([t if i < right else (t + 1) % vocab for i, t in enumerate(row[:5])])
        size.append((n * 7 + 3) % 6)
    return Draft.chain(torch.tensor(rows), size)


def tree(coming: list[list[int]], vocab: int, seen: Seen) -> Draft:
    """Random trees with siblings (twins too), rows of different sizes, and the truth along one path
    that is not contiguous."""
    N, rows, parents, sizes = 9, [], [], []
    for row, n in zip(coming, seen.length, strict=True):
        rng = random.Random(n * 31 + row[0])
        parent = [rng.randrange(-1, i) for i in range(N)]
        ids = [rng.randrange(vocab) for _ in range(N)]
        depth = 0
        place = -1
        for i in range(N):  # lay the truth along the last children
            if parent[i] == place and rng.random() < 0.7:
                ids[i], place, depth = row[depth], i, depth + 1
        rows.append(ids)
        parents.append(parent)
        sizes.append(rng.choice([0, 3, N, N, N]))
    return Draft(torch.tensor(rows), torch.tensor(parents), sizes)


def random_lm(target: Target, **drafting: Any) -> LM:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lm = LM(target.shape, layers=1, width=64, **drafting)
    return sharpen(lm.to(target.dtype), 8).eval()


def ids_of(result: Decoded) -> list[list[int]]:
    return [answer.ids for answer in result.answers]


def plain(target: Target, prompts: list[list[int]], n: int = 24, **options: Any) -> list[list[int]]:
    options = {"sampling": GREEDY, "end_ids": NO_END, **options}
    return ids_of(decode(target, None, prompts, max_new_tokens=n, **options))


DRAFTERS: dict[str, Callable[[Target, dict[int, list[int]]], Any]] = {
    "random": lambda target, truth: random_lm(target, draft_length=4),
    "random, stops": lambda target, truth: random_lm(target, draft_length=6, stop_below=0.2),
    "random, argmax": lambda target, truth: random_lm(target, draft_length=3, sample=False),
    "target": lambda target, truth: LM.around(target.model, draft_length=4),
    "target, stops": lambda target, truth: LM.around(target.model, draft_length=4, stop_below=0.4),
    "ngram": lambda target, truth: Ngram(longest=3, draft_length=5),
    "wrong": lambda target, truth: Scripted(truth, wrong),
    "partly": lambda target, truth: Scripted(truth, partly),
    "tree": lambda target, truth: Scripted(truth, tree),
}
TARGETS = {
    "llama": {"seed": 10},
    "grouped, untied": {"heads": 4, "kv_heads": 2, "tied": False, "seed": 2},
    "one layer": {"layers": 1, "seed": 3},
}


@pytest.fixture(scope="module", params=TARGETS)
def target(request) -> Target:
    return tiny_target(**TARGETS[request.param])


@pytest.fixture(scope="module")
def llama() -> Target:
    """Its greedy answers hardly repeat a token."""
    return tiny_target(seed=6, tied=False)


def test_plain_decoding_is_what_transformers_generates(target):
    """The loop's own baseline, beside another implementation."""
    for prompt, ids in zip(PROMPTS, plain(target, PROMPTS), strict=True):
        out = target.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        assert out[0, len(prompt) :].tolist() == ids


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_answers_are_the_targets_own(target, name):
    truth = dict(enumerate(plain(target, PROMPTS)))
    assert min(len(set(ids)) for ids in truth.values()) > 8, "a constant answer proves nothing"
    drafter = DRAFTERS[name](target, truth)
    options = {"sampling": GREEDY, "max_new_tokens": 24, "end_ids": NO_END}
    assert ids_of(decode(target, drafter, PROMPTS, **options)) == list(truth.values())
    for number, prompt in enumerate(PROMPTS):
        alone = decode(target, drafter, [prompt], requests=[number], **options)
        assert ids_of(alone) == [truth[number]]
        (answer,) = alone.answers  # nothing is lost in the accounts
        assert alone.rounds == len(answer.drafted) == len(answer.accepted)
        assert (
            sum(answer.accepted) + alone.rounds >= 24 > sum(answer.accepted[:-1]) + alone.rounds - 1
        )
        assert all(a <= d for a, d in zip(answer.accepted, answer.drafted, strict=True))


@pytest.mark.parametrize("name", ["random", "target", "partly", "tree", "ngram"])
@pytest.mark.parametrize("limit", range(1, 13))
def test_limits_that_end_inside_a_block(llama, name, limit):
    truth = plain(llama, PROMPTS, 12)
    drafter = DRAFTERS[name](llama, dict(enumerate(truth)))
    out = decode(llama, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=limit, end_ids=NO_END)
    assert ids_of(out) == [ids[:limit] for ids in truth]
    assert not any(answer.ended for answer in out.answers)
    assert out.tokens == 3 * limit


@pytest.mark.parametrize("name", ["random", "target", "partly", "tree", "ngram"])
def test_an_end_at_every_offset_of_a_block(llama, name):
    """Nothing stands after an end id, wherever in a block it falls and whatever was accepted."""
    truth = plain(llama, PROMPTS, 13)
    assert min(len(set(ids)) for ids in truth) >= 12, "ends must fall on many offsets"
    drafter = DRAFTERS[name](llama, dict(enumerate(truth)))
    lengths = set()
    for end in {ids[k] for ids in truth for k in range(13)}:
        due = [ids[: ids.index(end) + 1] if end in ids else ids for ids in truth]
        ends = frozenset({end})
        out = decode(llama, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=13, end_ids=ends)
        assert ids_of(out) == due
        assert [a.ended for a in out.answers] == [ids[-1] == end for ids in due]
        lengths |= {len(ids) for ids in due}
    assert lengths == set(range(1, 14))


def test_end_ids_come_from_the_target(llama):
    ids = plain(llama, PROMPTS[:1], 8)[0]
    target = tiny_target(seed=6, tied=False)
    target.model.generation_config.eos_token_id = [ids[4], 63]
    assert target.end_ids == {ids[4], 63}
    out = decode(target, None, PROMPTS[:1], sampling=GREEDY, max_new_tokens=8)
    assert ids_of(out) == [ids[: ids.index(ids[4]) + 1]]


def test_the_target_as_its_own_drafter_is_always_right(llama):
    """Fewer accepted tokens mean that drafter and target read different prefixes."""
    for sampling in (GREEDY, SAMPLED, Sampling(0.8, top_k=9, top_p=0.9)):
        for rule in (Chain(), Block()):
            drafter = LM.around(llama.model, draft_length=4)
            out = decode(
                llama,
                drafter,
                PROMPTS,
                sampling=sampling,
                max_new_tokens=25,
                end_ids=NO_END,
                rule=rule,
            )
            assert out.rounds == 5
            assert all(answer.accepted == [4] * 5 for answer in out.answers)


def test_a_wrong_drafter_costs_a_round_a_token(llama):
    truth = dict(enumerate(plain(llama, PROMPTS)))
    out = decode(
        llama, Scripted(truth, wrong), PROMPTS, sampling=GREEDY, max_new_tokens=24, end_ids=NO_END
    )
    assert out.rounds == 24
    assert all(answer.accepted == [0] * 24 for answer in out.answers)


def test_trees_are_worth_something(llama):
    """Were paths through a tree never taken, its greedy test would prove nothing."""
    truth = dict(enumerate(plain(llama, PROMPTS)))
    taken: list[list[int]] = []

    class Watching(Target):
        def keep(self, draft, scored, verdict, cache):
            taken.extend(verdict.path)
            return super().keep(draft, scored, verdict, cache)

    watching = Watching(llama.model)
    decode(
        watching, Scripted(truth, tree), PROMPTS, sampling=GREEDY, max_new_tokens=24, end_ids=NO_END
    )
    assert sum(nodes != list(range(len(nodes))) for nodes in taken) >= 5
    assert max(map(len, taken)) >= 2


# --- sampled answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random, argmax", "ngram", "wrong", "partly", "tree"])
def test_one_hot_drafts_do_not_change_a_sampled_answer(target, name):
    """The target's own draws are keyed by position alone, so the answer is plain sampling's."""
    for sampling in (SAMPLED, Sampling(0.7, top_k=8, top_p=0.9, seed=5)):
        truth = plain(target, PROMPTS, sampling=sampling)
        assert truth != plain(target, PROMPTS)
        drafter = DRAFTERS[name](target, dict(enumerate(truth)))
        out = decode(target, drafter, PROMPTS, sampling=sampling, max_new_tokens=24, end_ids=NO_END)
        assert ids_of(out) == truth


@pytest.mark.parametrize("name", [None, "random", "random, stops", "target", "ngram"])
def test_an_answer_does_not_depend_on_its_batch(target, name):
    drafter = DRAFTERS[name](target, {}) if name else None
    options = {"sampling": SAMPLED, "max_new_tokens": 20, "end_ids": NO_END}
    numbers = [12, 5, 900]
    together = ids_of(decode(target, drafter, PROMPTS, requests=numbers, **options))
    for prompt, number, ids in zip(PROMPTS, numbers, together, strict=True):
        assert ids_of(decode(target, drafter, [prompt], requests=[number], **options)) == [ids]
    order = [2, 0, 1]
    shuffled = decode(
        target,
        drafter,
        [PROMPTS[i] for i in order],
        requests=[numbers[i] for i in order],
        **options,
    )
    assert ids_of(shuffled) == [together[i] for i in order]


def test_requests_and_seeds_give_different_answers(llama):
    prompts = [PROMPTS[1]] * 6
    drafter = random_lm(llama)
    options = {"max_new_tokens": 12, "end_ids": NO_END}
    out = ids_of(decode(llama, drafter, prompts, sampling=SAMPLED, **options))
    assert len({tuple(ids) for ids in out}) == 6
    again = ids_of(decode(llama, drafter, prompts, sampling=SAMPLED, **options))
    other = ids_of(decode(llama, drafter, prompts, sampling=Sampling(1.0, seed=4), **options))
    assert again == out != other


def test_a_finished_row_leaves_the_others_alone(target):
    """Rows that end early are taken out of caches and states; the rest must not move."""
    for sampling in (GREEDY, SAMPLED):
        for name in ("random", "target", "ngram"):
            drafter = DRAFTERS[name](target, {})
            options = {"sampling": sampling, "max_new_tokens": 20}
            free = ids_of(decode(target, drafter, PROMPTS, end_ids=NO_END, **options))
            for end in (free[0][2], free[1][5], free[2][9]):
                due = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
                out = decode(target, drafter, PROMPTS, end_ids=frozenset({end}), **options)
                assert ids_of(out) == due


# --- the cache's contract ------------------------------------------------------------------------


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

    def prefill(self, ids_BS: Tensor, count: list[int], cache: Cache) -> Seen:
        seen = super().prefill(ids_BS, count, cache)
        assert isinstance(cache, WatchedCache)
        cache.committed = [ids[:n] for ids, n in zip(ids_BS.tolist(), count, strict=True)]
        self.check(seen, cache)
        return seen

    def score(self, root_B: Tensor, draft: Draft, cache: Cache) -> Scored:
        scored = super().score(root_B, draft, cache)
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


# --- trained models, where they are --------------------------------------------------------------


@pytest.fixture(scope="module", params=["koen-17m", "stories260k"])
def trained(request, shared) -> tuple[Target, list[list[int]]]:
    folder = shared / "models" / request.param
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    pretrained = Pretrained(str(folder), dtype="float32")
    texts = {
        "koen-17m": ["대한민국의 수도는", "오늘 날씨가 좋아서 나는", "The film was so"],
        "stories260k": ["Once upon a time", "Lily and Tom went to the", "The dog"],
    }[request.param]
    tokenizer = pretrained.tokenizer()
    return pretrained.load(), [tokenizer(text).input_ids for text in texts]


@pytest.mark.parametrize("name", ["random", "target", "ngram", "tree"])
def test_greedy_answers_of_trained_models(trained, name):
    """fp32, no tolerance: one near-tie decided otherwise fails."""
    target, prompts = trained
    truth = plain(target, prompts, 32, end_ids=None)
    drafter = DRAFTERS[name](target, dict(enumerate(truth)))
    assert ids_of(decode(target, drafter, prompts, sampling=GREEDY, max_new_tokens=32)) == truth
    alone = decode(target, drafter, prompts[:1], sampling=GREEDY, max_new_tokens=32)
    assert ids_of(alone) == truth[:1]


def test_a_trained_target_as_its_own_drafter(trained):
    target, prompts = trained
    for sampling in (GREEDY, SAMPLED):
        drafter = LM.around(target.model, draft_length=4)
        out = decode(
            target, drafter, prompts[:1], sampling=sampling, max_new_tokens=25, end_ids=NO_END
        )
        assert out.answers[0].accepted == [4] * 5


# --- sentences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "limit", "words"),
    [
        ([[1, 2]], 0, "max_new_tokens is 0; it must be at least 1"),
        ([[1], []], 4, "every prompt needs at least one token"),
        ([], 4, "every prompt needs at least one token"),
        (
            [[1] * 500],
            13,
            "a prompt of 500 tokens and 13 new ones exceed the 512 positions of tiny",
        ),
    ],
)
def test_requests_that_cannot_be_met(llama, prompts, limit, words):
    with pytest.raises(ValueError, match=words):
        decode(llama, None, prompts, sampling=GREEDY, max_new_tokens=limit)


def test_drafting_up_to_the_last_position(llama):
    """A draft may reach past the positions that target and drafter have; the answer may not."""
    prompt = [[3] * 500]
    truth = plain(llama, prompt, 12)
    for name in ("random", "target", "ngram"):
        out = decode(
            llama,
            DRAFTERS[name](llama, {}),
            prompt,
            sampling=GREEDY,
            max_new_tokens=12,
            end_ids=NO_END,
        )
        assert ids_of(out) == truth


def test_a_request_longer_than_the_drafter_reads(llama):
    short = LM.around(tiny_model(max_positions=16))
    with pytest.raises(ValueError, match="requests of 21 tokens exceed the drafter's 16 positions"):
        decode(llama, short, [[1]], sampling=GREEDY, max_new_tokens=20)


def test_targets_whose_cache_cannot_be_cropped_are_refused():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
    )
    with pytest.raises(ValueError, match="cannot be cropped"):
        Target(MistralForCausalLM(config))
