"""How one measured figure follows one quantity: laws with bands, fitted to the runs of a sweep.

A law is weighted least squares. A run's weight is 1 / (s^2 + t^2): s from its own interval (bench's
bootstrap over prompts), t the scatter between runs that the intervals do not explain, by the
moments of DerSimonian and Laird (1986). Intervals scale by the residuals that are there, with
Student's t of the degrees of freedom left (Knapp and Hartung 2003): runs of one sweep share
their prompts, so the intervals alone would overstate what parts the runs, and without the
residuals they would know nothing of a training's luck.

Shapes: N runs, C coefficients, R draws, X places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from eval.bootstrap import CONFIDENCE, Array
from eval.curves import FORMS, Fit, aicc, drawn, edges, least, spread

MARGIN = 4.0  # of AICc: the asked form then has a seventh of the other's weight (Akaike weights)
LEAST = 3  # points of a law
ARRAYS = ("coefficients", "draws", "spread")
FORMS_TRIED = ("power", "saturating")
Z = float(stats.norm.ppf((1 + CONFIDENCE) / 2))


class Band(NamedTuple):
    """A law's value at a place, its 95 % interval, and whether the place is beyond the data."""

    value: float
    low: float
    high: float
    extrapolated: bool


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law.

    of, against: what follows what; form, coefficients: a key of FORMS and its letters, in order;
    draws_RC: the same from data drawn anew, of a form with a bend; spread_CC: their covariance, of
    one without; left: degrees of freedom; range: the least and largest x; residual: root mean
    square of y - law over these degrees, in units of y; r_squared: with the fit's weights;
    n: runs; conditions: what all runs had in common. asked: the form that was asked for; aicc: of
    every form that n points can judge; said: what that means; scatter: standard deviation between
    runs beyond their intervals; lack_of_fit: p of the F test against repeated x, None without any;
    points: {name, x, y, low, high, residual}.
    """

    of: str
    against: str
    form: str
    coefficients: Array
    draws: Array
    spread: Array
    left: int
    range: tuple[float, float]
    residual: float
    r_squared: float
    n: int
    conditions: dict[str, Any]
    asked: str
    aicc: dict[str, float]
    said: str
    scatter: float
    lack_of_fit: float | None = None
    points: list[dict[str, Any]] = field(default_factory=list)

    def at(self, x: float) -> Band:
        """The law at x with its 95 % band: of the mean of runs like these, on these prompts."""
        value, low, high = (float(v[0]) for v in self.along(np.array([x], dtype=float)))
        least, most = self.range
        return Band(value, low, high, not least * (1 - 1e-9) <= x <= most * (1 + 1e-9))

    def along(self, x_X: Array) -> tuple[Array, Array, Array]:
        """The curve and the lower and upper edge of its 95 % band, X values each."""
        form = FORMS[self.form]
        if not form.bends:
            return self._student(form.columns(x_X))
        value = form.curve(self.coefficients[None], x_X)[0]
        return value, *edges(form.curve(self.draws, x_X))

    def _student(self, rows_XC: Array) -> tuple[Array, Array, Array]:
        """These sums of the coefficients with Student's 95 % intervals."""
        value = rows_XC @ self.coefficients
        half = np.sqrt(np.einsum("xc,cd,xd->x", rows_XC, self.spread, rows_XC))
        half *= stats.t.ppf((1 + CONFIDENCE) / 2, self.left)
        return value, value - half, value + half

    def slope(self) -> Band:
        """The mean rise over the measured range, for each unit of the asked form (ten times x,
        twice x, x + 1): b itself where the law has the asked form."""
        ends = np.array(self.range)
        span = np.subtract(*FORMS[self.asked].parts(ends, None)[1][::-1])
        if not FORMS[self.form].bends:
            first, last = FORMS[self.form].columns(ends)
            found = self._student((last - first)[None] / span)
            rise, least, most = (float(each[0]) for each in found)
            return Band(rise, least, most, False)
        rows = np.concatenate([self.coefficients[None], self.draws])
        rises = FORMS[self.form].curve(rows, ends)
        slopes = ((rises[:, 1] - rises[:, 0]) / span)[:, None]
        low, high = edges(slopes[1:])
        return Band(float(slopes[0, 0]), float(low[0]), float(high[0]), False)

    def told(self) -> dict[str, Any]:
        """JSON-able; `Law.of_told` reads it."""
        rounded = {name: _rounded(getattr(self, name)) for name in ARRAYS}
        return asdict(self) | rounded | {"range": list(self.range)}

    @classmethod
    def of_told(cls, told: dict[str, Any]) -> Law:
        """What `told` wrote; ValueError for another shape."""
        try:
            given = told | {name: np.array(told[name], dtype=float) for name in ARRAYS}
            made = cls(**given | {"range": (float(told["range"][0]), float(told["range"][1]))})
            count = FORMS[made.form].count
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"this is not a law as laws.json has them: {error!r}") from None
        doubt = made.draws.shape[1:] if FORMS[made.form].bends else made.spread.shape[1:]
        if made.coefficients.shape != (count,) or doubt != (count,):
            raise ValueError(f"a law of form {made.form} has {count} coefficients, this has not")
        return made


def fit(
    x: Sequence[float],
    y: Sequence[float],
    low: Sequence[float | None],
    high: Sequence[float | None],
    *,
    of: str,
    against: str,
    asked: str = "log10",
    names: Sequence[str] = (),
    conditions: dict[str, Any] | None = None,
    forms: Sequence[str] = FORMS_TRIED,
) -> Law:
    """The law of y(x) in the form `asked`, or in one of `forms` where that is clearly better.

    Clearly: its AICc (Akaike's criterion for small samples, Hurvich and Tsai 1989, on the weighted
    residuals, their scale being a coefficient too) is lower by more than 4. AICc and not the error
    of leaving one out, which with 4 to 8 points is decided by the two ends, where the law
    extrapolates. It charges a third coefficient so much there that a curve has to be plain to see,
    and is undefined below 5 points (6 for a form of three): then nothing is said of forms.

    Bands are Student's of least squares for forms without a bend. For others, with the form fixed,
    every y is drawn anew as law + normal noise of its own standard deviation, on the scale of the
    residuals, itself drawn (scaled inverse chi-square), and the law is fitted again.

    Raises ValueError below three points, or where x has fewer different values than needed.
    """
    x_N, y_N = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    distinct = len(np.unique(x_N))
    if len(x_N) < LEAST or distinct < 2:
        raise ValueError(
            f"a law of {of} against {against} needs {LEAST} runs at 2 places or more; there are "
            f"{len(x_N)} runs at {distinct}"
        )
    own_N = _deviations(low, high)
    scatter = _scatter(asked, x_N, y_N, own_N)
    sd_N = np.sqrt(own_N**2 + scatter**2)
    able = [f for f in (asked, *forms) if f == asked or distinct > FORMS[f].count]
    fits = {name: least(name, x_N, y_N, sd_N) for name in able}
    counted = {n: aicc(f.squares, len(x_N), FORMS[n].count) for n, f in fits.items()}
    best, said = _choose(asked, known := _known(counted), len(x_N))
    chosen = fits[best]
    return Law(
        of=of,
        against=against,
        form=best,
        coefficients=chosen.coefficients,
        **_doubt(chosen, x_N, y_N, sd_N),
        range=(float(x_N.min()), float(x_N.max())),
        residual=float(np.sqrt(np.sum(chosen.residuals**2) / chosen.left)),
        r_squared=_r_squared(chosen, y_N, sd_N),
        n=len(x_N),
        conditions=conditions or {},
        asked=asked,
        aicc=known,
        said=said,
        scatter=scatter,
        lack_of_fit=_lack_of_fit(chosen, x_N, y_N, sd_N),
        points=_points(names, x_N, y_N, low, high, chosen.residuals),
    )


def _doubt(found: Fit, x_N: Array, y_N: Array, sd_N: Array) -> dict[str, Any]:
    """What the band is made of."""
    bent, nothing = FORMS[found.form].bends is not None, np.zeros((0, 0))
    return {
        "draws": drawn(found, x_N, y_N, sd_N) if bent else nothing,
        "spread": nothing if bent else spread(found, x_N, sd_N),
        "left": found.left,
    }


def _deviations(low: Sequence[float | None], high: Sequence[float | None]) -> Array:
    """Standard deviations from 95 % intervals; the median's where a run has none, 1 without any."""
    spans = [
        (b - a) / (2 * Z) if a is not None and b is not None and b > a else np.nan
        for a, b in zip(low, high, strict=True)
    ]
    known = np.array(spans, dtype=float)
    typical = float(np.nanmedian(known)) if np.isfinite(known).any() else 1.0
    return np.where(np.isfinite(known), known, typical)


def _scatter(form: str, x_N: Array, y_N: Array, own_N: Array) -> float:
    """Standard deviation between runs that their intervals do not explain, by moments."""
    found = least(form, x_N, y_N, own_N)
    design = FORMS[form].columns(x_N)
    w = 1 / own_N**2
    inverse = np.linalg.pinv(design.T @ (w[:, None] * design))
    spare = w.sum() - np.trace(inverse @ (design.T @ ((w**2)[:, None] * design)))
    return float(np.sqrt(max(0.0, (found.squares - found.left) / spare))) if spare > 0 else 0.0


def _known(counted: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in counted.items() if value is not None}


def _choose(asked: str, aicc: dict[str, float], n: int) -> tuple[str, str]:
    """The form, and the sentence that says why."""
    formula = {name: FORMS[name].formula for name in (asked, *aicc)}
    if asked not in aicc or len(aicc) < 2:
        return asked, f"too few points ({n}) to tell {formula[asked]} from other forms"
    best = min(aicc, key=lambda name: aicc[name])
    gain = aicc[asked] - aicc[best]
    if gain > MARGIN:
        return best, (
            f"{formula[asked]} fails here: {formula[best]} is better (AICc lower by {gain:.1f})"
        )
    others = ", ".join(formula[name] for name in aicc if name != asked)
    return asked, f"{formula[asked]} holds: no other form is clearly better ({others} tried)"


def _r_squared(found: Fit, y_N: Array, sd_N: Array) -> float:
    mean = np.average(y_N, weights=1 / sd_N**2)
    total = float(np.sum(((y_N - mean) / sd_N) ** 2))
    return 1 - found.squares / total if total > 0 else 0.0


def _lack_of_fit(found: Fit, x_N: Array, y_N: Array, sd_N: Array) -> float | None:
    """p that the law misses the means at repeated x by no more than their repeats scatter."""
    places, where = np.unique(x_N, return_inverse=True)
    between, within = len(places) - FORMS[found.form].count, len(x_N) - len(places)
    if between < 1 or within < 1:
        return None
    w = 1 / sd_N**2
    means = np.bincount(where, w * y_N) / np.bincount(where, w)
    pure = float(np.sum(w * (y_N - means[where]) ** 2))
    if pure <= 0:
        return None
    ratio = max(0.0, found.squares - pure) / between / (pure / within)
    return float(stats.f.sf(ratio, between, within))


def _points(
    names: Sequence[str],
    x_N: Array,
    y_N: Array,
    low: Sequence[float | None],
    high: Sequence[float | None],
    residuals: Array,
) -> list[dict[str, Any]]:
    called = names or [str(i + 1) for i in range(len(x_N))]
    rows = zip(called, x_N.tolist(), y_N.tolist(), low, high, residuals.tolist(), strict=True)
    return [
        dict(zip(("name", "x", "y", "low", "high", "residual"), row, strict=True)) for row in rows
    ]


def _rounded(values: Array) -> Any:
    """Eight digits: a law's curve is a difference of terms larger than itself."""
    return np.vectorize(lambda v: float(f"{v:.8g}"), otypes=[float])(values).tolist()
