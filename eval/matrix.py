"""Stage `matrix`: drafters of several languages on tasks of several languages, in one table.

Each drafter was measured by a bench stage of its own on the same tasks and target; this puts
their slices by task side by side, and says where a drafter is slower than none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from drafters.base import write_json
from eval.bootstrap import FASTER, SLOWER
from eval.markdown import grid, interval, number, times
from eval.slices import language_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
CELL = ("speedup", "tau", "n", "verdict")


class Matrix:
    """Compares what bench stages found; `needs` maps each drafter's language to its bench stage."""

    def run(self, out: Path, **reports: Path) -> dict[str, float]:
        """Writes artifact/: matrix.json, matrix.md and matrix.png; returns each cell's speedup at
        the lowest temperature as `speedup_DRAFTER_TASK`.

        Raises ValueError where reports are of different targets or share no task.
        """
        if len(reports) < 2:
            raise ValueError(
                "matrix needs the bench stages of two drafters or more: needs: {ko: bench_ko, ...}"
            )
        measured = {name: _read(name, folder) for name, folder in reports.items()}
        _one_target(measured)
        rows = [row for name, report in measured.items() for row in _rows(name, report)]
        tasks = _tasks(rows, list(reports))
        folder = out / "artifact"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "matrix.json", {"rows": rows, "drafters": list(reports), "tasks": tasks}
        )
        text = page(rows, list(reports), tasks)
        (folder / "matrix.md").write_text(text, encoding="utf-8")
        draw(rows, list(reports), tasks, folder / "matrix.png")
        print(text, flush=True)
        cold = min(row["temperature"] for row in rows)
        return {
            f"speedup_{row['drafter']}_{row['task']}": row["speedup"]["value"]
            for row in rows
            if row["temperature"] == cold and row["speedup"]["value"] is not None
        }


def page(rows: list[Row], drafters: list[str], tasks: list[str]) -> str:
    """matrix.md: for each temperature a table of drafters by tasks, and verdicts in words."""
    parts = ["# Drafters by language, on tasks by language"]
    for temperature in sorted({row["temperature"] for row in rows}):
        here = {(r["drafter"], r["task"]): r for r in rows if r["temperature"] == temperature}
        head = ("drafter", *tasks)
        lines = [
            (_named(d, rows), *(_cell(here.get((d, task))) for task in tasks)) for d in drafters
        ]
        parts += [f"## Temperature {temperature:g}, batch 1", grid(head, lines)]
        parts += _verdicts(here)
    parts.append(
        "Speedup over no drafting and tau (tokens per target call), with 95 % intervals over "
        "prompts; repetitive answers are left out."
    )
    return "\n\n".join(parts) + "\n"


def draw(rows: list[Row], drafters: list[str], tasks: list[str], path: Path) -> None:
    """Two heat maps, speedup and tau, at the lowest temperature; white is no drafting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from eval.picture import plain

    cold = min(row["temperature"] for row in rows)
    here = {(r["drafter"], r["task"]): r for r in rows if r["temperature"] == cold}
    size = (4 + 2.4 * len(tasks), 2.2 + 0.8 * len(drafters))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Drafter (row) on task (column), T={cold:g}, batch 1")
    for axes, key, said in zip(
        figure.subplots(1, 2),
        ("speedup", "tau"),
        ("times as fast as no drafting", "tokens per target call"),
        strict=True,
    ):
        axes.set_title(said)
        _heat(axes, [[here.get((d, task)) for task in tasks] for d in drafters], key)
        axes.set_xticks(range(len(tasks)), [plain(t, 20) for t in tasks], rotation=30, ha="right")
        axes.set_yticks(range(len(drafters)), [plain(d, 20) for d in drafters])
    figure.savefig(path, format="png")


def _read(name: str, folder: Path) -> Row:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if not report.get("by_task"):
        raise ValueError(
            f"the report of {name!r} has no figures by task: it was not measured at batch 1, or "
            "before reports had schema 2"
        )
    return dict(report)


def _one_target(measured: dict[str, Row]) -> None:
    same = ("target", "target_revision", "parameters_target", "dtype", "device", "threads")
    for key in same:
        found = {name: report["conditions"].get(key) for name, report in measured.items()}
        if len(set(found.values())) > 1:
            told = ", ".join(f"{name}: {value}" for name, value in found.items())
            raise ValueError(
                f"a matrix compares drafters of one target, measured alike, but {key} is "
                f"{told}; set the benches' dtype, or measure them on one machine"
            )


def _rows(name: str, report: Row) -> Iterator[Row]:
    changed = "target_change" in report["conditions"]
    for entry in report["by_task"]:
        cell = {key: entry[key] for key in ("task", "temperature", *CELL)}
        own = language_in(entry["task"]) == _language(name)
        yield {"drafter": name, "own": own, "passed": report["passed"], "changed": changed} | cell


def _tasks(rows: list[Row], drafters: list[str]) -> list[str]:
    """In the order of the drafters, so that a drafter's own language stands on the diagonal."""
    tasks = sorted({row["task"] for row in rows})
    shared = [t for t in tasks if len({r["drafter"] for r in rows if r["task"] == t}) > 1]
    if not shared:
        raise ValueError(f"the reports share no task; theirs are {', '.join(tasks)}")
    place = {_language(name): i for i, name in enumerate(drafters)}
    return sorted(tasks, key=lambda task: (place.get(language_in(task) or "", len(place)), task))


def _language(drafter: str) -> str:
    return language_in(drafter) or drafter


def _named(drafter: str, rows: list[Row]) -> str:
    row = next(row for row in rows if row["drafter"] == drafter)
    name = drafter + (" (target CHANGED)" if row["changed"] else "")
    return name if row["passed"] else f"{name} (a control FAILED)"


def _cell(row: Row | None) -> str:
    if row is None or row["speedup"]["value"] is None:
        return "not measured"
    said = f"{interval(row['speedup'], times)}, tau {interval(row['tau'])}, n={row['n']}"
    return said if row["verdict"] == FASTER else f"{said}: {row['verdict']}"


def _verdicts(here: dict[tuple[str, str], Row]) -> Iterator[str]:
    slow = [
        f"{drafter} on {task} ({interval(row['speedup'], times)})"
        for (drafter, task), row in here.items()
        if row["verdict"] == SLOWER
    ]
    yield f"Slower than no drafting: {', '.join(slow) or 'none, as far as the intervals show'}."
    known = [row for row in here.values() if row["speedup"]["value"] is not None]
    own, other = (
        [r["speedup"]["value"] for r in known if r["own"] == side] for side in (True, False)
    )
    if own and other:
        yield (
            f"On tasks of its own language a drafter is {times(_mean(own))} as fast as no drafting "
            f"(geometric mean of {len(own)}), on the others {times(_mean(other))} ({len(other)})."
        )


def _mean(ratios: list[float]) -> float:
    return math.exp(fmean(math.log(ratio) for ratio in ratios))


def _heat(axes: Axes, cells: list[list[Row | None]], key: str) -> None:
    """Violet above 1, orange below, each with its number; grey where nothing was measured."""
    from matplotlib import colormaps

    values = [[_value(cell, key) for cell in line] for line in cells]
    logs = [[math.nan if v is None else math.log(v) for v in line] for line in values]
    reach = max((abs(x) for line in logs for x in line if not math.isnan(x)), default=0.1)
    shades = colormaps["PuOr"].with_extremes(bad="#d0d0d0")
    axes.imshow(logs, cmap=shades, vmin=-max(reach, 0.1), vmax=max(reach, 0.1), aspect="auto")
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            value, log = values[y][x], logs[y][x]
            dark = not math.isnan(log) and abs(log) > 0.6 * reach
            text = "-" if cell is None or value is None else number(value)
            if key == "speedup" and cell is not None and cell["verdict"] == SLOWER:
                text += "\nslower"
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")


def _value(cell: Row | None, key: str) -> float | None:
    return None if cell is None else cell[key]["value"]
