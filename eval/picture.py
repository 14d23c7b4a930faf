"""The report as one picture: speedups, acceptance by position, batch sizes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.bootstrap import Estimate
from eval.statistics import BASELINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
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
    temperatures = sorted({row["temperature"] for row in report["table"]})
    style = {t: (COLOURS[i % 6], MARKERS[i % 6]) for i, t in enumerate(temperatures)}
    _speedups(left, [row for row in report["table"] if row["batch"] == 1], style)
    drafter = [row for row in report["table"] if row["arm"] == "drafter"]
    _positions(middle, [row for row in drafter if row["batch"] == 1], style)
    _batches(right, drafter, style)
    # one legend under all panels: inside one it would sooner or later cover a line
    handles = [Patch(color=colour, label=f"T={t:g}") for t, (colour, _) in style.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=max(1, len(handles)), frameon=False
    )
    figure.savefig(path, format="png")


def _plain(text: object, most: int = 44) -> str:
    """Text that the font can show and mathtext does not read: ASCII, short, no dollar."""
    flat = str(text).encode("ascii", "replace").decode().replace("$", "")
    return flat if len(flat) <= most else flat[: most - 3] + "..."


def _named(path: object) -> str:
    """The last two parts of a path, which is also a Hub id whole."""
    return _plain("/".join(Path(str(path)).parts[-2:]))


def _title(report: Row) -> str:
    known = report["conditions"]
    names = f"Speculative decoding of {_named(known['target'])} with {_named(known['drafter'])}"
    names += ", target CHANGED" if known.get("target_change") else ""
    place = f"{_plain(known['device'], 60)}, {known['threads']} threads, {_plain(known['dtype'])}"
    warning = "" if report["passed"] else "CONTROLS NOT PASSED, do not use: "
    return f"{warning}{names}\n{place}; 95 % intervals over n prompts, repetitive answers left out"


def _speedups(axes: Axes, rows: list[Row], style: dict[float, tuple[str, str]]) -> None:
    """Bars lie, since names of arms are longer than a bar is wide."""
    axes.set_title("Speedup over autoregressive, batch 1")
    rows = [row for row in rows if row["arm"] != BASELINE and row["speedup"]["value"] is not None]
    if not rows:
        return _nothing(axes)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    temperatures = sorted({row["temperature"] for row in rows})
    height = 0.8 / len(temperatures)
    for row in rows:
        slot = temperatures.index(row["temperature"]) - (len(temperatures) - 1) / 2
        y, estimate = arms.index(row["arm"]) + slot * height, row["speedup"]
        axes.barh(y, estimate["value"], 0.9 * height, color=style[row["temperature"]][0])
        axes.errorbar(estimate["value"], y, xerr=_reach([estimate]), color="black", capsize=3)
        end = estimate["high"] or estimate["value"]
        text = f"{estimate['value']:.2f}x, n={row['n']}"
        axes.annotate(text, (end, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
    widest = max(row["speedup"]["high"] or row["speedup"]["value"] for row in rows)
    axes.set_xlim(0, 1.35 * max(widest, 1.0))
    axes.set_yticks(range(len(arms)), [_plain(arm, 22) for arm in arms])
    axes.invert_yaxis()
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("times as fast (dashed: no drafting)")
    _tidy(axes)


def _positions(axes: Axes, rows: list[Row], style: dict[float, tuple[str, str]]) -> None:
    axes.set_title("Acceptance by draft position, batch 1")
    rows = [row for row in rows if row["acceptance"]]
    if not rows:
        return _nothing(axes)
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
    _tidy(axes)


def _batches(axes: Axes, rows: list[Row], style: dict[float, tuple[str, str]]) -> None:
    axes.set_title("Drafter's speedup by batch size")
    rows = [row for row in rows if row["speedup"]["value"] is not None]
    if not rows:
        return _nothing(axes)
    sizes = sorted({row["batch"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})
    for i, temperature in enumerate(temperatures):
        mine = [row for row in rows if row["temperature"] == temperature]
        shift = 0.03 * (i - (len(temperatures) - 1) / 2)
        places = [sizes.index(row["batch"]) + shift for row in mine]
        _line(axes, places, [row["speedup"] for row in mine], mine[0], style)
    highest = max(row["speedup"]["high"] or row["speedup"]["value"] for row in rows)
    axes.set_ylim(0, 1.2 * max(highest, 1.0))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlim(-0.5, len(sizes) - 0.5)
    axes.axhline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel("requests decoded together")
    axes.set_ylabel("times as fast (dashed: no drafting)")
    _tidy(axes)


def _line(
    axes: Axes,
    places: list[float],
    estimates: list[Estimate],
    row: Row,
    style: dict[float, tuple[str, str]],
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


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "nothing measured here", ha="center", va="center", color=GREY)
    axes.set_axis_off()
