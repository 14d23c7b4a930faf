"""Adaptive tri-gram (ADED, Liu et al. 2024; its code is called Adaptix): weights of which token
follows which two, and a Monte Carlo tree search over them.

Training-free. Shapes: B batch, S newly committed tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Purpose, Sampling
from decoding.target import Target
from drafters.base import Drafter
from drafters.ngram import Guess, joined

GAIN, CAP = 0.04, 3.0  # what a tri-gram's weight gains each time it is read, and its limit
WINDOW = 16  # the last tokens, whose tri-grams are read again every round
SUCCESSORS = 12  # kept of a pair
C1, C2 = 32.0, 8.0  # of the bound that the search follows

Pair = tuple[int, int]
Weights = dict[Pair, dict[int, float]]


@dataclass
class TrigramState:
    """Per row: the committed tokens and the number that keys its randomness."""

    sampling: Sampling
    requests: list[int]
    tokens: list[list[int]]

    def select(self, rows: list[int]) -> None:
        self.requests = [self.requests[r] for r in rows]
        self.tokens = [self.tokens[r] for r in rows]


class Trigram(Drafter):
    """Searches continuations of the last two tokens `depth` tokens deep in `iterations` rounds,
    and drafts the most visited, each with its likeliest successor: a tree of up to `nodes`.

    A search is random; its numbers are keyed by request and length and are not the verifier's, so
    the one-hot rule is exact. The weights are shared by all requests and grow with the text read
    (some hundred bytes a token).

    Departures. It starts without the statistics of a corpus (the published one has 253 MB of text)
    and reads each prompt whole instead. A rollout is worth the weights of its own tri-grams (in
    the published code an index, .0 for .1, looks up another token there). `nodes` counts the nodes
    of the tree, not the lengths of its paths.
    """

    remembers = True

    def __init__(self, *, iterations: int = 150, depth: int = 3, nodes: int = 24) -> None:
        super().__init__()
        if min(iterations, depth, nodes) < 1:
            raise ValueError(
                f"trigram has iterations {iterations}, depth {depth} and nodes {nodes}; each must "
                "be at least 1"
            )
        self.iterations, self.depth, self.nodes = iterations, depth, nodes
        self.weights: Weights = {}

    def forget(self) -> None:
        self.weights = {}

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> TrigramState:
        return TrigramState(sampling, list(requests), [[] for _ in requests])

    def propose(self, state: TrigramState, seen: Seen, target: Target) -> Draft:
        for tokens, ids, count in zip(
            state.tokens, seen.ids_BS.tolist(), seen.count, strict=True
        ):  # all rows teach before any drafts
            is_new = not tokens
            tokens += ids[:count]
            self._read(tokens if is_new else tokens[-WINDOW:])
        u_Bn = state.sampling.uniforms(
            Purpose.DRAFT, state.requests, seen.length, self.iterations * self.depth
        )
        guesses = [self._guess(row, u) for row, u in zip(state.tokens, u_Bn.tolist(), strict=True)]
        return joined(guesses, seen.ids_BS.device)

    def _read(self, tokens: list[int]) -> None:
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            after = self.weights.setdefault((a, b), {})
            if c not in after and len(after) == SUCCESSORS:
                del after[min(after, key=after.__getitem__)]
            after[c] = min(CAP, after.get(c, 0.0) + GAIN)

    def _guess(self, tokens: list[int], uniforms: list[float]) -> Guess:
        """The searched tree's best nodes; none where the last two tokens are new."""
        pair = (tokens[-2], tokens[-1]) if len(tokens) > 1 else (-1, -1)
        if pair not in self.weights:
            return [], []
        root = Place(pair, 0.0)
        for n in range(0, len(uniforms), self.depth):
            _visit(root, self.weights, uniforms[n : n + self.depth])
        return _best(root, self.weights, self.nodes)


class Place:
    """A node of the search: its last two tokens, its weight and what its visits were worth.
    `below` is None until it is expanded."""

    __slots__ = ("below", "pair", "prior", "visits", "worth")

    def __init__(self, pair: Pair, prior: float) -> None:
        self.pair, self.prior = pair, prior
        self.visits, self.worth = 0, 0.0
        self.below: list[Place] | None = None

    def choose(self) -> "Place":
        """The child with the highest bound W/N + (c1 + ln((N_p + c2 + 1)/c2)) P sqrt(N_p)/(1 + N);
        one that was never visited comes first."""
        assert self.below, "only an expanded place has children to choose from"
        weight = (C1 + math.log((self.visits + C2 + 1) / C2)) * math.sqrt(self.visits)
        best, most = self.below[0], -math.inf
        for place in self.below:
            if not place.visits:
                return place
            bound = place.worth / place.visits + weight * place.prior / (1 + place.visits)
            if bound > most:
                best, most = place, bound
        return best


def _visit(root: Place, weights: Weights, uniforms: list[float]) -> None:
    """One iteration: walk down, expand, roll out to a depth of len(uniforms), count the worth."""
    path, worth = [root], 1.0
    place, depth = root, len(uniforms)
    while place.below and len(path) <= depth:
        place = place.choose()
        path.append(place)
        worth += place.prior
    if place.below is None and len(path) <= depth:
        after = weights.get(place.pair, {})
        place.below = [Place((place.pair[1], c), weight) for c, weight in after.items()]
        if place.below:
            place = place.below[-1]
            path.append(place)
            worth += place.prior
    pair = place.pair
    for u in uniforms[len(path) - 1 :]:
        drawn = _draw(weights.get(pair), u)
        if drawn is None:
            break
        pair, worth = (pair[1], drawn[0]), worth + drawn[1]
    for place in path:
        place.visits += 1
        place.worth += worth


def _draw(after: dict[int, float] | None, u: float) -> tuple[int, float] | None:
    """A successor and its weight, drawn in proportion to the weights."""
    if not after:
        return None
    left = u * sum(after.values())
    drawn = None  # rounding can leave a little of the last one
    for drawn in after.items():
        left -= drawn[1]
        if left < 0:
            break
    return drawn


def _best(root: Place, weights: Weights, nodes: int) -> Guess:
    """The most visited places, parents first, each followed by its likeliest successor."""
    number: dict[tuple[int, ...], int] = {(): -1}
    ids: list[int] = []
    parents: list[int] = []
    for path, place in sorted(_walk(root, ()), key=lambda found: -found[1].visits):
        after = weights.get(place.pair)
        greedy = [(*path, max(after, key=after.__getitem__))] if after else []
        for each in (path, *greedy):
            if len(ids) == nodes:
                return ids, parents
            if each not in number:
                number[each] = len(ids)
                ids.append(each[-1])
                parents.append(number[each[:-1]])
    return ids, parents


def _walk(place: Place, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Place]]:
    """Every place with the tokens that lead to it, parents first."""
    yield path, place
    for child in place.below or ():
        yield from _walk(child, (*path, child.pair[1]))
