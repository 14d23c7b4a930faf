"""What a budget of training buys: every candidate at the tau that the law gives it, on its costs.

Shapes: C candidates, S draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval.advise import Candidate
from eval.cost import between
from eval.forecast import Forecaster, Speed, shown
from eval.joint import Array, Asked, Interval, Law, expected_tau

DRAWS = 4000
EDGES = (0.025, 0.975)


@dataclass(frozen=True)
class Outlook:
    """A candidate after a training: its acceptance, the chain length that is fastest at it, tokens
    a second and the speedup: of whole answers, where runs on this machine show what drafting leaves
    as it is, else while decoding. `beyond`: in what the law is extrapolated; rival: not to be told
    apart from the first one."""

    name: str
    asked: Asked
    alpha: Interval
    length: int
    per_second: Interval
    speedup: Interval
    beyond: list[str]
    rival: bool = False

    @property
    def tau(self) -> Interval:
        return self.alpha.through(lambda alpha: expected_tau(alpha, self.length))

    def told(self) -> dict[str, Any]:
        """JSON-able."""
        return vars(self) | {"asked": vars(self.asked), "tau": self.tau}


def outlooks(
    forecaster: Forecaster, candidates: Mapping[str, Candidate], asked: Mapping[str, Asked]
) -> list[Outlook]:
    """Those of which its law says something, the fastest first.

    Intervals are of draws that all candidates share (Line.draws), and so is the difference to the
    first one: where its 95 % interval holds 0, the candidate is a rival. How far measured speedups
    lie off what costs give is drawn for each, and what is not known of its middle for all.
    """
    law, speed, luck = forecaster.law, forecaster.speed, np.random.default_rng(0)
    names = [name for name in candidates if name in asked and not law.unknown(asked[name])]
    if not names:
        return []
    scale_S = common_S = np.zeros(DRAWS)
    if speed:
        scale_S = speed.scatter * np.sqrt(speed.freedom / luck.chisquare(speed.freedom, DRAWS))
        common_S = scale_S * luck.normal(size=DRAWS) / math.sqrt(speed.freedom + 1)
    alphas_SC = law.alphas([asked[name] for name in names], DRAWS)
    found, drawn = [], {}
    for name, alphas_S in zip(names, alphas_SC.T, strict=True):
        mine, alpha = candidates[name], law.alpha(asked[name])
        length = mine.best(alpha.value)[1]
        each = speedup_of(mine, length, speed)
        drawn[name] = each(alphas_S) * np.exp(common_S + scale_S * luck.normal(size=DRAWS))
        low, high = np.quantile(drawn[name], EDGES)
        speedup = Interval(float(each(np.array(alpha.value))), float(low), float(high))
        plain = 1000 / mine.plain * (1 - speed.fixed if speed else 1)
        per_second = Interval(*(plain * times for times in speedup))
        beyond = forecaster.beyond(asked[name])
        found.append(Outlook(name, asked[name], alpha, length, per_second, speedup, beyond))
    found.sort(key=lambda outlook: -outlook.per_second.value)
    best = drawn[found[0].name]
    return [found[0], *(_beside(outlook, drawn[outlook.name] - best) for outlook in found[1:])]


def speedup_of(candidate: Candidate, length: int, speed: Speed | None) -> Callable[[Array], Array]:
    """The speedup with chains of this length, of acceptances: of whole answers where `speed` knows
    what drafting does not shorten, else while decoding."""
    round_ms = between(candidate.draft, length) + between(candidate.verify, length)

    def times(alphas_S: Array) -> Array:
        tau_S = np.sum([alphas_S**k for k in range(length + 1)], axis=0)
        decoding_S = tau_S * candidate.plain / round_ms
        return speed.whole(decoding_S) if speed else decoding_S

    return times


def _beside(outlook: Outlook, difference_S: Array) -> Outlook:
    rival = bool(np.quantile(difference_S, EDGES[1]) >= 0)
    return Outlook(**vars(outlook) | {"rival": rival})


@dataclass(frozen=True)
class Proposal:
    """What to train. budget: in words, "" without one; law: None where the acceptance is assumed,
    and `why`; unknown: by reason, the candidates of which it says nothing; sweep: the words of the
    command that would measure it; command: that trains the first; fixed: the share of an answer's
    time that drafting leaves as it is, None where speedups are of decoding alone, and `added` what
    it adds to that."""

    budget: str
    law: Law | None
    why: str
    outlooks: list[Outlook]
    unknown: dict[str, list[str]] = field(default_factory=dict)
    sweep: str = ""
    command: str = ""
    fixed: float | None = None
    added: float = 0.0

    def told(self) -> dict[str, Any]:
        """JSON-able."""
        slopes = self.law.slopes if self.law else {}
        return {
            **{"budget": self.budget, "assumed": self.why, "slopes": slopes},
            **{"outlooks": [outlook.told() for outlook in self.outlooks]},
            **{"unknown": self.unknown, "command": self.command, "fixed": self.fixed},
            "added": self.added,
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        if not self.law or not self.outlooks:
            return [*self._assumed(), ""]
        rest = [f"  Nothing is known of {', '.join(who)}: {why}" for why, who in
                self.unknown.items()]  # fmt: skip
        return [*self._table(self.law), *rest, *(self._train() if self.budget else []), ""]

    def _assumed(self) -> list[str]:
        what = f"what {self.budget} buy is not known: " if self.budget else ""
        return [
            f"Acceptance is assumed here, {what}{self.why}. What tokens and size do for this "
            "target is measured by",
            *(f"  {self.sweep} sweep={name}" for name in ("tokens", "size")),
            "and `python -m eval.sweep FOLDER` of each; then ask again.",
        ]

    def _table(self, law: Law) -> Iterator[str]:
        budget = self.budget or "the recipe's own tokens"
        sweeps = len({run.sweep for run in law.runs})
        yield (
            f"By the law of {len(law.runs)} runs of {sweeps} sweep{'s' if sweeps > 1 else ''} on "
            f"this target, with {budget} (95 % intervals for a new drafter, T=0, "
            f"{'while decoding' if self.fixed is None else 'whole answers'}):"
        )
        width = max(len(outlook.name) for outlook in self.outlooks)
        head = f"  {'drafter':<{width}} {'tokens':>13}  {'acceptance':<18}  {'speedup':<20}"
        yield f"{head}  drafts of"
        for o in self.outlooks:
            far = "  extrapolated" if o.beyond else ""
            yield (
                f"  {o.name:<{width}} {o.asked.tokens:>13,.0f}  {shown(o.alpha):<18}  "
                f"{shown(o.speedup, 'x'):<20}  {o.length}{far}"
            )

    def _left(self) -> str:
        """What drafting does not shorten."""
        if self.fixed is None:
            return "Prefill, which drafting does not shorten, comes on top."
        return (
            f"Drafting leaves {self.fixed:.0%} of an answer's time as it is (prefill above all) "
            f"and adds {self.added:.0%}, by the benches of these runs."
        )

    def _train(self) -> Iterator[str]:
        first = self.outlooks[0]
        each = first.per_second
        yield (
            f"Train {first.name} ({first.asked.parameters:,} parameters) on "
            f"{first.asked.tokens:,.0f} tokens and draft {first.length} at a time: tau "
            f"{shown(first.tau)}, {each.value:.0f} [{each.low:.0f}, {each.high:.0f}] tokens a "
            f"second, {shown(first.speedup, 'x')}. {self._left()}"
        )
        if first.beyond:
            yield f"Mind that {' and '.join(first.beyond)}: extrapolated."
        rivals = [outlook.name for outlook in self.outlooks if outlook.rival]
        if rivals:
            yield f"Not to be told apart from it: {', '.join(rivals)}."
        slope = self.law.slopes.get("tokens") if self.law else None
        if slope and slope.low <= 0:
            yield f"That more tokens help was not shown (ten times: tau {shown(slope)} more)."
        yield f"  {self.command}"
