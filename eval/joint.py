"""The joint law of the runs of all sweeps on one target: tau by kind, tokens, size and depth.

tau = a_kind + b log10 tokens + c log10 parameters + d log2 depth, by least squares weighted with
the runs' own intervals; tokens and size act log-linearly (drafters.md, a and j), tokens from a
number on, where the runs show that tau stands still below it (eval/curves.py, `late`). A kind is a
family and the tokens of its pretraining, so that tokens are those of the last training alone. A new
drafter has Student's prediction interval: the scatter of single runs beside the doubt about the
line (Draper and Smith, Applied Regression Analysis, 3rd edition, 1998, chapters 3 and 9).

Shapes: R runs, K terms of the law, C candidates, S draws.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm
from scipy.stats import t as student

from eval.bootstrap import CONFIDENCE, Array
from eval.cost import between
from eval.curves import aicc, knees
from eval.laws import MARGIN

Z = float(norm.ppf((1 + CONFIDENCE) / 2))
SPARE = 3  # runs more than terms, at least: with fewer the interval says nothing
BENT = 5  # numbers of tokens, at least, that can show where the law begins
BEYOND = 1.05  # a range that is left by more than this factor is extrapolated
VARIES = 0.1  # of a term's values, once the others are taken out: less is as good as none
SAME = 1.25  # a number within this factor of those without a term of their own is like them


class Interval(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def through(self, curve: Callable[[float], float]) -> Interval:
        """Of a rising function of it."""
        return Interval(*map(curve, self))


@dataclass(frozen=True)
class Asked:
    """A drafter: what its tau depends on. tokens: positions of its last training; before: of those
    that it started from; depth: layers of an lm, else None."""

    family: str
    parameters: int
    tokens: float
    depth: int | None = None
    before: int = 0

    @property
    def kind(self) -> str:
        """Its term of the law besides the slopes: the family, and what it was pretrained on."""
        return f"{self.family} pretrained on {self.before:,} tokens" if self.before else self.family


@dataclass(frozen=True)
class Known:
    """A drafter that a sweep trained and measured, at one temperature and batch 1.

    bench: the name of its stage's folder; prompts: what it was asked, and how long answers may be;
    length: of its chain; token: milliseconds of a drafted token; verify: v by m, and overhead,
    milliseconds; rate: training tokens a second; machine: what the times hold for; setting: what
    the law has no term for (eval/known.py); quiet: whether its times may be used (eval/others.py);
    fixed: the share of plain decoding's time that is no round of it.
    """

    of: Asked
    sweep: str
    bench: str
    prompts: str
    length: int
    tau: Interval
    speedup: Interval | None
    token: float | None
    verify: dict[int, float]
    overhead: float
    rate: float | None
    machine: str
    setting: tuple[str, str] = ("", "")
    quiet: bool = True
    fixed: float | None = None

    @property
    def decoding(self) -> float:
        """The speedup that its tau and its costs give rounds of plain decoding."""
        assert self.token is not None, "asked of runs with costs alone"
        drafted = self.length * self.token + between(self.verify, self.length + 1) + self.overhead
        return self.tau.value * (self.verify[1] + self.overhead) / drafted

    def at(self, length: int) -> Interval:
        """tau with chains of another length, if each drafted token is accepted as often."""
        if length == self.length:
            return self.tau
        return self.tau.through(lambda tau: expected_tau(alpha_of(tau, self.length), length))


def expected_tau(alpha: float, length: int) -> float:
    """Tokens per target call when each of `length` drafted tokens is accepted with alpha."""
    return sum(alpha**k for k in range(length + 1))


def alpha_of(tau: float, length: int) -> float:
    """The acceptance of each drafted token that gives tau with chains of this length: 0 to 1."""
    if tau <= 1:
        return 0.0
    if tau >= length + 1:
        return 1.0
    return float(brentq(lambda alpha: expected_tau(alpha, length) - tau, 0.0, 1.0))


def _least(rows_RK: Array, values_R: Array, variances_R: Array) -> tuple[Array, Array, float]:
    """Coefficients [K], the inverse of the weighted normal matrix, the squares that are left."""
    scaled_RK = rows_RK / np.sqrt(variances_R)[:, None]
    inverse = np.asarray(np.linalg.inv(scaled_RK.T @ scaled_RK), dtype=np.float64)
    found_K = inverse @ scaled_RK.T @ (values_R / np.sqrt(variances_R))
    return found_K, inverse, float(np.sum((values_R - rows_RK @ found_K) ** 2 / variances_R))


TERMS: dict[str, Callable[[Asked], float]] = {
    "tokens": lambda of: math.log10(of.tokens),
    "parameters": lambda of: math.log10(of.parameters),
    "depth": lambda of: math.log2(of.depth) if of.depth else 0.0,  # heads: in their kind's term
}


@dataclass(frozen=True)
class Line:
    """Weighted least squares. coefficients [K]; spread [K, K]: their covariance over `scale`;
    scale: what the residuals say of the variances that were expected; noise: variance expected of
    a new run; freedom: runs less terms."""

    coefficients: Array
    spread: Array
    scale: float
    noise: float
    freedom: int

    @classmethod
    def through(cls, rows_RK: Array, values_R: Array, errors_R: Array, bends: int = 0) -> Line:
        """errors: standard errors of the values; bends: coefficients of which the rows know. The
        variance of a run is its own and, of all alike, what parts two trainings: DerSimonian and
        Laird's moments, as in eval/laws.py."""
        _, spread, squares = _least(rows_RK, values_R, errors_R**2)
        freedom = len(values_R) - rows_RK.shape[1] - bends
        weights_R = errors_R**-2
        spare = np.sum(weights_R) - np.sum((spread @ rows_RK.T) * (rows_RK.T * weights_R**2))
        between = max(0.0, (squares - freedom) / float(spare))
        found, spread, squares = _least(rows_RK, values_R, errors_R**2 + between)
        noise = float(np.median(errors_R**2)) + between
        return cls(found, spread, squares / freedom, noise, freedom)

    def at(self, row_K: Array) -> Interval:
        """Of a new point: the interval holds its value, not the line's, in 95 of 100 cases."""
        value = float(row_K @ self.coefficients)
        variance = self.scale * (self.noise + float(row_K @ self.spread @ row_K))
        half = float(student.ppf((1 + CONFIDENCE) / 2, self.freedom)) * math.sqrt(variance)
        return Interval(value, value - half, value + half)

    def draws(self, rows_CK: Array, count: int, seed: int = 0) -> Array:
        """[S, C] values of new points, drawn together: they share what is not known of the line,
        and each has a scatter of its own."""
        dice = np.random.default_rng(seed)
        spread_KK = np.linalg.cholesky(self.spread)
        lines = dice.standard_normal((count, len(self.coefficients))) @ spread_KK.T
        own = dice.standard_normal((count, len(rows_CK))) * math.sqrt(self.noise)
        scale = self.scale * self.freedom / dice.chisquare(self.freedom, (count, 1))
        return rows_CK @ self.coefficients + np.sqrt(scale) * (lines @ rows_CK.T + own)


@dataclass(frozen=True)
class Law:
    """tau of chains of `length` over the runs it was fitted to; `terms` besides a kind's own;
    start: tokens below which more of them do nothing (1: as far as is known, none)."""

    runs: list[Known]
    kinds: list[str]
    terms: list[str]
    length: int
    line: Line
    start: float = 1.0

    @property
    def residual(self) -> float:
        """Root mean square of tau over what the law gives, by the degrees of freedom."""
        off = [run.at(self.length).value - float(self._row(run.of) @ self.line.coefficients)
               for run in self.runs]  # fmt: skip
        return math.sqrt(sum(x * x for x in off) / self.line.freedom)

    @property
    def slopes(self) -> dict[str, Interval]:
        """By term: tau for ten times the tokens or parameters, and for twice the depth."""
        t = float(student.ppf((1 + CONFIDENCE) / 2, self.line.freedom))
        first = len(self.kinds)
        values = self.line.coefficients[first:]
        halves = t * np.sqrt(self.line.scale * np.diag(self.line.spread)[first:])
        return {
            term: Interval(float(value), float(value - half), float(value + half))
            for term, value, half in zip(self.terms, values, halves, strict=True)
        }

    def tau(self, asked: Asked) -> Interval:
        """With chains of the law's length, within what is possible. ValueError: see `unknown`."""
        why = self.unknown(asked)
        if why:
            raise ValueError(why)
        return self.line.at(self._row(asked)).through(self._possible)

    def alpha(self, asked: Asked) -> Interval:
        """The acceptance of each drafted token."""
        return self.tau(asked).through(lambda tau: alpha_of(tau, self.length))

    def alphas(self, asked: Sequence[Asked], count: int) -> Array:
        """[S, C] drawn together (Line.draws)."""
        grid = np.linspace(0, 1, 1001)
        taus = np.array([expected_tau(alpha, self.length) for alpha in grid])
        drawn = self.line.draws(np.array([self._row(each) for each in asked]), count)
        return np.interp(drawn, taus, grid)

    def unknown(self, asked: Asked) -> str:
        """Why nothing can be said of this drafter; "" where something can."""
        if asked.kind not in self.kinds:
            return f"no sweep has a run of {asked.kind}"
        for term in TERMS:
            if term not in self.terms and self._off(term, asked) > SAME:
                return f"the runs do not say what {term} does: they are too few, or too alike"
        return ""

    def beyond(self, asked: Asked) -> list[str]:
        """The axes on which it lies outside of what was measured, in words."""
        found = []
        for term in self.terms:
            factor = self._off(term, asked)
            if factor > BEYOND:
                verb = "is" if term == "depth" else "are"
                low = getattr(asked, term) < min(self._measured(term, asked))
                what = "below" if low else "beyond"
                found.append(f"{term} {verb} {factor:.1f}x {what} what was measured")
        return found

    def _off(self, term: str, asked: Asked) -> float:
        """The factor by which it leaves the runs' range; 1 within."""
        if term == "depth" and asked.depth is None:
            return 1.0
        known, value = self._measured(term, asked), getattr(asked, term)
        return float(max(value / max(known), min(known) / value, 1.0))

    def _measured(self, term: str, asked: Asked) -> list[float]:
        """The runs' values; depths are of its kind alone, since heads have none."""
        there = [r.of for r in self.runs if term != "depth" or r.of.kind == asked.kind]
        return [getattr(of, term) for of in there]

    def _row(self, asked: Asked) -> Array:
        return _row(asked, self.kinds, self.terms, self.start)

    def _possible(self, tau: float) -> float:
        return min(max(tau, 1.0), self.length + 1.0)


def fit(runs: Sequence[Known]) -> Law | None:
    """The law of these runs with every term in which they vary beside their kind; None where
    they are fewer than SPARE more than its terms."""
    if not runs:
        return None
    length = Counter(run.length for run in runs).most_common(1)[0][0]
    kinds = sorted({run.of.kind for run in runs})
    terms: list[str] = []
    for term in TERMS:
        rows_RK = np.array([_row(run.of, kinds, terms) for run in runs])
        if _varies(np.array([TERMS[term](run.of) for run in runs]), rows_RK):
            terms.append(term)
    if "depth" in terms and len(runs) < len(kinds) + len(terms) + SPARE:
        terms.remove("depth")  # beside the size a small matter: its scatter is in the interval
    if len(runs) < len(kinds) + len(terms) + SPARE:
        return None
    taus = [run.at(length) for run in runs]
    errors = np.array([(tau.high - tau.low) / (2 * Z) for tau in taus])
    known = errors[errors > 0]
    errors = np.where(errors > 0, errors, np.median(known) if len(known) else 1.0)
    values = np.array([tau.value for tau in taus])

    def rows(start: float) -> Array:
        return np.array([_row(run.of, kinds, terms, start) for run in runs])

    start = 1.0
    if "tokens" in terms:
        start = _start(np.array([r.of.tokens for r in runs]), rows, values, errors)
    line = Line.through(rows(start), values, errors, bends=int(start > 1))
    return Law(list(runs), kinds, terms, length, line, start)


def _start(
    tokens_R: Array, rows: Callable[[float], Array], values_R: Array, errors_R: Array
) -> float:
    """The tokens from which the law rises; 1 unless that is clearly better (eval/laws.py)."""
    if len(np.unique(tokens_R)) < BENT:
        return 1.0

    def squares(start: float) -> float:
        return _least(rows(start), values_R, errors_R**2)[2]

    best = float(min(knees(tokens_R), key=squares))
    n, count = rows(best).shape
    straight, late = aicc(squares(1.0), n, count), aicc(squares(best), n, count + 1)
    shown = straight is not None and late is not None and straight - late > MARGIN
    return best if shown else 1.0


def _varies(values_R: Array, rows_RK: Array) -> bool:
    """Whether these values differ by more than the other terms explain: two axes that moved
    together are one."""
    known_K = np.linalg.lstsq(rows_RK, values_R)[0]
    return bool(np.ptp(values_R - rows_RK @ known_K) > VARIES)


def _row(asked: Asked, kinds: Sequence[str], terms: Iterable[str], start: float = 1.0) -> Array:
    mine = [float(asked.kind == kind) for kind in kinds]
    risen = replace(asked, tokens=max(asked.tokens, start))
    return np.array(mine + [TERMS[term](risen) for term in terms])
