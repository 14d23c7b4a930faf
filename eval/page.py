"""The report as one web page that stands alone: no script, no request, light and dark.

Every text goes through `html.escape`: names of tasks, arms and models are not ours to trust.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from eval.bootstrap import FASTER, SLOWER
from eval.charts import Chart, charts
from eval.markdown import Said, Section

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --soft: #5c5c5c; --line: #c4c4c4;
  --box: #f4f4f2; --good: #00714f; --bad: #b03a00; --c0: #0072B2; --c1: #c98500; --c2: #009E73;
  --c3: #b8608f; --c4: #3f9fd4; --c5: #D55E00; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181a; --ink: #e6e6e3; --soft: #a5a5a0;
  --line: #4a4d50; --box: #212427; --good: #3fc79a; --bad: #ff9a66; --c0: #4aa8e0; --c1: #E69F00;
  --c2: #1fbf92; --c3: #e094bf; --c4: #8fd0f5; --c5: #ff8a3d; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif;
  max-width: 84rem; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.opening { background: var(--box); border-left: 4px solid var(--c0); padding: .6rem 1rem; }
.opening.broken { border-color: var(--bad); }
.opening p { margin: .35rem 0; }
.loud { font-weight: 600; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(28rem, 100%), 1fr));
  gap: 1.5rem 2rem; align-items: start; margin-top: 1.5rem; }
figure { margin: 0; }
figcaption { font-weight: 600; margin-bottom: .3rem; }
svg { width: 100%; height: auto; }
svg text { fill: var(--ink); }
.key { margin: 1rem 0 0; color: var(--soft); }
.key i { display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { white-space: nowrap; }
td.figure { white-space: nowrap; }
abbr { text-decoration: underline dotted; text-underline-offset: 3px; cursor: help; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; }
dd { margin: 0 0 0 1.2rem; max-width: 60rem; }
"""
BAD = (SLOWER, "FAILED", "off by more than 10 %")
GOOD = (FASTER, "passed", "within 10 %")


def page(
    report: dict[str, Any], title: str, opening: Sequence[Said], sections: Sequence[Section]
) -> str:
    """report.html: the same sentences and tables as report.md, figures, definitions on hover."""
    definitions = report["definitions"]
    first, *others = sections  # conditions first, then figures, then tables
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            f"<h1>{escape(title)}</h1>",
            opening_of(opening, report["passed"]),
            section_of(first, definitions),
            _figures(charts(report), report),
            *(section_of(section, definitions) for section in others),
            definitions_of(definitions),
            "</body>\n</html>\n",
        ]
    )


def opening_of(opening: Sequence[Said], passed: bool) -> str:
    lines = [f"<p{' class=loud' if said.loud else ''}>{escape(said.text)}</p>" for said in opening]
    kind = "opening" if passed else "opening broken"
    return f'<div class="{kind}">{"".join(lines)}</div>'


def _figures(figures: Sequence[Chart], report: dict[str, Any]) -> str:
    if not figures:
        return ""
    drawn = [
        f'<figure role="img" aria-label="{escape(said)}"><figcaption>{escape(said)}</figcaption>'
        f"{svg}</figure>"
        for said, svg in figures
    ]
    temperatures = sorted({row["temperature"] for row in report["table"]})
    key = [
        f'<i style="background: var(--c{i % 6})"></i>T={t:g}' for i, t in enumerate(temperatures)
    ]
    said = "Lines at points and bars: 95 % intervals over prompts."
    legend = f'<p class="key">Temperatures:{"".join(key)}. {said}</p>'
    return f'<h2>Figures</h2>{legend}<div class="figures">{"".join(drawn)}</div>'


def section_of(section: Section, definitions: dict[str, str]) -> str:
    said = [f"<p>{escape(text)}</p>" for text in section.said]
    notes = [f"<p>{escape(text)}</p>" for text in section.notes]
    table = _table(section, definitions) if section.rows else ""
    return f"<h2>{escape(section.title)}</h2>{''.join(said)}{table}{''.join(notes)}"


def _table(section: Section, definitions: dict[str, str]) -> str:
    head = "".join(f'<th scope="col">{_hinted(name, definitions)}</th>' for name in section.head)
    top = f"<thead><tr>{head}</tr></thead>" if any(section.head) else ""
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in section.rows)
    return f'<div class="wide"><table>{top}<tbody>{rows}</tbody></table></div>'


def _hinted(name: str, definitions: dict[str, str]) -> str:
    """A column's name, with its definition on hover where there is one.

    `TPOT ms p50` is defined by TPOT, `draft ms/round` by `draft, verify, other`.
    """
    for key, text in definitions.items():
        if any(name == alias or name.startswith(f"{alias} ") for alias in key.split(", ")):
            return f'<abbr title="{escape(text)}">{escape(name)}</abbr>'
    return escape(name)


def _cell(value: object) -> str:
    text = str(value)
    kind = "bad" if text in BAD else "good" if text in GOOD else ""
    kind = kind or ("figure" if len(text) < 30 else "")
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>"


def definitions_of(definitions: dict[str, str]) -> str:
    entries = [f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in definitions.items()]
    return f"<h2>What every number means</h2><dl>{''.join(entries)}</dl>"
