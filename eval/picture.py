"""The report as one picture: speedups, acceptance by position, batch sizes.

Its panels are public: eval/charts.py sets them into the web page too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bootstrap import Estimate
from eval.statistics import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
Style = dict[float, tuple[str, str]]  # colour and marker of a temperature
# Okabe and Ito's palette, told apart by all common kinds of colour blindness
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY = "#555555"


def draw(report: Row, path: Path) -> None:
    """Writes a PNG of three panels, with 95 % intervals, whatever the name of `path` ends in."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    # no pyplot: its global state is not ours to change
    figure = Figure(figsize=(15, 5.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    figure.suptitle(_title(report), fontsize=12)
    style = style_of(report)
    left.set_title("Speedup over autoregressive, batch 1")
    speedups(left, arms_at_one(report), "arm", style, lambda name: plain(name, 22))
    middle.set_title("Acceptance by draft position, batch 1")
    positions(middle, report, style)
    right.set_title("Speedup by batch size (ringed: break-even)")
    batches(right, report, style)
    # one legend under all panels: inside one it would sooner or later cover a line
    handles = [Patch(color=colour, label=f"T={t:g}") for t, (colour, _) in style.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False
    )
    figure.savefig(path, format="png")


def style_of(report: Row) -> Style:
    temperatures = sorted({row["temperature"] for row in report["table"]})
    return {t: (COLOURS[i % 6], MARKERS[i % 6]) for i, t in enumerate(temperatures)}


def plain(text: object, most: int = 44) -> str:
    """Text that the font can show and mathtext does not read: ASCII, short, no dollar."""
    flat = str(text).encode("ascii", "replace").decode().replace("$", "")
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def _named(path: object) -> str:
    """The last two parts of a path, which is also a Hub id whole."""
    return plain("/".join(Path(str(path)).parts[-2:]))


def _title(report: Row) -> str:
    known = report["conditions"]
    names = f"Speculative decoding of {_named(known['target'])} with {_named(known['drafter'])}"
    names += ", target CHANGED" if known.get("target_change") else ""
    place = f"{plain(known['device'], 60)}, {known['threads']} threads, {plain(known['dtype'])}"
    warning = "" if report["passed"] else "CONTROLS NOT PASSED, do not use: "
    return f"{warning}{names}\n{place}; 95 % intervals over n prompts, repetitive answers left out"


def arms_at_one(report: Row) -> list[Row]:
    """The cells of drafting arms at batch 1 that were measured."""
    rows = [row for row in report["table"] if row["batch"] == 1 and row["arm"] != BASELINE]
    return [row for row in rows if row["speedup"]["value"] is not None]


def speedups(
    axes: Axes, rows: list[Row], key: str, style: Style, named: Callable[[object], str]
) -> None:
    """A group of bars for each value of `key`; lying, since names are longer than a bar is wide."""
    if not rows:
        return nothing(axes)
    names = list(dict.fromkeys(row[key] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    height = 0.8 / len(temperatures)
    for row in rows:
        slot = temperatures.index(row["temperature"]) - (len(temperatures) - 1) / 2
        y, estimate = names.index(row[key]) + slot * height, row["speedup"]
        axes.barh(y, estimate["value"], 0.9 * height, color=style[row["temperature"]][0])
        axes.errorbar(estimate["value"], y, xerr=_reach([estimate]), color="black", capsize=3)
        end = estimate["high"] or estimate["value"]
        text = f"{estimate['value']:.2f}x, n={row['n']}"
        axes.annotate(text, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
    widest = max(row["speedup"]["high"] or row["speedup"]["value"] for row in rows)
    axes.set_xlim(0, 1.35 * max(widest, 1.0))
    axes.set_yticks(range(len(names)), [named(name) for name in names])
    axes.invert_yaxis()
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("times as fast (dashed: no drafting)")
    tidy(axes)


def positions(axes: Axes, report: Row, style: Style) -> None:
    """The drafter's conditional acceptance at each draft position, batch 1."""
    rows = [row for row in drafter_cells(report) if row["batch"] == 1 and row["acceptance"]]
    if not rows:
        return nothing(axes)
    for i, row in enumerate(rows):
        known = [p for p in row["acceptance"] if p["conditional"]["value"] is not None]
        estimates = [p["conditional"] for p in known]
        places = [p["position"] + 0.06 * (i - (len(rows) - 1) / 2) for p in known]
        _line(axes, places, estimates, row, style)
    longest = max(len(row["acceptance"]) for row in rows)
    step = 1 + longest // 16
    axes.set_xticks(range(1, longest + 1, step))
    axes.set_xlim(0.5, longest + 0.5)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("draft position")
    axes.set_ylabel("accepted, given all before were")
    tidy(axes)


def batches(axes: Axes, report: Row, style: Style) -> None:
    """The drafter's speedup by batch size, and the size at which it stops paying."""
    rows = [row for row in drafter_cells(report) if row["speedup"]["value"] is not None]
    if not rows:
        return nothing(axes)
    sizes = sorted({row["batch"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})
    for i, temperature in enumerate(temperatures):
        mine = [row for row in rows if row["temperature"] == temperature]
        shift = 0.03 * (i - (len(temperatures) - 1) / 2)
        places = [math.log2(row["batch"]) + shift for row in mine]
        _line(axes, places, [row["speedup"] for row in mine], mine[0], style)
    for entry in report["break_even"]:
        if entry["value"] is not None:
            colour, marker = style[entry["temperature"]]
            place = math.log2(entry["value"])
            axes.plot(place, 1.0, marker, color=colour, mfc="none", ms=13, mew=1.5)
            axes.annotate(
                f"{entry['value']:.3g}", (place, 1.0), (0, -22), textcoords="offset points",
                ha="center", color=colour,
            )  # fmt: skip
    highest = max(row["speedup"]["high"] or row["speedup"]["value"] for row in rows)
    axes.set_ylim(0, 1.2 * max(highest, 1.0))
    axes.set_xticks([math.log2(size) for size in sizes], [str(size) for size in sizes])
    axes.set_xlim(math.log2(sizes[0]) - 0.5, math.log2(sizes[-1]) + 0.5)
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("requests decoded together")
    axes.set_ylabel("times as fast (dashed: no drafting)")
    tidy(axes)


def drafter_cells(report: Row) -> list[Row]:
    return [row for row in report["table"] if row["arm"] == "drafter"]


def point(axes: Axes, place: float, estimate: Estimate, look: tuple[str, str]) -> None:
    """An estimate with its interval, which stands upright."""
    colour, marker = look
    value, reach = estimate["value"] or 0.0, _reach([estimate])
    axes.errorbar([place], [value], reach, color=colour, marker=marker, capsize=3)


def _line(
    axes: Axes, places: list[float], estimates: list[Estimate], row: Row, style: Style
) -> None:
    colour, marker = style[row["temperature"]]
    values = [estimate["value"] or 0.0 for estimate in estimates]
    reach = _reach(estimates)
    axes.errorbar(places, values, reach, color=colour, marker=marker, capsize=3)


def _reach(estimates: list[Estimate]) -> list[list[float]]:
    """How far each interval reaches below and above its value; 0 where there is none."""

    def span(estimate: Estimate, end: str) -> float:
        bound, value = estimate[end], estimate["value"]  # type: ignore[literal-required]
        return 0.0 if bound is None else abs(bound - value)

    return [[span(e, end) for e in estimates] for end in ("low", "high")]


def tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing measured here", ha="center", va="center", color=GREY)
    axes.set_axis_off()
