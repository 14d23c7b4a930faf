"""How numbers are written, and pages of sections as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from eval.bootstrap import Estimate


@dataclass(frozen=True)
class Section:
    """A titled part of a page: sentences, a table, and notes below it; cells are plain text."""

    title: str
    said: Sequence[str] = ()
    head: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Said:
    """A sentence at the head of a page; the loud ones are what a reader must not miss."""

    text: str
    loud: bool = True


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


def render(
    title: str,
    opening: Iterable[Said],
    sections: Iterable[Section],
    definitions: dict[str, str],
    *,
    picture: str,
) -> str:
    """The page as Markdown; no text in it can become a tag, a table's edge or a heading."""
    parts = [f"# {_safe(title)}"]
    parts += [f"**{_safe(said.text)}**" if said.loud else _safe(said.text) for said in opening]
    for section in sections:
        parts += [f"## {_safe(section.title)}", *map(_safe, section.said)]
        parts += [grid(section.head, section.rows)] if section.rows else []
        parts += map(_safe, section.notes)
    parts.append(f"![the figures of this page]({picture})")
    defined = [f"- **{_safe(name)}**: {_safe(text)}" for name, text in definitions.items()]
    return "\n\n".join([*parts, "## What every number means", "\n".join(defined)]) + "\n"


def grid(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return _safe(value).replace("|", "\\|")


def _safe(value: object) -> str:
    """On one line, and no HTML: what names are called is not ours to trust."""
    return " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
