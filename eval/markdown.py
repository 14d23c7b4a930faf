"""The report as a page that a person reads in a minute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from eval.bootstrap import NO_DIFFERENCE, SLOWER, Estimate

Row = dict[str, Any]


def number(value: float | None) -> str:
    """About three significant digits, and all those of a larger whole number."""
    if value is None:
        return "-"
    digits = sum(value < bound for bound in (0.1, 10, 100))
    return f"{value:,.{digits}f}"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def interval(estimate: Estimate | None, form: Callable[[float | None], str] = number) -> str:
    """`1.62x [1.55x, 1.70x]`; `-` where nothing was measured, n where it is too few for that."""
    if estimate is None or estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{form(estimate['value'])} [n={estimate['n']}]"
    return f"{form(estimate['value'])} [{form(estimate['low'])}, {form(estimate['high'])}]"


def sentence(entry: Row) -> str:
    """A headline entry in words."""
    where = f"At temperature {entry['temperature']:g}, batch 1"
    if not entry["n"]:
        return f"{where}: nothing to report, every prompt's answer was repetitive or unpaired."
    speedup, n = entry["speedup"], f"{entry['n']} prompts"
    if speedup["low"] is None:
        return f"{where}: {times(speedup['value'])} on one prompt, which has no interval."
    spread = f"95 % interval {speedup['low']:.2f} to {speedup['high']:.2f}, {n}"
    tau = f"{interval(entry['tau'])} tokens per target call"
    words = {
        SLOWER: f"slower than no drafting, {times(speedup['value'])}",
        NO_DIFFERENCE: f"no difference shown, {times(speedup['value'])}",
    }
    said = words.get(entry["verdict"], f"{times(speedup['value'])} as fast as no drafting")
    return f"{where}: {said} ({spread}); {tau}."


def render(report: Row) -> str:
    """report.md: headline, conditions, tables, controls, definitions."""
    conditions = report["conditions"]
    parts = [
        f"# How fast {conditions['target']} becomes with {conditions['drafter']}",
        *_opening(report),
        "## Conditions\n\n" + _conditions(conditions),
        "## Speed\n\n" + _speed(report["table"]),
        *_tasks(report["by_task"]),
        "## Acceptance by position (drafter, batch 1)\n\n" + _acceptance(report["table"]),
        "## Costs\n\n" + _costs(report["table"]),
        *_repetitive(report),
        "## Controls\n\n" + _controls(report["controls"]),
        "![speedup, acceptance and batch sizes](report.png)",
        "## What every number means\n\n"
        + "\n".join(f"- **{name}**: {text}" for name, text in report["definitions"].items()),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(report: Row) -> list[str]:
    parts = []
    if not report["passed"]:
        failed = [name for name, c in report["controls"].items() if not c["passed"]]
        said = f"failed: {', '.join(failed)}" if failed else "none was run"
        parts.append(f"**Controls not passed ({said}): do not use these figures.**")
    parts += [f"**{sentence(entry)}**" for entry in report["headline"]]
    if change := report["conditions"].get("target_change"):
        parts.append(f"**Mind: {change['said']}.**")
    if not report["headline"]:
        parts.append("The drafter was not measured at batch 1.")
    for entry in report["headline"]:
        against = [
            f"{interval(e, times)} as fast as {arm} (n={e['n']})"
            for arm, e in entry["against"].items()
        ]
        if against:
            where = f"at temperature {entry['temperature']:g}, batch 1"
            parts.append(f"Beside other ways to draft, {where}: {'; '.join(against)}.")
    exactness = report["controls"].get("exactness", {"passed": False, "found": "not checked"})
    state = "passed" if exactness["passed"] else "NOT PASSED"
    return [*parts, f"Exactness {state}: {exactness['found']}."]


def _grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _conditions(conditions: Row) -> str:
    named = {
        **{"target": "target", "parameters_target": "its parameters"},
        **{"drafter": "drafter", "parameters_drafter": "its parameters"},
        **{"device": "device", "threads": "threads", "dtype": "dtype", "dtype_reason": "why"},
        **{"draft_shape": "draft", "rule": "acceptance rule"},
        **{"max_new_tokens": "most new tokens", "prompts": "prompts", "repeats": "repeats"},
        **{"prompt_source": "prompts from"},
    }
    rows = [(named.get(key, key), _said(conditions[key])) for key in named if key in conditions]
    versions = ", ".join(f"{k} {v}" for k, v in conditions.get("versions", {}).items())
    tried = conditions.get("draft_shape_choice") or {}
    if tried:
        speeds = ", ".join(f"{shape}: {speed:.1f}" for shape, speed in tried.items())
        rows.append(("chosen by", f"a short trial, tokens/s: {speeds}"))
    return _grid(("", ""), [*rows, ("versions", versions)])


def _said(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _speed(table: list[Row]) -> str:
    head = ("T", "batch", "arm", "speedup", "decode only", "tau", "tokens/s", "n", "verdict")
    rows = [
        (
            *(f"{row['temperature']:g}", row["batch"], row["arm"]),
            *(interval(row["speedup"], times), interval(row["decode_speedup"], times)),
            *(interval(row["tau"]), interval(row["tokens_per_second"])),
            *(row["n"], row["verdict"] or "the baseline"),
        )
        for row in table
    ]
    lost = [row for row in table if row["unpaired"]]
    notes = [
        f"{row['arm']} at T={row['temperature']:g}, batch {row['batch']}: {row['unpaired']} "
        "prompts left out, since autoregressive decoding did not run them."
        for row in lost
    ]
    return "\n\n".join([_grid(head, rows), *notes])


def _tasks(entries: list[Row]) -> list[str]:
    if not entries:
        return []
    head = ("task", "T", "speedup", "decode only", "tau", "n", "verdict")
    rows = [
        (
            *(entry["task"], f"{entry['temperature']:g}", interval(entry["speedup"], times)),
            *(interval(entry["decode_speedup"], times), interval(entry["tau"])),
            *(entry["n"], entry["verdict"]),
        )
        for entry in entries
    ]
    return ["## By task (drafter, batch 1)\n\n" + _grid(head, rows)]


def _acceptance(table: list[Row]) -> str:
    head = ("T", "position", "conditional", "rounds that reached it", "survival", "rounds drafted")
    rows = [
        (
            *(f"{row['temperature']:g}", p["position"]),
            *(interval(p["conditional"], percent), f"{p['reached']:,}"),
            *(interval(p["survival"], percent), f"{p['drafted']:,}"),
        )
        for row in table
        if row["arm"] == "drafter" and row["batch"] == 1
        for p in row["acceptance"]
    ]
    pooled = [
        f"T={row['temperature']:g}: {row['accepted']:,} of {row['drafted']:,} drafted tokens "
        f"accepted, {interval(row['accepted_per_round'])} a round (n={row['n']})."
        for row in table
        if row["arm"] == "drafter" and row["batch"] == 1 and row["n"]
    ]
    return "\n\n".join([*pooled, _grid(head, rows)]) if rows else "Not measured."


def _costs(table: list[Row]) -> str:
    head = ("T", "batch", "arm", "draft ms/token", "draft ms/round", "verify ms/round")
    more = ("plain ms/round", "predicted", "TTFT ms", "TPOT ms p50", "TPOT ms p95", "n")
    rows = [
        (
            *(f"{row['temperature']:g}", row["batch"], row["arm"]),
            *(interval(row["draft_ms_per_token"]), interval(row["draft_ms_per_round"])),
            *(interval(row["verify_ms_per_round"]), interval(row["plain_ms_per_round"])),
            *(interval(row["predicted_speedup"], times), interval(row["ttft_ms"])),
            *(interval(row["tpot_ms_p50"]), interval(row["tpot_ms_p95"]), row["n"]),
        )
        for row in table
    ]
    return _grid((*head, *more), rows)


def _repetitive(report: Row) -> list[str]:
    head = ("T", "batch", "repetitive", "of", "share")
    rows = [
        (
            *(f"{e['temperature']:g}", e["batch"], e["repetitive"], e["groups"]),
            interval(e["share"], percent),
        )
        for e in report["repetition"]
    ]
    said = "Prompts (at batch > 1: groups) with a repetitive answer. Left out of all the above."
    parts = ["## Repetitive answers, apart\n\n" + said, _grid(head, rows)]
    return parts + ([_speed(report["table_repetitive"])] if report["table_repetitive"] else [])


def _controls(controls: dict[str, Row]) -> str:
    if not controls:
        return "No control was run: nothing vouches for these figures."
    state = {True: "passed", False: "**FAILED**"}
    rows = [(name, state[c["passed"]], c["found"]) for name, c in controls.items()]
    return _grid(("control", "", "found"), rows)
