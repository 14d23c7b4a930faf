"""Which laws a sweep holds: runs that differ in one thing only, found from their configurations.

Two runs are alike when all that made their measurements (`Run.held`: the whole configuration of
bench, and of every stage down to the data) is equal but for the keys of the axis, and when what
they were measured on is. A preset's name decides nothing. Seeds are no difference, but repeats.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from eval.bootstrap import Estimate
from eval.laws import FORMS_TRIED, LEAST, Law, fit
from eval.swept import Run, Sweep

TOKENS = ("schedule.tokens",)
SHAPE = ("drafter.width", "drafter.layers", "drafter.parameters")  # of an lm
PROMPTS = ("target", "prompts", "max_new_tokens")  # what tau depends on
MACHINE = (*PROMPTS, "device", "machine", "threads", "dtype")  # and what a time does
TOLD = 3  # differences between groups that a label names

Group = list[Run]
Place = tuple[Run, float, Estimate]  # a run, its x and its y


def laws_of(sweep: Sweep) -> list[Law]:
    """Every law that three of the sweep's measured runs, or of a run's batch sizes, allow."""
    runs = sweep.measured
    return [*_of_tokens(runs), *_of_size(runs), *_of_latency(runs), *_of_batches(runs)]


def alike(
    runs: Group, loose: Sequence[str], conditions: Sequence[str], fixed: Sequence[str] = ()
) -> list[tuple[str, Group]]:
    """Groups of runs that are alike but for the `loose` keys, with what sets each apart from the
    others; `fixed` names facts of a run that must be equal besides."""
    groups: dict[Any, Group] = {}
    for run in runs:
        facts = _facts(run, loose)
        on = tuple(str(run.conditions.get(key)) for key in conditions)
        groups.setdefault((facts, on, *(getattr(run, key) for key in fixed)), []).append(run)
    found = [group for group in groups.values() if len(group) >= LEAST]
    return list(zip(_labels(found, loose, fixed), found, strict=True))


def _facts(run: Run, loose: Sequence[str]) -> frozenset[tuple[str, str]]:
    ends = tuple(f".{key}" for key in loose)
    return frozenset((k, v) for k, v in run.held.items() if not f".{k}".endswith(ends))


def _labels(groups: list[Group], loose: Sequence[str], fixed: Sequence[str]) -> list[str]:
    """What differs between the groups, of each: `lr=0.001`; "" for a single one."""
    first = [dict(_facts(group[0], loose)) for group in groups]
    first = [
        facts | {key: str(getattr(group[0], key)) for key in fixed}
        for facts, group in zip(first, groups, strict=True)
    ]
    seen = {key: None for facts in first for key in facts}
    keys = [key for key in seen if len({facts.get(key) for facts in first}) > 1]
    named: dict[str, str] = {}
    for key in keys:  # the shortest path of each name: the others follow from it
        name = key.rsplit(".", 1)[-1]
        if name not in named or len(key) < len(named[name]):
            named[name] = key
    few = list(named.items())[:TOLD]
    return [", ".join(f"{n}={facts.get(k)}" for n, k in few) for facts in first]


def _of_tokens(runs: Group) -> Iterator[Law]:
    """tau against log10 of the tokens of those trainings whose tokens differ."""
    for label, group in alike(runs, TOKENS, PROMPTS):
        every = {name for run in group for name in run.trained}
        moved = sorted(n for n in every if len({run.trained.get(n) for run in group}) > 1)

        def tokens(run: Run, moved: list[str] = moved) -> float:
            return float(sum(run.trained.get(name, 0) for name in moved))

        more = {"held": label, "tokens_of": " and ".join(moved)}
        yield from _tau(group, tokens, "tokens", more)


def _of_size(runs: Group) -> Iterator[Law]:
    """tau against log10 parameters, at one depth."""
    for label, group in alike(runs, SHAPE, PROMPTS, ["depth"]):
        yield from _tau(group, lambda run: float(run.parameters or 0), "parameters",
                        {"held": label})  # fmt: skip


def _tau(
    group: Group, x: Callable[[Run], float], against: str, conditions: dict[str, Any]
) -> Iterator[Law]:
    for temperature in sorted({t for run in group for t, _ in run.tau}):
        places = [
            (run, x(run), run.first(run.tau)[temperature])
            for run in group
            if temperature in run.first(run.tau)
        ]
        more = {"temperature": temperature} | conditions | _shared(group, PROMPTS)
        yield from _law(places, of="tau", against=against, asked="log10", conditions=more)


def _of_latency(runs: Group) -> Iterator[Law]:
    """Milliseconds of a drafted token against depth, and against parameters, of the same runs."""
    timed = [run for run in runs if run.token_ms and run.depth and run.quiet]
    for label, group in alike(timed, SHAPE, MACHINE):
        for against in ("depth", "parameters"):
            places: list[Place] = [
                (run, float(getattr(run, against)), run.token_ms) for run in group if run.token_ms
            ]
            more = {"held": label} | _shared(group, MACHINE)
            yield from _law(places, of="token_ms", against=against, asked="linear", conditions=more)


def _of_batches(runs: Group) -> Iterator[Law]:
    """Speedup against log2 batch, of each run by itself."""
    for run in (run for run in runs if run.quiet):
        for temperature in sorted({t for t, _ in run.speedup}):
            places = [
                (run, float(b), e) for (t, b), e in sorted(run.speedup.items()) if t == temperature
            ]
            more = {"temperature": temperature, "held": run.name} | _shared([run], MACHINE)
            yield from _law(places, of="speedup", against="batch", asked="log2", conditions=more)


def _law(
    places: list[Place], *, of: str, against: str, asked: str, conditions: dict[str, Any]
) -> Iterator[Law]:
    """The law, where at least three different x allow one."""
    if len({x for _, x, _ in places}) < LEAST:
        return
    ordered = sorted(places, key=lambda place: place[1])
    named = [f"batch {x:g}" if against == "batch" else run.name for run, x, _ in ordered]
    yield fit(
        [x for _, x, _ in ordered],
        [float(e["value"] or 0.0) for *_, e in ordered],
        [e["low"] for *_, e in ordered],
        [e["high"] for *_, e in ordered],
        **{"of": of, "against": against, "asked": asked},
        # a drafter learns how often tokens are before it learns what follows what
        forms=(*FORMS_TRIED, "late") if against == "tokens" else FORMS_TRIED,
        names=named,
        conditions=conditions,
    )


def _shared(group: Group, keys: Sequence[str]) -> dict[str, Any]:
    shapes = Counter(str(run.draft_shape) for run in group)
    return {key: group[0].conditions.get(key) for key in keys} | {"drafts": dict(shapes)}


def explained(laws: list[Law]) -> list[str]:
    """Sentences on whether depth or parameters explain the time of a drafted token."""
    times = [law for law in laws if law.of == "token_ms"]
    found = []
    for depth in (law for law in times if law.against == "depth"):
        for size in (law for law in times if law.against == "parameters"):
            if depth.n == size.n and depth.conditions == size.conditions:
                found.append(_which(depth, size))
    return found


def _which(depth: Law, size: Law) -> str:
    """By how much better the one fits than the other, both straight, by AICc."""
    told = (
        f"The time of a drafted token has R2 {depth.r_squared:.3f} against depth and "
        f"{size.r_squared:.3f} against parameters ({depth.n} runs): "
    )
    if min(depth.residual, size.residual) <= 0:
        return told + "a fit without residuals proves nothing."
    if depth.form != size.form:
        return told + "one is a straight line and the other is not, so they are not compared."
    gain = 2 * depth.n * math.log(size.residual / depth.residual)
    if abs(gain) <= 4:
        return told + "the runs do not tell which explains it."
    return told + f"{'depth' if gain > 0 else 'parameters'} explain{'s' * (gain > 0)} it better."
