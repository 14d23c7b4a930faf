"""The report: what the headline leaves out, what it refuses to hide, what it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.sources import Local
from decoding.pretrained import Pretrained
from drafters.base import save
from drafters.lm import LM
from eval.bench import Bench
from eval.report import headline_lines, summarise, write_report
from tests.tiny import write_chats, write_target, write_texts

CONDITIONS = {
    **{"target": "stages/target-1a/모델", "drafter": "stages/finetune-2b/drafter"},
    **{"device": "a CPU", "threads": 2, "dtype": "fp32", "dtype_reason": "faster by 1.4x"},
    **{"draft_shape": "chain of 3", "rule": "chain (lossless)", "max_new_tokens": 32, "repeats": 1},
    **{"prompts": 8, "prompt_source": "held-out", "versions": {"torch": "2.13.0"}},
    **{"parameters_target": 17_000_000, "parameters_drafter": 1_200_000},
    "draft_shape_choice": {"chain of 2": 100.0, "chain of 3": 120.0},
}
CONTROLS = {
    "drafter = target": {"passed": True, "found": "accepted 3 of 3 in all 40 rounds"},
    "exactness": {"passed": True, "found": "8 of 8 answers identical in fp32"},
}


def pair(group: int, ratio: float = 2.0, arm: str = "drafter", **rest: Any) -> list[dict]:
    """A run of `arm` and an autoregressive one that takes `ratio` times as long."""
    cost = 1.0 + 0.1 * (group % 5)
    common = {
        **{"temperature": 0.0, "batch": 1, "repeat": 0, "group": group, "prompts": [group]},
        **{"task": "ko", "tokens": 10, "first_seconds": 0.1, "verify_seconds": 0.3},
        "repetitive": False,
    }
    fast = {
        **{"arm": arm, "seconds": cost, "rounds": 4, "row_rounds": 4, "first_tokens": 4},
        **{"draft_seconds": 0.1, "drafted": [[3] * 4], "accepted": [[3, 2, 1, 0]]},
    }
    plain = {
        **{"arm": "autoregressive", "seconds": ratio * cost, "rounds": 10, "row_rounds": 10},
        **{"draft_seconds": 0.0, "drafted": [[0] * 10], "accepted": [[0] * 10], "first_tokens": 1},
    }
    return [common | fast | rest, common | plain | rest]


def many(ratio: float = 2.0, **rest: Any) -> list[dict]:
    """Eight prompts whose ratios spread a little around `ratio`."""
    spread = np.linspace(0.95, 1.05, 8)
    return [run for g, s in enumerate(spread) for run in pair(g, ratio * s, **rest)]


def made(runs: list[dict], controls: dict = CONTROLS) -> dict[str, Any]:
    return summarise(runs, CONDITIONS, controls)


def test_headline_is_the_drafter_at_batch_1() -> None:
    runs = many() + many(temperature=1.0, ratio=1.4) + many(batch=4, ratio=0.8)
    cold, warm = made(runs)["headline"]
    assert (cold["temperature"], cold["n"], cold["verdict"]) == (0.0, 8, "faster")
    assert cold["speedup"]["value"] == pytest.approx(2.0, abs=0.03)
    assert cold["speedup"]["low"] < 2.0 < cold["speedup"]["high"]
    assert cold["tau"]["value"] == 2.5
    assert warm["speedup"]["value"] == pytest.approx(1.4, abs=0.03)


def test_a_repetitive_prompt_is_kept_apart_and_a_plain_one_counts() -> None:
    easy = pair(8, ratio=9.0)
    alone, counted = made(many())["headline"][0], made(many() + easy)["headline"][0]
    apart = made(many() + [run | {"repetitive": True} for run in easy])
    assert counted["speedup"]["value"] > alone["speedup"]["value"] + 0.5
    assert apart["headline"][0] == alone
    assert apart["table_repetitive"][1]["speedup"]["value"] == pytest.approx(9.0)
    assert apart["repetition"][0]["share"]["value"] == pytest.approx(1 / 9)


def test_break_even_leaves_repetitive_groups_out() -> None:
    slow = many(0.8, batch=4)
    easy = pair(8, ratio=50.0, batch=4, repetitive=True)
    (found,) = made(many() + slow + easy)["break_even"]
    assert found == made(many() + slow)["break_even"][0]
    assert found["state"] == "crossed"


def test_one_arm_that_repeats_takes_the_prompt_from_all_at_that_temperature() -> None:
    runs = many() + many(temperature=1.0)
    runs[0]["repetitive"] = True
    report = made(runs)
    assert [row["n"] for row in report["table"]] == [7, 7, 8, 8]
    assert [e["repetitive"] for e in report["repetition"]] == [1, 0]


def test_only_repetitive_prompts_give_a_sentence(tmp_path: Path) -> None:
    runs = many(repetitive=True)
    report = made(runs)
    write_report(tmp_path, report, runs)
    assert report["headline"][0]["verdict"] == "not measured"
    assert "nothing to report, every prompt's answer was repetitive" in headline_lines(report)[0]
    assert "nothing to report" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_no_runs_at_all_give_a_sentence(tmp_path: Path) -> None:
    report = made([])
    write_report(tmp_path, report, [])
    assert headline_lines(report)[0] == "The drafter was not measured at batch 1."


def test_a_failed_control_comes_first() -> None:
    wrong = CONTROLS | {"exactness": {"passed": False, "found": "7 of 8 answers identical"}}
    report = made(many(), wrong)
    assert not report["passed"]
    assert headline_lines(report)[0].startswith("CONTROL FAILED")
    assert "exactness: 7 of 8" in headline_lines(report)[0]


def test_a_failed_control_is_on_the_page(tmp_path: Path) -> None:
    wrong = CONTROLS | {"random drafter": {"passed": False, "found": "tau 3.1"}}
    write_report(tmp_path, made(many(), wrong), many())
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Controls not passed (failed: random drafter): do not use these figures." in page
    assert "| random drafter | FAILED | tau 3.1 |" in page


def test_without_controls_nothing_has_passed(tmp_path: Path) -> None:
    report = made(many(), {})
    write_report(tmp_path, report, many())
    assert not report["passed"]
    assert headline_lines(report)[0].startswith("No control was run")
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Controls not passed (none was run)" in page


@pytest.mark.parametrize(
    ("ratio", "words"), [(0.8, "slower than no drafting"), (1.0, "no difference shown")]
)
def test_no_gain_is_said_in_words(ratio: float, words: str) -> None:
    report = made(many(ratio))
    assert report["headline"][0]["verdict"] == words
    assert words in headline_lines(report)[0]


def test_the_drafter_is_compared_with_other_arms_prompt_by_prompt() -> None:
    other = [run | {"seconds": 1.5 * run["seconds"], "arm": "ngram"} for run in many()[::2]]
    against = made(many() + other)["headline"][0]["against"]
    assert list(against) == ["ngram"]
    assert against["ngram"]["value"] == pytest.approx(1.5)


def test_tasks_are_told_apart() -> None:
    runs = many() + [run for g in range(8, 12) for run in pair(g, 3.0, task="nli")]
    found = {entry["task"]: entry["speedup"]["value"] for entry in made(runs)["by_task"]}
    assert found == {"ko": pytest.approx(2.0, abs=0.03), "nli": pytest.approx(3.0)}
    assert [entry["task"] for entry in made(many())["by_task"]] == ["ko"]


def test_languages_pool_the_tasks_that_name_them() -> None:
    runs = [
        run
        for i, task in enumerate(("ko_chat", "ko_nli", "de_en", "qa"))
        for g in range(8 * i, 8 * i + 8)
        for run in pair(g, 3.0 if task == "de_en" else 2.0, task=task)
    ]
    found = {e["language"]: (e["n"], e["speedup"]["value"]) for e in made(runs)["by_language"]}
    assert found == {"de": (8, pytest.approx(3.0)), "ko": (16, pytest.approx(2.0))}
    assert [e["language"] for e in made(runs)["by_task"]] == ["de", "ko", "ko", None]
    assert made(many())["by_language"] == []


MEASURED = {
    "costs": {"verify_ms": {"1": 100.0, "4": 130.0}, "draft_ms": 11.0, "overhead_ms": 2.0},
    "predicted": [
        {"arm": "drafter", "temperature": 0.0, "batch": 1, "speedup": 2.1},
        {"arm": "drafter", "temperature": 0.0, "batch": 4, "speedup": 1.6},
        {"arm": "drafter", "temperature": 0.7, "batch": 4, "speedup": 1.6},
    ],
    "agreement": {"drafter": {"n": 8, "identical": 7, "near_ties": 1, "wrong": 0}},
    "alpha": {"0": {"value": 0.61, "low": 0.55, "high": 0.66, "n": 8}},
    "expected_tau": {"0": 2.61},
    **{"commit": "0123abc", "clock_mhz": 2500, "ranks": 2},
}


def whole() -> tuple[dict[str, Any], list[dict]]:
    """A report in which everything was measured, and its runs."""
    runs = [
        run
        for i, task in enumerate(("ko", "de_en"))
        for g in range(8 * i, 8 * i + 8)
        for run in pair(g, 2.0, task=task, prompt_tokens=[100 if i else 20])
    ]
    runs += many(0.8, batch=4) + pair(99, repetitive=True)
    runs += [run | {"arm": "prompt_lookup"} for run in many()[::2]]
    return summarise(runs, CONDITIONS | MEASURED, CONTROLS), runs


def test_a_prediction_stands_beside_its_measurement_and_says_where_it_fails(tmp_path: Path) -> None:
    report, runs = whole()
    near, far = report["predicted"]  # the third was not measured
    assert (near["batch"], near["within"]) == (1, True)
    assert near["error"] == pytest.approx(0.05, abs=0.01)
    assert (far["batch"], far["within"]) == (4, False)
    write_report(tmp_path, report, runs)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| 0 | 4 | drafter | 1.60x | 0.80x" in page
    assert "batch 4, milliseconds a round: draft 25.0 (alone 11.0)" in page
    assert "batch 1, milliseconds a round" not in page


def test_the_page_has_what_was_measured_and_omits_the_rest(tmp_path: Path) -> None:
    report, runs = whole()
    write_report(tmp_path / "all", report, runs)
    full = (tmp_path / "all" / "report.md").read_text(encoding="utf-8")
    write_report(tmp_path / "few", made(many()), many())
    short = (tmp_path / "few" / "report.md").read_text(encoding="utf-8")
    for said in (
        "Batch sizes at temperature 0: drafting pays up to about batch",
        "## By prompt tokens",
        "## By language",
        "## Predicted beside measured",
        "| drafter | 8 | 7 | 1 | 0 |",
        "T=0: alpha 61.0 % [55.0 %, 66.0 %] (n=8).",
        "promise 2.61 tokens per target call; the loop measured 2.50",
        "| commit | 0123abc |",
        "a pass of the target by tokens in it 1: 100, 4: 130; a draft 11.0",
    ):
        assert said in full
        assert said not in short


def test_other_work_is_said_where_speeds_are(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("eval.others.needed", lambda: 2)
    busy = summarise(many(), CONDITIONS | {"other_work": 0.6}, CONTROLS)
    said = "Mind: other processes took 0.6 of this machine's cores"
    assert said in " ".join(headline_lines(busy))
    write_report(tmp_path, busy, many())
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")
    quiet = summarise(many(), CONDITIONS | {"other_work": 0.05}, CONTROLS)
    assert "Mind" not in " ".join(headline_lines(quiet))


def test_wrong_answers_are_not_hidden_but_a_lossy_arm_may_differ() -> None:
    wrong = {"n": 8, "identical": 5, "near_ties": 1, "wrong": 2}
    lossy = CONDITIONS | {"agreement": {"drafter, typical acceptance (LOSSY)": wrong}}
    assert "WRONG" not in "".join(headline_lines(summarise(many(), lossy, CONTROLS)))
    bad = CONDITIONS | {"agreement": {"drafter": wrong}}
    assert "WRONG ANSWERS, not explained by near ties: drafter 2 of 8." in headline_lines(
        summarise(many(), bad, CONTROLS)
    )


def documented() -> dict[str, dict[str, str]]:
    """docs/report.md: the keys of each table, with what is said of them."""
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    return {
        name: dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", body, flags=re.MULTILINE))
        for name, body in tables.items()
    }


def test_the_documentation_lists_exactly_the_keys_of_a_report() -> None:
    report, docs = whole()[0], documented()
    entry = docs["headline[]"].keys() - {"against"}
    found = {
        "report.json": report,
        **{f"{k}[]": report[k][0] for k in ("headline", "table", "break_even", "predicted")},
        "repetition[]": report["repetition"][0],
        "table[].acceptance[]": report["table"][1]["acceptance"][0],
    }
    assert {name: set(keys) for name, keys in found.items()} == {
        name: set(docs[name]) for name in found
    }
    for name in ("by_task", "by_language", "by_length"):
        assert report[name][0].keys() == entry | docs[f"{name}[]"].keys()
    assert report["table_repetitive"][0].keys() == report["table"][0].keys()
    assert report["schema"] == 2


def test_the_documentation_lists_what_bench_writes(tmp_path: Path) -> None:
    """Conditions and runs of a real measurement; what only some have says `if` first."""
    folder, docs = benched(tmp_path), documented()
    said = json.loads((folder / "report.json").read_text(encoding="utf-8"))["conditions"]
    lines = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert {frozenset(json.loads(line)) for line in lines} == {frozenset(docs["runs.jsonl"])}
    optional = {key for key, text in docs["conditions"].items() if text.startswith("if ")}
    assert docs["conditions"].keys() - optional <= said.keys() <= docs["conditions"].keys()


def benched(place: Path) -> Path:
    """The artifact of a real bench stage on a tiny target, with an untrained drafter."""
    write_target(place / "target", write_texts(place), ends=20)
    write_chats(place)
    spec = Pretrained(path=str(place / "target"), dtype="float32")
    save(LM(spec.load().shape, layers=1, width=64), place / "drafter", {"layers": 1, "width": 64})
    spec.tokenizer().save_pretrained(place / "drafter")
    stage = Bench(
        target=Pretrained(path=str(place / "target")),
        prompts={"chat": Local(files=[str(place / "chat.jsonl")], prompt="{question}")},
        **{"heldout_only": False, "limit": 2, "max_new_tokens": 6, "repeats": 1},
        **{"temperatures": [0.0], "batch_sizes": [1], "draft_lengths": [2]},
        **{"trial_prompts": 1, "control_prompts": 1, "dtype": "float32"},
    )
    (place / "out").mkdir()
    stage.run(place / "out", drafter=place / "drafter")
    return place / "out" / "artifact"


def test_every_file_is_written_whole(tmp_path: Path) -> None:
    runs = many() + many(temperature=1.0) + many(batch=4, ratio=0.8)
    report = made(runs)
    write_report(tmp_path, report, runs)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["report.html", "report.json", "report.md", "report.png", "runs.jsonl"]
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == runs
    stored = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert stored["headline"] == report["headline"]
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_report(tmp_path, made(many()), many())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    broken = made(many()) | {"controls": {"exactness": {"passed": True, "found": float("nan")}}}
    with pytest.raises(ValueError, match="nan"):
        write_report(tmp_path, broken, many())
    assert (tmp_path / "report.json").read_bytes() == before["report.json"]
    assert {path.name for path in tmp_path.iterdir()} == set(before)


def test_the_page_says_conditions_and_defines_its_numbers(tmp_path: Path) -> None:
    write_report(tmp_path, made(many()), many())
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| why | faster by 1.4x |" in page
    assert "Exactness passed: 8 of 8 answers identical in fp32." in page
    assert "| 0 | 1 | 75.0 %" in page
    assert "- **tau**: tokens per target call" in page


def test_the_terminal_gets_three_to_five_lines() -> None:
    assert len(headline_lines(made(many()))) == 3
    runs = [
        run for t in (0.0, 0.3, 0.7, 1.0) for b in (1, 4) for run in many(temperature=t, batch=b)
    ]
    assert len(headline_lines(made(runs))) == 5
