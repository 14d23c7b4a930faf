"""The figures of the web page: inline SVG whose colours follow the page, with text as text."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from io import StringIO
from typing import TYPE_CHECKING, Any, NamedTuple

from eval import picture
from eval.picture import COLOURS, GREY, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
HIDDEN = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no metadata, no address


class Chart(NamedTuple):
    """A figure: what it shows, in words, and its SVG."""

    said: str
    svg: str


def charts(report: Row) -> list[Chart]:
    """The figures of what was measured, in the order of the page."""
    style = picture.style_of(report)
    return [
        Chart(said, svg(panel, size, f"f{i}"))
        for i, (said, size, panel) in enumerate(_panels(report, style))
    ]


def _panels(
    report: Row, style: Style
) -> Iterator[tuple[str, tuple[float, float], Callable[[Axes], None]]]:
    bars = {
        "Speedup over autoregressive decoding by arm, batch 1": (picture.arms_at_one(report), "arm")
    }
    bars["Drafter's speedup by task, batch 1"] = (report["by_task"], "task")
    bars["Drafter's speedup by language, batch 1"] = (report["by_language"], "language")
    bars["Drafter's speedup by tokens of the prompt, batch 1"] = (
        report["by_length"], "prompt_tokens",
    )  # fmt: skip
    for said, (entries, key) in bars.items():
        rows = [row for row in entries if row["speedup"]["value"] is not None]
        if len({row[key] for row in rows}) > (key != "arm"):  # one task alone is the headline
            height = 1.2 + 0.28 * len(rows) + 0.12 * len({row[key] for row in rows})
            yield said, (6.4, height), _bars(rows, key, style)
    if any(row["acceptance"] for row in picture.drafter_cells(report)):
        said = "Drafter's acceptance by draft position, batch 1"
        yield said, (6.4, 4), lambda axes: picture.positions(axes, report, style)
    if len({row["batch"] for row in report["table"]}) > 1:
        said = "Drafter's speedup by batch size (ringed: break-even)"
        yield said, (6.4, 4), lambda axes: picture.batches(axes, report, style)
    if report["predicted"]:
        said = "Speedup predicted by the cost model, and measured (band: 10 %)"
        yield said, (6.4, 4.4), lambda axes: _predicted(axes, report["predicted"], style)
    if tried := report["conditions"].get("draft_shape_choice"):
        chosen = report["conditions"].get("draft_shape")
        said = "Tokens/s of the shapes of draft that were tried (blue: chosen)"
        yield said, (6.4, 1.2 + 0.32 * len(tried)), lambda axes: _shapes(axes, tried, chosen)


def _bars(rows: list[Row], key: str, style: Style) -> Callable[[Axes], None]:
    return lambda axes: picture.speedups(axes, rows, key, style, short)


def _predicted(axes: Axes, entries: list[Row], style: Style) -> None:
    """Points on the dashed line were predicted exactly."""
    ends = [entry["predicted"] for entry in entries]
    ends += [e["measured"][k] or e["measured"]["value"] for e in entries for k in ("low", "high")]
    low, high = 0.9 * min([*ends, 1.0]), 1.1 * max([*ends, 1.0])
    axes.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high],
                      color=GREY, alpha=0.15, linewidth=0)  # fmt: skip
    axes.plot([low, high], [low, high], color=GREY, linestyle="--", linewidth=1)
    for entry in entries:
        picture.point(axes, entry["predicted"], entry["measured"], style[entry["temperature"]])
        text = short(f"{entry['arm']}, batch {entry['batch']}", 28)
        place = entry["predicted"], entry["measured"]["value"]
        axes.annotate(text, place, (7, -9), textcoords="offset points", fontsize=8)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel("predicted, times as fast")
    axes.set_ylabel("measured, times as fast")
    picture.tidy(axes)


def _shapes(axes: Axes, tried: dict[str, float], chosen: str | None) -> None:
    colours = [COLOURS[0] if shape == chosen else "#B0B0B0" for shape in tried]
    axes.barh(range(len(tried)), list(tried.values()), 0.7, color=colours)
    for i, speed in enumerate(tried.values()):
        axes.annotate(f"{speed:,.1f}", (speed, i), (5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(tried)), [short(shape, 40) for shape in tried])
    axes.set_xlim(0, 1.2 * max(tried.values()))
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s on the trial prompts")
    picture.tidy(axes)


def short(text: object, most: int = 30) -> str:
    """In any script, since the reader's browser has the fonts; a dollar begins no formula."""
    flat = " ".join(str(text).split())
    flat = flat if len(flat) <= most else flat[: most - 1] + "…"
    return flat.replace("$", r"\$")


def svg(panel: Callable[[Axes], None], size: tuple[float, float], name: str) -> str:
    """The panel as an element that stands in a page by itself."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser's has it
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        panel(figure.subplots())
        text = StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata=HIDDEN)
    return _inline(text.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Without prologue and comments; ids are the figure's own, colours the page's variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>", r'<svg viewBox="\1">', svg, count=1)
    svg = re.sub(r"\bxlink:href", "href", svg)
    svg = re.sub(r"font: ([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1sans-serif", svg)
    named = {"#000000": "var(--ink)", GREY: "var(--soft)", "#b0b0b0": "var(--line)"}
    named |= {colour: f"var(--c{i})" for i, colour in enumerate(COLOURS)}
    for colour, variable in named.items():
        svg = re.sub(colour, variable, svg, flags=re.IGNORECASE)
    return svg.strip()
