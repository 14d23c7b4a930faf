"""Stage `compare`: a drafter beside the one that it was trained on from, set by set.

Two bench stages measured them with one target, on the same tasks; here each task is a set. The
numbers are those of eval/compare.py, at batch 1: both over the prompts that both answered.
"""

from pathlib import Path
from typing import Any

from drafters.base import write_json
from eval.bootstrap import Estimate
from eval.compare import DRIFT, Row, Side, compare, read, warnings
from eval.markdown import grid, interval, times

BETTER, SAME, WORSE = "better", "same", "worse"
HEAD = ("set", "T", "prompts", "tau before", "after", "speedup before", "after", "ratio", "verdict")


class Regress:
    """Says where a fine-tuned drafter is better than its parent, and where worse.

    A set is worse where the speedup is lower, or, both drafting in the same shape, the tokens per
    target call are: by more than 3 %, and with the whole 95 % interval of the change. It is better
    where one of them is higher by as much, and nothing is lower.
    """

    def run(self, out: Path, *, before: Path, after: Path) -> dict[str, float]:
        """Writes artifact/comparison.json and comparison.md; returns the ratio of the speedups for
        each set and temperature, and the number of rows that are worse.

        comparison.json: {rows, worse, mind}. A row: set, temperature, n; before and after: the
        speedups over no drafting; ratio: after / before; tau: {before, after, change} with change =
        after - before (all Estimates, see eval/bootstrap.py); verdict: better, same or worse, and
        `said`, why. worse: whether a row is. mind: sentences for a careful reader.

        Raises ValueError for measurements of two targets, or without a task in common.
        """
        a, b = read(before), read(after)
        found, mind = compared(a, b)
        worse = [row for row in found if row["verdict"] == WORSE]
        folder = out / "artifact"
        folder.mkdir(parents=True, exist_ok=True)
        text = page(found, mind)
        (folder / "comparison.md").write_text(text, encoding="utf-8")
        write_json(folder / "comparison.json", {"rows": found, "worse": bool(worse), "mind": mind})
        print(text, flush=True)
        return {"worse": len(worse)} | {
            f"ratio_{row['set']}_T{row['temperature']:g}": row["ratio"]["value"]
            for row in found
            if row["ratio"]["value"] is not None
        }


def compared(a: Side, b: Side) -> tuple[list[Row], list[str]]:
    """The rows, and what makes a reader careful."""
    sets = sorted(_sets(a) & _sets(b))
    if not sets:
        raise ValueError(
            f"the two measurements have no set of prompts in common at batch 1: {_listed(a)} were "
            f"measured before and {_listed(b)} after; give both bench stages the same prompts"
        )
    same = _shape(a) == _shape(b)
    rows, mind = list[Row](), warnings(a, b, [])
    for name in sets:
        ours, theirs = _only(a, name), _only(b, name)
        entries = compare(ours, theirs)
        rows += [_row(name, entry, same) for entry in entries]
        told = warnings(ours, theirs, entries)
        mind += [f"{name}, {line}" for line in told if line not in mind]
    if mind:
        mind.insert(0, "A stands for before, B for after")
    if not same:
        mind.append(
            f"they drafted in other shapes ({_shape(a)} before, {_shape(b)} after), each its own "
            "best: tokens per target call are not compared, speed is"
        )
    alone = sorted(_sets(a) ^ _sets(b))
    mind += [f"measured once only, so not compared: {', '.join(alone)}"] if alone else []
    return rows, mind


def page(rows: list[Row], mind: list[str]) -> str:
    """comparison.md: a table, a verdict and what to mind."""
    lines = [
        (
            *(row["set"], f"{row['temperature']:g}", row["n"]),
            *(interval(row["tau"]["before"]), interval(row["tau"]["after"])),
            *(interval(row["before"], times), interval(row["after"], times)),
            *(
                interval(row["ratio"], times),
                f"{row['verdict']} ({row['said']})".removesuffix(" ()"),
            ),
        )
        for row in rows
    ]
    worse = list(dict.fromkeys(row["set"] for row in rows if row["verdict"] == WORSE))
    better = list(dict.fromkeys(row["set"] for row in rows if row["verdict"] == BETTER))
    parts = [
        "# Before and after",
        f"Better on {_joined(better)}; worse on {_joined(worse)}.",
        grid(HEAD, lines),
        "Batch 1, 95 % intervals over prompts that both answered. Before and after: tokens per "
        "target call (tau), and times as fast as no drafting. Ratio: the speedup after over the "
        f"one before. Less than {DRIFT:.0%} is called the same.",
    ]
    parts += ["Mind:"] if mind else []
    return "\n\n".join([*parts, *(f"- {line}" for line in mind)]) + "\n"


def _sets(side: Side) -> set[str]:
    """Tasks that were measured at batch 1."""
    return {run["task"] for run in side.runs if run["batch"] == 1}


def _only(side: Side, task: str) -> Side:
    runs = [run for run in side.runs if run["batch"] == 1 and run["task"] == task]
    return Side(side.folder, side.report, runs)


def _row(name: str, entry: Row, same_shape: bool) -> Row:
    speedup, tau = entry["measures"]["speedup"], entry["measures"]["tau"]
    judged = {"speedup": _verdict(speedup["change"], 1.0)}
    if same_shape:
        judged["tau"] = _verdict(tau["change"], 0.0, tau["a"]["value"])
    decisive = next((v for v in (WORSE, BETTER) if v in judged.values()), SAME)
    said = [measure for measure, verdict in judged.items() if verdict == decisive != SAME]
    return {
        **{"set": name, "temperature": entry["temperature"], "n": speedup["change"]["n"]},
        **{"before": speedup["a"], "after": speedup["b"], "ratio": speedup["change"]},
        "tau": {"before": tau["a"], "after": tau["b"], "change": tau["change"]},
        **{"verdict": decisive, "said": " and ".join(said)},
    }


def _verdict(change: Estimate, none: float, scale: float | None = 1.0) -> str:
    """none: the value of no change; scale: what DRIFT is a share of."""
    low, high = change["low"], change["high"]
    if low is None or high is None or scale is None:  # too few prompts for an interval
        return SAME
    if high < none - DRIFT * scale:
        return WORSE
    return BETTER if low > none + DRIFT * scale else SAME


def _shape(side: Side) -> Any:
    return side.report["conditions"].get("draft_shape")


def _listed(side: Side) -> str:
    return ", ".join(sorted(_sets(side))) or "none"


def _joined(names: list[str]) -> str:
    return ", ".join(names) or "none"
