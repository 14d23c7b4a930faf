"""What a rank of test_distill.py does: stages that the command has left, one after another."""

import json
import os
import signal
from pathlib import Path

from train.compose import bind, build
from train.loop import Loop


def stages(folders: list[Path], die_at: int = 0) -> None:
    """die_at: the optimiser step of the first in which SIGKILL ends the process, if any."""
    step = Loop._step

    def deadly(self, engine, step_fn, number, micro):
        if number + 1 == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, engine, step_fn, number, micro)

    Loop._step = deadly  # type: ignore[method-assign]
    for folder in folders:
        note = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        bind(note["config"], "stages.test")
        inputs = {name: Path(path) for name, path in note["inputs"].items()}
        build(note["config"]).run(folder, **inputs)
