"""Ranks of a job without a launcher: forks of one process, which imports once what they all use.

That process has joined no group, as one that runs tests may have, and lives as long as the tests.
"""

import functools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ALONE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
IMPORTED = [
    "pytest",
    "deepspeed",
    "transformers.models.llama.modeling_llama",
    "data.generate",
    "eval.bench",
    "train.distill",
    "train.processes.worker",
]
LATER = 30.0  # seconds that ranks have left once one of them has failed
SERVER = ("127.0.0.1", 0)


@dataclass
class Forked:
    """The ranks of a job, which have begun; each one's output goes into FOLDER/forked-N.log."""

    folder: Path
    processes: list[Any]
    store: torch.distributed.TCPStore  # lives here, as torchrun's does in its agent

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def ends(self, seconds: float = 300.0) -> list[int]:
        """The exit codes of all ranks; those that outlive `seconds`, or another's failure by
        LATER, are killed (-9)."""
        until = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < until:
            if any(process.exitcode for process in self.processes):
                until = min(until, time.monotonic() + LATER)
            time.sleep(0.02)
        self.kill()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def said(self) -> str:
        """What the ranks printed, rank after rank."""
        logs = [self.folder / f"forked-{n}.log" for n in range(len(self.processes))]
        return "".join(log.read_text(encoding="utf-8") for log in logs if log.is_file())


def begin(job: Callable[..., Any], *given: Any, folder: Path, ranks: int = 2) -> Forked:
    """Has each of so many ranks call job(*given), a function of a module; its exit code is 0 when
    that returns, 1 when it raises."""
    context = _server()
    store = torch.distributed.TCPStore(
        *SERVER, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5)
    )
    processes = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        place |= {"MASTER_ADDR": store.host, "MASTER_PORT": store.port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": True}
        words = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
        log = folder / f"forked-{rank}.log"
        processes.append(context.Process(target=_rank, args=(words, log, job, given), daemon=True))
        processes[-1].start()
    return Forked(folder, processes, store)


def run(job: Callable[..., Any], *given: Any, folder: Path, ranks: int = 2) -> Forked:
    """As `begin`, to the end of all, which must be a good one."""
    done = begin(job, *given, folder=folder, ranks=ranks)
    codes = done.ends()
    assert codes == [0] * ranks, f"{codes}: {done.said()[-3000:]}"
    return done


def worker(folder: Path) -> None:
    """A job: the stage in `folder`, as the worker that a launcher starts runs it."""
    from train.processes.worker import main

    sys.exit(main([str(folder)]))


@functools.cache
def _server() -> Any:
    """What forks; it is started with an environment of its own, whatever the test's is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHED:
            patch.delenv(name, raising=False)
        for name, value in ALONE.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _rank(words: dict[str, str], log: Path, job: Callable[..., Any], given: tuple) -> None:
    os.environ.update(words)
    with log.open("ab", 0) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    torch.set_num_threads(1)
    code = 1
    try:
        job(*given)
        code = 0
    except SystemExit as left:
        code = int(left.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:  # without the interpreter's own end, in which gloo's threads may abort
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
