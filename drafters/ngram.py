"""Prompt lookup (Saxena 2023): the draft is what followed the last occurrence of the last tokens.

Training-free; the baseline that every trained drafter has to beat.
"""

from dataclasses import dataclass

import torch

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter


@dataclass
class NgramState:
    """Per row: the committed tokens, and for each n-gram where its last occurrence ends."""

    tokens: list[list[int]]
    ends: list[dict[tuple[int, ...], int]]

    def select(self, rows: list[int]) -> None:
        self.tokens = [self.tokens[r] for r in rows]
        self.ends = [self.ends[r] for r in rows]


class Ngram(Drafter):
    """Looks up the last `longest` .. 1 tokens in the request itself, prompt and answer so far.

    It knows nothing but the request, so its first use in a request is cold.
    """

    free: frozenset[str] = frozenset()

    def __init__(self, *, longest: int = 3, draft_length: int = 10) -> None:
        super().__init__()
        if longest < 1 or draft_length < 1:
            raise ValueError(
                f"ngram has longest {longest} and draft_length {draft_length}; "
                "each must be at least 1"
            )
        self.longest, self.draft_length = longest, draft_length

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> NgramState:
        return NgramState([[] for _ in requests], [{} for _ in requests])

    def propose(self, state: NgramState, seen: Seen, target: Target) -> Draft:
        guesses = []
        for row, ids in enumerate(seen.ids_BS.tolist()):
            self._learn(state, row, ids[: seen.count[row]])
            guesses.append(self._continue(state.tokens[row], state.ends[row]))
        size = [len(guess) for guess in guesses]
        padded = [guess + [0] * (max(size) - len(guess)) for guess in guesses]
        ids_BN = torch.tensor(padded, dtype=torch.long, device=seen.ids_BS.device)
        return Draft.chain(ids_BN.reshape(len(size), max(size)), size)

    def _learn(self, state: NgramState, row: int, new: list[int]) -> None:
        """Files every n-gram that ends before the newest token; the newest one is the question."""
        tokens, ends = state.tokens[row], state.ends[row]
        for token in new:
            for n in range(1, min(self.longest, len(tokens)) + 1):
                ends[tuple(tokens[-n:])] = len(tokens)
            tokens.append(token)

    def _continue(self, tokens: list[int], ends: dict[tuple[int, ...], int]) -> list[int]:
        for n in range(min(self.longest, len(tokens)), 0, -1):
            end = ends.get(tuple(tokens[-n:]))
            if end is not None:
                return tokens[end : end + self.draft_length]
        return []
