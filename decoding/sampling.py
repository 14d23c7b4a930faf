"""How a token is chosen from logits, with randomness that depends on the request alone.

Shapes: B batch, N draws, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a uniform number decides; part of its key, so that no number decides two things."""

    DRAFT = 1
    ACCEPT = 2
    NEXT = 3


Path = tuple[int, ...]
"""Drafted tokens, from a child of the root down to a node; () is the root."""


class Matcher(Protocol):
    """What one request may say, given its committed answer (decoding/constraint.py)."""

    def allowed(self, path: Path) -> Tensor | None:
        """Boolean over the vocabulary, or its beginning: the tokens that may follow these drafted
        ones; None where they have ended the answer or are forbidden themselves."""

    def advance(self, ids: Sequence[int]) -> None:
        """Learns the tokens that were committed. Raises ValueError where they are forbidden."""


@dataclass(frozen=True)
class Sampling:
    """The processors applied alike to the target's law p and the drafter's law q.

    temperature 0 is greedy decoding; top_k 0 and top_p 1 switch those filters off. matchers: by
    request number, what it may say; their masks come before the other processors.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    matchers: Mapping[int, Matcher] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 0.01 <= self.temperature < float("inf")):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or at least 0.01"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must lie between 0 and 2**32 - 1")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_k is {self.top_k} and top_p {self.top_p}; top_k must be 0 (off) or above, "
                "top_p above 0 and at most 1 (off)"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def law(self, logits: Tensor) -> Tensor:
        """The law (fp32, same shape) that a token is sampled from; needs temperature > 0."""
        scores = logits.float() / self.temperature
        if self.top_k and self.top_k < scores.shape[-1]:
            floor = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < floor, -torch.inf)
        if self.top_p < 1:
            ranked, order = scores.sort(dim=-1, descending=True)
            mass_before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
            drop = (mass_before >= self.top_p).scatter(-1, order, mass_before >= self.top_p)
            scores = scores.masked_fill(drop, -torch.inf)
        return scores.softmax(-1)

    def uniforms(self, purpose: Purpose, requests: list[int], starts: list[int], n: int) -> Tensor:
        """n numbers of one round for each row: [B, n], float64 in [0, 1), on the CPU.

        `start` is the row's committed length when the round begins; it occurs once in a request,
        so no number serves two rounds. Rules that look past the first rejection need that.
        """
        return self._hash(purpose, requests, np.array(starts)[:, None], np.arange(n)[None, :])

    def uniforms_at(self, requests: list[int], positions_BM: Tensor) -> Tensor:
        """The number that decides the target's own token at an absolute position: [B, M], as above.

        Whoever asks gets the same one: an answer drawn with these alone (plain decoding, one-hot
        drafts) does not depend on the draft at all.
        """
        return self._hash(Purpose.NEXT, requests, positions_BM.numpy(), np.zeros((1, 1)))

    def _hash(
        self, purpose: Purpose, requests: list[int], major: np.ndarray, minor: np.ndarray
    ) -> Tensor:
        key = _mix(np.array([self.seed], dtype=np.uint64) + np.uint64(int(purpose) << 56))
        key = _mix(key + np.array(requests, dtype=np.uint64))[:, None]
        bits = _mix(_mix(key + major.astype(np.uint64)) + minor.astype(np.uint64))
        # 32 bits: u * total stays below total in float64, so a draw never falls off the end
        return torch.from_numpy((bits >> np.uint64(32)).astype(np.float64) * 2.0**-32)


@dataclass(frozen=True)
class Dice:
    """The randomness of one round: how tokens are chosen, for which requests, from which lengths.

    requests: a number for each row; starts: its committed length when the round begins.
    """

    sampling: Sampling
    requests: list[int]
    starts: list[int]

    def uniforms(self, purpose: Purpose, n: int) -> Tensor:
        """n numbers for each row, [B, n]; see `Sampling.uniforms`."""
        return self.sampling.uniforms(purpose, self.requests, self.starts, n)

    def next(self, depth_BM: Tensor) -> Tensor:
        """The numbers that decide the target's own tokens `depth` places after the root, [B, M]."""
        positions_BM = torch.tensor(self.starts)[:, None] + depth_BM.cpu()
        return self.sampling.uniforms_at(self.requests, positions_BM)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood 2014) after its golden-ratio step."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(law: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF sample from each row of `law` [..., V] (any scale) with uniforms `u` [...]."""
    cdf = law.cumsum(-1, dtype=torch.float64)
    point = u.to(cdf.device)[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf, point, right=True)[..., 0]
