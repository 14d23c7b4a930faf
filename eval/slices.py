"""The drafter by task, language and length of prompt, and the batch size up to which it pays.

Every entry of a slice is measured like the headline: batch 1, repetitive prompts left out.

Legend of shapes: R resamples, N batch sizes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from data.language import SCRIPT_OF
from eval.bootstrap import CONFIDENCE, RESAMPLES, Array
from eval.statistics import Run, measure, speedup_draws

Row = dict[str, Any]

DRAFTER = "drafter"
EDGES = (64, 256, 1024, 4096)  # tokens of a prompt at which the next bucket of lengths begins
FEW = 5  # prompts below which a bucket says nothing
PICKED = (
    *("temperature", "speedup", "macro_speedup", "decode_speedup"),
    *("tau", "tau_p10", "tau_p50", "tau_p90", "n", "verdict"),
)


def pick(cell: Row) -> Row:
    """What the headline and the slices keep of a cell of the table."""
    return {name: cell[name] for name in PICKED}


def by_task(clean: list[Run]) -> list[Row]:
    """One entry a task and temperature: `pick`, `task`, and the `language` in its name or None."""
    entries = _slices(clean, lambda run: run["task"], "task")
    return [entry | {"language": language_in(entry["task"])} for entry in entries]


def by_language(clean: list[Run]) -> list[Row]:
    """One entry a language and temperature, tasks pooled; [] unless tasks name two or more."""
    found = _slices(clean, lambda run: language_in(run["task"]), "language")
    return found if len({entry["language"] for entry in found}) > 1 else []


def by_length(clean: list[Run]) -> list[Row]:
    """One entry a bucket of prompt lengths and temperature: `pick`, and `prompt_tokens` in words.

    Buckets of fewer than FEW prompts are left out; [] unless two are left.
    """

    def bucket(run: Run) -> int | None:
        return (
            sum(run["prompt_tokens"][0] >= e for e in EDGES) if run.get("prompt_tokens") else None
        )

    found = [entry for entry in _slices(clean, bucket, "bucket") if entry["n"] >= FEW]
    if len({entry["bucket"] for entry in found}) < 2:
        return []
    return [{"prompt_tokens": _bucket_name(entry.pop("bucket"))} | entry for entry in found]


def language_in(task: str) -> str | None:
    """The ISO 639-1 code that a task's name is, begins with or ends with: `de_en` is de."""
    parts = re.split(r"[^A-Za-z]+", task.lower())
    return next((part for part in (parts[0], parts[-1]) if part in SCRIPT_OF), None)


def break_even(
    runs: Iterable[Run], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """At which batch size drafting stops paying; one entry a temperature with two sizes or more.

    {temperature, batches, state, value, low, high, said}: `value` is where the speedup first
    falls through 1, its logarithm taken as linear in log2 of the batch between two sizes; None
    unless `state` is "crossed" (else "not reached" or "below from the start"). low and high: 95 %,
    None where that end lies outside the sizes measured. Groups are resampled for each size apart,
    since the groups of two sizes are not the same prompts.
    """
    mine = list(runs)
    cells = {(r["temperature"], r["batch"]) for r in mine if r["arm"] == DRAFTER}
    found = []
    for temperature in sorted({cell[0] for cell in cells}):
        draws = {
            batch: speedup_draws(
                mine, DRAFTER, temperature=temperature, batch=batch, resamples=resamples,
                seed=seed + batch,
            )[:, 0]
            for batch in sorted(b for t, b in cells if t == temperature)
        }  # fmt: skip
        known = {batch: column for batch, column in draws.items() if np.isfinite(column[0])}
        if len(known) > 1:
            found.append({"temperature": temperature} | _crossing(known))
    return found


def _slices(clean: list[Run], of: Callable[[Run], Any], name: str) -> list[Row]:
    """The drafter's cells at batch 1 for each value of `of` but None, in order."""
    single = [(of(run), run) for run in clean if run["batch"] == 1]
    found = []
    for value in sorted({value for value, _ in single if value is not None}):
        runs = [run for other, run in single if other == value]
        temperatures = sorted({r["temperature"] for r in runs if r["arm"] == DRAFTER})
        cells = [measure(runs, DRAFTER, temperature=t, batch=1) for t in temperatures]
        found += [{name: value} | pick(cell) for cell in cells]
    return found


def _bucket_name(bucket: int) -> str:
    if bucket == 0:
        return f"under {EDGES[0]}"
    if bucket == len(EDGES):
        return f"{EDGES[-1]:,} or more"
    return f"{EDGES[bucket - 1]:,} to {EDGES[bucket] - 1:,}"


def _crossing(draws: dict[int, Array]) -> Row:
    """Value, interval and words, from the speedup's draws at each batch size."""
    rows = min(len(column) for column in draws.values())  # one group alone: no resamples
    speedup_RN = np.stack([column[:rows] for column in draws.values()], axis=1)
    batches = list(draws)
    places = _first_below_one(speedup_RN[np.isfinite(speedup_RN).all(1)], batches)
    place, drawn = float(places[0]), places[1:]
    low, high = None, None
    if len(drawn):
        tail = 50 * (1 - CONFIDENCE)  # "nearest" does no arithmetic, which inf would spoil
        ends = np.percentile(drawn, [tail, 100 - tail], method="nearest")
        low, high = (float(e) if 0 < e < np.inf else None for e in ends)
    state = {0.0: "below from the start", np.inf: "not reached"}.get(place, "crossed")
    value = place if state == "crossed" else None
    entry = {"batches": batches, "state": state, "value": value, "low": low, "high": high}
    return entry | {"said": _said(entry, bool(len(drawn)))}


def _first_below_one(speedup_RN: Array, batches: list[int]) -> Array:
    """The batch size where each row first falls below 1, (R,): 0 at once, inf never."""
    below = speedup_RN < 1
    first = below.argmax(1)
    at, before = np.arange(len(first)), np.maximum(first - 1, 0)
    x, log = np.log2(batches), np.log(speedup_RN)
    fallen = log[at, before] - log[at, first]
    share = np.divide(log[at, before], fallen, out=np.zeros(len(first)), where=fallen > 0)
    place = np.exp2(x[before] + share * (x[first] - x[before]))
    place[first == 0] = 0.0
    place[~below.any(1)] = np.inf
    return place


def _said(entry: Row, resampled: bool) -> str:
    least, most = entry["batches"][0], entry["batches"][-1]
    if entry["state"] == "below from the start":
        said = f"drafting does not pay even at batch {least}"
    elif entry["state"] == "not reached":
        said = f"no break-even up to batch {most}, the largest measured"
    else:
        said = f"drafting pays up to about batch {entry['value']:.3g}"
    if not resampled:
        return f"{said} (no interval: a batch size with one group)"
    if entry["low"] is None and entry["high"] is None and entry["state"] != "crossed":
        return said
    low = f"below {least}" if entry["low"] is None else f"{entry['low']:.3g}"
    high = f"above {most}" if entry["high"] is None else f"{entry['high']:.3g}"
    return f"{said} (95 % interval {low} to {high})"
