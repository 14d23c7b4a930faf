"""What the card says of the measurement: how fast, whether losslessly, where and where not."""

from collections.abc import Iterator
from typing import Any

from eval.markdown import grid, interval, percent, times

Row = dict[str, Any]
SLICE = ("T", "speedup", "verdict", "tokens per target call", "n")
SLICES = {"by_task": "task", "by_language": "language", "by_length": "prompt_tokens"}
DRAFTER = "drafter"


def plain(text: object) -> str:
    """On one line and without HTML: what names are called is not ours to trust."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def speed(report: Row) -> Iterator[str]:
    """Tables by temperature and batch, task, language and prompt length, with intervals and n."""
    head = ("T", "batch", "speedup", "verdict", "tokens per target call", "tokens/s", "n")
    rows = [
        (
            *(f"{row['temperature']:g}", row["batch"], interval(row["speedup"], times)),
            *(row["verdict"], interval(row["tau"]), interval(row["tokens_per_second"]), row["n"]),
        )
        for row in report["table"]
        if row["arm"] == DRAFTER
    ]
    yield grid(head, rows)
    for key, field in SLICES.items():
        if report[key]:
            name = field.replace("_", " ")
            yield f"By {name}, at batch 1:"
            yield grid((name, *SLICE), [(entry[field], *_slice(entry)) for entry in report[key]])
    yield from _beside(report)
    yield from _predicted(report)


def _slice(entry: Row) -> tuple[object, ...]:
    return (
        *(f"{entry['temperature']:g}", interval(entry["speedup"], times), entry["verdict"]),
        *(interval(entry["tau"]), entry["n"]),
    )


def _beside(report: Row) -> Iterator[str]:
    """Which ways to draft that need no training this drafter was, and was not, shown to beat."""
    for entry in report["headline"]:
        against = entry["against"]
        equal = {arm: e for arm, e in against.items() if e["low"] is None or e["low"] <= 1}
        where = f"At temperature {entry['temperature']:g}, batch 1, it was"
        if equal:
            told = "; ".join(f"{interval(e, times)} {plain(arm)}" for arm, e in equal.items())
            yield (
                f"{where} not shown to be faster than these, which need no training (how many "
                f"times as fast as each): {told}."
            )
        elif against:
            told = ", ".join(f"{plain(arm)} ({interval(e, times)})" for arm, e in against.items())
            yield f"{where} faster than what needs no training: {told}."


def _predicted(report: Row) -> Iterator[str]:
    rows = [
        (
            *(f"{entry['temperature']:g}", entry["batch"], times(entry["predicted"])),
            *(interval(entry["measured"], times), f"{1 + entry['error']:.2f}"),
        )
        for entry in report["predicted"]
        if entry["arm"] == DRAFTER
    ]
    if rows:
        yield "What the cost model predicts from tau and the cost of each step, and the stopwatch:"
        yield grid(("T", "batch", "predicted", "measured", "predicted / measured"), rows)


def lossless(report: Row) -> Iterator[str]:
    """The rule of acceptance and what was checked of it, near ties counted."""
    known, controls = report["conditions"], report["controls"]
    author = "the target as it changes it" if known.get("target_change") else "the target"
    exact = controls.get("exactness", {"passed": False, "found": "not checked"})
    yield (
        f"Drafts are verified by this rule: {plain(known['rule'])}. Under it greedy answers are "
        f"those of {author}, and sampled ones follow its law. What was checked:"
    )
    checks = [f"exactness {_state(exact)}: {plain(exact['found'])}"]
    checks += [
        f"{plain(name)} {_state(found)}: {plain(found['found'])}"
        for name, found in controls.items()
        if name.startswith("same law")
    ]
    if mine := known.get("agreement", {}).get(DRAFTER):
        checks.append(
            f"in {known['dtype']}, the dtype of the measurement, {mine['identical']} of "
            f"{mine['n']} greedy answers were identical to plain decoding's; {mine['near_ties']} "
            "parted where the target's two best tokens nearly tie, so that rounding decides; "
            f"{mine['wrong']} were wrong"
        )
    if not any(name.startswith("same law") for name in controls):
        checks.append("the law of sampled answers was not tested")
    yield "\n".join(f"- {check}" for check in checks)
    if lossy := sorted({row["arm"] for row in report["table"] if "LOSSY" in row["arm"]}):
        yield (
            f"The report also measures {', '.join(map(plain, lossy))}, whose answers are NOT the "
            "target's; no figure on this page is of it."
        )


def _state(control: Row) -> str:
    return "passed" if control["passed"] else "**NOT PASSED**"


def limits(report: Row, trained: dict[int, list[str]]) -> Iterator[str]:
    """What was asked, on what it was trained (tokens of a sequence -> stages), what is open."""
    known = report["conditions"]
    points = [
        f"Prompts: {plain(known['prompt_source'])}. Answers of at most {known['max_new_tokens']} "
        f"tokens; runs of each: {known['repeats']}.",
        f"dtype: {known['dtype']} ({plain(known['dtype_reason'])}).",
        f"Draft: {plain(known['draft_shape'])}.",
    ]
    if trained:
        told = "; ".join(f"{length:,} ({', '.join(names)})" for length, names in trained.items())
        points.append(f"Trained on sequences of so many tokens: {told}. {_beyond(report, trained)}")
    for entry in report["repetition"]:
        if entry["repetitive"] and entry["batch"] == 1:
            points.append(
                f"At temperature {entry['temperature']:g}, {entry['repetitive']} of "
                f"{entry['groups']} prompts had a repetitive answer, which is easy to draft "
                f"({percent(entry['share']['value'])}); no figure above counts them."
            )
    points.append(
        "Other languages, tasks, devices, engines and larger batches were not measured. A drafter "
        "that fits worse there changes no answer; it can be slower than no drafting."
    )
    yield "\n".join(f"- {point}" for point in points)


def _beyond(report: Row, trained: dict[int, list[str]]) -> str:
    """What is known of texts longer than the longest training sequence."""
    longest = max(trained)
    if not report["by_length"]:
        return f"By length of prompt nothing was measured: beyond {longest:,} tokens it is open."
    there = ", ".join(dict.fromkeys(entry["prompt_tokens"] for entry in report["by_length"]))
    return (
        f"Prompts of {there} tokens were measured (table above); what is not in it is open, most "
        f"of all beyond {longest:,} tokens."
    )


def regressions(comparison: Row) -> Iterator[str]:
    """A fine-tune beside the drafter that its training started from."""
    rows = [
        (
            *(row["set"], f"{row['temperature']:g}", row["n"]),
            *(interval(row["tau"]["before"]), interval(row["tau"]["after"])),
            *(interval(row["before"], times), interval(row["after"], times)),
            *(interval(row["ratio"], times), row["verdict"]),
        )
        for row in comparison["rows"]
    ]
    told = ("tau before", "after", "speedup before", "after", "after / before", "verdict")
    yield "Both measured alike, over the prompts that both answered."
    yield grid(("prompts", "T", "n", *told), rows)
    yield from (f"Mind: {plain(line)}." for line in comparison["mind"])
