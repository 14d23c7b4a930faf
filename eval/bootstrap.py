"""Intervals by resampling groups of runs: ratios of sums, quantiles, shares.

Every interval is a paired percentile bootstrap (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13): groups are drawn with replacement, and a drawn group brings the runs
of both arms, so what makes a prompt slow for both cancels.

Legend of shapes: G groups, R resamples, W width (1, or one column for each draft position).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Columns = dict[str, Array]

RESAMPLES = 10_000
CONFIDENCE = 0.95
CHUNK = 1_000_000  # draws held at once: some 25 MB, whatever the number of groups
FASTER = "faster"
NO_DIFFERENCE = "no difference shown"
SLOWER = "slower than no drafting"


class Estimate(TypedDict):
    """A measured value, its 95 % interval, and n, the number of groups behind it.

    `value` is None where nothing was measured (no groups, or a ratio of zeros), `low` and `high`
    also where one group alone shows nothing about the spread.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


def verdict(speedup: Estimate) -> str:
    """The words for a speedup: its whole interval decides, never its value alone."""
    if speedup["value"] is None:
        return "not measured"
    if speedup["low"] is None or speedup["high"] is None:
        return "one prompt: no interval"
    if speedup["high"] < 1:
        return SLOWER
    return FASTER if speedup["low"] > 1 else NO_DIFFERENCE


def share(count: int, total: int) -> Estimate:
    """count / total with Wilson's 95 % interval, which stays honest at 0 and at all of them."""
    if total == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    z, p = 1.959964, count / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * np.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    low, high = max(0.0, float(centre - half)), min(1.0, float(centre + half))
    return {"value": p, "low": low, "high": high, "n": total}


def _weights(groups: int, resamples: int, seed: int) -> Iterator[Array]:
    """How often each group was drawn, (chunk, G) at a time; the first row is the data as it is.

    One group yields that row alone: resampling it would give an interval of width zero.
    """
    yield np.ones((1, groups))
    if groups < 2:
        return
    rng = np.random.default_rng(seed)
    step = max(1, CHUNK // groups)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(groups, size=(size, groups)) + groups * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * groups)
        yield counts.reshape(size, groups).astype(np.float64)


def resample(columns: Columns, resamples: int, seed: int) -> Columns:
    """Sums over groups, (1 + R, W) each: row 0 of the data, the others of the resamples."""
    groups = len(next(iter(columns.values())))
    parts: dict[str, list[Array]] = {name: [] for name in columns}
    for weights in _weights(groups, resamples, seed):
        for name, column in columns.items():
            parts[name].append(weights @ column)
    return {name: np.concatenate(part) for name, part in parts.items()}


def divide(top: Array, bottom: Array) -> Array:
    """top / bottom, NaN where there is nothing to divide by."""
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)


def quantile(ordered: Array, q: float, resamples: int, seed: int) -> Estimate:
    """The smallest value with a share q of the groups at or below it, with its interval."""
    if not len(ordered):
        return estimates(np.full((1, 1), np.nan), 0)[0]
    n = len(ordered)
    found = [
        ordered[(weights.cumsum(1) >= q * n - 1e-9).argmax(1)]  # 1e-9: q * n is not exact
        for weights in _weights(n, resamples, seed)
    ]
    return estimates(np.concatenate(found)[:, None], n)[0]


def estimates(ratio: Array, n: int | NDArray[np.int64]) -> list[Estimate]:
    """One Estimate for each column of (1 + R, W), n groups each; undefined resamples are left out.

    A column that fewer than two groups know anything about has no interval: theirs is of width
    zero, and would pass for certainty.
    """
    tail = 50 * (1 - CONFIDENCE)
    found: list[Estimate] = []
    for column, groups in zip(ratio.T, np.broadcast_to(n, ratio.shape[1:]), strict=True):
        value = float(column[0]) if np.isfinite(column[0]) else None
        drawn = column[1:][np.isfinite(column[1:])]
        low, high = None, None
        if value is not None and groups > 1 and len(drawn):
            low, high = (float(x) for x in np.percentile(drawn, [tail, 100 - tail]))
        found.append({"value": value, "low": low, "high": high, "n": int(groups)})
    return found
