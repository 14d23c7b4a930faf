"""One process, one stage: `python -m train.worker FOLDER` (a launcher starts it, once a rank)."""

import fcntl
import json
import os
import sys
import time
import traceback
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError

from decoding.ranks import ranks
from drafters.base import write_json
from eval.controls import Failed
from train.loop import Preempted

BUG, BAD_INPUT, CHECK_FAILED, ENVIRONMENT, STOPPED, PREEMPTED = 1, 2, 3, 4, 130, 143
FAILED, CLAIM = "failed.json", "failed.claim"
PACKAGES = ("torch", "transformers", "datasets", "deepspeed", "safetensors", "tokenizers")


def main(arguments: list[str]) -> int:
    """Runs the stage described in FOLDER/stage.json; returns the exit code."""
    (place,) = [a for a in arguments if not a.startswith("--local")]
    folder = Path(place)
    lock = _lock(folder)
    if lock is None:
        return _tell(folder, BAD_INPUT, f"another process is at work in {folder}; let it finish")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DISABLE_TQDM_FOR_WEIGHTS", "1")
    code = _guarded(folder)
    _leave(code)
    return code


def _lock(folder: Path) -> TextIO | None:
    """Held as long as this process lives; None when another has it. Rank 0 locks for its job."""
    stream = (folder / ".lock").open("w")
    if ranks()[0] == 0:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return None
    return stream


def _guarded(folder: Path) -> int:
    """Runs; a sentence for what the user can mend, a traceback for what we must."""
    try:
        if ranks()[1] == 1:  # several must not undo what the quickest has said
            for left in (FAILED, CLAIM):
                (folder / left).unlink(missing_ok=True)
        if ranks()[0] == 0:
            _run(folder)
        else:  # what it would print, rank 0 prints
            with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
                _run(folder)
        return 0
    except ValueError as error:
        return _say(folder, BAD_INPUT, str(error))
    except (Failed, ArithmeticError) as error:
        return _say(folder, CHECK_FAILED, str(error))
    except Preempted as error:
        return _say(folder, PREEMPTED, str(error))
    except (MemoryError, torch.OutOfMemoryError):
        said = "out of memory: lower micro_batch, batch_size or max_new_tokens"
        return _say(folder, ENVIRONMENT, said)
    except (OSError, SafetensorError) as error:
        return _say(folder, ENVIRONMENT, str(error))
    except KeyboardInterrupt:
        return _say(folder, STOPPED, "stopped; the same command goes on where it was")
    except Exception as error:
        if _first_to_fail(folder):
            traceback.print_exc()
            write_json(folder / FAILED, {"code": BUG, "error": f"{type(error).__name__}: {error}"})
        return BUG


def _run(folder: Path) -> None:
    from transformers.utils import logging

    from train.compose import bind, build
    from train.engine import quiet

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quiet()
    note = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
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
        (folder / "DONE").write_text("", encoding="utf-8")


def _spend(folder: Path, seconds: float) -> float:
    """Seconds of work in all starts of this stage, this one's added."""
    file = folder / "seconds.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0.0
    write_json(file, before + seconds)
    return before + seconds


def environment(world: int = 1) -> dict[str, Any]:
    """Versions and hardware, for provenance."""
    import platform

    from train.plan import processor

    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "ranks": world,
    }


def _say(folder: Path, code: int, sentence: str) -> int:
    """Tells the sentence of the first rank to fail."""
    if _first_to_fail(folder):
        _tell(folder, code, sentence)
    return code


def _first_to_fail(folder: Path) -> bool:
    """Whether no other rank has failed before: one that has, is why this one ends."""
    with suppress(FileExistsError):
        (folder / CLAIM).touch(exist_ok=False)
        return True
    return False


def _tell(folder: Path, code: int, sentence: str) -> int:
    """Prints, and leaves the code for the command: a launcher reports one of its own."""
    write_json(folder / FAILED, {"code": code, "error": sentence})
    who = f"rank {ranks()[0]}: " if ranks()[0] else ""
    print(f"error: {who}{' '.join(sentence.split())}", file=sys.stderr, flush=True)
    return code


def _leave(code: int) -> None:
    """Ends this rank: after a barrier if all went well, and without the interpreter's own exit,
    in which gloo's threads abort about one two-process job in ten."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if code == 0 and torch.distributed.get_world_size() > 1:
            torch.distributed.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
