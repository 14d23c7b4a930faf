"""Suffix lookup (SuffixDecoding, Oliaro et al. 2024, as in ArcticInference): what followed the
longest matches of the text's end, in the request and in earlier answers, by how often it did.

Training-free. Shapes: B batch, S newly committed tokens.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Drafter
from drafters.ngram import Guess, joined


class Node:
    """A string of tokens that occurs `count` times. While it occurs once it is folded: what follows
    is ids[at], ids[at + 1], ..., and its children are None."""

    __slots__ = ("at", "children", "count", "ids")

    def __init__(self, ids: list[int], at: int) -> None:
        self.count, self.ids, self.at = 1, ids, at
        self.children: dict[int, Node] | None = None

    def after(self) -> dict[int, "Node"]:
        """The next tokens and where they lead; a folded node stays folded."""
        if self.children is not None:
            return self.children
        if self.at < len(self.ids):
            return {self.ids[self.at]: Node(self.ids, self.at + 1)}
        return {}

    def unfold(self, is_deepest: bool) -> None:
        self.children = {} if is_deepest else self.after()
        self.ids = []


@dataclass
class Text:
    """Tokens that a trie counts. matches[m - 1] is the node of the last m tokens, for every m at
    which they occurred before."""

    ids: list[int] = field(default_factory=list)
    matches: list[Node] = field(default_factory=list)


class Trie:
    """How often each string of up to `depth` tokens occurs in some texts. Strings that occur once
    are folded into one node, so there are about as many nodes as repeated strings and tokens."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.root = Node([], 0)
        self.root.unfold(is_deepest=True)

    def extend(self, text: Text, token: int) -> None:
        """Counts the strings that end with one more token of a text; only the newest text of a trie
        may grow."""
        text.ids.append(token)
        matches = []
        for length, node in enumerate((self.root, *text.matches)):
            if length == self.depth:
                break
            assert node.children is not None, "what is matched is unfolded"
            child = node.children.get(token)
            if child is None:
                node.children[token] = Node(text.ids, len(text.ids))
                continue
            if child.children is None:
                child.unfold(length + 1 == self.depth)
            child.count += 1
            matches.append(child)
        text.matches = matches

    def remove(self, ids: list[int]) -> None:
        """Uncounts a text that was counted whole."""
        for begin in range(len(ids)):
            node = self.root
            for token in ids[begin : begin + self.depth]:
                assert node.children is not None, "two strings end here"
                child = node.children[token]
                child.count -= 1
                if not child.count:
                    del node.children[token]
                    break
                node = child

    def find(self, ids: Iterable[int]) -> Node | None:
        """The node of a string; None where it does not occur."""
        node: Node | None = self.root
        for token in ids:
            node = node.after().get(token) if node else None
        return node

    def matches(self, ids: list[int]) -> list[Node]:
        """The nodes of the last 1, 2, ... tokens, while they occur. Those of `depth` tokens are
        left out: what follows them is not counted."""
        found: list[Node] = []
        for length in range(1, min(self.depth, len(ids) + 1)):
            node = self.find(ids[-length:])
            if node is None:
                break
            found.append(node)
        return found


class Memory:
    """The latest finished answers, together up to `tokens` tokens."""

    def __init__(self, depth: int, tokens: int) -> None:
        self.trie, self.most = Trie(depth), tokens
        self.answers: deque[list[int]] = deque()
        self.held = 0

    def add(self, ids: list[int]) -> None:
        """Counts an answer and uncounts the oldest ones until all fit; of an answer that is longer
        than the memory the end stays."""
        text = Text()
        for token in ids[-self.most :]:
            self.trie.extend(text, token)
        self.answers.append(text.ids)
        self.held += len(text.ids)
        while self.held > self.most:
            oldest = self.answers.popleft()
            self.trie.remove(oldest)
            self.held -= len(oldest)


@dataclass
class Request:
    """One request's text, prompt and answer, and the trie of it."""

    trie: Trie
    text: Text = field(default_factory=Text)
    prompt_length: int = 0


@dataclass
class SuffixState:
    requests: list[Request]

    def select(self, rows: list[int]) -> None:
        self.requests = [self.requests[r] for r in rows]


class Suffix(Drafter):
    """For each match of the last m tokens, drafts up to m * `factor` + `offset` of the likeliest
    continuations, at most `draft_length`; the probability of one is the product of the shares of
    its tokens among what followed there. The draft with the largest sum of probabilities, its
    expected length, is used, whether it comes from the request or from the memory of earlier
    answers; between equals the request's and the longest match's.

    min_probability: less likely continuations are left out. tree: several continuations of a match
    are drafted (False: only the likeliest token of each place, a chain). memory_tokens: of earlier
    answers, remembered until newer ones take their place. An answer is remembered when the next
    call of decode begins, without its last block, which no drafter is shown. depth: the longest
    string counted, match and continuation together.
    """

    remembers = True

    def __init__(
        self,
        *,
        draft_length: int = 24,
        factor: float = 1.0,
        offset: float = 0.0,
        min_probability: float = 0.1,
        tree: bool = True,
        depth: int = 64,
        memory_tokens: int = 100_000,
    ) -> None:
        super().__init__()
        if draft_length < 1 or depth < 2 or memory_tokens < 1 or not 0 < min_probability <= 1:
            raise ValueError(
                f"suffix has draft_length {draft_length}, depth {depth}, memory_tokens "
                f"{memory_tokens} and min_probability {min_probability}; expected at least 1, 2 "
                "and 1, and a probability above 0 and at most 1"
            )
        if factor < 0 or offset < 0 or factor + offset == 0:
            raise ValueError(
                f"suffix has factor {factor} and offset {offset}; neither may be negative, and "
                "with both 0 it never drafts"
            )
        self.draft_length, self.factor, self.offset = draft_length, factor, offset
        self.min_probability, self.tree = min_probability, tree
        self.depth, self.memory_tokens = depth, memory_tokens
        self.forget()

    def forget(self) -> None:
        self.memory = Memory(self.depth, self.memory_tokens)
        self.unfiled: list[Request] = []  # of the last call of decode

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> SuffixState:
        for request in self.unfiled:
            self.memory.add(request.text.ids[request.prompt_length :])
        self.unfiled = [Request(Trie(self.depth)) for _ in requests]
        return SuffixState(list(self.unfiled))

    def propose(self, state: SuffixState, seen: Seen, target: Target) -> Draft:
        guesses = []
        for request, ids, count in zip(
            state.requests, seen.ids_BS.tolist(), seen.count, strict=True
        ):
            for token in ids[:count]:
                request.trie.extend(request.text, token)
            request.prompt_length = request.prompt_length or count
            guesses.append(self._guess(request))
        return joined(guesses, seen.ids_BS.device)

    def _guess(self, request: Request) -> Guess:
        best: Guess = ([], [])
        most = 0.0
        own = request.text.matches[: self.depth - 1]
        for matches in (own, self.memory.trie.matches(request.text.ids)):
            for length in range(len(matches), 0, -1):
                limit = min(self.draft_length, int(length * self.factor + self.offset))
                if limit <= most:  # no probability is above 1: nothing shorter can be better
                    break
                *guess, score = self._likeliest(matches[length - 1], limit)
                if score > most:
                    best, most = (guess[0], guess[1]), score
        return best

    def _likeliest(self, match: Node, limit: int) -> tuple[list[int], list[int], float]:
        """The `limit` likeliest places behind a match, parents first: ids, parents and the sum of
        their probabilities."""
        ids: list[int] = []
        parents: list[int] = []
        score = 0.0
        heap: list[tuple[float, int, int, Node, int]] = []
        met, place, chance, node = 0, -1, 1.0, match
        while len(ids) < limit:
            after = node.after()
            total = sum(child.count for child in after.values())
            options = list(after.items())
            if not self.tree:
                options = sorted(options, key=lambda item: -item[1].count)[:1]
            for token, child in options:
                share = chance * child.count / total
                if share >= self.min_probability:
                    met += 1
                    heapq.heappush(heap, (-share, met, token, child, place))
            if not heap:
                break
            negative, _, token, node, parent = heapq.heappop(heap)
            chance, place = -negative, len(ids)
            ids.append(token)
            parents.append(parent)
            score += chance
        return ids, parents, score
