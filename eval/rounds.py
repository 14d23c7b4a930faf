"""Rounds of the decode loop, timed part by part, in turn.

Shapes: B batch, N drafted nodes, S committed tokens.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from decoding.loop import Proposer, decode
from decoding.round import Draft, Seen, Verdict
from decoding.sampling import Dice, Sampling
from decoding.sharded import agreed
from decoding.target import Target
from decoding.verify import default_rule

CONTEXT = 64  # committed tokens before the rounds that are timed
ROOM = 64  # positions behind them for what the rounds commit and draft
TURNS, SECONDS = (3, 25), 6.0  # least and most turns, and about how long they may take
GREEDY = Sampling()

K = TypeVar("K")
Subject = Callable[[], tuple[float, ...]]
"""Goes once; returns the milliseconds that it took, by part."""


class Round:
    """The next round of `rows` requests that decode together, timed in two parts: drafting, and
    the target's scoring with verification and keeping, as decoding/loop.py does them.

    What stands of a draft is scripted, from nothing to the longest path in turn and another number
    in each row: the times of an untrained drafter are those of a trained one of its size.
    """

    def __init__(
        self,
        model: Target,
        drafter: Proposer,
        rows: int = 1,
        context: int = CONTEXT,
        sampling: Sampling = GREEDY,
    ) -> None:
        self.model, self.drafter, self.sampling = model, drafter, sampling
        self.context = max(2, min(context, model.shape.max_positions - ROOM))
        self.requests = list(range(rows))
        self.seen: Seen | None = None
        self.tokens = self.turn = 0

    def __call__(self) -> tuple[float, float]:
        """Milliseconds of drafting, and of the target's share."""
        if self.seen is None or max(self.seen.length) > self.context + ROOM // 2:
            self.begin()
        return self._round()

    @torch.inference_mode()
    def begin(self) -> tuple[float, float]:
        """Begins anew; milliseconds of the target's prefill, and of the drafter's with its first
        draft."""
        model, rows = self.model, len(self.requests)
        ids_B1 = torch.arange(rows, device=model.device)[:, None]
        ids_BS = (ids_B1 + 7 * torch.arange(self.context, device=model.device)) % (
            model.shape.vocab_size
        )
        count = [max(2, self.context - b % 4) for b in self.requests]  # ragged, as prompts are
        begin = self._now()
        self.cache = model.new_cache(rows, self.context + ROOM)
        self.seen = model.prefill(ids_BS, count, self.cache, self.drafter.taps)
        prefilled = self._now()
        room = self.context + ROOM
        self.state = self.drafter.start(model, self.cache, self.sampling, self.requests, room)
        started = self._now()
        drafting, _ = self._round()
        return (prefilled - begin) * 1000, (started - prefilled) * 1000 + drafting

    @torch.inference_mode()
    def _round(self) -> tuple[float, float]:
        assert self.seen is not None, "a round follows a beginning"
        model, seen, device = self.model, self.seen, self.model.device
        begin = self._now()
        draft = self.drafter.propose(self.state, seen, model)
        drafted = self._now()
        rows = torch.arange(len(seen.count), device=device)
        last = torch.tensor(seen.count, device=device) - 1
        scored = model.score(seen.ids_BS[rows, last], draft, self.cache, self.drafter.taps)
        rule = default_rule(draft.law)
        verdict = rule(scored, draft, Dice(self.sampling, self.requests, seen.length))
        judged = self._now()
        script = self._script(draft, verdict)
        resumed = self._now()
        self.seen = model.keep(draft, scored, script, self.cache)
        verifying = judged - drafted + self._now() - resumed
        self.tokens, self.turn = draft.ids_BN.shape[1] + 1, self.turn + 1
        return (drafted - begin) * 1000, verifying * 1000

    def _script(self, draft: Draft, verdict: Verdict) -> Verdict:
        parents = draft.parents_BN.tolist()
        paths = [longest(row[:n]) for row, n in zip(parents, draft.size, strict=True)]
        kept = [path[: (self.turn + b) % (len(path) + 1)] for b, path in enumerate(paths)]
        return Verdict(kept, verdict.next)

    def _now(self) -> float:
        return now(self.model)


class Fixed:
    """Drafts `tokens` tokens that take no time to find, so that a round is the target's alone."""

    taps: tuple[int, ...] = ()

    def __init__(self, tokens: int, tree: bool = False) -> None:
        self.tokens, self.is_chain = tokens, not (tree and tokens)

    def start(self, *_: object) -> "Fixed":
        return self

    def select(self, rows: list[int]) -> None:
        """It remembers nothing of them."""

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft:
        B = len(seen.count)
        ids_BN = torch.ones(B, self.tokens, dtype=torch.long, device=target.device)
        draft = Draft.chain(ids_BN, [self.tokens] * B)
        draft.is_chain = self.is_chain
        return draft


class Overhead:
    """What a round of the decode loop takes besides drafting and the target's share."""

    def __init__(self, model: Target, rows: int = 1, rounds: int = 16) -> None:
        self.model, self.rows, self.rounds = model, rows, rounds

    def __call__(self) -> tuple[float]:
        done = decode(  # a prompt of one token has no prefill
            self.model,
            None,
            [[1]] * self.rows,
            sampling=Sampling(),
            max_new_tokens=self.rounds,
            end_ids=frozenset(),
        )
        seconds = done.seconds - done.draft_seconds - done.verify_seconds
        return (1000 * seconds / done.rounds,)


def in_turn(
    subjects: Mapping[K, Subject], said: str, model: Target | None = None
) -> dict[K, tuple[float, ...]]:
    """The median of each part over turns in which each subject goes once. The first turn warms up
    and is left out; it decides how many follow, on all ranks alike where `model` is sharded."""
    least, most = TURNS
    times: dict[K, list[tuple[float, ...]]] = {name: [] for name in subjects}
    begin = time.perf_counter()
    with tqdm(total=least + 1, desc=said, unit="turn", leave=False) as bar:
        for subject in subjects.values():
            subject()
        turns = SECONDS / max(time.perf_counter() - begin, 1e-6)
        turns = turns if model is None else agreed(model, turns)
        bar.total = 1 + int(min(max(turns, least), most))
        bar.update()
        while bar.n < bar.total:
            for name, subject in subjects.items():
                times[name].append(subject())
            bar.update()
    return {name: tuple(map(median, zip(*turn, strict=True))) for name, turn in times.items()}


def longest(parents: list[int]) -> list[int]:
    """The nodes of a tree's longest path, root side first; the first such path."""
    depth: list[int] = []
    for parent in parents:
        depth.append(1 + (depth[parent] if parent >= 0 else 0))
    node, path = depth.index(max(depth)) if depth else -1, []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def now(model: Target) -> float:
    """Seconds, after the device has finished what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
