"""propose -> score -> verify -> keep, for any drafter; without one it is autoregressive decoding.

Shapes: B batch, S newly committed tokens.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from decoding.cache import Cache
from decoding.constraint import Constraint, advance, allowed_of, confined, pruned
from decoding.round import Draft, Scored, Seen, Verdict
from decoding.sampling import Dice, Sampling
from decoding.target import Target
from decoding.verify import Rule, default_rule


class State(Protocol):
    """What a drafter remembers of the requests in a batch."""

    def select(self, rows: list[int]) -> None:
        """Forgets all but these rows: the others' requests are finished."""


class Proposer(Protocol):
    """What the loop needs of a drafter (drafters/base.py has the class)."""

    taps: tuple[int, ...]  # k names hidden_states[k] of the target, which the drafter reads

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> State: ...

    def propose(self, state: Any, seen: Seen, target: Target) -> Draft: ...


@dataclass
class Answer:
    """One request's new ids, up to and including the first end id, and its rounds.

    drafted and accepted: the longest path drafted and the tokens accepted, per round; nodes:
    drafted in all.
    """

    ids: list[int] = field(default_factory=list)
    ended: bool = False
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    nodes: int = 0


@dataclass
class Decoded:
    """The answers in the order of the prompts, and where the time went (seconds).

    `first_seconds` runs until the first round's tokens are there (prefill of target and drafter
    and one round), which brought `first_tokens`.
    """

    answers: list[Answer]
    rounds: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    first_tokens: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(answer.ids) for answer in self.answers)


@torch.inference_mode()
def decode(
    target: Target,
    drafter: Proposer | None,
    prompts: list[list[int]],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    end_ids: frozenset[int] | None = None,
    rule: Rule | None = None,
    requests: list[int] | None = None,
    constraints: list[Constraint | None] | None = None,
) -> Decoded:
    """Answers `prompts` together; the ids follow the target's own law whatever the drafter says,
    unless `rule` is lossy. A rule that does not cover a draft's law gives way to that law's
    default.

    requests: a number for each prompt that keys its randomness (default: its place in the list),
    so that an answer does not depend on what else is in the batch. constraints: what each answer
    must be (None: anything); the target's law is then renormalised over what is allowed.
    """
    _check(target, prompts, max_new_tokens, requests)
    clock = _Clock(target.device)
    ends = target.end_ids if end_ids is None else end_ids
    live = list(range(len(prompts)))
    requests = list(requests) if requests is not None else list(live)
    sampling = confined(sampling, constraints, requests, ends)
    max_len = max(map(len, prompts)) + max_new_tokens
    done = Decoded([Answer() for _ in prompts])

    taps = drafter.taps if drafter else ()
    cache = target.new_cache(len(prompts), max_len + 32)
    seen = target.prefill(_pad(prompts, target.device), [len(p) for p in prompts], cache, taps)
    state = drafter.start(target, cache, sampling, requests, max_len) if drafter else None
    while live:
        before = clock.read()
        dice = Dice(sampling, requests, seen.length)
        draft = pruned(drafter.propose(state, seen, target), dice) if drafter else _no_draft(seen)
        drafted = clock.read()
        rows = torch.arange(len(live), device=target.device)
        last = torch.tensor(seen.count, device=target.device) - 1
        scored = target.score(seen.ids_BS[rows, last], draft, cache, taps)
        verdict = _verify(scored, draft, dice, rule)
        seen = target.keep(draft, scored, verdict, cache)
        done.draft_seconds += drafted - before
        done.verify_seconds += clock.read() - drafted
        done.rounds += 1
        on = _emit(done, live, seen, draft, verdict.path, ends, max_new_tokens)
        advance(dice, seen, on)
        if done.rounds == 1:
            done.first_seconds, done.first_tokens = clock.read(), done.tokens
        if len(on) < len(live):
            live, requests = [live[r] for r in on], [requests[r] for r in on]
            if live:
                seen = seen.select(on)
                cache.select(on)
                if state is not None:
                    state.select(on)
    done.seconds = clock.read()
    return done


def _verify(scored: Scored, draft: Draft, dice: Dice, rule: Rule | None) -> Verdict:
    """What stands by `rule`, or, where it does not cover the draft's law, by that law's default."""
    judge = rule if rule and draft.law in rule.laws else default_rule(draft.law)
    return judge(allowed_of(scored, draft, dice), draft, dice)


def _emit(
    done: Decoded,
    live: list[int],
    seen: Seen,
    draft: Draft,
    paths: list[list[int]],
    ends: frozenset[int],
    limit: int,
) -> list[int]:
    """Adds each row's new ids to its answer, cut at an end id or the limit; returns who goes on.

    Cutting after acceptance is exact: prefixes of exact samples are exact.
    """
    on, depth = [], draft.depth()
    for row, ids in enumerate(seen.ids_BS.tolist()):
        answer = done.answers[live[row]]
        answer.drafted.append(depth[row])
        answer.nodes += draft.size[row]
        answer.accepted.append(len(paths[row]))
        for token in ids[: seen.count[row]]:
            answer.ids.append(token)
            if token in ends:
                answer.ended = True
                break
            if len(answer.ids) == limit:
                break
        if not answer.ended and len(answer.ids) < limit:
            on.append(row)
    return on


class _Clock:
    """Seconds since it was made, after the device has finished what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = 0.0
        self.begin = self.read()

    def read(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - self.begin


def _no_draft(seen: Seen) -> Draft:
    return Draft.empty(len(seen.count), seen.ids_BS.device)


def _pad(prompts: list[list[int]], device: torch.device) -> Tensor:
    longest = max(map(len, prompts))
    return torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=device)


def _check(
    target: Target, prompts: list[list[int]], max_new_tokens: int, requests: list[int] | None
) -> None:
    if requests is not None and len(set(requests)) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts came with {len(set(requests))} different request numbers; "
            "each prompt needs one of its own"
        )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    longest = max(map(len, prompts), default=0)
    if not prompts or min(map(len, prompts)) == 0:
        raise ValueError("every prompt needs at least one token")
    if longest + max_new_tokens > target.shape.max_positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the "
            f"{target.shape.max_positions} positions of {target.name}; lower max_new_tokens"
        )
