"""One process, one stage: `python -m train.processes.worker FOLDER`, started once a rank.

With --slurm it reads its place among the ranks from SLURM's variables: `srun python -m
train.processes.worker --slurm FOLDER`. --local_rank, which some launchers add, is ignored.
"""

import argparse
import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.secrets import guard
from decoding.ranks import START, ranks, store
from drafters.base import write_json
from eval.controls import Failed
from train.compose import ROOMS, ROOT
from train.guard import Preempted
from train.processes import slurm
from train.processes.lock import Lock
from train.processes.watch import ECHO, FAILED, HANG_SECONDS, Watch
from train.resume import Paused
from train.seal import seal
from train.sweep import PAUSED
from train.versions import installed, untested

BUG, BAD_INPUT, CHECK_FAILED, ENVIRONMENT, STOPPED, PREEMPTED = 1, 2, 3, 4, 130, 143
ASK = 20.0  # seconds; torchrun and deepspeed kill what has not ended after thirty
HEARD: list[float] = []  # when this process was signalled first
LOST = ("gloo", "nccl", "connection", "peer", "socket", "store", "another rank")  # what torch says


def main(arguments: list[str]) -> int:
    """Runs the stage described in FOLDER/stage.json; returns the exit code."""
    given = _parse(arguments)
    if given.slurm:
        os.environ.update(slurm.place())
    if given.job:
        os.environ["DRAFTSMITH_JOB"] = given.job
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DISABLE_TQDM_FOR_WEIGHTS", "1")
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, _stop)
    watch = Watch(given.folder, given.job, given.hang_seconds)
    code = _guarded(given.folder, watch)
    _leave(code, watch)
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.processes.worker", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--job", default="")
    parser.add_argument("--hang-seconds", type=float, default=HANG_SECONDS)
    parser.add_argument("--slurm", action="store_true")
    parser.add_argument("--local_rank", "--local-rank", type=int)
    return parser.parse_args(arguments)


class Stopped(KeyboardInterrupt):
    """A signal where no loop listens for itself; no library takes it for a failure to retry."""


def _stop(number: int, _: object) -> None:
    """The first signal unwinds, a second ends at once; an echo of the first is neither."""
    now = time.monotonic()
    first, HEARD[:] = not HEARD, HEARD or [now]
    if first:
        raise Stopped(number)
    if now - HEARD[0] > ECHO:
        os._exit(128 + number)


def _guarded(folder: Path, watch: Watch) -> int:
    """Runs; a sentence for what the user can mend, a traceback for what we must."""
    try:
        if watch.world > 1:
            store()  # which rank 0 may have to open, before the others come
        watch.begin()
        lock = _locked(folder)
        try:
            if watch.rank == 0:
                _run(folder)
            else:  # what it would print, rank 0 prints
                with (
                    Path(os.devnull).open("w", encoding="utf-8") as nowhere,
                    redirect_stdout(nowhere),
                ):
                    _run(folder)
            if watch.world > 1:  # all went well on each
                torch.distributed.barrier()
        finally:
            if lock:
                lock.free()
        return 0
    except BaseException as error:
        for kind in (signal.SIGTERM, signal.SIGINT):  # the launcher's, after the first has failed
            signal.signal(kind, signal.SIG_IGN)
        return _failed(error, watch)


def _failed(error: BaseException, watch: Watch) -> int:
    """The exit code for an error, told unless another rank's fault is behind it."""
    if isinstance(error, Paused):
        return _paused(error, watch)
    blamed = watch.blame(_time_to_ask(error))
    if blamed:
        return int(blamed["code"])
    code, sentence = _sentence(error)
    trace = "".join(traceback.format_exception(error)) if code == BUG else ""
    watch.tell(code, sentence, trace)
    return code


def _paused(error: Paused, watch: Watch) -> int:
    """The exit code of a stage that has come to where it was to pause, which is no fault. All ranks
    come to it; the first tells, and leaves the code for the command."""
    if watch.rank == 0:
        print(error, flush=True)
        write_json(watch.folder / FAILED, {"code": PAUSED, "error": str(error), "job": watch.job})
    return PAUSED


def _time_to_ask(error: BaseException) -> float:
    """Seconds to wait for another rank's cause: a lost connection has one."""
    lost = isinstance(error, (OSError, RuntimeError)) and any(w in str(error).lower() for w in LOST)
    return ASK if lost else 0.5


def _sentence(error: BaseException) -> tuple[int, str]:
    said = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        own = said if type(error) is MemoryError else ""
        return ENVIRONMENT, own or "out of memory: lower micro_batch, batch_size or max_new_tokens"
    kinds: dict[int, tuple[type[BaseException], ...]] = {
        BAD_INPUT: (ValueError,),
        CHECK_FAILED: (Failed, ArithmeticError),
        PREEMPTED: (Preempted,),
        ENVIRONMENT: (OSError, SafetensorError),
    }
    for code, types in kinds.items():
        if isinstance(error, types):
            return code, said
    if isinstance(error, KeyboardInterrupt):
        told = isinstance(error, Stopped) and error.args == (signal.SIGTERM,)
        return PREEMPTED if told else STOPPED, "stopped; the same command goes on where it was"
    return BUG, f"{type(error).__name__}: {error}"


def _locked(folder: Path) -> Lock | None:
    """Rank 0 locks the folder for its job, and clears what an earlier failure left there."""
    if ranks()[0]:
        return None
    lock = Lock(folder)
    said = lock.take()
    if said:
        print(said, flush=True)
    (folder / FAILED).unlink(missing_ok=True)
    return lock


def _run(folder: Path) -> None:
    from transformers.utils import logging

    from train.compose import bind, build
    from train.engine import quiet

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quiet()
    note = shared_note(folder)
    bind(note["config"], f"stages.{note['name']}")
    stage = build(note["config"])
    rank, world = ranks()
    if rank == 0:
        write_json(folder / "environment.json", environment(world))
    begin = time.time()
    inputs = {name: Path(path) for name, path in note["inputs"].items()}
    try:
        metrics = stage.run(folder, **inputs)
    finally:
        if rank == 0:
            spent = _spend(folder, time.time() - begin)
    if rank == 0:
        write_json(folder / "result.json", {**metrics, "seconds": spent})
        seal(folder)


def shared_note(folder: Path) -> dict[str, Any]:
    """The stage's note, which rank 0 reads and gives to the others, once all have come and run the
    same code and versions. Raises ValueError naming the rank and what differs."""
    rank, world = ranks()
    if rank:
        store().set(f"build/{rank}", json.dumps(build_of_this_rank()))
        return json.loads(_await("stage", "rank 0 has not said what to do"))
    said = (folder / "stage.json").read_text(encoding="utf-8")
    mine = build_of_this_rank() if world > 1 else {}
    for other in range(1, world):
        theirs = json.loads(_await(f"build/{other}", f"rank {other} of {world} has not come"))
        mine["host"] = theirs["host"]
        apart = [f"{k} {v}, not {mine[k]}" for k, v in theirs.items() if v != mine[k]]
        if apart:
            raise ValueError(
                f"rank {other} on {theirs['host']} does not run what rank 0 runs: "
                f"{'; '.join(apart)}. Install the same versions and the same draftsmith there"
            )
    if world > 1:
        store().set("stage", said)
    return json.loads(said)


def _await(key: str, missing: str) -> bytes:
    """A key of the job's store, which may come later. Unlike the store's own wait, it hears
    signals. Raises OSError where it does not come."""
    until = time.monotonic() + START.total_seconds()
    while not store().check([key]):
        if time.monotonic() > until:
            minutes = START.total_seconds() / 60
            raise OSError(f"{missing} within {minutes:.0f} minutes: look at its machine and log")
        time.sleep(0.05)
    return store().get(key)


def build_of_this_rank() -> dict[str, str]:
    """What ranks must have in common: the code of this repository and the versions."""
    code = hashlib.sha256()
    for file in sorted(f for room in ROOMS for f in (ROOT / room).rglob("*.py")):
        code.update(file.read_bytes())
    return {"host": socket.gethostname(), "draftsmith": code.hexdigest()[:12], **installed()}


def _spend(folder: Path, seconds: float) -> float:
    """Seconds of work in all starts of this stage, this one's added."""
    file = folder / "seconds.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0.0
    write_json(file, before + seconds)
    return before + seconds


def environment(world: int = 1) -> dict[str, Any]:
    """Versions and hardware, for provenance."""
    from train.plan import processor

    packages = installed()
    return {
        "python": packages.pop("python"),
        "packages": packages,
        "untested": untested(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ranks": world,
    }


def _leave(code: int, watch: Watch) -> None:
    """Ends this rank without the interpreter's own exit, in which gloo's threads abort about one
    two-process job in ten."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    watch.end()
    if joined or watch.world > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    guard()
    sys.exit(main(sys.argv[1:]))
