"""Drafters that the loop must survive, and the targets to try them on."""

import random
from collections.abc import Callable
from typing import Any

import torch
from toys import sharpen

from decoding.loop import Decoded, decode
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.lm import LM
from drafters.ngram import Ngram

GREEDY = Sampling()
SAMPLED = Sampling(temperature=1.0, seed=3)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 8, 9, 8, 9]]  # one token, ragged, and one to look up in
NO_END: frozenset[int] = frozenset()


class Scripted:
    """Drafts from the true continuation of each request, as `guess` makes of it."""

    taps = ()

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
