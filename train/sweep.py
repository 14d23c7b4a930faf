"""A sweep: its folder, the note that each of its jobs leaves there, and the table that they make.

Jobs may run in other processes and on other machines, so what they found is in files alone:

OUTPUT_DIR/sweeps/NAME/sweep.json         what is swept, and what it maximises
OUTPUT_DIR/sweeps/NAME/jobs/<12 hex>.json  one job: its words, code, value, stages (`Job`)
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.secrets import redacted
from drafters.files import write_json
from train.compose import inside
from train.plan import Planned
from train.processes.lock import Lock

OWN = "DRAFTSMITH_JOBS"  # among Hydra's words for a job: what its own command says (Sweep.own)
TURN = ".turn"  # in a stage's folder: the job of a sweep whose turn it is to make the stage
FREE = re.compile(  # words that change no result, or are named elsewhere
    r"(recipe|sweep|output_dir|launch|tracker|hardware|engines|preflight|plan|view|advise|budget"
    r"|hydra)([./@].*)?"
)
BAD_INPUT = 2
STOPPED, PAUSED = (130, 143), 75  # exit codes of a stage that will go on
LONGEST = 300  # characters of a failed job's sentence


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says. maximises: the number of a stage's result.json that is looked for;
    axes: the keys that are swept; command: the one that began the folder; start: how often one
    was started on it; commands: the different ones; jobs: how many there are, those of earlier
    starts included, None where only the sweeper knows."""

    folder: Path
    recipe: str
    preset: str | None
    maximises: str
    axes: tuple[str, ...]
    command: str
    start: int = 1
    commands: tuple[str, ...] = ()
    jobs: int | None = None

    @classmethod
    def read(cls, folder: Path) -> "Sweep":
        """The sweep of this folder. Raises OSError or ValueError where there is none."""
        note = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        tuples = {key: tuple(note.get(key, ())) for key in ("axes", "commands")}
        return cls(folder, **note | tuples)

    @classmethod
    def of_job(cls, folder: Path, own: str) -> "Sweep":
        """The sweep of a job that was given `own()`: what another command has written meanwhile to
        sweep.json is not its."""
        told = json.loads(own)
        return replace(cls.read(folder), **told | {"axes": tuple(told["axes"])})

    def own(self) -> str:
        """What its jobs are told, in JSON."""
        return json.dumps({key: getattr(self, key) for key in ("axes", "maximises", "start")})

    def begin(self, runs: list[dict[str, str]] | None = None) -> "Sweep":
        """Writes sweep.json; returns the sweep with the number of this start. runs: the swept words
        of each of its jobs, None where they are not known. Notes of jobs that had nothing but bad
        input are removed, and values of another number than this sweep maximises read anew."""
        command, start = self.command, 1
        commands: tuple[str, ...] = (command,)
        try:
            before = Sweep.read(self.folder)
            command, start = before.command, before.start + 1
            commands = tuple(dict.fromkeys([command, *before.commands, self.command]))
        except (OSError, ValueError, TypeError):
            self.folder.mkdir(parents=True, exist_ok=True)
        there = self._renewed()
        jobs = None if runs is None else len({*there, *map(self.file_of, runs)})
        begun = replace(self, command=command, commands=commands, start=start, jobs=jobs)
        write_json(
            self.folder / "sweep.json", {k: v for k, v in asdict(begun).items() if k != "folder"}
        )
        return begun

    def _renewed(self) -> list[Path]:
        """The notes' files that stay, each with its value as this sweep has it."""
        stay = []
        for file in (self.folder / "jobs").glob("*.json"):
            note = json.loads(file.read_text(encoding="utf-8"))
            if note["code"] == BAD_INPUT and not note["stages"]:
                file.unlink(missing_ok=True)
                continue
            stay.append(file)
            if (renewed := self._valued(note)) != note:
                write_json(file, renewed)
        return stay

    def _valued(self, note: dict[str, Any]) -> dict[str, Any]:
        """The note, with a value of another number than this sweep maximises read anew."""
        if note["code"] != 0 or note.get("maximises") == self.maximises:
            return note
        value = _value(note["stages"], self.maximises)
        return note | {"value": value, "maximises": self.maximises}

    def file_of(self, overrides: dict[str, str]) -> Path:
        """The note of the job with these swept words."""
        return self.folder / "jobs" / f"{short_hash(sorted(overrides.items()), 12)}.json"

    def notes(self) -> list[dict[str, Any]]:
        """What its jobs have left, of all starts, in the order of their numbers."""
        files = (self.folder / "jobs").glob("*.json")
        found = [self._valued(json.loads(file.read_text(encoding="utf-8"))) for file in files]
        return sorted(found, key=lambda note: (note["start"], note["number"]))

    def code(self) -> int:
        """The first exit code of this start's jobs that is not 0."""
        codes = [note["code"] for note in self.notes() if note["start"] == self.start]
        return next((code for code in codes if code), 0)


def folder_of(
    root: Path, recipe: str, preset: str | None, axes: list[str], fixed: list[str]
) -> Path:
    """root/sweeps/<recipe>-<preset>, without a preset <recipe>. The axes that are not the preset's
    own (`axes`) and the other words of the command that can change a result (`fixed`) add 8 hex:
    two sweeps never write the same notes, and other values of the same axes are added to theirs."""
    kept = sorted(word for word in fixed if not FREE.fullmatch(word.partition("=")[0].lstrip("+~")))
    apart = [*sorted(axes), *kept]
    parts = [recipe, *([preset] if preset else []), *([short_hash(apart, 8)] if apart else [])]
    return inside(root, "sweeps", "-".join(parts))


def swept(words: list[str], axes: tuple[str, ...]) -> dict[str, str]:
    """Of a job's words, those of the axes: key -> value."""
    pairs = [word.partition("=") for word in words]
    return {key: value for key, _, value in pairs if key in axes}


class Job:
    """One job's note, written when it begins, when its stages are known and when it ends.

    A job of the same words writes the same note. code null: at work, interrupted, or paused by
    halving, with the [tokens, tau] of each rung in `rungs`. The note of a job that was done before
    stays what it was until this one comes to its end.
    """

    def __init__(self, sweep: Sweep, words: list[str], number: int) -> None:
        self.sweep, self.number, self.begun = sweep, number, time.time()
        overrides = swept(words, sweep.axes)
        self.name = " ".join(f"{key}={value}" for key, value in overrides.items()) or "as it is"
        self.file = sweep.file_of(overrides)
        self.before = _done(self.file)
        self.note: dict[str, Any] = {"overrides": overrides, "code": None, "error": None}
        self.note |= {"value": None, "stages": {}, "seconds": 0.0, "rungs": []}
        self.note |= {"maximises": sweep.maximises, "start": sweep.start, "number": number}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def planned(self, stages: list[Planned]) -> None:
        """Notes where the stages are, for whoever reads the sweep while it runs."""
        self.note["stages"] = {stage.name: str(stage.folder) for stage in stages}
        self.note["rungs"] = self._rungs()
        self._write()

    def failed(self, error: object) -> None:
        """Notes the first sentence of what went wrong."""
        line = next(
            (x.strip() for x in redacted(str(error)).splitlines() if x.strip()),
            "no reason was given",
        )
        self.note["error"] = re.split(r"(?<=[^.])[.] ", line)[0][:LONGEST]

    def end(self, code: int) -> float | None:
        """Notes how it ended; returns the value that the sweep maximises, None without one."""
        value = _value(self.note["stages"], self.sweep.maximises) if code == 0 else None
        goes_on = code in (*STOPPED, PAUSED)
        self.before = self.before if goes_on else None
        self.note |= {"code": None if goes_on else code, "value": value, "rungs": self._rungs()}
        if code == 0:
            self.note["error"] = None
        self._write()
        return value

    @contextmanager
    def turn(self, folder: Path) -> Iterator[None]:
        """While this job alone makes the stage in `folder`. Where another job or command is at it,
        waits for its end, and says so at once and then every few minutes."""
        folder.mkdir(parents=True, exist_ok=True)
        mine = Lock(folder, TURN)
        mine.wait(self._tell)
        try:
            Lock(folder).wait_for(self._tell)  # a command that is no job of a sweep
            yield
        finally:
            mine.free()

    def environment(self) -> dict[str, str]:
        """What tells a tracker which sweep and job a training belongs to."""
        return {"DRAFTSMITH_SWEEP": self.sweep.folder.name, "DRAFTSMITH_RUN": self.name}

    def _tell(self, line: str) -> None:
        print(f"run {self.number}: {line}", flush=True)

    def _rungs(self) -> list[tuple[int, float | None]]:
        from train.halving import rungs

        found = [rungs(Path(folder)) for folder in self.note["stages"].values()]
        return sorted({k: v for one in found for k, v in one.items()}.items())

    def _write(self) -> None:
        self.note["seconds"] = round(time.time() - self.begun, 3)
        new = {key: self.note[key] for key in ("start", "number")}
        write_json(self.file, self.note if self.before is None else self.before | new)


def _done(file: Path) -> dict[str, Any] | None:
    """The note of a job that has come to its end, None if it has not."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        return note if note["code"] == 0 else None
    except (OSError, ValueError, KeyError):
        return None


def numbers(stages: dict[str, str], maximises: str) -> dict[str, float]:
    """What the stages that are done have measured: STAGE/KEY -> number, and under its own name what
    a sweep maximises, of the last stage that has it."""
    found: dict[str, float] = {}
    for name, folder in stages.items():
        file = Path(folder) / "result.json"
        result = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        told = {key: float(v) for key, v in result.items() if isinstance(v, int | float)}
        found |= {f"{name}/{key}": value for key, value in told.items()}
        found |= {key: value for key, value in told.items() if key == maximises}
    return found


def _value(stages: dict[str, str], maximises: str) -> float | None:
    return numbers(stages, maximises).get(maximises)


def told(sweep: Sweep) -> list[str]:
    """The table of a sweep from its jobs' notes: the best first, then those without a value, with
    the reason; and what to type next."""
    notes = sweep.notes()
    known = [note for note in notes if note["code"] == 0 and note["value"] is not None]
    known.sort(key=lambda note: -note["value"])
    jobs = max(sweep.jobs or 0, len(notes))
    rest = f", {jobs - len(notes)} not begun" if jobs > len(notes) else ""
    lines = [f"\n{sweep.folder.name}: {len(known)} of {jobs} jobs measured{rest}"]
    if known:
        lines.append(f"  {sweep.maximises}, best first:")
    lines += [f"  {note['value']:9.4g}  {_words(note)}" for note in known]
    for note in notes:
        if note not in known:
            lines.append(f"          -  {_words(note)}: {_why(note, sweep)}")
    lines.append(f"  next: python -m eval.sweep {_short(sweep.folder)}")
    return lines


def _why(note: dict[str, Any], sweep: Sweep) -> str:
    """Why a job has no value."""
    if note["code"] is None:
        if note["rungs"]:
            tokens, tau = note["rungs"][-1]
            return f"paused after {tokens:,} tokens" + ("" if tau is None else f" (tau {tau:.3f})")
        return "not at its end; the same command goes on"
    if note["code"]:
        return f"exit code {note['code']}: {note['error']}"
    return f"done, and no stage has measured {sweep.maximises}"


def _words(note: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in note["overrides"].items()) or "as it is"


def _short(path: Path) -> str:
    """As it is typed from here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def short_hash(words: list[Any], digits: int) -> str:
    """So many hex digits of what is JSON in these words."""
    return hashlib.sha256(json.dumps(words, ensure_ascii=False).encode()).hexdigest()[:digits]
