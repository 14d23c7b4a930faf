"""The web page: whole in itself, safe with any name, and drawn by a real browser."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eval.charts import charts
from eval.report import summarise, write_report
from tests.eval.test_report import CONDITIONS, CONTROLS, many, pair, whole

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
EVIL = "<script>document.title='taken'</script>"
VOID = {"meta", "br", "img", "link"}


def written(folder: Path, report: dict, runs: list[dict]) -> str:
    write_report(folder, report, runs)
    return (folder / "report.html").read_text(encoding="utf-8")


def evil(folder: Path) -> str:
    """The page of a measurement in which all that has a name is called like an attack."""
    runs = [run for g in range(8) for run in pair(g, task=EVIL)]
    runs += [run for g in range(8, 16) for run in pair(g, task='"><img src=x onerror=alert(1)>$a$')]
    runs += [run | {"arm": f"<b>{EVIL}"} for run in runs[::2]]
    names = {key: f"{key} {EVIL}" for key in ("target", "drafter", "device", "rule", "draft_shape")}
    names["draft_shape_choice"] = {f"chain {EVIL}": 10.0, f"draft_shape {EVIL}": 11.0}
    controls = CONTROLS | {EVIL: {"passed": True, "found": EVIL}}
    return written(folder, summarise(runs, CONDITIONS | names, controls), runs)


class Tags(html.parser.HTMLParser):
    """Every tag and attribute of a page; fails on one that is never closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.values: list[tuple[str, str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.values += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_asks_for_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = written(tmp_path, *whole())
    found = Tags(page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "image", "base"}
    assert not [name for name, _ in found.values if name.startswith("on") or name == "src"]
    links = [value for name, value in found.values if name in ("href", "xlink:href")]
    assert all(value.startswith("#f") for value in links)
    assert "://" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_names_stay_text(tmp_path: Path) -> None:
    page = evil(tmp_path)
    found = Tags(page)
    assert not found.tags & {"script", "img", "b"}
    assert not [name for name, _ in found.values if name == "onerror"]
    assert page.count("&lt;script&gt;document.title=") > 8
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in markdown.replace("<br>", "")


def test_ids_of_the_figures_do_not_clash(tmp_path: Path) -> None:
    found = Tags(written(tmp_path, *whole()))
    ids = [value for name, value in found.values if name == "id"]
    assert len(ids) == len(set(ids)) > 100
    used = [value[1:] for name, value in found.values if name == "href"]
    assert set(used) <= set(ids)


def test_every_figure_that_was_measured_is_there_and_no_other() -> None:
    full = [chart.said for chart in charts(whole()[0])]
    words = ("by arm", "by task", "by language", "tokens of the prompt", "draft position")
    for word in (*words, "by batch size", "predicted", "shapes of draft"):
        assert sum(word in said for said in full) == 1, word
    few = charts(summarise(many(), CONDITIONS | {"draft_shape_choice": {}}, CONTROLS))
    assert [chart.said for chart in few] == [full[0], full[4]]
    assert charts(summarise([], CONDITIONS | {"draft_shape_choice": {}}, CONTROLS)) == []


def test_text_of_figures_is_text_and_colours_follow_the_page() -> None:
    runs = [run for g in range(8) for run in pair(g, task="번역")] + many()
    (tasks,) = (c.svg for c in charts(summarise(runs, CONDITIONS, CONTROLS)) if "task" in c.said)
    assert re.search(r">\s*번역\s*</text>", tasks)
    assert "var(--c0)" in tasks
    assert "#000000" not in tasks


def test_the_page_says_verdicts_conditions_and_definitions(tmp_path: Path) -> None:
    report, runs = whole()
    page = written(tmp_path, report, runs)
    assert "<td class=bad>slower than no drafting</td>" in page
    assert "<td class=figure>faster by 1.4x</td>" in page
    for name in ("TPOT ms p50", "draft ms/round", "tau p10/p50/p90", "speedup", "near tie"):
        assert re.search(rf'<abbr title="[^"]+">{name}</abbr>', page), name
    for entry in report["definitions"]:
        assert f"<dt>{entry}</dt>" in page
    broken = CONTROLS | {"exactness": {"passed": False, "found": "7 of 8"}}
    failed = written(tmp_path, summarise(many(), CONDITIONS, broken), many())
    assert '<div class="opening broken"><p class=loud>Controls not passed' in failed


@pytest.mark.skipif(not BROWSER, reason="no chromium is installed to draw the page with")
def test_a_browser_draws_the_page_and_no_script_runs(tmp_path: Path) -> None:
    evil(tmp_path)
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,2400"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    address = (tmp_path / "report.html").as_uri()
    seen = subprocess.run(
        [*command, "--dump-dom", address], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "<title>How fast target &lt;script&gt;" in seen  # a script would have changed it
    assert seen.count("<svg") == 4
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", address], check=True, timeout=60,
                   capture_output=True)  # fmt: skip
    from matplotlib.image import imread

    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (2400, 1280)
    blue = (abs(pixels - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(-1).sum()
    assert blue > 2000  # bars are drawn in the page's colour
