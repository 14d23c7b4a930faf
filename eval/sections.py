"""What the report says, in sentences and tables; eval/markdown.py and eval/page.py set it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from eval.bootstrap import NO_DIFFERENCE, SLOWER
from eval.markdown import Said, Section, interval, number, percent, times
from eval.others import mind

Row = dict[str, Any]
CONDITIONS = {
    **{"target": "target", "parameters_target": "its parameters"},
    **{"drafter": "drafter", "parameters_drafter": "its parameters"},
    **{"device": "device", "threads": "threads", "clock_mhz": "clock, MHz", "ranks": "ranks"},
    "other_work": "cores that other work took",
    **{"dtype": "dtype", "dtype_reason": "why", "draft_shape": "draft"},
    **{"rule": "acceptance rule", "max_new_tokens": "most new tokens"},
    **{"prompts": "prompts", "repeats": "repeats", "prompt_source": "prompts from"},
    "commit": "commit",
}
SPEEDS = ("speedup", "verdict", "n", "per prompt", "decode only", "tau", "tau p10/p50/p90")


def title(report: Row) -> str:
    known = report["conditions"]
    return f"How fast {known['target']} becomes with {known['drafter']}"


def sentence(entry: Row) -> str:
    """A headline entry in words."""
    where = f"At temperature {entry['temperature']:g}, batch 1"
    if not entry["n"]:
        return f"{where}: nothing to report, every prompt's answer was repetitive or unpaired."
    speedup, n = entry["speedup"], f"{entry['n']} prompts"
    if speedup["low"] is None:
        return f"{where}: {times(speedup['value'])} on one prompt, which has no interval."
    spread = f"95 % interval {speedup['low']:.2f} to {speedup['high']:.2f}, {n}"
    tau = f"{interval(entry['tau'])} tokens per target call"
    words = {
        SLOWER: f"slower than no drafting, {times(speedup['value'])}",
        NO_DIFFERENCE: f"no difference shown, {times(speedup['value'])}",
    }
    said = words.get(entry["verdict"], f"{times(speedup['value'])} as fast as no drafting")
    return f"{where}: {said} ({spread}); {tau}."


def wrong_answers(report: Row) -> str | None:
    """The warning that an arm which claims to be lossless gave answers of its own."""
    agreement = report["conditions"].get("agreement", {})
    wrong = {arm: a for arm, a in agreement.items() if a["wrong"] and "LOSSY" not in arm}
    if not wrong:
        return None
    told = ", ".join(f"{arm} {a['wrong']} of {a['n']}" for arm, a in wrong.items())
    return f"WRONG ANSWERS, not explained by near ties: {told}."


def busy_machine(report: Row) -> str | None:
    """The warning that other work took cores from the runs."""
    so = "these speeds are not those of a quiet machine; tau does not depend on it"
    return mind(report["conditions"].get("other_work"), so)


def opening(report: Row) -> list[Said]:
    """What stands above all tables: verdicts, warnings, break-even, exactness."""
    parts = []
    if not report["passed"]:
        failed = [name for name, c in report["controls"].items() if not c["passed"]]
        said = f"failed: {', '.join(failed)}" if failed else "none was run"
        parts.append(Said(f"Controls not passed ({said}): do not use these figures."))
    parts += [Said(sentence(entry)) for entry in report["headline"]]
    if wrong := wrong_answers(report):
        parts.append(Said(wrong))
    if busy := busy_machine(report):
        parts.append(Said(busy))
    if change := report["conditions"].get("target_change"):
        parts.append(Said(f"Mind: {change['said']}."))
    if not report["headline"]:
        parts.append(Said("The drafter was not measured at batch 1.", loud=False))
    parts += [Said(text, loud=False) for text in _beside(report)]
    exactness = report["controls"].get("exactness", {"passed": False, "found": "not checked"})
    state = "passed" if exactness["passed"] else "NOT PASSED"
    return [*parts, Said(f"Exactness {state}: {exactness['found']}.", loud=False)]


def _beside(report: Row) -> Iterator[str]:
    for entry in report["headline"]:
        against = [
            f"{interval(e, times)} as fast as {arm} (n={e['n']})"
            for arm, e in entry["against"].items()
        ]
        if against:
            where = f"at temperature {entry['temperature']:g}, batch 1"
            yield f"Beside other ways to draft, {where}: {'; '.join(against)}."
    for entry in report["break_even"]:
        yield f"Batch sizes at temperature {entry['temperature']:g}: {entry['said']}."


def sections(report: Row) -> list[Section]:
    """Everything below the opening; what was not measured is not there."""
    table, conditions = report["table"], report["conditions"]
    return [
        Section("Conditions", (), ("", ""), _conditions(conditions)),
        _speed("Speed", table),
        *_slices(report),
        *_agreement(conditions.get("agreement", {})),
        *_predicted(report),
        _acceptance(table, conditions),
        _costs(table, conditions.get("costs", {})),
        *_repetitive(report),
        _controls(report["controls"]),
    ]


def _conditions(conditions: Row) -> list[tuple[str, str]]:
    rows = [(said, _said(conditions[key])) for key, said in CONDITIONS.items() if key in conditions]
    if tried := conditions.get("draft_shape_choice"):
        speeds = ", ".join(f"{shape}: {speed:.1f}" for shape, speed in tried.items())
        rows.append(("chosen by", f"a short trial, tokens/s: {speeds}"))
    versions = ", ".join(f"{k} {v}" for k, v in conditions.get("versions", {}).items())
    return [*rows, ("versions", versions)]


def _said(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _speed(name: str, table: list[Row], said: tuple[str, ...] = ()) -> Section:
    rows = [
        (
            *(f"{row['temperature']:g}", row["batch"], row["arm"], *_speeds(row)),
            interval(row["tokens_per_second"]),
        )
        for row in table
    ]
    notes = [
        f"{row['arm']} at T={row['temperature']:g}, batch {row['batch']}: {row['unpaired']} "
        "prompts left out, since autoregressive decoding did not run them."
        for row in table
        if row["unpaired"]
    ]
    return Section(name, said, ("T", "batch", "arm", *SPEEDS, "tokens/s"), rows, notes)


def _speeds(row: Row) -> tuple[str, ...]:
    spread = "/".join(number(row[f"tau_p{p}"]["value"]) for p in (10, 50, 90))
    return (
        *(interval(row["speedup"], times), row["verdict"] or "the baseline", str(row["n"])),
        *(interval(row["macro_speedup"], times), interval(row["decode_speedup"], times)),
        *(interval(row["tau"]), spread),
    )


def _slices(report: Row) -> Iterator[Section]:
    """Tables by task, language and prompt length; one task alone is the headline again."""
    keys = {"by_task": "task", "by_language": "language", "by_length": "prompt tokens"}
    for key, name in keys.items():
        entries = report[key]
        field = name.replace(" ", "_")
        if len({entry[field] for entry in entries}) > 1:
            rows = [(e[field], f"{e['temperature']:g}", *_speeds(e)) for e in entries]
            yield Section(f"By {name} (drafter, batch 1)", (), (name, "T", *SPEEDS), rows)


def _agreement(agreement: Row) -> Iterator[Section]:
    """Greedy answers of the measured runs, in the dtype that was measured."""
    if agreement:
        rows = [
            (arm, a["n"], a["identical"], a["near_ties"], a["wrong"])
            for arm, a in agreement.items()
        ]
        said = ("Greedy answers of these runs beside autoregressive decoding's, id by id.",)
        head = ("arm", "answers", "identical", "near tie", "wrong")
        yield Section("Agreement in the measured dtype", said, head, rows)


def _predicted(report: Row) -> Iterator[Section]:
    entries = report["predicted"]
    if not entries:
        return
    head = ("T", "batch", "arm", "predicted", "measured", "predicted / measured", "")
    rows = [
        (
            *(f"{e['temperature']:g}", e["batch"], e["arm"], times(e["predicted"])),
            *(interval(e["measured"], times), f"{1 + e['error']:.2f}"),
            "within 10 %" if e["within"] else "off by more than 10 %",
        )
        for e in entries
    ]
    costs = report["conditions"].get("costs")
    notes = [_where(e, report["table"], costs) for e in entries if costs and not e["within"]]
    yield Section("Predicted beside measured", (), head, rows, notes)


def _where(entry: Row, table: list[Row], costs: Row) -> str:
    """Where the time of a cell went, beside the costs that its prediction was made from."""
    place = {key: entry[key] for key in ("arm", "temperature", "batch")}
    cell = next(row for row in table if place.items() <= row.items())
    spent = {
        "draft": (cell["draft_ms_per_round"], costs.get("draft_ms")),
        "verify": (cell["verify_ms_per_round"], None),
        "plain": (cell["plain_ms_per_round"], costs.get("verify_ms", {}).get("1")),
        "elsewhere": (cell["other_ms_per_round"], costs.get("overhead_ms")),
    }
    told = [
        f"{name} {number(found['value'])}" + (f" (alone {number(cost)})" if cost else "")
        for name, (found, cost) in spent.items()
    ]
    where = f"{entry['arm']} at T={entry['temperature']:g}, batch {entry['batch']}"
    return (
        f"{where}, milliseconds a round: {', '.join(told)}; costs alone are of the smallest batch."
    )


def _acceptance(table: list[Row], conditions: Row) -> Section:
    mine = [row for row in table if row["arm"] == "drafter" and row["batch"] == 1 and row["n"]]
    head = ("T", "position", "conditional", "rounds that reached it", "survival", "rounds drafted")
    rows = [
        (
            *(f"{row['temperature']:g}", p["position"]),
            *(interval(p["conditional"], percent), f"{p['reached']:,}"),
            *(interval(p["survival"], percent), f"{p['drafted']:,}"),
        )
        for row in mine
        for p in row["acceptance"]
    ]
    pooled = [
        f"T={row['temperature']:g}: {row['accepted']:,} of {row['drafted']:,} drafted tokens "
        f"accepted, {interval(row['accepted_per_round'])} a round (n={row['n']})."
        for row in mine
    ]
    said = [*pooled, *_expected(conditions, mine)] or ["Not measured."]
    return Section("Acceptance by position (drafter, batch 1)", said, head, rows)


def _expected(conditions: Row, mine: list[Row]) -> Iterator[str]:
    """Alpha on the target's own text, and the tau that it should give beside the loop's."""
    for temperature, alpha in conditions.get("alpha", {}).items():
        each = alpha if isinstance(alpha, list) else [alpha]  # by position, or one for all
        told = ", ".join(interval(one, percent) for one in each)
        yield f"T={float(temperature):g}: alpha {told} (n={each[0]['n'] if each else 0})."
    loop = {row["temperature"]: row["tau"] for row in mine}
    for temperature, tau in conditions.get("expected_tau", {}).items():
        found = loop.get(float(temperature))
        yield (
            f"T={float(temperature):g}: the drafter's guesses on the target's own text promise "
            f"{number(tau)} tokens per target call; the loop measured {interval(found)}."
        )


def _costs(table: list[Row], costs: Row) -> Section:
    head = ("T", "batch", "arm", "draft ms/token", "draft ms/round", "verify ms/round")
    more = ("other ms/round", "plain ms/round", "busy", "TTFT ms", "TPOT ms p50", "TPOT ms p95")
    fields = (
        *("draft_ms_per_token", "draft_ms_per_round", "verify_ms_per_round"),
        *("other_ms_per_round", "plain_ms_per_round"),
    )
    rows = [
        (
            *(f"{row['temperature']:g}", row["batch"], row["arm"]),
            *(interval(row[field]) for field in fields),
            *(interval(row["busy_speedup"], times), interval(row["ttft_ms"])),
            *(interval(row["tpot_ms_p50"]), interval(row["tpot_ms_p95"]), row["n"]),
        )
        for row in table
    ]
    return Section("Costs", _alone(costs), (*head, *more, "n"), rows)


def _alone(costs: Row) -> list[str]:
    """The costs that the cost model uses, each timed by itself."""
    parts = []
    if passes := costs.get("verify_ms"):
        told = ", ".join(f"{tokens}: {number(ms)}" for tokens, ms in passes.items())
        parts.append(f"a pass of the target by tokens in it {told}")
    for key, said in {"draft_ms": "a draft", "overhead_ms": "a round besides"}.items():
        if costs.get(key) is not None:
            parts.append(f"{said} {number(costs[key])}")
    return [f"Timed alone, milliseconds: {'; '.join(parts)}."] if parts else []


def _repetitive(report: Row) -> list[Section]:
    head = ("T", "batch", "repetitive", "of", "share")
    rows = [
        (
            *(f"{e['temperature']:g}", e["batch"], e["repetitive"], e["groups"]),
            interval(e["share"], percent),
        )
        for e in report["repetition"]
    ]
    said = ("Prompts (at batch > 1: groups) with a repetitive answer. Left out of all the above.",)
    parts = [Section("Repetitive answers, apart", said, head, rows)]
    odd = report["table_repetitive"]
    return parts + ([_speed("Speed on repetitive answers", odd)] if odd else [])


def _controls(controls: dict[str, Row]) -> Section:
    if not controls:
        return Section("Controls", ("No control was run: nothing vouches for these figures.",))
    state = {True: "passed", False: "FAILED"}
    rows = [(name, state[c["passed"]], c["found"]) for name, c in controls.items()]
    return Section("Controls", (), ("control", "", "found"), rows)
