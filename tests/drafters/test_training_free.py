"""Drafters that train nothing but remember: exactness alone would hide a draft that is always
wrong, a memory that is never used, and one that is never forgotten.
"""

import random
import sys
from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import GREEDY, PROMPTS, SAMPLED, Watching
from growing import paths
from toys import tiny_target

sys.path.append(str(Path(__file__).parents[1] / "decoding"))  # the law and its judge

from frequencies import p_value
from law import TableTarget

from decoding.loop import decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Typical
from drafters.base import Drafter
from drafters.ngram import Ngram
from drafters.suffix import Memory, Node, Suffix, Text, Trie
from drafters.token_recycling import TEMPLATE, TokenRecycling
from drafters.trigram import CAP, GAIN, SUCCESSORS, Place, Trigram, _best, _visit

MAKE: dict[str, Callable[..., Drafter]] = {
    "token_recycling": TokenRecycling,
    "trigram": Trigram,
    "suffix": Suffix,
}
NODES = {"token_recycling": 80, "trigram": 24, "suffix": 24}
NO_END: frozenset[int] = frozenset()
CPU = torch.device("cpu")


def answers(target: Target, drafter: Any, sampling: Sampling = GREEDY, n: int = 24) -> list:
    return decode(
        target, drafter, PROMPTS, sampling=sampling, max_new_tokens=n, end_ids=NO_END
    ).answers


def ids(found: list) -> list[list[int]]:
    return [answer.ids for answer in found]


def drawn(watching: Watching) -> list[tuple]:
    """Every draft of the last decode."""
    rounds = [draft for _, draft in watching.rounds]
    return [(d.ids_BN.tolist(), d.parents_BN.tolist(), d.size) for d in rounds]


def committed(drafter: Drafter, text: list[int], target: Target | None = None) -> Draft:
    """The draft after one request's prompt."""
    target = target or tiny_target(layers=1, vocab=64)
    state = drafter.start(target, target.new_cache(1, 1), GREEDY, [0], 99)
    seen = Seen(torch.tensor([text]), [len(text)], [len(text)], torch.zeros(1, len(text), 1))
    return drafter.propose(state, seen, target)


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_the_targets_own_cold_and_warm(target, family, sampling):
    """One-hot drafts change no token of a sampled answer either."""
    drafter = MAKE[family]()
    due = ids(answers(target, None, sampling))
    cold, warm = (answers(target, drafter, sampling) for _ in range(2))
    assert ids(cold) == ids(warm) == due
    rounds = [sum(len(a.accepted) for a in found) for found in (cold, warm)]
    assert rounds[1] < 0.75 * sum(map(len, due)), "it has been of no use"


class Liar:
    """A drafter whose tokens are all changed to one that is never right."""

    taps = ()

    def __init__(self, drafter: Drafter, token: int) -> None:
        self.drafter, self.token, self.nodes = drafter, token, 0

    def start(self, *about: Any) -> Any:
        return self.drafter.start(*about)

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        draft = self.drafter.propose(state, seen, target)
        draft.ids_BN = torch.full_like(draft.ids_BN, self.token)
        self.nodes += sum(draft.size)
        return draft


@pytest.mark.parametrize("family", MAKE)
def test_a_drafter_that_is_always_wrong_changes_nothing(target, family):
    due = ids(answers(target, None))
    absent = min(set(range(40)) - {token for row in due for token in row})
    liar = Liar(MAKE[family](), absent)
    for _ in range(3):
        found = answers(target, liar)
        assert ids(found) == due
        assert not any(sum(answer.accepted) for answer in found)
    assert liar.nodes > 50


@pytest.mark.parametrize("family", MAKE)
def test_drafts_are_trees_of_the_targets_tokens(target, family):
    """Parents stand before children, siblings differ, and no tree is larger than it may be."""
    watching = Watching(MAKE[family]())
    for _ in range(3):
        answers(target, watching, SAMPLED)
    sizes = set()
    for _, draft in watching.rounds:
        assert draft.law == "one_hot"
        assert draft.ids_BN.shape[1] == max(draft.size) <= NODES[family]
        for row, size in enumerate(draft.size):
            sizes.add(size)
            assert all(0 <= token < 40 for token in draft.ids_BN[row, :size].tolist())
            parents = draft.parents_BN[row, :size].tolist()
            assert all(-1 <= parent < n for n, parent in enumerate(parents))
            assert len(set(paths(draft, row))) == size
    assert len(sizes) > 3
    assert min(sizes) == 0


@pytest.mark.parametrize("family", MAKE)
def test_forgetting_is_as_good_as_new(target, family):
    watching = Watching(MAKE[family]())
    assert watching.drafter.remembers
    seen = []
    for forgets in (True, False, True):
        if forgets:
            watching.drafter.forget()
        watching.rounds = []
        answers(target, watching, SAMPLED)
        seen.append(drawn(watching))
    new = Watching(MAKE[family]())
    answers(target, new, SAMPLED)
    assert seen[0] == seen[2] == drawn(new)
    assert seen[1] != seen[0]


@pytest.mark.parametrize(
    "drafter",
    [Ngram(), TokenRecycling(prefill=False), Trigram(), Suffix(), Suffix(tree=False)],
    ids=["ngram", "token_recycling", "trigram", "suffix", "suffix, chain"],
)
def test_repetition_is_drafted(drafter):
    """A target that counts up to 11 and begins again, after one warm request of its own."""
    table_VV = torch.eye(12, dtype=torch.float64).roll(1, dims=1).clamp(min=1e-9).log()
    target = TableTarget(table_VV)
    for _ in range(2):
        done = decode(target, drafter, [[0, 1, 2]], sampling=GREEDY, max_new_tokens=30)
    assert done.answers[0].ids == [n % 12 for n in range(3, 33)]
    assert done.tokens / done.rounds > 1.5


LAW = {
    "token_recycling": lambda: TokenRecycling(k=3, children=[[3], [2, 1, 0], [1, 0, 1]]),
    "trigram": lambda: Trigram(iterations=10, depth=2, nodes=6),
    "suffix": lambda: Suffix(draft_length=6, offset=1.0),
}


@pytest.mark.parametrize("family", LAW)
def test_joint_law(family):
    """Five tokens are at least two rounds; the same drafter serves all requests, so it is warm."""
    target = tiny_target(vocab=6, width=16, heads=2, seed=5, spread=0.35)
    drafter, prompts = LAW[family](), [[3], [2, 0, 2, 0, 2]]
    p = p_value(target, drafter, prompts, Sampling(1.0), n=2_000, length=5, batch=400)
    assert p > 1e-6, f"G-test p {p:.2g}"
    p = p_value(target, drafter, prompts, Sampling(1.0), n=400, length=5, rule=Typical())
    assert p < 1e-6, f"a lossy rule passed with G-test p {p:.2g}"


# --- token recycling -----------------------------------------------------------------------------


def test_the_memory_has_k_tokens_for_each(target):
    drafter = TokenRecycling(k=4)
    assert drafter.memory_Vk is None
    answers(target, drafter)
    memory_Vk = drafter.memory_Vk
    assert memory_Vk.nbytes == 40 * 4 * memory_Vk.itemsize
    assert not drafter.state_dict()
    answers(tiny_target(vocab=20), drafter)
    assert drafter.memory_Vk.shape == (20, 4), "another vocabulary begins anew"


def by_hand(memory_Vk: torch.Tensor, children: list[list[int]], root: int) -> list[tuple]:
    """The tokens of each known node's path, level by level."""
    found, level = [], [(root,)]
    for counts in children:
        asked = zip(level, counts, strict=True)
        level = [
            (*p, int(memory_Vk[p[-1], r]) if p[-1] >= 0 else -1) for p, n in asked for r in range(n)
        ]
        found += [path[1:] for path in level if path[-1] >= 0]
    return found


@pytest.mark.parametrize("unknown", [0.0, 0.4])
def test_the_tree_is_read_off_the_memory(unknown):
    """Every known token of the published tree and no other; without successors it is a leaf."""
    drafter, rng = TokenRecycling(), torch.Generator().manual_seed(0)
    drafter.memory_Vk = torch.rand(30, 30, generator=rng).topk(8).indices
    drafter.memory_Vk[torch.rand(30, generator=rng) < unknown] = -1
    draft = drafter._grow(torch.arange(30))
    for root in range(30):
        assert paths(draft, root) == by_hand(drafter.memory_Vk, TEMPLATE, root)
    if not unknown:
        assert set(draft.size) == {80}
        levels = [len(path) for path in paths(draft, 7)]
        assert [levels.count(depth) for depth in range(1, 8)] == [8, 21, 25, 15, 8, 3, 0]
        # the places that the authors name as the last of each level
        ranks = [(7,), (7, 0), (5, 0, 0), (3, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0)]
        for last, path in zip((7, 28, 53, 68, 76, 79), ranks, strict=True):
            token = 7
            for rank in path:
                token = int(drafter.memory_Vk[token, rank])
            assert draft.ids_BN[7, last] == token
    else:
        assert 0 in draft.size
        assert len(set(draft.size)) > 5


def test_a_smaller_k_keeps_what_it_can_of_the_tree():
    drafter = TokenRecycling(k=2)
    drafter.memory_Vk = torch.rand(30, 30).topk(2).indices
    draft = drafter._grow(torch.arange(3))
    # of the published tree, the nodes whose ranks are all 0 or 1
    assert set(draft.size) == {2 + 4 + 7 + 6 + 6 + 3}


def test_every_scored_node_teaches_and_the_last_of_equals_wins(target):
    """Replays the rounds of a batch: root and nodes of row after row, in breadth-first order."""
    due: dict[int, list[int]] = {}
    repeats = 0

    class Spying(Watching):
        def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
            nonlocal repeats
            if seen.scored is not None and seen.draft is not None:
                for row, size in enumerate(seen.draft.size):
                    root = self.committed[row][-1]
                    nodes = [root, *seen.draft.ids_BN[row, :size].tolist()]
                    repeats += len(nodes) - len(set(nodes))
                    best = seen.scored.logits_BMV[row].argsort(dim=-1, descending=True)
                    for n, token in enumerate(nodes):
                        due[token] = best[n, :8].tolist()
            return super().propose(state, seen, target)

    drafter = TokenRecycling(prefill=False)
    answers(target, Spying(drafter), SAMPLED, n=12)  # longer, and the first row leaves the batch
    known = {n: row for n, row in enumerate(drafter.memory_Vk.tolist()) if row[0] >= 0}
    assert known == due
    assert len(due) > 15
    assert repeats > 100


def test_the_prompt_teaches_if_it_may(target):
    drafter = TokenRecycling(k=3)
    decode(target, drafter, [PROMPTS[1]], sampling=GREEDY, max_new_tokens=1)
    logits_TV = target.logits(target(torch.tensor([PROMPTS[1]])).hidden_BTD)[0]
    for place, token in enumerate(PROMPTS[1][:-1]):
        assert drafter.memory_Vk[token].tolist() == logits_TV[place].topk(3).indices.tolist()
    assert int((drafter.memory_Vk[:, 0] >= 0).sum()) == len(PROMPTS[1]) - 1
    drafter = TokenRecycling(k=3, prefill=False)
    decode(target, drafter, [PROMPTS[1]], sampling=GREEDY, max_new_tokens=1)
    assert int(drafter.memory_Vk.max()) == -1


# --- adaptive tri-grams --------------------------------------------------------------------------


def test_weights_grow_with_every_reading_to_their_cap():
    """A tri-gram is read with its prompt, then once a round while among the last 16 tokens."""
    drafter, target = Trigram(), tiny_target(layers=1)
    state = drafter.start(target, target.new_cache(1, 1), GREEDY, [0], 999)

    def commit(new: list[int], length: int) -> None:
        seen = Seen(torch.tensor([new]), [len(new)], [length], torch.zeros(1, len(new), 1))
        drafter.propose(state, seen, target)

    commit(list(range(20)), 20)
    assert drafter.weights == {(n, n + 1): {n + 2: GAIN} for n in range(18)}
    commit([20], 21)
    read = {pair: after[pair[1] + 1] / GAIN for pair, after in drafter.weights.items()}
    assert read == {(n, n + 1): pytest.approx(2 if 5 <= n < 18 else 1) for n in range(19)}
    for length in range(22, 120):
        commit([50], length)
    assert drafter.weights[50, 50] == {50: CAP}
    assert max(w for after in drafter.weights.values() for w in after.values()) == CAP


def test_a_pair_keeps_its_heaviest_successors():
    drafter = Trigram()
    drafter._read([1, 2, 60, 1, 2, 60])
    for token in range(3, 3 + SUCCESSORS + 5):
        drafter._read([1, 2, token])
    assert len(drafter.weights[1, 2]) == SUCCESSORS
    assert {60, 3 + SUCCESSORS + 4} < set(drafter.weights[1, 2])


def test_what_always_followed_is_the_whole_draft():
    """Three searched tokens and the likeliest after them."""
    draft = committed(Trigram(), [1, 2, 3, 4, 5, 6, 7, 1, 2])
    assert paths(draft, 0) == [(3,), (3, 4), (3, 4, 5), (3, 4, 5, 6)]
    assert committed(Trigram(), [1, 2, 3, 4]).size == [0]
    assert committed(Trigram(), [1]).size == [0]


def test_the_search_counts_the_weights_on_its_way():
    """By hand on a line, where each visit is worth 1 and the three weights (with .0 for .1, the
    published slip, it would look up the token before); then on a fork, where the heavier side is
    visited more and both stay."""
    line = {(1, 2): {3: 0.5}, (2, 3): {4: 0.25}, (3, 4): {5: 2.0}, (4, 5): {6: 9.0}}
    root = Place((1, 2), 0.0)
    for _ in range(7):
        _visit(root, line, [0.5] * 3)
    places, place = [], root
    while True:
        places.append((place.visits, place.worth))
        if not place.below:
            break
        place = place.below[0]
    assert places == [(7, 7 * 3.75), (7, 7 * 3.75), (6, 6 * 3.75), (5, 5 * 3.75)]
    fork = {(1, 2): {3: 0.1, 4: 0.9}, (2, 3): {5: 0.1}, (2, 4): {6: 0.9}}
    root = Place((1, 2), 0.0)
    for _ in range(40):
        _visit(root, fork, [0.5] * 3)
    assert root.below is not None
    light, heavy = root.below
    assert root.visits == light.visits + heavy.visits == 40
    assert heavy.visits > 4 * light.visits > 0
    assert _best(root, fork, 9) == ([4, 6, 3, 5], [-1, 0, -1, 2])
    assert _best(root, fork, 2) == ([4, 6], [-1, 0])


def test_rollouts_follow_the_weights():
    """Behind the searched places: the worth of many rollouts is its expectation."""
    weights = {(1, 2): {3: 1.0}, (2, 3): {4: 1.0, 5: 3.0}}
    rng = random.Random(0)
    worth = []
    for _ in range(4_000):
        root = Place((1, 2), 0.0)
        _visit(root, weights, [rng.random() for _ in range(2)])
        worth.append(root.worth)
    assert set(worth) == {1 + 1 + 1.0, 1 + 1 + 3.0}
    assert sum(worth) / 4_000 == pytest.approx(2 + 0.25 * 1 + 0.75 * 3, abs=0.06)


# --- suffix lookup -------------------------------------------------------------------------------


def naive(texts: list[list[int]], depth: int) -> dict[tuple[int, ...], int]:
    """How often each string of up to `depth` tokens occurs."""
    counts: dict[tuple[int, ...], int] = {}
    for text in texts:
        for begin, length in product(range(len(text)), range(1, depth + 1)):
            if begin + length <= len(text):
                string = tuple(text[begin : begin + length])
                counts[string] = counts.get(string, 0) + 1
    return counts


def assert_counts(trie: Trie, texts: list[list[int]], tokens: int) -> None:
    due = naive(texts, trie.depth)
    strings = {(*s, t) for s in [(), *due] for t in range(tokens) if len(s) < trie.depth}
    for string in strings:
        node = trie.find(string)
        assert (node.count if node else 0) == due.get(string, 0), string
        if node and node.count > 1 and len(string) == trie.depth:
            assert not node.after(), "nothing is counted behind the deepest"


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_counts_are_those_of_naive_counting(tokens):
    """While a text grows, while others come, and while the oldest go."""
    rng = random.Random(tokens)
    for depth in (2, 3, 6):
        memory, texts = Memory(depth, 40), []
        for _ in range(12):
            texts.append([rng.randrange(tokens) for _ in range(rng.randint(0, 18))])
            memory.add(texts[-1])
            while sum(map(len, texts)) > 40:
                texts.pop(0)
            assert memory.held == sum(map(len, texts)) <= 40
            assert_counts(memory.trie, texts, tokens)
        memory.add([0] * 50)  # longer than the memory
        assert_counts(memory.trie, [[0] * 40], tokens)
        for text in list(memory.answers):
            memory.trie.remove(text)
        assert memory.trie.root.children == {}


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_growing_text_knows_where_its_end_occurred_before(tokens):
    rng = random.Random(tokens)
    trie, text, other = Trie(5), Text(), Memory(5, 1_000)
    for n in range(40):
        trie.extend(text, rng.randrange(tokens))
        ends = [tuple(text.ids[-m:]) for m in range(1, min(5, n + 1) + 1)]
        due = naive([text.ids], 5)
        repeated = [end for end in ends if due[end] > 1]
        assert [node.count for node in text.matches] == [due[end] for end in repeated]
        assert_counts(trie, [text.ids], tokens)
        # the same text against a memory that another one filled; the deepest say nothing
        found = other.trie.matches(text.ids)
        due = naive(list(other.answers), 5)
        assert [node.count for node in found] == [due[e] for e in ends[:4] if e in due]
        other.add([rng.randrange(tokens) for _ in range(4)])


def nodes_of(node: Node) -> int:
    return 1 + sum(map(nodes_of, (node.children or {}).values()))


def test_a_string_that_occurs_once_costs_one_node():
    trie, text = Trie(64), Text()
    for token in range(500):
        trie.extend(text, token)
    assert nodes_of(trie.root) == 501


def likely(texts: list[list[int]], end: list[int], floor: float, depth: int) -> dict[tuple, float]:
    """Every continuation of `end` that is likely enough, with its probability."""
    counts, found, level = naive(texts, depth), {}, {(): 1.0}
    while level:
        above, level = level, {}
        for path, chance in above.items():
            shares = {s[-1]: n for s, n in counts.items() if s[:-1] == (*end, *path)}
            for token, count in shares.items():
                if chance * count / sum(shares.values()) >= floor:
                    level[(*path, token)] = chance * count / sum(shares.values())
        found |= level
    return found


def test_the_likeliest_continuations_are_drafted():
    """Against an exhaustive search: the same number, the same sum of probabilities."""
    rng, compared = random.Random(3), 0
    for _ in range(30):
        texts = [[rng.choice((0, 0, 1, 2)) for _ in range(20)] for _ in range(3)]
        drafter = Suffix(min_probability=0.15, depth=9)
        for text in texts:
            drafter.memory.add(text)
        end = [rng.randrange(3) for _ in range(2)]
        match = drafter.memory.trie.find(end)
        if match is None:
            continue
        due = likely(texts, end, 0.15, 9)
        for limit in (1, 3, 6):
            tokens, parents, score = drafter._likeliest(match, limit)
            draft = Draft(torch.tensor([tokens]), torch.tensor([parents]), [len(tokens)])
            best = sorted(due.values(), reverse=True)[:limit]
            assert [due[path] for path in paths(draft, 0)] == pytest.approx(best)
            assert score == pytest.approx(sum(best))
            compared += len(set(parents)) > 2
        drafter.tree = False
        tokens, parents, _ = drafter._likeliest(match, 4)
        assert parents == list(range(-1, len(tokens) - 1))
        for a, b in pairwise(range(len(tokens) + 1)):
            shares = {
                p[-1]: c for p, c in due.items() if p[:a] == tuple(tokens[:a]) and len(p) == b
            }
            assert shares[tokens[a]] == max(shares.values())
    assert compared > 20


def test_the_draft_with_the_largest_expectation_is_used():
    """Matches of m tokens draft m; what always followed beats what followed half the time, and the
    request beats an equal memory."""
    assert committed(Suffix(), [1, 2, 3, 4, 5, 6, 1, 2, 3]).ids_BN.tolist() == [[4, 5, 6]]
    drafter = Suffix()
    for answer in ([1, 2, 3, 7, 8, 9], [1, 2, 3, 9, 9, 9], [9, 9, 2, 3, 7, 8, 9]):
        drafter.memory.add(answer)
    tree = committed(drafter, [0, 1, 2, 3])
    assert paths(tree, 0)[0] == (7,), "seven followed two times of three, or one of two"
    chosen = committed(drafter, [2, 3, 4, 0, 2, 3])
    assert chosen.ids_BN.tolist() == [[4, 0]], "sure in the request, unsure in the memory"
    drafter.forget()
    drafter.memory.add([2, 3, 5, 6])
    assert committed(drafter, [2, 3, 4, 0, 2, 3]).ids_BN.tolist() == [[4, 0]]
    assert committed(drafter, [4, 0, 2, 3]).ids_BN.tolist() == [[5, 6]]
    drafter.memory.add([2, 3, 7, 7])
    split = committed(drafter, [2, 3, 4, 4, 2, 3, 8, 8, 0, 2, 3])
    assert paths(split, 0) == [(4,), (8,)], "an expectation of 1 in both"
    for answer in ([1, 2, 3, 7, 8], [1, 2, 3, 9, 9], *[[5, 2, 3, 4, 6]] * 20):
        drafter.memory.add(answer)
    shorter = committed(drafter, [0, 1, 2, 3])
    assert shorter.ids_BN.tolist() == [[4, 6]], "sure after two tokens, one of two after three"
    assert committed(Suffix(factor=2.0), [1, 2, 3, 4, 5, 6, 1]).ids_BN.tolist() == [[2, 3]]
    assert committed(Suffix(offset=2.0), [1, 2, 3, 4, 5, 6, 1]).ids_BN.tolist() == [[2, 3, 4]]


def test_only_answers_are_remembered(target):
    """From the next call of decode on, and each row by itself: a batch drafts what its rows draft
    alone."""
    drafter = Suffix()
    watching = Watching(drafter)
    found = answers(target, watching)
    assert not drafter.memory.answers
    committed(drafter, [1], target)
    kept = list(drafter.memory.answers)
    assert [a.ids[: len(k)] for a, k in zip(found, kept, strict=True)] == kept
    assert all(len(k) >= 24 - 1 - a.accepted[-1] for a, k in zip(found, kept, strict=True))
    together = [[a.drafted, a.accepted, a.nodes] for a in found]
    alone = []
    for prompt in PROMPTS:
        drafter.forget()
        (a,) = decode(
            target, drafter, [prompt], sampling=GREEDY, max_new_tokens=24, end_ids=NO_END
        ).answers
        alone.append([a.drafted, a.accepted, a.nodes])
    assert alone == together


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TokenRecycling(k=0), "k 0; it must be at least 1"),
        (lambda: TokenRecycling(children=[]), "has no children"),
        (lambda: TokenRecycling(children=[[2], [1]]), r"children\[1\] .* \[1\]; .* the 2 nodes"),
        (lambda: TokenRecycling(k=3, children=[[4]]), "from 0 to k = 3"),
        (lambda: TokenRecycling(children=[[2], [0, 0]]), "not all 0"),
        (lambda: committed(TokenRecycling(k=65), [1]), "k 65, but tiny has 64 tokens"),
        (lambda: Trigram(nodes=0), "nodes 0; each must be at least 1"),
        (lambda: Suffix(min_probability=0.0), "min_probability 0.0; expected .* above 0"),
        (lambda: Suffix(factor=0.0), "it never drafts"),
        (lambda: Suffix(depth=1), "depth 1"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(make, says):
    with pytest.raises(ValueError, match=says):
        make()
