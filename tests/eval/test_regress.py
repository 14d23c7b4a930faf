"""A fine-tuned drafter beside its parent: what is called better, the same and worse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval import compare
from eval.regress import Regress
from tests.eval.test_compare import side, write


def bench(
    folder: Path, *, seed: int, conditions: dict[str, Any] | None = None, **sets: Any
) -> Path:
    """An artifact with a task for each set: {tau, speed, prompts, ...} of its drafter."""
    runs = []
    for number, (task, options) in enumerate(sets.items()):
        first = 1000 * number
        prompts = range(first, first + options.pop("n", 30))
        part = side(folder / task, seed=seed + number, prompts=prompts, task=task, **options)
        runs += compare.read(part).runs
    write(folder, runs, conditions)
    return folder / "artifact"


def regressed(tmp_path: Path, before: Path, after: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """comparison.json, and what the stage returned."""
    found = Regress().run(tmp_path / "out", before=before, after=after)
    return json.loads((tmp_path / "out" / "artifact" / "comparison.json").read_text()), found


def verdicts(said: dict[str, Any]) -> dict[str, str]:
    return {row["set"]: row["verdict"] for row in said["rows"]}


def test_better_on_the_new_set_and_worse_on_the_old(tmp_path: Path) -> None:
    before = bench(tmp_path / "a", seed=0, new={}, old={}, third={})
    after = bench(
        tmp_path / "b",
        seed=9,
        new={"tau": 3.2, "speed": 2.6},
        old={"tau": 2.1, "speed": 1.7},
        third={},
    )
    said, found = regressed(tmp_path, before, after)
    assert verdicts(said) == {"new": "better", "old": "worse", "third": "same"}
    assert said["worse"] is True
    assert found["worse"] == 1
    assert found["ratio_new_T0"] == pytest.approx(1.3, abs=0.06)
    (row,) = (row for row in said["rows"] if row["set"] == "new")
    for key in ("before", "after", "ratio"):
        assert row[key]["low"] < row[key]["value"] < row[key]["high"]
    assert row["ratio"]["value"] == pytest.approx(row["after"]["value"] / row["before"]["value"])
    assert row["n"] == row["ratio"]["n"] == 30
    assert row["said"] == "speedup and tau"
    text = (tmp_path / "out" / "artifact" / "comparison.md").read_text()
    assert "Better on new; worse on old." in text
    assert "worse (speedup and tau)" in text
    swapped, _ = regressed(tmp_path, after, before)
    assert verdicts(swapped) == {"new": "worse", "old": "better", "third": "same"}


def test_fewer_tokens_a_call_are_worse_even_where_the_clock_shows_nothing(tmp_path: Path) -> None:
    """The clock is noisy and the machine's; what is accepted is not."""
    before, after = (
        bench(tmp_path / name, seed=seed, old={"tau": tau})
        for name, seed, tau in (("a", 0, 2.5), ("b", 9, 2.2))
    )
    said, _ = regressed(tmp_path, before, after)
    assert verdicts(said) == {"old": "worse"}
    assert said["rows"][0]["said"] == "tau"
    assert said["rows"][0]["tau"]["change"]["high"] < 0


def test_of_other_shapes_speed_alone_is_compared(tmp_path: Path) -> None:
    """A shorter chain has fewer tokens a call, and may be the faster."""
    before = bench(tmp_path / "a", seed=0, old={"tau": 2.5})
    after = bench(
        tmp_path / "b", seed=9, conditions={"draft_shape": "chain of 2"}, old={"tau": 2.2}
    )
    said, _ = regressed(tmp_path, before, after)
    assert verdicts(said) == {"old": "same"}
    assert any("chain of 3 before, chain of 2 after" in line for line in said["mind"])


def test_a_slower_drafter_is_worse_though_more_is_accepted(tmp_path: Path) -> None:
    before = bench(tmp_path / "a", seed=0, old={})
    after = bench(tmp_path / "b", seed=9, old={"tau": 2.8, "speed": 1.6})
    said, _ = regressed(tmp_path, before, after)
    assert (said["rows"][0]["verdict"], said["rows"][0]["said"]) == ("worse", "speedup")


def test_less_than_three_per_cent_is_the_same(tmp_path: Path) -> None:
    """With so many prompts even 2 % is beyond noise; it is no reason not to publish."""
    before = bench(tmp_path / "a", seed=0, old={"n": 400})
    after = bench(tmp_path / "b", seed=9, old={"n": 400, "tau": 2.45, "speed": 1.96})
    said, _ = regressed(tmp_path, before, after)
    assert said["rows"][0]["tau"]["change"]["high"] < 0
    assert verdicts(said) == {"old": "same"}
    assert said["worse"] is False


def test_one_prompt_decides_nothing(tmp_path: Path) -> None:
    before, after = (
        bench(tmp_path / name, seed=3, old={"n": 1, "tau": tau})
        for name, tau in (("a", 3), ("b", 1.5))
    )
    said, _ = regressed(tmp_path, before, after)
    assert verdicts(said) == {"old": "same"}
    assert said["rows"][0]["ratio"]["low"] is None


def test_sets_are_paired_by_prompt_and_never_mixed(tmp_path: Path) -> None:
    """Half of the old prompts are shared; the batches of both, and a set measured once, are not."""
    before = bench(tmp_path / "a", seed=0, old={"n": 30}, gone={})
    after = bench(tmp_path / "b", seed=9, old={"n": 15})
    for place in (before, after):
        runs = compare.read(place).runs
        batched = [run | {"batch": 4, "task": task} for run in runs for task in ("mixed", "old")]
        write(place.parent, runs + batched)
    said, _ = regressed(tmp_path, before, after)
    assert [(row["set"], row["n"]) for row in said["rows"]] == [("old", 15)]
    assert any(line.startswith("old, T=0, batch 1: only the 15") for line in said["mind"])
    assert "measured once only, so not compared: gone" in said["mind"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "target": ({"conditions": {"target": "x"}, "old": {}}, "two targets"),
    "sets": ({"new": {}}, "old were measured before and new after"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_a_sentence(case: str, tmp_path: Path) -> None:
    before = bench(tmp_path / "a", seed=0, old={})
    other, sentence = REFUSED[case]
    after = bench(tmp_path / "b", seed=1, **other)
    with pytest.raises(ValueError, match=sentence):
        Regress().run(tmp_path / "out", before=before, after=after)
    with pytest.raises(ValueError, match=r"has no report\.json"):
        Regress().run(tmp_path / "out", before=before, after=tmp_path / "none")
    assert not (tmp_path / "out").exists()
