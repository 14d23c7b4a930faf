"""The matrix of drafters by tasks: its cells, its verdicts, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.matrix import Matrix
from eval.report import summarise
from tests.eval.test_report import CONDITIONS, CONTROLS, many


def bench(folder: Path, speeds: dict[str, float], target: str = "one", **rest) -> Path:
    """A bench's artifact with eight prompts of each task, so many times as fast as plain."""
    runs = [
        run | {"group": run["group"] + 8 * i, "task": task}
        for i, (task, speed) in enumerate(speeds.items())
        for run in many(speed)
    ]
    report = summarise(runs, CONDITIONS | {"target": target} | rest, CONTROLS)
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


def test_every_drafter_meets_every_language_and_slower_is_said(tmp_path: Path) -> None:
    found = Matrix().run(
        tmp_path / "out",
        ko=bench(tmp_path / "ko", {"de_en": 0.8, "ko": 2.0}),
        de=bench(tmp_path / "de", {"de_en": 1.8, "ko": 1.0, "ja": 1.2}),
    )
    assert found["speedup_ko_de_en"] == pytest.approx(0.8, abs=0.02)
    assert set(found) == {
        f"speedup_{d}_{t}" for d, ts in {"ko": ("ko", "de_en"), "de": ("ko", "de_en", "ja")}.items()
        for t in ts
    }  # fmt: skip
    lines = (tmp_path / "out" / "artifact" / "matrix.md").read_text().splitlines()
    (head, _, ko, de) = (line for line in lines if line.startswith("|"))
    assert head == "| drafter | ko | de_en | ja |"  # a drafter's own language on the diagonal
    assert ko.count("slower than no drafting") == 1
    assert ko.endswith("| not measured |")
    assert "no difference shown" in de
    (slow,) = (line for line in lines if line.startswith("Slower than no drafting"))
    assert slow.startswith("Slower than no drafting: ko on de_en (0.80x [")
    assert "de on" not in slow
    (own,) = (line for line in lines if line.startswith("On tasks of its own"))
    assert "1.90x as fast" in own  # geometric mean of 2.0 and 1.8
    assert (tmp_path / "out" / "artifact" / "matrix.png").read_bytes()[:4] == b"\x89PNG"
    stored = json.loads((tmp_path / "out" / "artifact" / "matrix.json").read_text())
    assert stored["tasks"] == ["ko", "de_en", "ja"]
    assert sum(row["own"] for row in stored["rows"]) == 2


def test_other_targets_and_no_shared_task_are_refused(tmp_path: Path) -> None:
    a = bench(tmp_path / "a", {"ko": 2.0})
    with pytest.raises(ValueError, match="alike, but target is ko: one, de: two"):
        Matrix().run(tmp_path, ko=a, de=bench(tmp_path / "b", {"ko": 1.0}, target="two"))
    with pytest.raises(ValueError, match="share no task; theirs are de, ko"):
        Matrix().run(tmp_path, ko=a, de=bench(tmp_path / "c", {"de": 1.0}))
    with pytest.raises(ValueError, match="needs the bench stages of two drafters or more"):
        Matrix().run(tmp_path, ko=a)


def test_a_report_without_tasks_is_refused(tmp_path: Path) -> None:
    a, b = (bench(tmp_path / n, {"ko": 2.0}) for n in "ab")
    report = json.loads((b / "report.json").read_text())
    (b / "report.json").write_text(json.dumps(report | {"by_task": []}))
    with pytest.raises(ValueError, match="the report of 'de' has no figures by task"):
        Matrix().run(tmp_path, ko=a, de=b)


def test_a_changed_target_and_a_failed_control_stand_by_the_name(tmp_path: Path) -> None:
    changed = bench(tmp_path / "a", {"ko": 2.0}, target_change={"said": "changed"})
    failed = bench(tmp_path / "b", {"ko": 1.5})
    report = json.loads((failed / "report.json").read_text())
    (failed / "report.json").write_text(json.dumps(report | {"passed": False}))
    Matrix().run(tmp_path / "out", ko=changed, de=failed)
    text = (tmp_path / "out" / "artifact" / "matrix.md").read_text()
    assert "| ko (target CHANGED) |" in text
    assert "| de (a control FAILED) |" in text
