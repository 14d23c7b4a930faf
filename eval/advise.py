"""Which drafters would pay for a target on this machine: from measured times, before any training.

The acceptance of a drafter that is not trained yet is unknown, so every answer is asked for each
acceptance alpha: with drafts of n tokens that are accepted one by one with alpha, a target call
gives (1 - alpha^(n+1)) / (1 - alpha) tokens (Leviathan et al. 2023, eq. 1), and the speedup is
that over the cost of a round in rounds of plain decoding (decoding.md, a.1).
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from eval.cost import between
from eval.joint import expected_tau

ALPHAS = (0.5, 0.6, 0.7, 0.8)  # acceptances that the tables show
DEFAULT = 0.6  # acceptance of the verdict where none was measured
LENGTHS = (1, 2, 4, 8, 16)  # chains that are timed; between them, linearly
TOKEN = 4  # a drafted token's milliseconds are told of a chain of so many, or the longest


@dataclass(frozen=True)
class Candidate:
    """A drafter and what its rounds cost.

    plain: milliseconds of a round of plain decoding; draft and verify: of a chain by its length,
    what a round takes besides included in plain and verify. layers: of an lm, else None.
    """

    name: str
    family: str
    parameters: int
    layers: int | None
    plain: float
    draft: dict[int, float]
    verify: dict[int, float]

    @property
    def token(self) -> float:
        """Milliseconds of a drafted token."""
        length = min(TOKEN, max(self.draft))
        return between(self.draft, length) / length

    def speedup(self, alpha: float, length: int) -> float:
        """Over plain decoding, with drafts of that many tokens."""
        cost = between(self.draft, length) + between(self.verify, length)
        return expected_tau(alpha, length) * self.plain / cost

    def best(self, alpha: float) -> tuple[float, int]:
        """The most speedup at this acceptance, and the shortest draft that gives it."""
        lengths = range(1, max(self.draft) + 1)
        length = max(lengths, key=lambda n: (self.speedup(alpha, n), -n))
        return self.speedup(alpha, length), length

    def needs(self, speed: float = 1.0) -> float | None:
        """The least acceptance with which it is that fast; None if none is enough."""
        if self.best(1.0)[0] < speed:
            return None
        low, high = 0.0, 1.0
        for _ in range(30):  # the speedup grows with alpha at every length
            middle = (low + high) / 2
            low, high = (low, middle) if self.best(middle)[0] >= speed else (middle, high)
        return high

    def told(self) -> dict[str, Any]:
        """JSON-able, with the answers."""
        at = {f"{a:g}": self.best(a) for a in ALPHAS}
        return {
            **{"name": self.name, "family": self.family, "parameters": self.parameters},
            **{"layers": self.layers, "c": self.token / self.plain, "token_ms": self.token},
            **{"draft_ms": self.draft, "verify_ms": self.verify, "break_even": self.needs()},
            "most": self.best(1.0)[0],
            "at": {a: {"speedup": speed, "length": n} for a, (speed, n) in at.items()},
        }


@dataclass(frozen=True)
class Accepted:
    """What a bench report says of its drafter at its lowest temperature, batch 1: alpha is
    accepted over verified tokens, of a tree by its levels."""

    family: str
    parameters: int
    shape: str
    alpha: float
    tau: float
    speedup: float

    @classmethod
    def of(cls, report: dict[str, Any]) -> "Accepted | None":
        """None where the drafter was not measured at batch 1, or never drafted."""
        rows = [r for r in report["table"] if (r["arm"], r["batch"]) == ("drafter", 1) and r["n"]]
        row = min(rows, key=lambda row: row["temperature"], default=None)
        reached = sum(p["reached"] for p in row["acceptance"]) if row else 0
        if row is None or not reached:
            return None
        said = report["conditions"]
        alpha = sum(p["accepted"] for p in row["acceptance"]) / reached
        values = (alpha, row["tau"]["value"], row["speedup"]["value"])
        return cls(said["drafter"], said["parameters_drafter"], said["draft_shape"], *values)

    def is_of(self, candidate: Candidate) -> bool:
        return (self.family, self.parameters) == (candidate.family, candidate.parameters)


@dataclass(frozen=True)
class Advice:
    """What was measured for one target, and what follows.

    verify: v by m, and overhead: what a round takes besides, milliseconds; free: a drafter that
    costs nothing; refused: what was left out, and why; recipe: the name of the recipe's own
    drafter; alpha: the acceptance of the verdict, and `expected` where a law of sweeps says so, of
    whom; batches: the drafter that is fastest at it,
    measured at each batch; kept: the file of the figures.
    """

    target: str
    conditions: str
    verify: dict[int, float]
    overhead: float
    free: Candidate
    candidates: list[Candidate]
    refused: dict[str, str]
    recipe: str
    kept: str
    alpha: float = DEFAULT
    accepted: Accepted | None = None
    expected: str = ""
    batches: dict[int, Candidate] = field(default_factory=dict)

    @property
    def fastest(self) -> Candidate:
        """At the acceptance of the verdict."""
        return max(self.candidates, key=lambda c: c.best(self.alpha)[0])

    def told(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **{"target": self.target, "conditions": self.conditions, "alpha": self.alpha},
            **{"verify_ms": self.verify, "overhead_ms": self.overhead, "free": self.free.told()},
            **{"candidates": [c.told() for c in self.candidates], "refused": self.refused},
            "accepted": None if self.accepted is None else vars(self.accepted),
            "batches": {b: c.told() for b, c in self.batches.items()},
            "verdict": verdict(self),
        }


def free(verify: dict[int, float], overhead: float) -> Candidate:
    """The drafter that no other can beat: its drafts take no time."""
    return Candidate(
        *("a drafter that costs nothing", "", 0, None, verify[1] + overhead),
        dict.fromkeys(LENGTHS, 0.0),
        {n: between(verify, n + 1) + overhead for n in LENGTHS},
    )


def verdict(advice: Advice) -> list[str]:
    """What follows, in sentences."""
    return [
        *_scatter(advice),
        *_yours(advice),
        *_pays(advice),
        *_hopeless(advice),
        *_depth(advice),
        *_limit(advice),
    ]


def _scatter(advice: Advice) -> list[str]:
    """A call over more tokens cannot take less: if it did, the machine had other work."""
    sizes = sorted(advice.verify)
    for less, more in pairwise(sizes):
        if advice.verify[more] < 0.9 * advice.verify[less]:
            return [
                f"THE FIGURES SCATTER: a call over {more} tokens took {advice.verify[more]:.2f} ms "
                f"and one over {less} {advice.verify[less]:.2f} ms. The machine was busy: remove "
                f"{advice.kept} and ask again when it is not."
            ]
    for each in advice.candidates:
        ms, length = min((ms, n) for n, ms in each.verify.items())
        if ms < 0.85 * each.plain:
            return [
                f"THE FIGURES SCATTER: a call over {length + 1} tokens, drafted by {each.name}, "
                f"took {ms:.2f} ms and one of plain decoding {each.plain:.2f} ms. The machine was "
                f"busy: remove {advice.kept} and ask again when it is not."
            ]
    return []


def _yours(advice: Advice) -> list[str]:
    found = advice.accepted
    if advice.expected:
        return [
            f"By the law of the sweeps {advice.expected} accepts {advice.alpha:.2f}; the following "
            "is said for that, and the table has others."
        ]
    if found is None:
        return [
            f"No drafter of this recipe was measured yet; the following is said for an acceptance "
            f"of {advice.alpha:.2f}, and the table has others."
        ]
    said = (
        f"Your drafter ({found.family}, {found.parameters:,} parameters, {found.shape}) accepted "
        f"{found.alpha:.2f} of the tokens that were verified, {found.tau:.2f} tokens per target "
        f"call, and measured {found.speedup:.2f}x"
    )
    row = next((c for c in advice.candidates if found.is_of(c)), None)
    if row is None:
        return [f"{said}; it is none of the drafters here."]
    speed, length = row.best(found.alpha)
    return [f"{said}; these costs give {speed:.2f}x at that acceptance with chains of {length}."]


def _pays(advice: Advice) -> list[str]:
    bound = advice.free.best(advice.alpha)[0]
    sentences = [
        f"At acceptance {advice.alpha:.2f} no drafter can give more than {bound:.2f}x here: that "
        "is what verification alone leaves."
    ]
    kinds = (("lm", "Of the small language models"), ("", "Of the draft heads"))
    for family, who in kinds:
        mine = [c for c in advice.candidates if (c.family == "lm") == (family == "lm")]
        best = max(mine, key=lambda c: c.best(advice.alpha)[0], default=None)
        if best is None:
            continue
        speed, length = best.best(advice.alpha)
        least = best.needs()
        pays = "it cannot pay" if least is None else f"it pays from an acceptance of {least:.2f} on"
        sentences.append(
            f"{who} {best.name} is fastest at that acceptance: {speed:.2f}x with drafts of "
            f"{length}; {pays}."
        )
    if any(c.family != "lm" for c in advice.candidates):
        sentences.append(
            "Heads are compared by their chains; a tree (stage tune_tree) accepts more a call and "
            "verifies more."
        )
    return sentences


def _hopeless(advice: Advice) -> list[str]:
    dead = [c for c in advice.candidates if c.needs() is None]
    if not dead:
        return ["Every drafter here can pay if enough of its tokens are accepted."]
    names = ", ".join(f"{c.name} (at most {c.best(1.0)[0]:.2f}x)" for c in dead)
    return [f"Cannot pay on this machine for this target, whatever they accept: {names}."]


def _depth(advice: Advice) -> list[str]:
    """Depth against width (drafters.md, j): at nearly equal size, and over all small models."""
    models = [c for c in advice.candidates if c.layers]
    pairs = [
        (abs(deep.parameters / shallow.parameters - 1), shallow, deep)
        for shallow in models
        for deep in models
        if (deep.layers or 0) >= 2 * (shallow.layers or 0)
    ]
    if not pairs:
        return []
    _, shallow, deep = min(pairs, key=lambda pair: pair[0])
    least = deep.needs(shallow.best(advice.alpha)[0])
    needs = (
        "no acceptance is enough"
        if least is None
        else f"its acceptance must be {least:.2f} or more"
    )
    sentences = [
        f"Depth against width: {deep.name} ({deep.parameters:,} parameters) takes "
        f"{deep.token:.2f} ms a token and {shallow.name} ({shallow.parameters:,}) "
        f"{shallow.token:.2f} ms; for {deep.name} to be as fast as {shallow.name} is at "
        f"{advice.alpha:.2f}, {needs}."
    ]
    if len(models) > 3:
        token = [c.token for c in models]
        depth, size = (
            float(np.corrcoef(token, of)[0, 1]) ** 2
            for of in ([c.layers or 0 for c in models], [c.parameters for c in models])
        )
        sentences.append(
            f"Over these {len(models)} models a token's time follows the layers with R² "
            f"{depth:.2f} and the parameters with R² {size:.2f}."
        )
    return sentences


def _limit(advice: Advice) -> list[str]:
    """The batch from which drafting no longer pays at the acceptance of the verdict."""
    speeds = {b: c.best(advice.alpha)[0] for b, c in sorted(advice.batches.items())}
    if not speeds:
        return []
    lost = next((b for b, speed in speeds.items() if speed < 1), None)
    name, alpha = advice.fastest.name, f"{advice.alpha:.2f}"
    if lost is None:
        last = max(speeds)
        return [f"{name} still pays at batch {last}, the largest tried ({speeds[last]:.2f}x)."]
    below = max((b for b in speeds if b < lost), default=None)
    until = "at no batch that was tried" if below is None else f"up to batch {below}"
    return [
        f"At acceptance {alpha} {name} pays {until}; at batch {lost} verification costs so much "
        f"that it gives {speeds[lost]:.2f}x."
    ]
