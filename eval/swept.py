"""The runs of a sweep as its folder tells them: what was varied, what was measured.

Reads JSON alone: sweep.json and jobs/*.json of the sweep, stage.json, result.json and report.json
of the stages that a job names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.ancestry import Row, benched, found_at, note_of, read_json
from eval.bootstrap import Estimate
from eval.others import much

Cell = tuple[float, int]  # temperature and batch
BENCH = "eval.bench.Bench"


@dataclass(frozen=True)
class Run:
    """A job of a sweep; what it did not reach is None, or empty.

    name: its overrides, shortly; code: its exit code (None: at work or interrupted); value: what
    the sweep maximises; tokens: packed positions that trained the drafter, of its own training and
    of those that it started from as far as they are stages here (prompts' and answers' positions
    alike, each as often as it was read), and trained the same by stage; draft_length: levels of
    the draft that bench chose; target: hash of the target's contents; token_ms: milliseconds of a
    drafted position, at the lowest temperature and smallest batch; conditions: target (its name),
    device, machine, threads, dtype, prompts (a hash of those asked), max_new_tokens; held: the
    configuration of the bench and of every stage that it is made from, flat, by role; bench: the
    folder of the measurement; other_work: cores that others took from it (eval/others.py); fixed:
    the share of plain decoding's time that drafting leaves as it is.
    """

    name: str
    overrides: dict[str, str]
    code: int | None = None
    error: str | None = None
    value: float | None = None
    seconds: float | None = None
    rungs: list[list[float]] = field(default_factory=list)
    family: str | None = None
    parameters: int | None = None
    depth: int | None = None
    width: int | None = None
    tokens: int | None = None
    trained: dict[str, int] = field(default_factory=dict)
    draft_length: int | None = None
    draft_shape: str | None = None
    target: str | None = None
    tau: dict[Cell, Estimate] = field(default_factory=dict)
    speedup: dict[Cell, Estimate] = field(default_factory=dict)
    token_ms: Estimate | None = None
    costs: Row = field(default_factory=dict)
    train_tokens_per_second: float | None = None
    conditions: Row = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    bench: Path | None = None
    other_work: float | None = None
    fixed: float | None = None

    @property
    def quiet(self) -> bool:
        """Whether its times may be used: the machine did next to nothing else."""
        return not much(self.other_work, self.conditions.get("threads"))

    @property
    def measured(self) -> bool:
        """Whether its figures may be used: bench ended, and its controls passed."""
        return self.code == 0 and bool(self.tau)

    def first(self, cells: dict[Cell, Estimate]) -> dict[float, Estimate]:
        """By temperature, at the smallest batch that was measured."""
        return {t: cells[t, b] for t, b in sorted(cells, key=lambda cell: (cell[0], -cell[1]))}

    def told(self) -> Row:
        """Flat and JSON-able, without what says only where it is."""
        flat = {k: v for k, v in vars(self).items() if k not in ("tau", "speedup", "held", "bench")}
        measures = {
            name: [
                {"temperature": t, "batch": b} | e
                for (t, b), e in sorted(getattr(self, name).items())
            ]
            for name in ("tau", "speedup")
        }
        return flat | measures | {"bench": self.bench.name if self.bench else None}


@dataclass(frozen=True)
class Sweep:
    """A sweep, or several of one target read together (then `recipe` names all)."""

    folder: Path
    recipe: str
    preset: str | None
    maximises: str
    axes: list[str]
    command: str
    runs: list[Run]

    @property
    def measured(self) -> list[Run]:
        """The runs whose figures may be used, best first."""
        good = [run for run in self.runs if run.measured]
        known = {id(run): self.value(run) for run in good}
        return sorted(good, key=lambda run: (known[id(run)] is None, -(known[id(run)] or 0.0)))

    def value(self, run: Run) -> float | None:
        """What the sweep maximises, of this run."""
        found = self.estimate(run)
        return None if found is None else found["value"]

    def estimate(self, run: Run) -> Estimate | None:
        """What the sweep maximises, of this run, with its interval where bench gave one."""
        named = re.fullmatch(r"(tau|speedup)_T(.+)", self.maximises)
        if named and run.tau:
            cells: dict[Cell, Estimate] = getattr(run, named[1])
            found = {f"{t:g}": estimate for t, estimate in run.first(cells).items()}
            if named[2] in found:
                return found[named[2]]
        return (
            None if run.value is None else {"value": run.value, "low": None, "high": None, "n": 0}
        )


def read(folder: Path) -> Sweep:
    """The sweep in a folder; ValueError says what is no sweep, or cannot be read."""
    note = read_json(folder / "sweep.json", f"{folder} is no sweep: it has no readable sweep.json")
    jobs = sorted((folder / "jobs").glob("*.json"))
    notes = [read_json(job, f"{job} is not the note of a job") for job in jobs]
    notes.sort(key=lambda note: (note.get("start", 0), note.get("number", 0)))
    try:
        runs = [_run(note, folder) for note in notes]
        told = {key: note[key] for key in ("recipe", "preset", "maximises", "axes", "command")}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no sweep of this version: its notes or reports lack {error}; run it "
            "again, which finds finished stages done"
        ) from None
    return Sweep(folder, **told, runs=runs)


def together(sweeps: list[Sweep]) -> Sweep:
    """Sweeps of one target as one; a measurement that two of them share counts once.

    Raises ValueError for two targets, and where no run has been measured yet.
    """
    runs: dict[Any, Run] = {}
    for sweep in sweeps:
        for run in sweep.runs:
            own = sweep.maximises == sweeps[0].maximises
            same = run if own else replace(run, value=None)  # which is of something else
            runs.setdefault(run.bench or (sweep.folder, run.name), same)
    first = sweeps[0]
    made = Sweep(
        first.folder,
        " + ".join(dict.fromkeys(s.recipe for s in sweeps)),
        " + ".join(dict.fromkeys(s.preset or ", ".join(s.axes) for s in sweeps)),
        first.maximises,
        list(dict.fromkeys(axis for s in sweeps for axis in s.axes)),
        first.command,
        list(runs.values()),
    )
    _require_runs(made, sweeps)
    return made


def _require_runs(made: Sweep, sweeps: list[Sweep]) -> None:
    """At least one run that tells something, and one target."""
    targets = {str(run.target): run for run in made.runs if run.target}
    if len(targets) > 1:
        told = ", ".join(f"{run.conditions['target']} ({t[:12]})" for t, run in targets.items())
        raise ValueError(
            f"these runs were measured with {len(targets)} targets, {told}; laws hold for one: "
            "give the sweeps of one target"
        )
    if not made.measured and not any(run.rungs for run in made.runs):
        codes = [run.code for run in made.runs]
        states = f"{codes.count(None)} at work or interrupted, {sum(map(bool, codes))} failed"
        folders = ", ".join(str(s.folder) for s in sweeps)
        raise ValueError(
            f"{folders}: no run has been measured by bench yet (of {len(codes)} jobs {states}); "
            f"let the sweep go on with the command that began it: {made.command}"
        )


def _run(note: Row, folder: Path) -> Run:
    """A job's run, with what its stages tell as far as they got."""
    overrides = {key: str(value) for key, value in note["overrides"].items()}
    run: Row = {name: note.get(name) for name in ("code", "error", "value", "seconds")}
    run |= {"rungs": [rung for rung in note.get("rungs") or [] if rung[1] is not None]}
    stages = folder.parent.parent / "stages"
    for place in map(Path, note["stages"].values()):
        stage = found_at(place, stages)
        if stage is None or not (stage / "result.json").is_file():  # not at its end
            continue
        if note_of(stage)["config"].get("_target_") == BENCH:
            run |= benched(stage, stages)
    return Run(shortly(overrides), overrides, **run)


def shortly(overrides: dict[str, str]) -> str:
    """`lr=0.001, tokens=30000`: the last part of each key, more where two would read alike."""
    keys = [re.split(r"[.@/]", key) for key in overrides]

    def called(parts: list[str]) -> str:
        size = 1
        while size < len(parts) and sum(k[-size:] == parts[-size:] for k in keys) > 1:
            size += 1
        return ".".join(parts[-size:])

    pairs = zip(map(called, keys), overrides.values(), strict=True)
    return ", ".join(f"{name}={value}" for name, value in pairs) or "as the recipe has it"
