"""Where the numbers go: JSONL always, wandb if asked; telemetry never ends a training run."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Jsonl:
    """conf/tracker/jsonl.yaml: metrics.jsonl in the stage's folder and nothing else."""

    def open(self, folder: Path, config: dict[str, Any]) -> Any:
        """No remote run."""
        return None


class Wandb(Jsonl):
    """conf/tracker/wandb.yaml. Offline unless a key is in the environment."""

    def __init__(self, *, project: str = "draftsmith", mode: str | None = None) -> None:
        self.project = project
        self.mode = mode or ("online" if os.environ.get("WANDB_API_KEY") else "offline")

    def open(self, folder: Path, config: dict[str, Any]) -> Any:
        """A wandb run, or None with a warning when there can be none."""
        try:
            import wandb

            return wandb.init(
                project=self.project,
                mode=self.mode,  # type: ignore[arg-type]
                dir=str(folder),
                id=folder.name[-64:],
                resume="allow",
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except Exception as error:  # any failure of telemetry is a warning
            print(f"wandb is off for this stage: {error}", file=sys.stderr)
            return None


class Tracker:
    """Writes metrics of one stage on rank 0; other ranks make one that does nothing."""

    def __init__(self, folder: Path, rank: int = 0, remote: Jsonl | None = None) -> None:
        self.file = folder / "metrics.jsonl"
        self.rank = rank
        self.run = None
        if remote and rank == 0:
            note = folder / "stage.json"
            config = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
            self.run = remote.open(folder, config)

    def log(self, step: int, **values: float) -> None:
        """One line of JSON; `step` counts optimiser steps."""
        if self.rank:
            return
        row = {"step": step, "time": round(time.time(), 3), **values}
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")
        if self.run is not None:
            try:
                self.run.log(values, step=step)
            except Exception as error:  # see above
                print(f"wandb stopped: {error}", file=sys.stderr)
                self.run = None

    def rewind(self, step: int) -> None:
        """Forgets what was logged behind `step`: a resumed run writes those lines again."""
        if self.rank or not self.file.is_file():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step(line) <= step]
        part = self.file.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(self.file)

    def close(self) -> None:
        if self.run is not None:
            try:
                self.run.finish()
            except Exception as error:  # see above
                print(f"wandb did not finish: {error}", file=sys.stderr)


def _step(line: str) -> float:
    """The step of a line; one that a crash cut short belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")
