"""Two measurements of drafters for one target: what differs beyond noise.

    .venv/bin/python -m eval.compare A B

A and B are folders with a report.json and a runs.jsonl, or stage folders of bench. Prompts are
paired by their keys (the hash of their text) and resampled together, so what makes a prompt slow
for both cancels. Exit codes: 0 compared, 2 refused.

Legend of shapes: G groups, R resamples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.bootstrap import RESAMPLES, Array, Columns, Estimate, divide, estimates, resample
from eval.markdown import interval, number, times
from eval.slices import DRAFTER
from eval.statistics import BASELINE, Run, totals

Row = dict[str, Any]
Key = tuple[str, ...]  # of the prompts that were decoded together
Cell = tuple[float, int]  # temperature and batch
Groups = dict[Key, list[Run]]

FIRST = 8  # tokens of a greedy answer that two copies of one target must share, most of the time
TARGET = ("target", "target_revision", "parameters_target")
MATTERS = ("device", "threads", "ranks", "dtype", "max_new_tokens", "rule", "versions", "clock_mhz")
DRIFT = 0.03  # one bench run again on one machine came out this different, prompt for prompt
HEAD = ("T", "batch", "", "A", "B", "difference", "n", "verdict")


@dataclass(frozen=True)
class Side:
    """One measurement: where it came from, its report and its runs."""

    folder: Path
    report: Row
    runs: list[Run]

    def arm(self, arm: str, cell: Cell, apart: set[Key]) -> Groups:
        """The arm's runs at a temperature and batch by the keys of their prompts, but `apart`."""
        groups: Groups = {}
        for run in self.runs:
            if (run["arm"], run["temperature"], run["batch"]) == (arm, *cell):
                groups.setdefault(tuple(run["keys"]), []).append(run)
        return {key: runs for key, runs in groups.items() if key not in apart}

    def repetitive(self, cell: Cell) -> set[Key]:
        """Keys of groups that some arm answered with repetition, which a report leaves out."""
        here = (run for run in self.runs if (run["temperature"], run["batch"]) == cell)
        return {tuple(run["keys"]) for run in here if run["repetitive"]}


def read(folder: Path) -> Side:
    """The measurement in a folder or in its artifact/; ValueError says what is missing."""
    place = folder if (folder / "report.json").is_file() else folder / "artifact"
    for name in ("report.json", "runs.jsonl"):
        if not (place / name).is_file():
            raise ValueError(
                f"{folder} has no {name}, neither has its artifact/; give the folder of a bench "
                "stage, or one with report.json and runs.jsonl"
            )
    report = json.loads((place / "report.json").read_text(encoding="utf-8"))
    lines = (place / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    runs = [json.loads(line) for line in lines if line]
    if report.get("schema", 1) < 2 or not all("keys" in run for run in runs):
        raise ValueError(
            f"the report in {folder} is of an older form whose runs do not name their prompts; "
            "measure again"
        )
    return Side(folder, report, runs)


def compare(a: Side, b: Side, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Row]:
    """One entry a temperature and batch that both measured, lowest first.

    {temperature, batch, paired, shared, only_a, only_b, measures}; `measures` maps a name to {a,
    b, change: Estimates, kind, verdict}: tau (kind "difference", B - A), tokens per second,
    speedup, and plain tokens per second, which is the machine's own change (kind "ratio", B / A).
    Paired where two or more prompts (groups) are shared, and then over those alone; else both
    sides are resampled apart.

    Raises ValueError for two targets, or nothing measured in common.
    """
    _same_target(a, b)
    cells = sorted(_cells(a) & _cells(b))
    if not cells:
        raise ValueError(
            "A and B share no temperature and batch size: A measured "
            f"{sorted(_cells(a))}, B {sorted(_cells(b))}"
        )
    return [_compared(a, b, cell, resamples, seed) for cell in cells]


def warnings(a: Side, b: Side, found: list[Row]) -> list[str]:
    """What makes a reader careful: other conditions, other prompts, failed controls, drift."""
    ours, theirs = a.report["conditions"], b.report["conditions"]
    said = [
        f"{key} differs: A {ours.get(key)}, B {theirs.get(key)}"
        for key in MATTERS
        if ours.get(key) != theirs.get(key)
    ]
    for name, side in {"A": a, "B": b}.items():
        if not side.report["passed"]:
            said.append(f"the controls of {name} were not passed: its figures mean nothing")
        if change := side.report["conditions"].get("target_change"):
            said.append(f"{name}: {change['said']}")
    return [*said, *(line for entry in found for line in _careful(entry))]


def table(found: list[Row]) -> str:
    """The entries as aligned columns of text."""
    rows = [HEAD]
    for entry in found:
        for name, m in entry["measures"].items():
            change = interval(m["change"], _signed if m["kind"] == "difference" else times)
            shown = (interval(m["a"]), interval(m["b"]), change, str(m["change"]["n"]))
            at = (f"{entry['temperature']:g}", str(entry["batch"]))
            rows.append((*at, name, *shown, m["verdict"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _cells(side: Side) -> set[Cell]:
    return {(run["temperature"], run["batch"]) for run in side.runs if run["arm"] == DRAFTER}


def _compared(a: Side, b: Side, cell: Cell, resamples: int, seed: int) -> Row:
    apart = a.repetitive(cell) | b.repetitive(cell)
    sides = [_arms(side, cell, apart) for side in (a, b)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    paired = len(shared) > 1
    keys = [shared if paired else sorted(side) for side in sides]
    columns = [_columns(side, chosen) for side, chosen in zip(sides, keys, strict=True)]
    if paired:  # one draw of prompts for both
        both = {f"{i}{name}": c for i, part in enumerate(columns) for name, c in part.items()}
        drawn = resample(both, resamples, seed)
        sums = [{k[1:]: v for k, v in drawn.items() if k[0] == str(i)} for i in (0, 1)]
    else:
        sums = [resample(part, resamples, seed + i) for i, part in enumerate(columns)]
    return {
        **{"temperature": cell[0], "batch": cell[1], "paired": paired, "shared": len(shared)},
        **{"only_a": len(sides[0]) - len(shared), "only_b": len(sides[1]) - len(shared)},
        "measures": _measures(sums, [len(k) for k in keys]),
    }


def _arms(side: Side, cell: Cell, apart: set[Key]) -> dict[Key, tuple[list[Run], list[Run]]]:
    """The drafter's and the baseline's runs of the groups that both decoded."""
    mine, plain = (side.arm(arm, cell, apart) for arm in (DRAFTER, BASELINE))
    return {key: (mine[key], plain[key]) for key in mine.keys() & plain.keys()}


def _columns(groups: dict[Key, tuple[list[Run], list[Run]]], keys: list[Key]) -> Columns:
    mine, plain = (totals([groups[key][i] for key in keys]) for i in (0, 1))
    return mine | {f"plain_{name}": column for name, column in plain.items()}


def _measures(sums: list[Columns], n: list[int]) -> dict[str, Row]:
    def speed(s: Columns, prefix: str = "") -> Array:
        return divide(s[prefix + "tokens"], s[prefix + "seconds"])

    ratios = {
        "tau": [divide(s["tokens"], s["row_rounds"]) for s in sums],
        "speedup": [divide(speed(s), speed(s, "plain_")) for s in sums],
        "tokens/s": [speed(s) for s in sums],
        "plain tokens/s": [speed(s, "plain_") for s in sums],
    }
    return {
        name: _measure(x, y, "difference" if name == "tau" else "ratio", n)
        for name, (x, y) in ratios.items()
    }


def _measure(x: Array, y: Array, kind: str, n: list[int]) -> Row:
    """Both sides and B against A; a side of one group knows no interval, nor does the change."""
    rows = min(len(x), len(y))
    change = y[:rows] - x[:rows] if kind == "difference" else divide(y[:rows], x[:rows])
    a, b, found = (estimates(c, m)[0] for c, m in ((x, n[0]), (y, n[1]), (change, min(n))))
    margin = (0.0, 0.0) if kind == "difference" else (1 - DRIFT, 1 + DRIFT)
    verdict = _verdict(found, *margin)
    return {"a": a, "b": b, "change": found, "kind": kind, "verdict": verdict}


def _verdict(change: Estimate, least: float, most: float) -> str:
    if change["low"] is None or change["high"] is None:
        return "too few prompts for an interval"
    if change["low"] > most:
        return "B is higher"
    return "B is lower" if change["high"] < least else "no difference shown"


def _same_target(a: Side, b: Side) -> None:
    """By name, revision and size, and by what the target itself answers."""
    ours, theirs = a.report["conditions"], b.report["conditions"]
    for key in TARGET:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"A and B were measured with two targets ({key}: {ours.get(key)} and "
                f"{theirs.get(key)}); only drafters for one target can be compared"
            )
    begun = [_beginnings(side) for side in (a, b)]
    shared = begun[0].keys() & begun[1].keys()
    same = sum(begun[0][key] == begun[1][key] for key in shared)
    if same < len(shared) / 2:
        raise ValueError(
            f"A and B were measured with two targets of one name: only {same} of {len(shared)} "
            f"plain greedy answers begin with the same {FIRST} tokens"
        )


def _beginnings(side: Side) -> dict[str, list[int]]:
    """The first tokens of the target's own greedy answer to each prompt."""
    plain = [run for run in side.runs if run["arm"] == BASELINE and run["temperature"] == 0]
    return {
        key: ids[:FIRST] for run in plain for key, ids in zip(run["keys"], run["ids"], strict=True)
    }


def _careful(entry: Row) -> Iterator[str]:
    where = f"T={entry['temperature']:g}, batch {entry['batch']}"
    groups = "prompts" if entry["batch"] == 1 else "groups of prompts"
    if not entry["paired"]:
        yield f"{where}: A and B share {entry['shared']} {groups}, so they are compared unpaired"
    elif entry["only_a"] or entry["only_b"]:
        yield (
            f"{where}: only the {entry['shared']} {groups} of both are compared; {entry['only_a']} "
            f"of A and {entry['only_b']} of B are left out"
        )
    plain = entry["measures"]["plain tokens/s"]
    if plain["verdict"] in ("B is higher", "B is lower"):
        yield (
            f"{where}: decoding without a drafter ran {times(plain['change']['value'])} as fast in "
            "B, so tokens/s compares machines too; the speedup, each side over its own, does not"
        )


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{'+' if value >= 0 else '-'}{number(abs(value))}"


def _shown(name: str, side: Side) -> str:
    known = side.report["conditions"]
    return f"{name}: {side.folder} ({known['drafter']}, {known.get('draft_shape', '')})"


def main(arguments: list[str]) -> int:
    """Prints the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description="Says whether two drafters for one target differ beyond noise: tokens per "
        "target call, speed-up, tokens per second, each with a 95 % paired bootstrap interval.",
        epilog="Exit codes: 0 compared, 2 refused (other targets, or a folder without a report).",
    )
    said = "a folder with report.json and runs.jsonl, or a bench stage's folder"
    parser.add_argument("a", type=Path, metavar="A", help=said)
    parser.add_argument("b", type=Path, metavar="B", help=said)
    given = parser.parse_args(arguments)
    try:
        a, b = read(given.a), read(given.b)
        found = compare(a, b)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_shown("A", a), _shown("B", b), "", table(found), "", sep="\n")
    for line in warnings(a, b, found):
        print(f"mind: {line}.")
    print("difference: B - A for tau, else B / A; 95 % intervals over n prompts.")
    print(f"Of times, less than {DRIFT:.0%} is called no difference: a repeat shows as much.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
