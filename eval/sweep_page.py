"""What a sweep teaches, in sentences and tables: the best run, its equals, and the laws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from eval import compare
from eval.bootstrap import Estimate
from eval.curves import FORMS
from eval.laws import Law
from eval.markdown import Said, Section, interval, number, times
from eval.sweep_charts import SHORT, formula, reach, rises
from eval.sweep_laws import explained
from eval.swept import Run, Sweep

RESAMPLES = 2000  # of the prompts, for each run beside the best one
DEFINITIONS = {
    "interval": "95 %. Of a run: bench's bootstrap over its prompts. Of a law and its slope: "
    "Student's interval of least squares, on the scale of the residuals; of a law with a bend the "
    "runs drawn anew about it, and fitted again. It is of the mean of trainings "
    "like these on these prompts: on other prompts the level is as uncertain as one run's.",
    "law": "weighted least squares; a run weighs 1 / (s^2 + t^2), with s from its interval and t "
    "the scatter between runs that their intervals do not explain. Fitted to runs whose "
    "configurations differ in this one thing (and in seeds, which are repeats).",
    "form": "the form that was asked for stays unless another has a corrected Akaike criterion "
    "(AICc) lower by more than 4; below 5 runs it is undefined and nothing is said.",
    "slope": "the mean rise over the measured range: for ten times, or twice, the x, a layer, or a "
    "million parameters.",
    "R2": "the share of the weighted squares about the mean that the law explains. It says nothing "
    "of the law beyond its runs.",
    "residual": "root mean square of measured less law, over the degrees of freedom, in the units "
    "of what is measured.",
    "misfit": "p of the F test of the law against the scatter of runs at the same x; a dash where "
    "no x was repeated. Below 0.05 the law is wrong somewhere.",
    "tau": "tokens per target call, the target's own token included: 1 without drafting.",
    "tokens": "packed positions that the drafter was trained on, prompts included, each as often "
    "as it was read, also by the trainings that it started from. A law of tokens counts the "
    "trainings that differ in them.",
    "ms/token": "milliseconds of a drafted position, at the lowest temperature, smallest batch.",
    "trained tokens/s": "positions a second in the last training.",
}
RUNS = ("family", "parameters", "layers x width", "tokens", "draft", "ms/token", "trained tokens/s")


def title(sweep: Sweep) -> str:
    """What was swept."""
    return f"Which drafter to train: {sweep.recipe}, sweep of {sweep.preset or 'its own axes'}"


def opening(sweep: Sweep, laws: Sequence[Law]) -> list[Said]:
    """The answer first: the best run, those that are not told apart from it, what the laws say."""
    parts = [Said(text, loud=i == 0) for i, text in enumerate(_answer(sweep))]
    parts += [Said(text, loud=False) for text in explained(list(laws))]
    best = sweep.measured[0].name if sweep.measured else None
    shown = [law for law in laws if law.against != "batch" or law.conditions["held"] == best]
    return [*parts, *(Said(claim(law), loud=False) for law in shown)]


def _answer(sweep: Sweep) -> Iterator[str]:
    ranked = [run for run in sweep.measured if sweep.value(run) is not None]
    if not ranked:
        yield "No run has been measured by bench yet; the learning curves are below."
        return
    best, n = ranked[0], len(ranked)
    yield f"Best of {n} by {sweep.maximises}: {best.name}, {_figures(best)}."
    if rest := [run for run in sweep.runs if run not in ranked]:
        failed = sum(bool(run.code) for run in rest)
        yield f"Of {len(sweep.runs)} jobs, {failed} failed and {len(rest) - failed} have no figure."
    if beside := [f"{run.name} ({run.other_work:g})" for run in ranked if not run.quiet]:
        yield (
            f"Measured beside other work, which took cores of this machine: {'; '.join(beside)}. "
            "Their speeds are not those of a quiet machine, and no law of times is fitted to them."
        )
    if n == 1:
        return
    equal = [run.name for run in ranked[1:] if not _apart(best, run, sweep)]
    yield (
        f"Not told apart from it: {'; '.join(equal)}."
        if equal
        else "All others are worse beyond noise."
    )
    yield (
        f"The best of {n} noisy values is too high on average, the more so the more there are: "
        "measure the one that you choose again, on other prompts, before you quote it."
    )


def _figures(run: Run) -> str:
    """tau and speedup of a run, each temperature."""
    tau, speedup = run.first(run.tau), run.first(run.speedup)
    return "; ".join(
        f"at T={t:g} tau {interval(tau[t])}"
        + (f", {interval(speedup[t], times)} as fast as no drafting" if t in speedup else "")
        for t in tau
    )


def _apart(best: Run, run: Run, sweep: Sweep) -> bool:
    """Whether a run is worse than the best beyond noise: prompt by prompt where both kept their
    runs, else by the two intervals, as if their prompts were not the same."""
    of, _, at = sweep.maximises.partition("_T")
    if of in ("tau", "speedup") and best.bench and run.bench:
        try:
            sides = compare.read(best.bench), compare.read(run.bench)
            found = compare.compare(*sides, resamples=RESAMPLES)
        except ValueError:  # runs that were not kept
            found = []
        for entry in found:
            if f"{entry['temperature']:g}" == at:
                return str(entry["measures"][of]["verdict"]) == "B is lower"
    a, b = sweep.estimate(best), sweep.estimate(run)
    return a is not None and b is not None and _beyond(a, b)


def _beyond(a: Estimate, b: Estimate) -> bool:
    ends = [(e["value"], e["low"], e["high"]) for e in (a, b)]
    halves = [(h - w) / 2 for _, w, h in ends if w is not None and h is not None]
    known = [v for v, _, _ in ends if v is not None]
    return len(known) == len(halves) == 2 and known[0] - known[1] > math.hypot(*halves)


def claim(law: Law) -> str:
    """What a law says in a sentence, and where it fails or is not known; no slope, no forecast."""
    slope = law.slope()
    doubt = "" if law.form == law.asked and len(law.aicc) > 1 else f"; {law.said}"
    told = f"{_of(law)} ({_where(law)}, n={law.n})"
    if slope.low <= 0 <= slope.high:
        return f"{told}: no slope shown, {rises(law)}{doubt}.{_drafts(law)}"
    verb = "rises" if slope.low > 0 else "falls"
    end = reach(law)
    value, low, high, _ = law.at(end)
    return (
        f"{told} {verb}, {rises(law)}: {formula(law)}{doubt}. Extrapolated to {end:,.0f}: "
        f"{number(value)} [{number(low)}, {number(high)}].{_drafts(law)}"
    )


def _of(law: Law) -> str:
    return f"{SHORT[law.of]} against {law.against}"


def _drafts(law: Law) -> str:
    """A warning where bench chose drafts of different shapes, which change tau by themselves."""
    drafts = law.conditions.get("drafts", {})
    if len(drafts) < 2:
        return ""
    told = ", ".join(f"{shape} in {count}" for shape, count in drafts.items())
    return f" Mind: bench drafted differently ({told}), which is part of this law."


def sections(sweep: Sweep, laws: Sequence[Law]) -> list[Section]:
    """Everything below the opening; conditions first."""
    rungs = [_rungs(sweep)] if any(run.rungs for run in sweep.runs) else []
    return [_conditions(sweep), _runs(sweep), *rungs, _laws(laws), *_residuals(laws)]


def _conditions(sweep: Sweep) -> Section:
    known: dict[str, dict[str, None]] = {}
    for run in sweep.measured:
        for key, value in run.conditions.items():
            known.setdefault(key, {})[str(value)] = None
    rows = [("command", sweep.command), ("axes", ", ".join(sweep.axes))]
    rows += [(key.replace("_", " "), " / ".join(values)) for key, values in known.items()]
    mixed = [key for key, values in known.items() if len(values) > 1]
    said = [f"The runs differ in {', '.join(mixed)}: compare them with care."] if mixed else []
    return Section("Conditions", said, ("", ""), rows)


def _runs(sweep: Sweep) -> Section:
    """All jobs, the measured ones first, the best on top; below it why others failed."""
    temperatures = sorted({t for run in sweep.runs for t, _ in run.tau})
    columns = [(name, t) for t in temperatures for name in ("tau", "speedup")]
    known = {f"{name}_T{t:g}" for name, t in columns}
    value = [] if sweep.maximises in known else [sweep.maximises]
    good = sweep.measured
    rows = [
        (
            *(run.name, _state(run), *(interval(sweep.estimate(run)) for _ in value)),
            *(_cell(run, name, t) for name, t in columns),
            *_facts(run),
        )
        for run in [*good, *(run for run in sweep.runs if run not in good)]
    ]
    head = ("run", "state", *value, *(f"{name} T={t:g}" for name, t in columns), *RUNS)
    notes = [
        f"{run.name} failed: {run.error or 'no reason was noted'}" for run in sweep.runs if run.code
    ]
    return Section("Runs", (), head, rows, notes)


def _cell(run: Run, name: str, temperature: float) -> str:
    found = run.first(getattr(run, name)).get(temperature)
    return interval(found, times if name == "speedup" else number)


def _facts(run: Run) -> tuple[str, ...]:
    shape = "-" if run.depth is None else f"{run.depth} x {run.width}"
    counts = ["-" if v is None else f"{v:,}" for v in (run.parameters, run.tokens)]
    speed = run.train_tokens_per_second
    return (
        *(run.family or "-", counts[0], shape, counts[1], run.draft_shape or "-"),
        *(interval(run.token_ms), "-" if speed is None else f"{speed:,.0f}"),
    )


def _state(run: Run) -> str:
    if run.measured:
        return "measured"
    if run.code:
        return f"failed (code {run.code})"
    if run.rungs:
        tokens, _ = run.rungs[-1]
        return f"paused at {tokens:,.0f}"
    if run.code == 0:
        return "done, without a bench"
    return "at work or interrupted"


def _rungs(sweep: Sweep) -> Section:
    rows = [
        (run.name, ", ".join(f"{tokens:,.0f}: {tau:.2f}" for tokens, tau in run.rungs), _state(run))
        for run in sorted(sweep.runs, key=lambda run: -len(run.rungs))
        if run.rungs
    ]
    said = (
        "Tau of the validation's decoding, without interval. At a pause the learning rate is that "
        "of the whole schedule, so these are not what a training of that length would give: no "
        "law is fitted to them.",
    )
    return Section("Rungs of halving", said, ("run", "tokens: tau", ""), rows)


def _laws(laws: Sequence[Law]) -> Section:
    head = ("law", "where", "curve", "slope", "R2", "residual", "largest residual", "misfit", "n")
    rows = [
        (
            *(_of(law), _where(law), formula(law), rises(law), f"{law.r_squared:.3f}"),
            *(number(law.residual), _largest(law)),
            *("-" if law.lack_of_fit is None else f"{law.lack_of_fit:.3f}", law.n),
        )
        for law in laws
    ]
    none = (
        "No law: it takes three measured runs at three places that differ in one thing alone "
        "(tokens; the size of an lm), or three batch sizes."
    )
    notes = [f"{_of(law)}, {_where(law)}: {law.said}{_tried(law)}.{_drafts(law)}" for law in laws]
    return Section("Laws", () if rows else (none,), head, rows, notes)


def _where(law: Law) -> str:
    known = law.conditions
    at = [f"T={known['temperature']:g}"] if "temperature" in known else []
    of = [f"of {known['tokens_of']}"] if known.get("tokens_of") else []
    return ", ".join([*of, *filter(None, [known.get("held")]), *at]) or "all such runs"


def _tried(law: Law) -> str:
    told = ", ".join(f"{FORMS[name].formula} {value:.1f}" for name, value in law.aicc.items())
    return f" (AICc: {told})" if len(law.aicc) > 1 else ""


def _largest(law: Law) -> str:
    worst = max(law.points, key=lambda point: abs(point["residual"]))
    return f"{worst['residual']:+.3g} ({worst['name']})"


def _residuals(laws: Sequence[Law]) -> Iterator[Section]:
    rows = [
        (_of(law), _where(law), p["name"], f"{p['x']:,.0f}", interval(_measured(p)),
         number(p["y"] - p["residual"]), f"{p['residual']:+.3g}")
        for law in laws if law.against != "batch" for p in law.points
    ]  # fmt: skip
    if rows:
        head = ("law", "where", "run", "x", "measured", "law says", "residual")
        yield Section("Residuals", (), head, rows)


def _measured(point: dict[str, Any]) -> Estimate:
    return Estimate(value=point["y"], low=point["low"], high=point["high"], n=0)
