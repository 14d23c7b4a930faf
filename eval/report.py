"""The report on a drafter: what bench measured, as JSON, Markdown, a web page and a picture.

docs/report.md describes report.json and runs.jsonl key by key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.bootstrap import Estimate, share
from eval.markdown import interval, number, render, times
from eval.sections import busy_machine, opening, sections, sentence, title, wrong_answers
from eval.slices import DRAFTER, break_even, by_language, by_length, by_task, pick
from eval.statistics import BASELINE, Run, measure, paired_speedup

SCHEMA = 2
MARGIN = 0.10  # a prediction this far from the measurement has to be explained
DEFINITIONS = {
    "speedup": "(sum of seconds / sum of tokens of autoregressive decoding) / (the same of the "
    "arm), over the same prompts, prefill included. At temperature 0 with identical answers this "
    "is the ratio of total times. Above 1: faster.",
    "per prompt": "macro mean: each prompt's own speedup, averaged, so that long answers weigh no "
    "more than short ones.",
    "decode only": "the speedup without the seconds and tokens up to the end of the first round, "
    "that is without prefill.",
    "busy": "the speedup that the draft and verify seconds of these runs alone would give. Far "
    "from decode only: time goes somewhere else.",
    "predicted": "the speedup that the cost model gives for the measured tau from the costs of a "
    "pass, a draft and a round, each measured alone. More than 10 % from the measured speedup: "
    "the page says where the time went.",
    "tau": "tokens per target call: generated tokens / calls in which the row was alive. Includes "
    "the target's own token, so autoregressive decoding has 1. p10, p50, p90: over prompts.",
    "accepted per round": "accepted draft tokens / rounds. About tau - 1; more where an answer "
    "ended inside an accepted draft.",
    "alpha": "mean of sum min(p, q) over the positions of answers that the target drew itself; "
    "unlike acceptance in the loop it sees the hard positions as often as they occur.",
    "acceptance by position": "conditional: of the rounds that drafted position k and accepted "
    "all before it, the share that accepted k. Survival (unconditional): of the rounds that "
    "drafted position k, the share that accepted it; a tree drafts the positions of its longest "
    "path, and accepts one if any of its nodes there stands. Shorter drafts are in neither "
    "denominator; rounds are pooled, intervals are over prompts.",
    "break-even": "the batch size at which the speedup first falls through 1; between two measured "
    "sizes the logarithm of the speedup is taken as linear in the logarithm of the size.",
    "draft, verify, other": "milliseconds for each round in the drafter, in the target's call and "
    "elsewhere (prefill, bookkeeping); per drafted token: draft milliseconds / positions drafted "
    "(a tree's levels). Plain: the target's call of autoregressive decoding.",
    "TTFT": "milliseconds until the first round's tokens are there: prefill of target and "
    "drafter, and one round. Mean over runs.",
    "TPOT": "milliseconds from a request's token to its next, first round excluded, at batch > 1 "
    "for each request of the batch. p50 and p95 over prompts.",
    "tokens/s": "generated tokens / seconds, prefill included, all requests of a batch together.",
    "n": "prompts (at batch > 1: groups of prompts decoded together). Repeats of a prompt are "
    "summed: they are no further prompts.",
    "interval": "95 %, percentile bootstrap over prompts with 10,000 resamples, both arms of a "
    "prompt drawn together; shares of prompts: Wilson. A verdict needs the whole interval. With "
    "fewer than about 20 prompts such intervals are too narrow.",
    "near tie": "greedy answers part where the target's two best tokens in fp32 are closer than "
    "passes of one and of several tokens differ in the dtype that was measured: either is right. "
    "Any other difference is wrong.",
    "repetitive": "an answer of any arm fell into repetition, at this temperature and batch. "
    "Such text is easy to draft, so these prompts are kept out of the headline.",
    "tokens": "generated ids, up to and including the first end token, counted alike in all arms.",
}


def summarise(runs: list[Run], conditions: dict, controls: dict) -> dict[str, Any]:
    """The report, JSON-able: its keys are those of docs/report.md, which says what each means.

    A group is repetitive, at a temperature and batch, if any arm's run of it is; only
    `table_repetitive` and `repetition` see such groups. Temperatures stand in rising order, the
    baseline's cell before the drafter's, other arms behind it.
    """
    odd = {_place(run) for run in runs if run["repetitive"]}
    clean = [run for run in runs if _place(run) not in odd]
    repetitive = [run for run in runs if _place(run) in odd]
    table = _table(clean, _cells(runs))
    return {
        "schema": SCHEMA,
        "passed": bool(controls) and all(control["passed"] for control in controls.values()),
        "headline": _headline(table, clean),
        "table": table,
        "break_even": break_even(clean),
        "by_task": by_task(clean),
        "by_language": by_language(clean),
        "by_length": by_length(clean),
        "predicted": _predicted(table, conditions.get("predicted", [])),
        "repetition": _repetition(runs),
        "table_repetitive": _table(repetitive, _cells(repetitive)),
        **{"definitions": DEFINITIONS, "conditions": conditions, "controls": controls},
    }


def headline_lines(report: dict[str, Any]) -> list[str]:
    """A few short lines for the terminal: speed, batch sizes, repetition, agreement, controls."""
    first, *others = report["headline"] or [None]
    lines = [sentence(first) if first else "The drafter was not measured at batch 1."]
    if others:
        lines.append("; ".join(_brief(entry) for entry in others))
    larger = [row for row in report["table"] if row["arm"] == DRAFTER and row["batch"] > 1]
    if larger:
        lines.append(_batches(larger, report["break_even"]))
    apart = [entry for entry in report["repetition"] if entry["batch"] == 1]
    if apart:
        parts = [f"{e['repetitive']} of {e['groups']} at T={e['temperature']:g}" for e in apart]
        lines.append(f"Prompts with repetitive answers, kept apart: {', '.join(parts)}.")
    if change := report["conditions"].get("target_change"):
        lines.append(f"Mind: {change['said']}.")
    if wrong := wrong_answers(report):
        lines.append(wrong)
    if busy := busy_machine(report):
        lines.append(busy)
    vouched = _controls_line(report["controls"])
    return [*lines, vouched] if report["passed"] else [vouched, *lines]


def write_report(folder: Path, report: dict[str, Any], runs: list[Run]) -> None:
    """Writes runs.jsonl, report.png, report.md, report.html and, last, report.json into `folder`.

    Each file appears whole or not at all, and report.json only beside the others. Raises OSError
    when the folder cannot be written.
    """
    from eval.page import page  # matplotlib takes a second to import
    from eval.picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(run, ensure_ascii=False) + "\n" for run in runs)
    _replace(folder / "runs.jsonl", lambda path: _text(path, lines))
    _replace(folder / "report.png", lambda path: draw(report, path))
    parts, heading, first = sections(report), title(report), opening(report)
    defined = report["definitions"]
    markdown = render(heading, first, parts, defined, picture="report.png")
    _replace(folder / "report.md", lambda path: _text(path, markdown))
    html = page(report, heading, first, parts)
    _replace(folder / "report.html", lambda path: _text(path, html))
    whole = json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    _replace(folder / "report.json", lambda path: _text(path, whole))


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary file, then renames it to `path`."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)  # a rename in one folder is atomic
    finally:
        part.unlink(missing_ok=True)


def _place(run: Run) -> tuple[float, int, int]:
    return run["temperature"], run["batch"], run["group"]


def _cells(runs: list[Run]) -> list[tuple[float, int, str]]:
    """Temperature, batch and arm of every cell: the baseline first, then the drafter."""
    order = {BASELINE: 0, DRAFTER: 1}
    cells = {(run["temperature"], run["batch"], run["arm"]) for run in runs}
    return sorted(cells, key=lambda cell: (*cell[:2], order.get(cell[2], 2), cell[2]))


def _table(runs: list[Run], cells: list[tuple[float, int, str]]) -> list[dict[str, Any]]:
    return [
        measure(runs, arm, temperature=temperature, batch=batch)
        for temperature, batch, arm in cells
    ]


def _headline(table: list[dict[str, Any]], clean: list[Run]) -> list[dict[str, Any]]:
    rows = [row for row in table if row["batch"] == 1 and row["arm"] == DRAFTER]
    return [pick(row) | {"against": _against(row, table, clean)} for row in rows]


def _against(
    row: dict[str, Any], table: list[dict[str, Any]], clean: list[Run]
) -> dict[str, Estimate]:
    """The drafter's speedup over every other drafting arm that shares its prompts."""
    here = {"temperature": row["temperature"], "batch": row["batch"]}
    others = [
        other["arm"]
        for other in table
        if other["n"] and other["arm"] not in (BASELINE, DRAFTER) and here.items() <= other.items()
    ]
    return {arm: paired_speedup(clean, DRAFTER, arm, **here) for arm in others if row["n"]}


def _repetition(runs: list[Run]) -> list[dict[str, Any]]:
    everywhere = {_place(run) for run in runs}
    odd = {_place(run) for run in runs if run["repetitive"]}
    entries = []
    for temperature, batch in sorted({place[:2] for place in everywhere}):
        total = sum(place[:2] == (temperature, batch) for place in everywhere)
        count = sum(place[:2] == (temperature, batch) for place in odd)
        entry = {"temperature": temperature, "batch": batch, "groups": total, "repetitive": count}
        entries.append(entry | {"share": share(count, total)})
    return entries


def _predicted(table: list[dict[str, Any]], given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each prediction of the cost model beside its cell, where one was measured."""
    found = []
    for entry in given:
        place = {key: entry[key] for key in ("arm", "temperature", "batch")}
        cell = next((row for row in table if place.items() <= row.items()), None)
        if cell is None or cell["speedup"] is None or cell["speedup"]["value"] is None:
            continue
        error = entry["speedup"] / cell["speedup"]["value"] - 1
        beside = {"predicted": entry["speedup"], "measured": cell["speedup"]}
        found.append(place | beside | {"error": error, "within": abs(error) <= MARGIN})
    return found


def _brief(entry: dict[str, Any]) -> str:
    speedup, tau = interval(entry["speedup"], times), number(entry["tau"]["value"])
    return f"T={entry['temperature']:g}: {speedup}, tau {tau}, n={entry['n']}: {entry['verdict']}"


def _batches(rows: list[dict[str, Any]], crossings: list[dict[str, Any]]) -> str:
    lowest = min(row["temperature"] for row in rows)
    parts = [
        f"{row['batch']}: {interval(row['speedup'], times)}, n={row['n']}"
        for row in rows
        if row["temperature"] == lowest
    ]
    said = [entry["said"] for entry in crossings if entry["temperature"] == lowest]
    return f"By batch size at T={lowest:g}: {'; '.join([*parts, *said])}."


def _controls_line(controls: dict[str, dict[str, Any]]) -> str:
    failed = [f"{name}: {c['found']}" for name, c in controls.items() if not c["passed"]]
    if failed:
        return f"CONTROL FAILED, do not use these figures. {'; '.join(failed)}"
    if not controls:
        return "No control was run: nothing vouches for these figures."
    return f"Controls passed: {', '.join(controls)}."
