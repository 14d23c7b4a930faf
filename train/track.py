"""Where the numbers go: JSONL always, wandb if asked; telemetry never ends or slows training."""

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 30.0  # seconds that the end of a run waits for a remote tracker to take what is left
OUTCOME = "outcome"  # the job type of a run that holds what a recipe has come to
WAITING = 10_000  # lines kept for a tracker that does not answer; what comes later is dropped


class Jsonl:
    """conf/tracker/jsonl.yaml: metrics.jsonl in the stage's folder and nothing else."""

    def open(self, folder: Path, run: str, config: dict[str, Any]) -> Any:
        """No remote run. Another tracker gives one with `log(values, step=)` and
        `finish(exit_code=)`; it is opened and used on a thread of its own, and may raise or hang in
        any of them. folder: for files of its own; run: the run's name for ever, by which one that
        was interrupted goes on."""
        return None


class Wandb(Jsonl):
    """conf/tracker/wandb.yaml. Offline unless a key is in the environment."""

    def __init__(self, *, project: str = "draftsmith", mode: str | None = None) -> None:
        self.project = project
        self.mode = mode or ("online" if os.environ.get("WANDB_API_KEY") else "offline")

    def open(self, folder: Path, run: str, config: dict[str, Any]) -> Any:
        """A wandb run with this id. Its job type is the stage, or OUTCOME; in a sweep its group is
        the sweep's folder, and its name says what the job differs in."""
        import wandb

        kind = config.get("name", "")
        return wandb.init(
            project=self.project,
            group=os.environ.get("DRAFTSMITH_SWEEP") or None,
            job_type=kind or None,
            name=f"{kind} {os.environ.get('DRAFTSMITH_RUN', '')}".strip() or None,
            mode=self.mode,  # type: ignore[arg-type]
            dir=str(folder),
            id=run[-64:],
            resume="allow",
            config=config,
            settings=wandb.Settings(silent=True, console="off"),
        )


class Tracker:
    """Writes metrics of one stage on rank 0; other ranks make one that does nothing."""

    def __init__(self, folder: Path, rank: int = 0, remote: Jsonl | None = None) -> None:
        self.file = folder / "metrics.jsonl"
        self.rank = rank
        self.remote: _Remote | None = None
        if remote and rank == 0 and type(remote) is not Jsonl:
            note = folder / "stage.json"
            config = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
            self.remote = _Remote(
                remote, folder, folder.name, config, f"{self.file.name} has every line"
            )

    def log(self, step: int, values: dict[str, float], rows: list[int] | None = None) -> None:
        """One line of JSON; `step` counts global batches, `rows` are sequences of packed/train to
        look at. A value that is not a finite number is left out: JSON has none."""
        if self.rank:
            return
        finite = _finite(values)
        more = {} if rows is None else {"sequences": rows}
        line = {"step": step, "time": round(time.time(), 3), **finite, **more}
        with _only_warns(self.file.name):
            self._append(json.dumps(line) + "\n")
        if self.remote is not None:
            self.remote.put(step, finite)

    def rewind(self, step: int) -> None:
        """Forgets what was logged behind `step`: a resumed run writes those lines again."""
        if self.rank or not self.file.is_file():
            return
        with _only_warns(self.file.name):
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if _step(line) <= step]
            part = self.file.with_suffix(".part")
            part.write_text("".join(kept), encoding="utf-8")
            part.replace(self.file)

    def close(self) -> None:
        """Lets a remote tracker take what is left, for at most PATIENCE seconds."""
        if self.remote is not None:
            self.remote.close()
            self.remote = None

    def _append(self, line: str) -> None:
        """The whole line or, where the disk is full, nothing of it."""
        before = self.file.stat().st_size if self.file.is_file() else 0
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(line)
        except OSError:
            with suppress(OSError):
                os.truncate(self.file, before)
            raise


def outcome(
    tracker: Jsonl,
    folder: Path,
    run: str,
    config: dict[str, Any],
    values: dict[str, float],
    code: int,
) -> None:
    """Gives a remote tracker what a whole recipe has come to, or a job of a sweep: a run of its own
    beside those of the trainings, which jobs may share. code: the exit code, which marks a failed
    run."""
    if type(tracker) is not Jsonl:
        remote = _Remote(tracker, folder, run, {"name": OUTCOME, **config}, "the files are whole")
        remote.put(None, _finite(values))
        remote.close(code)


class _Remote:
    """A remote tracker on a thread of its own, which training never waits for. kept: what a warning
    says of that which it did not take."""

    def __init__(
        self, tracker: Jsonl, folder: Path, run: str, config: dict[str, Any], kept: str
    ) -> None:
        self.name, self.kept, self.code = type(tracker).__name__.lower(), kept, 0
        self.lines: queue.Queue[tuple[int | None, dict[str, float]] | None] = queue.Queue(WAITING)
        self.dropped = 0
        work = (tracker, folder, run, config)
        self.thread = threading.Thread(target=self._work, args=work, daemon=True, name=self.name)
        self.thread.start()

    def put(self, step: int | None, values: dict[str, float]) -> None:
        """Leaves a line for the thread, or drops it where too many wait."""
        try:
            self.lines.put_nowait((step, values))
        except queue.Full:
            self.dropped += 1

    def close(self, code: int = 0) -> None:
        """Waits for the thread, but not for ever, and says what was lost."""
        self.code = code
        if self.thread.is_alive():
            end = time.monotonic() + PATIENCE
            try:
                self.lines.put(None, timeout=PATIENCE)
                self.thread.join(max(0.0, end - time.monotonic()))
            except queue.Full:
                self.dropped += 1
        if self.thread.is_alive() or self.dropped:
            left = max(0, self.lines.qsize() - 1) + self.dropped  # without the end's own mark
            self._warn(f"has not taken about {left} lines within {PATIENCE:.0f} s of the end")

    def _work(self, tracker: Jsonl, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            run = tracker.open(folder, name, config)
            while (line := self.lines.get()) is not None:
                run.log(line[1], step=line[0])
            run.finish(exit_code=self.code)
        except Exception as error:  # whatever it is, training goes on without it
            self._warn(f"stopped ({type(error).__name__}: {error})")

    def _warn(self, what: str) -> None:
        said = " ".join(f"warning: {self.name} {what}".split())
        print(f"{said}; {self.kept}", file=sys.stderr, flush=True)


def _finite(values: dict[str, float]) -> dict[str, float]:
    return {key: float(v) for key, v in values.items() if math.isfinite(v)}


@contextmanager
def _only_warns(name: str) -> Iterator[None]:
    """A line that could not be written is no reason to end a training run."""
    try:
        yield
    except OSError as error:
        print(f"warning: {name} was not written: {error.strerror}", file=sys.stderr, flush=True)


def _step(line: str) -> float:
    """The step of a line; one that a crash cut short belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
