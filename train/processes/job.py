"""The processes of one start of a stage: signals go to each rank once, and none is left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from train.compose import ROOT
from train.processes.watch import ENVIRONMENT, FAILED, LEAVE, SAVE, STOPPED, stop_from_afar

TURN = 1.0  # seconds
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Job:
    """A launcher, or a worker without one, in a session of its own: what the terminal or a
    scheduler sends reaches the ranks through this process alone, and so once.

    expected: ranks on this machine that the launcher starts; 0: it is a worker itself.
    passes_signals: the launcher (srun) sends on what it is sent; its ranks may be elsewhere. The
    others are never told: deepspeed leaves its ranks behind or kills them at once, torchrun
    gives them half a minute. store: where the job's store listens, if known: through it a job is
    stopped that has no rank on this machine.
    """

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        folder: Path,
        name: str,
        *,
        expected: int = 0,
        passes_signals: bool = False,
        store: tuple[str, int] | None = None,
    ) -> None:
        self.command, self.environment = command, environment
        self.note, self.name = folder / FAILED, name
        self.expected, self.passes_signals, self.store = expected, passes_signals, store
        self.heard: list[int] = []
        self.ranks: set[psutil.Process] = set()

    def run(self) -> int:
        """To its end; the exit code that the first rank to fail has left, else the launcher's."""
        before = {kind: signal.getsignal(kind) for kind in SIGNALS}
        try:
            for kind in SIGNALS:
                if before[kind] != signal.SIG_IGN:  # nohup
                    signal.signal(kind, self._hear)
            code = self._run()
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
        return self._code(code)

    def _run(self) -> int:
        launcher = psutil.Popen(
            self.command, cwd=ROOT, env=self.environment, start_new_session=True
        )
        if not self.expected:
            self.ranks.add(launcher)
        try:
            return self._wait(launcher)
        finally:
            self._end(launcher)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.heard.append(number)

    def _wait(self, launcher: Any) -> int:
        sent, deadline = 0, float("inf")
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
                return launcher.wait(timeout=TURN)
            self._find()
            if sent == 0 and self.heard:
                sent = 1
                self._send(launcher, self.heard[0])
            elif sent == 1 and len(self.heard) > 1:
                if not self.passes_signals:
                    break
                sent, deadline = 2, time.monotonic() + LEAVE
                self._send(launcher, self.heard[1])
            note = self._left()
            if note:  # the ranks end each other; what they cannot end is ended here
                grace = SAVE if note["code"] in STOPPED else 2 * LEAVE
                deadline = min(deadline, time.monotonic() + grace)
        self._end(launcher)
        with suppress(subprocess.TimeoutExpired, psutil.TimeoutExpired):
            return int(launcher.wait(timeout=LEAVE))
        return ENVIRONMENT  # the system holds it in a call, as of storage that does not answer

    def _send(self, launcher: Any, number: int) -> None:
        """To each rank of this machine; they tell those of others (train/processes/watch.py)."""
        for process in {launcher} if self.passes_signals else self.ranks:
            with suppress(psutil.Error):
                process.send_signal(number)
        if self.passes_signals or self.ranks:
            return
        if self.store:
            stop_from_afar(self.store, self.name)
        else:
            self._end(launcher)  # none has started

    def _find(self) -> None:
        """Remembers the ranks of this machine: once their launcher has died nobody knows them.
        What a rank has forked looks like it, and is left out."""
        if self.passes_signals or len(self.ranks) >= self.expected:
            return
        alike = set()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                words = process.cmdline()
                if f"--job={self.name}" in words and _module(words) == "train.processes.worker":
                    alike.add(process)
        for process in alike:
            with suppress(psutil.Error):
                if process.parent() not in alike:
                    self.ranks.add(process)

    def _end(self, launcher: Any) -> None:
        """Kills what is left. A launcher is not asked: on several nodes, deepspeed's answer is to
        kill whatever there has the same command line."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(launcher.pid, signal.SIGKILL)
        for process in [launcher, *self.ranks]:
            with suppress(psutil.Error):
                process.kill()

    def _left(self) -> dict[str, Any] | None:
        """What the first rank to fail has left, of this start."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return note if note.get("job") == self.name else None

    def _code(self, code: int) -> int:
        note = self._left()
        if code and note:
            return int(note["code"])
        if self.heard:  # also where the stage was done by then: no other begins
            return 130 if self.heard[0] == signal.SIGINT else 143
        if code:
            print(
                f"error: the processes of this stage have ended without a word (code {code}): they "
                "were killed (by the system, if memory ran out) or did not start",
                file=sys.stderr,
            )
        return {-signal.SIGTERM: 143, -signal.SIGINT: 130}.get(code, code)


def _module(words: list[str]) -> str:
    """What a Python command line runs with -m, a launcher or a rank."""
    after = words[words.index("-m") + 1 :] if "-m" in words else []
    return after[0] if after else ""
