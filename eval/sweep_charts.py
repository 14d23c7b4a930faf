"""The figures of a sweep: its runs, its laws with bands, and learning curves.

Each figure is a panel that draws itself into any axes, so the page has it as SVG and the picture
beside sweep.md has it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eval import picture
from eval.bootstrap import Array, Estimate
from eval.charts import Chart, short, svg
from eval.laws import FORMS, Law
from eval.picture import COLOURS, GREY, MARKERS
from eval.swept import Run, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[float, float]
BEYOND = {"log10": 4.0, "log2": 4.0, "linear": 2.0}  # times the largest x that a law is drawn to
UNITS = {  # of a slope: how it is called, and how many steps of x it is
    "log10": ("for ten times the {}", 1.0),
    "log2": ("for twice the {}", 1.0),
    "depth": ("a layer", 1.0),
    "parameters": ("a million parameters", 1e6),
}
MOST_RUNS, MOST_LAWS = 30, 6
NAMES = {
    "tau": "tokens per target call (tau)",
    "speedup": "times as fast as no drafting",
    "token_ms": "milliseconds of a drafted token",
    "tokens": "tokens trained on",
    "parameters": "parameters of the drafter",
    "depth": "layers of the drafter",
    "batch": "requests decoded together",
}

SHORT = {"tau": "Tau", "speedup": "Speedup", "token_ms": "Time of a drafted token"}


class Panel(NamedTuple):
    """What a figure shows, in words, its size in inches, and what draws it."""

    said: str
    size: Size
    draw: Callable[[Axes], None]


def panels(sweep: Sweep, laws: Sequence[Law]) -> list[Panel]:
    """The figures of what was measured, in the order of the page."""
    return [*_best(sweep), *_laws(sweep, laws), *_rungs(sweep)]


def charts(figures: Sequence[Panel]) -> list[Chart]:
    """The panels as SVG for the page."""
    return [
        Chart(panel.said, svg(panel.draw, panel.size, f"s{i}")) for i, panel in enumerate(figures)
    ]


def write(figures: Sequence[Panel], path: Path) -> None:
    """The panels as one PNG, two in a row; an odd last one has the row to itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [figures[i : i + 2] for i in range(0, len(figures), 2)]
    heights = [max(panel.size[1] for panel in row) for row in rows]
    figure = Figure(figsize=(13.5, 0.5 * len(rows) + sum(heights)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(len(rows), 2, height_ratios=heights)
    for i, panel in enumerate(figures):
        alone = i % 2 == 0 and i == len(figures) - 1
        axes = figure.add_subplot(grid[i // 2, :] if alone else grid[i // 2, i % 2])
        axes.set_title(panel.said, fontsize=10)
        panel.draw(axes)
    figure.savefig(path, format="png")


def _best(sweep: Sweep) -> Iterator[Panel]:
    """Every measured run by what the sweep maximises, the best at the top."""
    found = [(run, sweep.estimate(run)) for run in sweep.measured]
    known = [(run, e) for run, e in found if e is not None][:MOST_RUNS]
    if known:
        said = f"Runs by {sweep.maximises}, the best first (95 % intervals)"
        yield Panel(said, (6.4, 1.3 + 0.27 * len(known)), lambda axes: _bars(axes, known, sweep))


def _bars(axes: Axes, known: list[tuple[Run, Estimate]], sweep: Sweep) -> None:
    for i, (_, estimate) in enumerate(known):
        value, low, high = estimate["value"] or 0.0, estimate["low"], estimate["high"]
        about = None
        if low is not None and high is not None:
            about = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([value], [i], xerr=about, fmt="o", color=COLOURS[0], capsize=3)
    axes.set_yticks(range(len(known)), [short(run.name, 36) for run, _ in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.set_xlabel(NAMES.get(sweep.maximises.split("_")[0], sweep.maximises))
    picture.tidy(axes)


def _laws(sweep: Sweep, laws: Sequence[Law]) -> Iterator[Panel]:
    """A figure for each kind of law and temperature; of batch laws the best run's alone."""
    kinds: dict[tuple[str, str, float | None], list[Law]] = {}
    best = sweep.measured[0].name if sweep.measured else ""
    for law in laws:
        if law.against == "batch" and law.conditions["held"] != best:
            continue
        kind = law.of, law.against, law.conditions.get("temperature")
        kinds.setdefault(kind, []).append(law)
    for (of, against, temperature), mine in kinds.items():
        at = "" if temperature is None else f", T={temperature:g}"
        some = f" (the first {MOST_LAWS} of {len(mine)} laws)" if len(mine) > MOST_LAWS else ""
        only = f" of the best run ({best})" if against == "batch" else ""
        said = f"{SHORT[of]} against {against}{only}{at}{some}"
        yield Panel(said, (6.4, 4.3), partial(_curves, laws=mine[:MOST_LAWS]))


def _curves(axes: Axes, laws: list[Law]) -> None:
    """Points with intervals, the law and its band; what is extrapolated is dashed and paler."""
    for i, law in enumerate(laws):
        colour = COLOURS[i]
        for point in law.points:
            estimate = Estimate(value=point["y"], low=point["low"], high=point["high"], n=0)
            picture.point(axes, point["x"], estimate, (colour, MARKERS[i]))
        named = law.conditions.get("held") if len(laws) > 1 else ""
        label = short(f"{named}: {formula(law)}" if named else formula(law), 52)
        for x_X, style, alpha, said in (
            (_places(law, *law.range), "-", 0.22, label),
            (_places(law, law.range[1], reach(law)), "--", 0.09, None),
        ):
            value, low, high = law.along(x_X)
            axes.plot(x_X, value, style, color=colour, linewidth=1.6, label=said)
            axes.fill_between(x_X, low, high, color=colour, alpha=alpha, linewidth=0)
    _scale(axes, laws)
    axes.legend(loc="best", fontsize=8, frameon=False)
    axes.set_ylabel(NAMES[laws[0].of])
    picture.tidy(axes)


def _places(law: Law, low: float, high: float) -> Array:
    linear = law.asked == "linear"
    return np.linspace(low, high, 60) if linear else np.geomspace(low, high, 60)


def reach(law: Law) -> float:
    """The x up to which a law is drawn beyond its runs."""
    return law.range[1] * BEYOND[law.asked]


def _scale(axes: Axes, laws: list[Law]) -> None:
    """The axis of x, and a word where measurement ends; the y axis holds all points, and what of
    the extrapolated bands lies within twice their spread."""
    asked, against = laws[0].asked, laws[0].against
    most = max(law.range[1] for law in laws)
    if asked != "linear":
        axes.set_xscale("log", base=2 if asked == "log2" else 10)
    _counts(axes, base=2 if asked == "log2" else 10 if asked == "log10" else None)
    axes.axvline(most, color=GREY, linestyle=":", linewidth=1)
    end = max(reach(law) for law in laws)
    axes.axvspan(most, end, color=GREY, alpha=0.06, linewidth=0)
    middle = (most + end) / 2 if asked == "linear" else math.sqrt(most * end)
    axes.annotate(
        "extrapolated", (middle, 0.02), xycoords=("data", "axes fraction"), ha="center", fontsize=8,
        color=GREY,
    )  # fmt: skip
    ends = [p[k] or p["y"] for law in laws for p in law.points for k in ("y", "low", "high")]
    ends += [float(v) for law in laws for v in law.along(np.array([*law.range, reach(law)]))[0]]
    spread = (max(ends) - min(ends)) or 1.0
    least = min(ends) - 0.35 * spread
    axes.set_ylim(least if min(ends) < 0 else max(least, 0.0), max(ends) + 0.45 * spread)
    axes.set_xlabel(f"{NAMES[against]} (dashed: up to {BEYOND[asked]:g} times the largest)")


def _counts(axes: Axes, base: int | None) -> None:
    """Ticks as 30k and 1M; on an axis of logarithms to 10 at 1, 2 and 5."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    if base == 10:
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    if base:
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def formula(law: Law) -> str:
    """The fitted curve with its numbers, of the law's own letters: `-1.02 + 0.71 log10 x`."""
    a, *rest = law.coefficients.tolist()
    if law.form == "power":
        return f"{a:.3g} x^{rest[0]:.2f}"
    if law.form == "saturating":
        return f"{a:.3g} {'-' if rest[0] >= 0 else '+'} {abs(rest[0]):.3g} x^-{rest[1]:.2f}"
    if law.form == "late":
        return (
            f"{a:.3g} {'-' if rest[0] < 0 else '+'} {abs(rest[0]):.3g} log10 max(x, {rest[1]:,.0f})"
        )
    of = FORMS[law.form].formula.removeprefix("a + b ")
    return f"{a:.3g} {'-' if rest[0] < 0 else '+'} {abs(rest[0]):.3g} {of}"


def rises(law: Law) -> str:
    """How much y changes over the measured range, for each unit of x."""
    unit, steps = UNITS.get(law.asked) or UNITS[law.against]
    value, low, high = (steps * end for end in law.slope()[:3])
    return f"{value:+.3g} [{low:+.3g}, {high:+.3g}] {unit.format(law.against)}"


def _rungs(sweep: Sweep) -> Iterator[Panel]:
    """Learning curves of a sweep that was halved."""
    climbed = [run for run in sweep.runs if run.rungs]
    if climbed:
        said = "Decode-validated tau at the rungs of halving"
        yield Panel(said, (6.4, 4.3), lambda axes: _climb(axes, climbed))


def _climb(axes: Axes, runs: list[Run]) -> None:
    """The runs that went furthest in colour, the others grey; each ends where it was stopped."""
    ordered = sorted(runs, key=lambda run: (-len(run.rungs), -run.rungs[-1][1]))
    for i, run in enumerate(ordered):
        front = i < len(COLOURS)
        axes.plot(
            *zip(*run.rungs, strict=True),
            marker=MARKERS[i % 6] if front else ".",
            color=COLOURS[i] if front else "#B0B0B0",
            label=short(run.name, 36) if front else None,
            zorder=3 if front else 1,
        )
    axes.set_xscale("log")
    _counts(axes, 10)
    axes.set_xlabel("tokens trained on at the pause")
    axes.set_ylabel("tau on validation prompts")
    axes.legend(loc="best", fontsize=8, frameon=False)
    picture.tidy(axes)
