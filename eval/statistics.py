"""Numbers from raw bench runs: paired speedups, tokens per target call, acceptance by position.

A run is one line of bench's runs.jsonl. A group is the unit that is resampled: one prompt at batch
1, or the prompts that were decoded together. Every estimate is a ratio of sums over groups, with
the interval of eval/bootstrap.py.

Repeats of a group are summed and never resampled: they share the prompt, and counting them as
independent would narrow the interval without more prompts behind it. The sum and not the median,
so that the numbers are about all the time that passed, slow repeats included.

Legend of shapes: G groups, R resamples, W width (1, or one column for each draft position).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.bootstrap import (
    RESAMPLES,
    Array,
    Columns,
    Estimate,
    divide,
    estimates,
    quantile,
    resample,
    verdict,
)

Run = dict[str, Any]

BASELINE = "autoregressive"
FIELDS = (
    *("seconds", "tokens", "rounds", "row_rounds"),
    *("first_seconds", "first_tokens", "draft_seconds", "verify_seconds"),
)


def paired_speedup(
    runs: list[Run],
    arm: str,
    baseline: str = BASELINE,
    *,
    temperature: float = 0.0,
    batch: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """How many times faster `arm` is than `baseline`, over the groups that both decoded.

    (sum seconds / sum tokens of the baseline) / (sum seconds / sum tokens of the arm), sums over
    groups and their repeats. Prefill is included. At temperature 0 with identical outputs this is
    the ratio of total times; elsewhere dividing by tokens keeps a shorter answer from looking fast.

    Raises ValueError when no group was decoded by both at this temperature and batch.
    """
    mine, theirs, _ = _pair(runs, arm, baseline, temperature, batch)
    if not mine:
        there = sorted({(run["arm"], run["temperature"], run["batch"]) for run in runs})
        raise ValueError(
            f"No prompt was decoded by both {arm!r} and {baseline!r} at temperature "
            f"{temperature:g}, batch {batch}. There are runs of (arm, temperature, batch): {there}."
        )
    return estimates(_draws(mine, theirs, resamples, seed), len(mine))[0]


def speedup_draws(
    runs: list[Run],
    arm: str,
    *,
    temperature: float,
    batch: int,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Array:
    """The speedup over the baseline, (1 + R, 1): the data's first, then the resamples'.

    NaN where nothing was measured; the first row alone where one group was.
    """
    mine, theirs, _ = _pair(runs, arm, BASELINE, temperature, batch)
    return _draws(mine, theirs, resamples, seed)


def measure(
    runs: list[Run],
    arm: str,
    *,
    temperature: float,
    batch: int,
    baseline: str = BASELINE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that the report says about one arm at one temperature and batch, JSON-able.

    Estimates (see Estimate): speedup, macro_speedup (the mean of the groups' own speedups),
    decode_speedup (without the time and tokens up to the first round) and busy_speedup (what the
    draft and verify seconds alone would give), all four None for the baseline itself;
    tokens_per_second; tau and its quantiles over groups tau_p10, tau_p50, tau_p90;
    accepted_per_round; draft_ms_per_round, verify_ms_per_round, other_ms_per_round,
    draft_ms_per_token (milliseconds); plain_ms_per_round, the baseline's verification; ttft_ms;
    tpot_ms_p50 and tpot_ms_p95. Counts: n (groups), unpaired (groups left out, since the baseline
    did not decode them), runs, tokens, row_rounds, drafted, accepted. `acceptance` as in
    `acceptance_by_position`; `verdict` in words, None for the baseline.

    Without a single group, the values are None and the counts 0: a report must survive that.
    """
    mine, theirs, unpaired = _pair(runs, arm, baseline, temperature, batch)
    columns = totals(mine) | _plain(totals(theirs)) | _positions(mine)
    columns |= _each(columns)
    sums = resample(columns, resamples, seed)
    found: dict[str, Any] = {
        name: estimates(ratio, len(mine))[0] for name, ratio in _ratios(sums).items()
    }
    if arm == baseline:
        found |= dict.fromkeys(name for name in found if name.endswith("speedup"))
    return {
        **{"arm": arm, "temperature": temperature, "batch": batch},
        **{"n": len(mine), "unpaired": unpaired},
        **{name: int(sums[name][0, 0]) for name in ("runs", "tokens", "row_rounds")},
        **{name: int(sums[f"{name}_tokens"][0, 0]) for name in ("drafted", "accepted")},
        **found,
        **_quantiles(columns, resamples, seed),
        "acceptance": _acceptance(columns, sums),
        "verdict": None if arm == baseline else verdict(found["speedup"]),
    }


def acceptance_by_position(
    runs: list[Run], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Acceptance at each draft position, of runs of one arm, temperature and batch.

    One entry for each position k, from 1: `drafted`, the row-rounds that drafted k tokens or more;
    `reached`, those of them that accepted the k - 1 before; `accepted`, those that accepted k or
    more; `survival` = accepted / drafted (unconditional, what vLLM prints) and `conditional` =
    accepted / reached, both Estimates, whose n is the groups that the denominator is not 0 in. A
    round that drafted fewer than k tokens counts in neither denominator of position k. Counts are
    pooled over rounds: the product of per-position means over prompts is another number, and not
    the acceptance.
    """
    groups = by_group(runs)
    members = [groups[group] for group in sorted(groups)]
    columns = _positions(members)
    return _acceptance(columns, resample(columns, resamples, seed))


def by_group(runs: Iterable[Run]) -> dict[int, list[Run]]:
    groups: dict[int, list[Run]] = {}
    for run in runs:
        groups.setdefault(run["group"], []).append(run)
    return groups


def _pair(
    runs: list[Run], arm: str, baseline: str, temperature: float, batch: int
) -> tuple[list[list[Run]], list[list[Run]], int]:
    """Runs of both arms, by shared group in one order, and how many of the arm's are unshared."""
    here = [run for run in runs if run["temperature"] == temperature and run["batch"] == batch]
    mine = by_group(run for run in here if run["arm"] == arm)
    theirs = by_group(run for run in here if run["arm"] == baseline)
    shared = sorted(mine.keys() & theirs.keys())
    return [mine[g] for g in shared], [theirs[g] for g in shared], len(mine) - len(shared)


def totals(members: list[list[Run]]) -> Columns:
    """Sums over each group's repeats, (G, 1) each."""
    table = [[sum(run[field] for run in group) for field in FIELDS] for group in members]
    matrix = np.array(table, dtype=np.float64).reshape(len(members), len(FIELDS))
    columns = {field: matrix[:, i : i + 1] for i, field in enumerate(FIELDS)}
    runs = np.array([[len(group)] for group in members], dtype=np.float64)
    rows = np.array([[len(group[0]["prompts"])] for group in members], dtype=np.float64)
    return columns | {"runs": runs.reshape(-1, 1), "rows": rows.reshape(-1, 1)}


def _plain(columns: Columns) -> Columns:
    return {f"plain_{name}": column for name, column in columns.items()}


def _positions(members: list[list[Run]]) -> Columns:
    """Counts by draft position, (G, K) each, and the totals of drafted and accepted, (G, 1)."""
    pairs = [_rounds(group) for group in members]
    longest = max((int(drafted.max(initial=0)) for drafted, _ in pairs), default=0)
    place = np.arange(1, longest + 1)
    counts = np.zeros((5, len(pairs), longest))
    for g, (drafted, accepted) in enumerate(pairs):
        assert (accepted <= drafted).all(), f"accepted more than drafted in group {g} of the cell"
        long_enough = drafted[:, None] >= place
        counts[0, g] = long_enough.sum(0)
        counts[1, g] = (long_enough & (accepted[:, None] >= place - 1)).sum(0)
        counts[2, g] = (accepted[:, None] >= place).sum(0)
    totals = np.array([[d.sum(), a.sum()] for d, a in pairs], dtype=np.float64).reshape(-1, 2)
    return {
        **{"drafted_at": counts[0], "reached_at": counts[1], "accepted_at": counts[2]},
        **{"drafted_tokens": totals[:, :1], "accepted_tokens": totals[:, 1:]},
    }


def _rounds(group: list[Run]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens drafted and accepted in each round of each row of each repeat, flat."""
    flat = [
        [count for run in group for row in run[field] for count in row]
        for field in ("drafted", "accepted")
    ]
    assert len(flat[0]) == len(flat[1]), f"{len(flat[0])} drafted, {len(flat[1])} accepted rounds"
    return np.array(flat[0], dtype=np.int64), np.array(flat[1], dtype=np.int64)


def _each(columns: Columns) -> Columns:
    """Each group's own speedup, where it has one, and whether it has; (G, 1) both."""
    ratio = _speedup(columns)
    known = np.isfinite(ratio)
    return {"ratio": np.where(known, ratio, 0.0), "rated": known.astype(np.float64)}


def _draws(mine: list[list[Run]], theirs: list[list[Run]], resamples: int, seed: int) -> Array:
    return _speedup(resample(totals(mine) | _plain(totals(theirs)), resamples, seed))


def _speedup(s: Columns) -> Array:
    mine = divide(s["seconds"], s["tokens"])
    return divide(divide(s["plain_seconds"], s["plain_tokens"]), mine)


def _ratios(s: Columns) -> Columns:
    """Every ratio of `measure`, (1 + R, 1) each."""

    def decode(prefix: str) -> Array:
        seconds = s[prefix + "seconds"] - s[prefix + "first_seconds"]
        return divide(seconds, s[prefix + "tokens"] - s[prefix + "first_tokens"])

    def busy(prefix: str) -> Array:
        return s[prefix + "draft_seconds"] + s[prefix + "verify_seconds"]

    return {
        "speedup": _speedup(s),
        "macro_speedup": divide(s["ratio"], s["rated"]),
        "decode_speedup": divide(decode("plain_"), decode("")),
        "busy_speedup": divide(
            divide(busy("plain_"), s["plain_tokens"]), divide(busy(""), s["tokens"])
        ),
        "tokens_per_second": divide(s["tokens"], s["seconds"]),
        "tau": divide(s["tokens"], s["row_rounds"]),
        "accepted_per_round": divide(s["accepted_tokens"], s["row_rounds"]),
        "draft_ms_per_round": 1e3 * divide(s["draft_seconds"], s["rounds"]),
        "verify_ms_per_round": 1e3 * divide(s["verify_seconds"], s["rounds"]),
        "other_ms_per_round": 1e3 * divide(s["seconds"] - busy(""), s["rounds"]),
        "draft_ms_per_token": 1e3 * divide(s["draft_seconds"], s["drafted_tokens"]),
        "plain_ms_per_round": 1e3 * divide(s["plain_verify_seconds"], s["plain_rounds"]),
        "ttft_ms": 1e3 * divide(s["first_seconds"], s["runs"]),
    }


def _acceptance(columns: Columns, s: Columns) -> list[dict[str, Any]]:
    def rate(denominator: str) -> list[Estimate]:
        groups = (columns[denominator] > 0).sum(0)
        return estimates(divide(s["accepted_at"], s[denominator]), groups)

    survival, conditional = rate("drafted_at"), rate("reached_at")
    return [
        {
            "position": k + 1,
            **{name: int(s[f"{name}_at"][0, k]) for name in ("drafted", "reached", "accepted")},
            **{"survival": survival[k], "conditional": conditional[k]},
        }
        for k in range(len(survival))
    ]


def _quantiles(columns: Columns, resamples: int, seed: int) -> dict[str, Estimate]:
    """Quantiles over groups of tau, and of the milliseconds between a request's tokens.

    A request waits for the whole group, so its time is the group's over its own share of the
    tokens, prefill apart. A group that ended in its first round has no such time and is not in n.
    """
    seconds = columns["seconds"] - columns["first_seconds"]
    tokens = (columns["tokens"] - columns["first_tokens"]) / np.maximum(columns["rows"], 1)
    waits = np.sort(1e3 * seconds[tokens > 0] / tokens[tokens > 0])
    taus = np.sort(divide(columns["tokens"], columns["row_rounds"]).ravel())
    wanted = [("tpot_ms", waits, 50), ("tpot_ms", waits, 95)]
    wanted += [("tau", taus[np.isfinite(taus)], percent) for percent in (10, 50, 90)]
    return {
        f"{name}_p{percent}": quantile(each, percent / 100, resamples, seed)
        for name, each, percent in wanted
    }
