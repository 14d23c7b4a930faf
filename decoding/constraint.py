"""Structured output: what a grammar forbids has probability zero, at every node of a draft.

A node's mask follows from the committed answer and the node's own path, and p is the target's law
renormalised over what is allowed there (decoding.md (h), JSONSchemaBench). Drafters that are asked
level by level get the same masks on q (drafters/confined.py), so that what a grammar forces is
always drafted right; of one-hot drafts, whose q is one token, what is forbidden goes with all
below it.

Shapes: B batch, N drafted nodes, M = N + 1 (root first), W nodes of a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.round import Draft, Scored, Seen
from decoding.sampling import Dice, Matcher, Path, Sampling


class Constraint(Protocol):
    """What an answer must be; made once, and good for any number of requests."""

    def start(self, ends: frozenset[int]) -> Matcher:
        """A matcher of an answer that has no token yet; `ends` are the ids that end it."""


class Grammars:
    """Constraints over one tokenizer; a schema is compiled when it is first asked for.

    Raises ValueError for a tokenizer that has no fast version.
    """

    def __init__(self, tokenizer: Any) -> None:
        from llguidance.hf import from_tokenizer
        from transformers import PreTrainedTokenizerFast

        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"the tokenizer is a {type(tokenizer).__name__}; structured output needs a fast "
                "tokenizer (one with a tokenizer.json)"
            )
        self._tokens = from_tokenizer(tokenizer)
        self._made: dict[str, JsonSchema] = {}

    def json(self, schema: str) -> "JsonSchema":
        """Answers that are JSON and match this schema (JSON text). Raises ValueError for a schema
        that no grammar can be made of."""
        if schema not in self._made:
            self._made[schema] = JsonSchema(schema, self._tokens)
        return self._made[schema]


class JsonSchema:
    """A constraint by llguidance: any white space that JSON allows is allowed, and where the
    schema leaves one text only, so are the tokens that the tokenizer makes of it, and no others."""

    def __init__(self, schema: str, tokens: Any) -> None:
        from llguidance import LLMatcher

        matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(schema), log_level=0)
        if matcher.is_error():
            raise ValueError(
                f"no grammar can be made of the JSON schema {schema[:80]!r} "
                f"({_first_line(matcher)}); leave it out, or write it in other words"
            )
        self._matcher, self._tokens = matcher, tokens

    def start(self, ends: frozenset[int]) -> "JsonMatcher":
        return JsonMatcher(self._matcher.deep_copy(), self._tokens, ends)


class JsonMatcher:
    """One request's answer so far. Masks of a round are kept until tokens are committed: the
    drafter and the verifier ask for the same ones."""

    def __init__(self, matcher: Any, tokens: Any, ends: frozenset[int]) -> None:
        self._matcher, self._size = matcher, tokens.vocab_size  # a model can have more logits
        self._ends = [token for token in ends if token < self._size]
        self._special = {*tokens.eos_tokens, *self._ends}
        self._masks: dict[Path, Tensor | None] = {}

    def allowed(self, path: Path) -> Tensor | None:
        if path not in self._masks:
            self._masks[path] = self._mask(path)
        return self._masks[path]

    def advance(self, ids: Sequence[int]) -> None:
        self._masks.clear()
        if self._matcher.try_consume_tokens(list(ids)) < len(ids):
            raise ValueError(
                "the tokenizer has no token to go on with where the JSON schema leaves few "
                "choices; leave this schema out, or choose a target with a byte-level tokenizer"
            )

    def _mask(self, path: Path) -> Tensor | None:
        if not self._special.isdisjoint(path) or max(path, default=0) >= self._size:
            return None
        # a copy each: after `rollback`, llguidance 1.9.1 sometimes gives masks of another state
        matcher = self._matcher.deep_copy()
        if matcher.try_consume_tokens(list(path)) < len(path):
            return None
        mask_V = torch.tensor(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8) > 0
        mask_V[list(self._special)] = False
        mask_V[self._ends] = matcher.is_accepting()
        if matcher.is_error():
            raise ValueError(
                f"the JSON schema is too complex to follow ({_first_line(matcher)}); leave it out"
            )
        return mask_V


def confined(
    sampling: Sampling,
    constraints: Sequence[Constraint | None] | None,
    requests: list[int],
    ends: frozenset[int],
) -> Sampling:
    """The sampling of these requests under their constraints. Raises ValueError where there is not
    one entry a request, or nothing that can end an answer."""
    if constraints is None or not any(constraints):
        return sampling
    if len(constraints) != len(requests):
        raise ValueError(
            f"{len(requests)} prompts came with {len(constraints)} constraints; each prompt needs "
            "one, or null"
        )
    if not ends:
        raise ValueError(
            "a constrained answer must be able to end, and there is no end id; give end_ids"
        )
    pairs = zip(requests, constraints, strict=True)
    return replace(sampling, matchers={r: c.start(ends) for r, c in pairs if c is not None})


def allowed(logits_BWV: Tensor, paths: list[list[Path]], dice: Dice) -> Tensor:
    """The logits of what follows each row's nodes, -inf where its constraint forbids a token.

    paths: each node's drafted tokens, from the root's child to itself. A node that cannot be
    reached, or at which nothing allowed is known to the one who made the logits, stays as it is.
    """
    cells, masks = [], []
    for b, request in enumerate(dice.requests):
        matcher = dice.sampling.matchers.get(request)
        for w, path in enumerate(paths[b] if matcher is not None else []):
            mask_V = matcher.allowed(path) if matcher is not None else None
            if mask_V is not None:
                cells.append((b, w))
                masks.append(F.pad(mask_V, (0, logits_BWV.shape[-1] - len(mask_V))))
    if not cells:
        return logits_BWV
    rows_K, nodes_K = torch.tensor(cells, device=logits_BWV.device).T
    was_KV = logits_BWV[rows_K, nodes_K]
    left_KV = was_KV.masked_fill(~torch.stack(masks).to(was_KV.device), -torch.inf)
    some_K1 = left_KV.amax(-1, keepdim=True) > -torch.inf
    return logits_BWV.index_put((rows_K, nodes_K), left_KV.where(some_K1, was_KV))


def allowed_of(scored: Scored, draft: Draft, dice: Dice) -> Scored:
    """What the target says of root and nodes, under the constraints."""
    if not dice.sampling.matchers:
        return scored
    paths = []
    rows = zip(draft.ids_BN.tolist(), draft.parents_BN.tolist(), draft.size, strict=True)
    for ids, parents, size in rows:
        mine: list[Path] = [()]
        for token, parent in zip(ids[:size], parents[:size], strict=True):
            mine.append((*mine[parent + 1], token))
        paths.append(mine)
    return replace(scored, logits_BMV=allowed(scored.logits_BMV, paths, dice))


def pruned(draft: Draft, dice: Dice) -> Draft:
    """A one-hot draft without the nodes that a constraint forbids, and without what stands below
    them: their law has nothing else to give. Other laws were masked where they were drawn from."""
    if not dice.sampling.matchers or draft.law != "one_hot" or not max(draft.size):
        return draft
    ids_BN, parents_BN, size = torch.zeros_like(draft.ids_BN), draft.parents_BN.clone(), []
    rows = zip(draft.ids_BN.tolist(), draft.parents_BN.tolist(), draft.size, strict=True)
    for b, (ids, parents, most) in enumerate(rows):
        matcher = dice.sampling.matchers.get(dice.requests[b])
        kept: dict[int, tuple[int, Path]] = {-1: (-1, ())}  # by old number: the new one, its path
        for n in range(most):
            if parents[n] not in kept:
                continue
            above, path = kept[parents[n]]
            mask_V = matcher.allowed(path) if matcher is not None else None
            if mask_V is None or (ids[n] < len(mask_V) and mask_V[ids[n]]):
                new = len(kept) - 1
                kept[n] = new, (*path, ids[n])
                ids_BN[b, new], parents_BN[b, new] = ids[n], above
        size.append(len(kept) - 1)
    return replace(draft, ids_BN=ids_BN, parents_BN=parents_BN, size=size)


def advance(dice: Dice, seen: Seen, rows: list[int]) -> None:
    """Tells the matchers of these rows what was committed."""
    if dice.sampling.matchers:
        ids = seen.ids_BS.tolist()
        for b in rows:
            matcher = dice.sampling.matchers.get(dice.requests[b])
            if matcher is not None:
                matcher.advance(ids[b][: seen.count[b]])


def _first_line(matcher: Any) -> str:
    return str(matcher.get_error()).strip().split("\n")[0][:200]
