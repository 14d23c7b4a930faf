"""What a sweep of trainings teaches: one table, one page of figures, and the laws of its runs.

    .venv/bin/python -m eval.sweep FOLDER [FOLDER ...]

FOLDER is OUTPUT_DIR/sweeps/NAME, as `python -m train -m sweep=...` leaves it; several of one target
are read as one. Exit codes: 0 written, 2 refused, 4 the report cannot be written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from drafters.base import write_json
from eval import sweep_charts, sweep_page
from eval.charts import Chart
from eval.known import settings
from eval.laws import Law
from eval.markdown import Said, Section, render
from eval.page import POLICY, STYLE, definitions_of, opening_of, section_of
from eval.sweep_laws import laws_of
from eval.swept import Sweep, read, together


def write(sweep: Sweep, folder: Path) -> list[str]:
    """Writes sweep.md, sweep.png, index.html and laws.json; returns the sentences at their head."""
    laws = laws_of(sweep)
    figures = sweep_charts.panels(sweep, laws)
    said, opened = sweep_page.title(sweep), sweep_page.opening(sweep, laws)
    parts = sweep_page.sections(sweep, laws)
    folder.mkdir(parents=True, exist_ok=True)
    text = render(said, opened, parts, sweep_page.DEFINITIONS, picture="sweep.png")
    (folder / "sweep.md").write_text(text, encoding="utf-8")
    sweep_charts.write(figures, folder / "sweep.png")
    html = page(said, opened, parts, sweep_charts.charts(figures))
    (folder / "index.html").write_text(html, encoding="utf-8")
    write_json(folder / "laws.json", told(sweep, laws))
    return [line.text for line in opened]


def told(sweep: Sweep, laws: list[Law]) -> dict[str, object]:
    """laws.json: the laws with all that draws them again, and the facts of every run."""
    best = next(iter(sweep.measured), None)
    return {
        "target": best.target if best else None,
        "conditions": best.conditions if best else {},
        "laws": [law.told() for law in laws],
        "runs": [run.told() | {"setting": settings(run.held)} for run in sweep.runs],
    }


def page(
    said: str, opened: Sequence[Said], sections: Sequence[Section], figures: Sequence[Chart]
) -> str:
    """index.html: the same sentences and tables as sweep.md, with figures; no script, no request.

    Every text goes through `html.escape`: names of runs and targets are not ours to trust."""
    first, *others = sections
    drawn = "".join(
        f'<figure role="img" aria-label="{escape(chart.said)}">'
        f"<figcaption>{escape(chart.said)}</figcaption>{chart.svg}</figure>"
        for chart in figures
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(said)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(said)}</h1>",
            opening_of(opened, True),
            f'<h2>Figures</h2><div class="figures">{drawn}</div>' if drawn else "",
            *(section_of(section, sweep_page.DEFINITIONS) for section in (*others, first)),
            definitions_of(sweep_page.DEFINITIONS),
            "</body>\n</html>\n",
        ]
    )


def main(arguments: list[str]) -> int:
    """Writes the report and prints its head; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.sweep",
        description="Says what a sweep found: the best drafter and those that cannot be told from "
        "it, and laws of tau against tokens and size, of speedup against batch, of drafting time "
        "against depth, with intervals, figures and what they say of drafters not yet trained.",
        epilog="Exit codes: 0 written, 2 refused, 4 the report cannot be written.",
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER",
        help="OUTPUT_DIR/sweeps/NAME; several of one target are read as one sweep",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, help="where to write; without it, report/ in the first FOLDER"
    )
    given = parser.parse_args(arguments)
    out = given.out or given.folders[0] / "report"
    try:
        lines = write(together([read(folder) for folder in given.folders]), out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: the report cannot be written to {out}: {error}", file=sys.stderr)
        return 4
    print(*lines, "", f"{out / 'index.html'}, sweep.md, sweep.png, laws.json", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
