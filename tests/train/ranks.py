"""Runs stages in the processes of a launcher: `... ranks.py FOLDER FOLDER ...`, one after another.

DIE_AT=n kills the process with SIGKILL in the n-th optimiser step of the first.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from train.compose import bind, build
from train.loop import Loop


def main() -> None:
    if "DIE_AT" in os.environ:
        step = Loop._step

        def deadly(self, engine, step_fn, number, micro):
            if number + 1 == int(os.environ["DIE_AT"]):
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, engine, step_fn, number, micro)

        Loop._step = deadly  # type: ignore[method-assign]
    for folder in map(Path, sys.argv[1:]):
        note = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        bind(note["config"], "stages.test")
        inputs = {name: Path(path) for name, path in note["inputs"].items()}
        build(note["config"]).run(folder, **inputs)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
