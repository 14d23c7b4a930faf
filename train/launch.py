"""Starts a stage as a process of its own, on one rank or several, and reports how it ended."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from train.compose import ROOT


class Launch:
    """conf/launch/: how a stage's processes are started.

    how: inline (one process), deepspeed or torchrun with `ranks` processes on this machine.
    """

    def __init__(
        self, *, how: Literal["inline", "deepspeed", "torchrun"] = "inline", ranks: int = 1
    ) -> None:
        if how not in ("inline", "deepspeed", "torchrun"):
            raise ValueError(f"launch.how is {how!r}; it must be inline, deepspeed or torchrun")
        if ranks < 1 or (how == "inline" and ranks != 1):
            raise ValueError(f"launch.ranks is {ranks} with how={how}; inline runs on one rank")
        self.how, self.ranks = how, ranks

    def run(self, folder: Path, parallel: bool) -> int:
        """Runs the stage in `folder` to its end and returns its exit code.

        `parallel` says that the stage can use several ranks; others run on one.
        """
        command = self._command(folder) if parallel else _inline(folder)
        for left in ("failed.json", "failed.claim"):  # of an earlier start
            (folder / left).unlink(missing_ok=True)
        process = subprocess.Popen(command, cwd=ROOT, env=self._environment(parallel))
        told: list[int] = []

        def stop(number: int, _: object) -> None:
            told.append(number)
            process.terminate()

        # the stage saves and ends by itself; Ctrl-C reaches it from the terminal
        earlier = signal.signal(signal.SIGTERM, stop)
        ignored = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, earlier)
            signal.signal(signal.SIGINT, ignored)
        note = folder / "failed.json"
        if code and note.is_file():
            return json.loads(note.read_text(encoding="utf-8"))["code"]
        if code and told:  # a launcher that is stopped has a code of its own
            return 143
        return {-signal.SIGTERM: 143, -signal.SIGINT: 130}.get(code, code)

    def _environment(self, parallel: bool) -> dict[str, str]:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1"}
        # a log file wants a line now and then, not a bar that redraws itself
        environment.setdefault("TQDM_MININTERVAL", "0.5" if sys.stderr.isatty() else "20")
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        if parallel and self.ranks > 1:  # threads of several ranks on the same cores wait in turn
            mine = max(1, len(os.sched_getaffinity(0)) // self.ranks)
            environment.setdefault("OMP_NUM_THREADS", str(mine))
        return environment

    def _command(self, folder: Path) -> list[str]:
        worker = ["train.worker", str(folder)]
        if self.how == "deepspeed":
            head = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators"]
            return [*head, str(self.ranks), "--module", *worker]
        if self.how == "torchrun":
            head = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            return [*head, "--nproc_per_node", str(self.ranks), "-m", *worker]
        return _inline(folder)


def _inline(folder: Path) -> list[str]:
    return [sys.executable, "-m", "train.worker", str(folder)]
