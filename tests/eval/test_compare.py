"""Comparing two measurements: what it finds, what it does not find, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import compare
from tests.eval.test_report import CONDITIONS, pair


def side(
    folder: Path,
    *,
    seed: int = 0,
    tau: float = 2.5,
    speed: float = 2.0,
    plain: float = 1.0,
    prompts: range = range(30),
    batch: int = 1,
    answers: int = 0,
    conditions: dict[str, Any] | None = None,
    **rest: Any,
) -> Path:
    """A bench's artifact. Prompts differ much in cost and tau, alike in every measurement."""
    noise, runs = np.random.default_rng(seed), []
    for g in prompts:
        own = np.random.default_rng(g)
        cost, level = own.lognormal(sigma=0.7), own.lognormal(sigma=0.3)
        keys = {"keys": [f"{g:012x}"], "ids": [list(range(g + answers, g + answers + 20))]}
        both = keys | {"batch": batch} | rest
        drafted, base = pair(g, **both)
        jitter = noise.lognormal(sigma=0.05, size=3)
        drafted["row_rounds"] = drafted["rounds"] = 10 / (tau * level * jitter[0])
        drafted["seconds"] = cost * plain / speed * jitter[1]
        base["seconds"] = cost * plain * jitter[2]
        runs += [drafted, base]
    write(folder, runs, conditions)
    return folder


def write(folder: Path, runs: list[dict], conditions: dict[str, Any] | None = None) -> None:
    """What compare reads of an artifact; the pictures would take seconds."""
    (folder / "artifact").mkdir(parents=True, exist_ok=True)
    report = {"schema": 2, "passed": True, "conditions": CONDITIONS | (conditions or {})}
    (folder / "artifact" / "report.json").write_text(json.dumps(report), encoding="utf-8")
    lines = "".join(json.dumps(run) + "\n" for run in runs)
    (folder / "artifact" / "runs.jsonl").write_text(lines, encoding="utf-8")


def compared(a: Path, b: Path, **options: Any) -> list[dict[str, Any]]:
    return compare.compare(compare.read(a), compare.read(b), **options)


def warned(a: Path, b: Path) -> str:
    first, second = compare.read(a), compare.read(b)
    return "\n".join(compare.warnings(first, second, compare.compare(first, second)))


def test_the_same_drafter_twice_shows_no_difference(tmp_path: Path) -> None:
    """With most seeds: of each number, one in twenty intervals misses the truth."""
    (found,) = compared(side(tmp_path / "a"), side(tmp_path / "b", seed=4))
    assert (found["paired"], found["shared"]) == (True, 30)
    verdicts = {name: m["verdict"] for name, m in found["measures"].items()}
    assert set(verdicts.values()) == {"no difference shown"}, verdicts


def test_pairing_finds_what_the_spread_of_prompts_would_hide(tmp_path: Path) -> None:
    """8 % in tau and 13 % in speed, where prompts differ by factors: only pairs can show it."""
    a = side(tmp_path / "a")
    b = side(tmp_path / "b", seed=1, tau=2.7, speed=2.26)
    (found,) = compared(a, b)
    tau = found["measures"]["tau"]
    assert tau["verdict"] == found["measures"]["speedup"]["verdict"] == "B is higher"
    assert tau["change"]["low"] > 0
    assert tau["change"]["value"] == pytest.approx(tau["b"]["value"] - tau["a"]["value"])
    (reverse,) = compared(b, a)
    assert reverse["measures"]["tau"]["verdict"] == "B is lower"
    # the same two measurements with no prompt in common
    far = side(tmp_path / "far", seed=1, tau=2.7, speed=2.26, prompts=range(100, 130))
    (apart,) = compared(a, far)
    assert not apart["paired"]
    assert apart["measures"]["tau"]["verdict"] == "no difference shown"
    assert "share 0 prompts, so they are compared unpaired" in warned(a, far)


def test_what_a_repeat_shows_is_no_difference(tmp_path: Path) -> None:
    """A bench run again came out 2 % slower, with an interval over prompts of less than that."""
    b = side(tmp_path / "b", speed=2 * 0.98)
    (found,) = compared(side(tmp_path / "a"), b)
    speedup = found["measures"]["speedup"]
    assert speedup["change"]["high"] < 1
    assert speedup["verdict"] == "no difference shown"


def test_a_faster_machine_is_not_a_better_drafter(tmp_path: Path) -> None:
    a, b = side(tmp_path / "a"), side(tmp_path / "b", seed=1, plain=0.8)
    (found,) = compared(a, b)
    verdicts = {name: m["verdict"] for name, m in found["measures"].items()}
    assert verdicts["tokens/s"] == verdicts["plain tokens/s"] == "B is higher"
    assert verdicts["speedup"] == "no difference shown"
    assert "decoding without a drafter ran 1.2" in warned(a, b)


def test_intervals_of_a_true_change_hold_it(tmp_path: Path) -> None:
    """Of 40 pairs of measurements whose speed truly differs by 1.1, about 38 intervals hold it."""
    held = 0
    for seed in range(40):
        a = side(tmp_path / f"a{seed}", seed=2 * seed)
        b = side(tmp_path / f"b{seed}", seed=2 * seed + 1, speed=2.2)
        (found,) = compared(a, b, resamples=400)
        change = found["measures"]["tokens/s"]["change"]
        held += change["low"] <= 1.1 <= change["high"]
    assert held >= 33


def test_only_shared_prompts_are_compared_and_it_is_said(tmp_path: Path) -> None:
    a, b = side(tmp_path / "a"), side(tmp_path / "b", seed=1, prompts=range(10, 40))
    (found,) = compared(a, b)
    assert (found["shared"], found["only_a"], found["only_b"]) == (20, 10, 10)
    assert found["measures"]["tau"]["change"]["n"] == 20
    assert "only the 20 prompts of both are compared; 10 of A and 10 of B" in warned(a, b)


def test_pairs_go_by_key_and_not_by_place(tmp_path: Path) -> None:
    """B measured the same prompts in another order; by number every pair would be wrong."""
    a = side(tmp_path / "a")
    b = side(tmp_path / "b", seed=1, prompts=range(29, -1, -1))
    runs = compare.read(b).runs
    for run in runs:
        run["group"] = 29 - run["group"]
    write(b, runs)
    (found,) = compared(a, b)
    change = found["measures"]["tau"]["change"]
    assert change["high"] - change["low"] < 0.2


def test_repetitive_answers_of_either_side_are_left_out_of_both(tmp_path: Path) -> None:
    a, b = side(tmp_path / "a"), side(tmp_path / "b", seed=1)
    runs = compare.read(b).runs
    runs[0]["repetitive"] = True
    write(b, runs)
    assert compared(a, b)[0]["shared"] == 29


def test_other_targets_are_refused_by_name_and_by_what_they_answer(tmp_path: Path) -> None:
    a = side(tmp_path / "a")
    b = side(tmp_path / "b", conditions={"parameters_target": 8_000_000_000})
    with pytest.raises(ValueError, match="two targets \\(parameters_target: 17000000 and 80"):
        compared(a, b)
    with pytest.raises(ValueError, match="of one name: only 0 of 30 plain greedy answers"):
        compared(a, side(tmp_path / "c", answers=1))


def test_other_conditions_are_warned_of(tmp_path: Path) -> None:
    other = {"dtype": "bf16", "max_new_tokens": 64, "threads": 8, "device": "another CPU"}
    said = warned(side(tmp_path / "a"), side(tmp_path / "b", conditions=other))
    assert "dtype differs: A fp32, B bf16" in said
    assert "max_new_tokens differs: A 32, B 64" in said
    assert "threads differs" in said
    assert "device differs" in said
    assert warned(side(tmp_path / "c"), side(tmp_path / "d")) == ""


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    a, b = side(tmp_path / "a"), side(tmp_path / "b", batch=4)
    with pytest.raises(ValueError, match=r"A measured \[\(0.0, 1\)\], B \[\(0.0, 4\)\]"):
        compared(a, b)


def test_one_prompt_has_no_verdict(tmp_path: Path) -> None:
    a, b = (side(tmp_path / name, prompts=range(1)) for name in "ab")
    (found,) = compared(a, b)
    assert found["measures"]["tau"]["verdict"] == "too few prompts for an interval"


def test_the_command_prints_a_table_and_its_code(tmp_path: Path, capsys) -> None:
    a, b = side(tmp_path / "a"), side(tmp_path / "b", seed=1, tau=3.0)
    assert compare.main([str(a), str(b / "artifact")]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("0  1      tau "))
    assert line.endswith("B is higher")
    assert "[+0." in line
    assert compare.main([str(a), str(tmp_path / "none")]) == 2
    assert "has no report.json" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        compare.main(["--help"])
    assert "Exit codes: 0 compared, 2 refused" in capsys.readouterr().out


def test_an_older_report_is_refused(tmp_path: Path) -> None:
    a = side(tmp_path / "a")
    runs = compare.read(a).runs
    for run in runs:
        del run["keys"]
    write(a, runs)
    with pytest.raises(ValueError, match="do not name their prompts; measure again"):
        compare.read(a)
