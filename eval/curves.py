"""Families of curves, and the one that leaves least: weighted least squares with one
bend, an exponent or a place.

Shapes: N points, C coefficients, R draws, X places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from eval.bootstrap import CONFIDENCE, Array

DRAWS = 9  # 2 to this power: 512


@dataclass(frozen=True)
class Form:
    """A family of curves: linear in all coefficients but the last, which is one of those that
    `bends` gives for the points' x, if there is one."""

    formula: str
    parts: Callable[[Array, Any], Sequence[Any]]
    bends: Callable[[Array], Array] | None = None

    def columns(self, x_X: Array) -> Array:
        """(X, C), by which coefficients are multiplied; of a family without a bend."""
        return np.stack(np.broadcast_arrays(*self.parts(x_X, 1.0)), -1)

    @property
    def count(self) -> int:
        """Coefficients, C."""
        return len(self.parts(np.ones(1), 1.0)) + (self.bends is not None)

    def curve(self, coefficients_RC: Array, x_X: Array) -> Array:
        """(R, X): each row of coefficients at each place."""
        parts = self.parts(x_X, coefficients_RC[:, -1:])
        columns = (coefficients_RC[:, i : i + 1] * part for i, part in enumerate(parts))
        return sum(columns, np.zeros((len(coefficients_RC), len(x_X))))


def knees(x_N: Array) -> Array:
    """From the least x to the third largest: three places at least lie on what rises."""
    places = np.unique(x_N)
    return np.geomspace(places[0], places[max(0, len(places) - 3)], 200)


FORMS = {
    "log10": Form("a + b log10 x", lambda x, _: (np.ones_like(x), np.log10(x))),
    "log2": Form("a + b log2 x", lambda x, _: (np.ones_like(x), np.log2(x))),
    "linear": Form("a + b x", lambda x, _: (np.ones_like(x), x)),
    "power": Form("a x^b", lambda x, b: (x**b,), lambda _: np.linspace(-3, 3, 601)),
    "saturating": Form(
        "a - c x^-b",
        lambda x, b: (np.ones_like(x), -(x**-b)),
        lambda _: np.geomspace(0.05, 3, 120),
    ),
    "late": Form(
        "a + b log10 max(x, k)",
        lambda x, k: (np.ones_like(x), np.log10(np.maximum(x, k))),
        knees,
    ),
}


class Fit(NamedTuple):
    """Coefficients (C,), the weighted sum of squared residuals, residuals (N,), degrees left."""

    form: str
    coefficients: Array
    squares: float
    residuals: Array
    left: int


def solve(form: str, x_N: Array, y_RN: Array, sd_N: Array) -> Array:
    """Coefficients (R, C) of each row: linear least squares at every bend E that the form may have,
    then the bend that leaves least (variable projection, Golub and Pereyra 1973)."""
    bends = FORMS[form].bends
    tried_E1 = np.ones((1, 1)) if bends is None else bends(x_N)[:, None]
    parts = FORMS[form].parts(x_N[None], tried_E1)
    design_ENP = np.stack([np.broadcast_to(p, (len(tried_E1), len(x_N))) for p in parts], -1)
    q_ENP, r_EPP = np.linalg.qr(design_ENP / sd_N[:, None])
    along_ERP = (y_RN / sd_N) @ q_ENP
    best_R = np.sum(along_ERP**2, -1).argmax(0)
    inverse_EPP = np.linalg.inv(r_EPP)
    rows = np.einsum("rij,rj->ri", inverse_EPP[best_R], along_ERP[best_R, np.arange(len(y_RN))])
    return rows if bends is None else np.concatenate([rows, tried_E1[best_R]], 1)


def least(form: str, x_N: Array, y_N: Array, sd_N: Array) -> Fit:
    """The curve of this form through (x, y) whose weighted squares are least."""
    coefficients = solve(form, x_N, y_N[None], sd_N)
    residuals = y_N - FORMS[form].curve(coefficients, x_N)[0]
    squares = float(np.sum((residuals / sd_N) ** 2))
    return Fit(form, coefficients[0], squares, residuals, len(x_N) - FORMS[form].count)


def aicc(squares: float, n: int, count: int) -> float | None:
    """Akaike's criterion for small samples (Hurvich and Tsai 1989) of weighted squared residuals,
    whose scale is a coefficient too; None where n is too small for it."""
    k = count + 1
    if n - k - 1 < 1:
        return None
    mean = max(squares / n, 1e-12)  # a perfect fit
    return float(n * np.log(mean) + 2 * k + 2 * k * (k + 1) / (n - k - 1))


def spread(found: Fit, x_N: Array, sd_N: Array) -> Array:
    """(C, C): covariance of the coefficients of a family without a bend, by the residuals."""
    scaled_NC = FORMS[found.form].columns(x_N) / sd_N[:, None]
    inverse_CC = np.asarray(np.linalg.inv(scaled_NC.T @ scaled_NC), dtype=np.float64)
    return inverse_CC * (found.squares / found.left)


def drawn(found: Fit, x_N: Array, y_N: Array, sd_N: Array) -> Array:
    """(R, C): coefficients of data drawn anew (eval/laws.py says how), by a scrambled Sobol
    sequence and its mirror image, whose quantiles are steadier than those of random numbers."""
    points = stats.qmc.Sobol(len(x_N) + 1, seed=0).random_base2(DRAWS - 1).clip(1e-9, 1 - 1e-9)
    scale_R = np.sqrt(found.squares / stats.chi2.ppf(points[:, 0], found.left))
    noise_RN = scale_R[:, None] * stats.norm.ppf(points[:, 1:]) * sd_N
    both_RN = np.concatenate([noise_RN, -noise_RN])
    return solve(found.form, x_N, y_N - found.residuals + both_RN, sd_N)


def edges(values_RX: Array) -> tuple[Array, Array]:
    """(X,) and (X,): the ends of the 95 % interval over the draws."""
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values_RX, [tail, 100 - tail], axis=0)
    return low, high
