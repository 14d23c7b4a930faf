"""Prompt lookup (Saxena 2023): the draft is what followed an earlier occurrence of the last tokens.

Training-free; the baseline that every trained drafter has to beat.
Shapes: B batch, S newly committed tokens, N drafted nodes.
"""

from dataclasses import dataclass

import torch

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter

Guess = tuple[list[int], list[int]]
"""One row's nodes: their ids and their parents (-1: the root)."""

CHOICES = {"occurrence": ("first", "last"), "continuation": ("full", "partial")}


@dataclass
class NgramState:
    """Per row: the committed tokens, and for each n-gram where the occurrence to copy ends."""

    tokens: list[list[int]]
    ends: list[dict[tuple[int, ...], int]]

    def select(self, rows: list[int]) -> None:
        self.tokens = [self.tokens[r] for r in rows]
        self.ends = [self.ends[r] for r in rows]


class Ngram(Drafter):
    """Looks up the last `longest` .. 1 tokens in the request itself, prompt and answer so far, and
    copies the `draft_length` tokens that followed.

    occurrence: the `first` (as published) or the `last` one. continuation: `full` (as published)
    counts only occurrences that `draft_length` tokens follow, `partial` those that any follow. The
    published code guesses token 100 on a miss; here a miss is no draft. It knows nothing but the
    request, so its first use in a request is cold.
    """

    free: frozenset[str] = frozenset()

    def __init__(
        self,
        *,
        longest: int = 3,
        draft_length: int = 10,
        occurrence: str = "last",
        continuation: str = "partial",
    ) -> None:
        super().__init__()
        if longest < 1 or draft_length < 1:
            raise ValueError(
                f"ngram has longest {longest} and draft_length {draft_length}; "
                "each must be at least 1"
            )
        for name, value in (("occurrence", occurrence), ("continuation", continuation)):
            if value not in CHOICES[name]:
                raise ValueError(
                    f"ngram has {name} {value!r}; it must be {' or '.join(CHOICES[name])}"
                )
        self.longest, self.draft_length = longest, draft_length
        self.occurrence, self.continuation = occurrence, continuation

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> NgramState:
        return NgramState([[] for _ in requests], [{} for _ in requests])

    def propose(self, state: NgramState, seen: Seen, target: Target) -> Draft:
        guesses = []
        for row, ids in enumerate(seen.ids_BS.tolist()):
            self._learn(state, row, ids[: seen.count[row]])
            copied = self._continue(state.tokens[row], state.ends[row])
            guesses.append((copied, list(range(-1, len(copied) - 1))))
        return joined(guesses, seen.ids_BS.device)

    def _learn(self, state: NgramState, row: int, new: list[int]) -> None:
        """Files every n-gram as soon as enough tokens follow it; the newest is the question."""
        tokens, ends = state.tokens[row], state.ends[row]
        followed = self.draft_length if self.continuation == "full" else 1
        for token in new:
            tokens.append(token)
            end = len(tokens) - followed
            for n in range(1, min(self.longest, end) + 1):
                gram = tuple(tokens[end - n : end])
                if self.occurrence == "last" or gram not in ends:
                    ends[gram] = end

    def _continue(self, tokens: list[int], ends: dict[tuple[int, ...], int]) -> list[int]:
        for n in range(min(self.longest, len(tokens)), 0, -1):
            end = ends.get(tuple(tokens[-n:]))
            if end is not None:
                return tokens[end : end + self.draft_length]
        return []


def joined(guesses: list[Guess], device: torch.device) -> Draft:
    """The rows' guesses as one draft of law one-hot, padded on the right to ids_BN; a chain where
    every row is one."""
    size = [len(ids) for ids, _ in guesses]
    N = max(size)
    ids_BN = torch.tensor([ids + [0] * (N - len(ids)) for ids, _ in guesses], dtype=torch.long)
    ids_BN = ids_BN.reshape(len(size), N).to(device)
    if all(parents == list(range(-1, len(parents) - 1)) for _, parents in guesses):
        return Draft.chain(ids_BN, size)
    parents_BN = torch.tensor([parents + [-1] * (N - len(parents)) for _, parents in guesses])
    return Draft(ids_BN, parents_BN, size)
