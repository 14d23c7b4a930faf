"""Checkpoints that a crash cannot half-write and any number of ranks can read.

A checkpoint is a folder: state.safetensors (weights and optimiser, fp32), position.json and, last,
manifest.json with sizes and hashes. It is written beside its name and renamed into place; where
that name is taken (by a damaged one, or one measured anew) it becomes step-N.1, step-N.2 and so on.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.files import damage, digests, flush, write_json

STATE, POSITION, MANIFEST = "state.safetensors", "position.json", "manifest.json"
NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
PART = re.compile(NAME.pattern + r"\.part")
FULL = (errno.ENOSPC, errno.EDQUOT)
MIB = 2**20
# A flush shows no progress while it lasts: storage that many share may take minutes for any, and
# for a large one as long as the slowest disk needs.
FLUSH, SLOWEST = 300.0, 10 * MIB  # seconds, bytes a second


def save(
    folder: Path, step: int, state: dict[str, Tensor], position: dict[str, Any], keep: int = 2
) -> Path:
    """Writes checkpoint `step` under `folder` and verifies it; then removes older ones.

    Of the older ones that verify, `keep` - 1 stay; with `keep` 1 no other stays, of whatever step.
    On a full disk all but the newest that verifies are removed and it is tried once more. Raises
    OSError, with what was there before still there, if it cannot be written. Rank 0 alone calls it.
    """
    try:
        final = _write(folder, step, state, position)
    except (OSError, SafetensorError) as error:
        if _number(error) not in FULL:
            raise _cannot(folder, step, state, error) from None
        _purge(folder, None, 1)
        try:
            final = _write(folder, step, state, position)
        except (OSError, SafetensorError) as again:
            raise _cannot(folder, step, state, again) from None
    try:
        why = fault(final)
    except OSError as error:
        why = f"it cannot be read ({error.strerror})"
    if why is None:
        _purge(folder, final, keep)
    else:
        print(f"{final.name} was written and does not verify, earlier ones stay: {why}", flush=True)
    return final


def patience(state: dict[str, Tensor]) -> float:
    """Seconds that a save may stand still before it counts as hung: one that storage holds for ever
    must end the job, and one that it delays must not."""
    return FLUSH + sum(tensor.nbytes for tensor in state.values()) / SLOWEST


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest checkpoint that verifies: its state, its position and which were skipped, why.

    None, with those named on the terminal, where none verifies. Raises OSError if one of them could
    not be read at all and none verifies: to begin anew would give up work that may be whole.
    """
    skipped: list[str] = []
    unreadable: OSError | None = None
    for path in reversed(_steps(folder)):
        try:
            why = fault(path)
            if why is None:
                position = json.loads((path / POSITION).read_text(encoding="utf-8"))
                return load_file(path / STATE), position, skipped
        except (ValueError, SafetensorError) as error:
            why = f"it is no checkpoint of ours ({error})"
        except OSError as error:
            why, unreadable = f"it cannot be read ({error.strerror or error})", error
        skipped.append(f"{path.name}: {why}")
    if unreadable is not None:
        raise OSError(
            f"no checkpoint of {folder} can be used ({'; '.join(skipped)}): make them readable, or "
            "remove the folder to begin anew"
        )
    for why in skipped:
        print(f"skipped checkpoint {why}", flush=True)
    return None


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (path / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    try:
        known = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        if set(known) != {STATE, POSITION}:
            return f"its {MANIFEST} does not list {STATE} and {POSITION}"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is not readable"
    return damage(path, known)


def reserve(folder: Path, size: int) -> None:
    """Raises OSError unless two checkpoints of `size` bytes, less those that are there, will fit.

    The blocks are really taken, and given back at once: a quota or a read-only folder is met now,
    not after hours of training.
    """
    wanted = size * max(1, 2 - len(_steps(folder)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=folder) as stream:  # without a name: no death leaves it
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(stream.fileno(), 0, wanted)
    except OSError as error:
        raise OSError(
            f"{folder} cannot take the checkpoints of this training ({error.strerror}): two of "
            f"{size / MIB:,.1f} MiB are kept, so {wanted / MIB:,.1f} MiB more are needed, and "
            f"{_free(folder)} are free; free some, or set output_dir to another disk"
        ) from None


def _write(folder: Path, step: int, state: dict[str, Tensor], position: dict[str, Any]) -> Path:
    """The new checkpoint under a name that nothing had; nothing is left of it if this fails."""
    new = not folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    if new:
        flush(folder.parent)
    for left in [p for p in folder.iterdir() if PART.fullmatch(p.name)]:
        shutil.rmtree(left, ignore_errors=True)
    final, again = folder / f"step-{step:08d}", count(1)
    while os.path.lexists(final):
        final = folder / f"step-{step:08d}.{next(again)}"
    part = folder / f"{final.name}.part"
    try:
        part.mkdir()
        save_file(state, part / STATE)
        flush(part / STATE)
        write_json(part / POSITION, {"step": step, **position})
        write_json(part / MANIFEST, {"files": digests(part, (STATE, POSITION))})
        flush(part)
        part.rename(final)
        flush(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _steps(folder: Path) -> list[Path]:
    """Checkpoints in place, whole or not, oldest first; nothing that only looks like one."""
    found = folder.iterdir() if folder.is_dir() else ()
    mine = [p for p in found if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]
    return sorted(mine, key=_age)


def _age(path: Path) -> tuple[int, int]:
    found = NAME.fullmatch(path.name)
    assert found, path
    return int(found[1]), int(found[2] or 0)


def _purge(folder: Path, made: Path | None, keep: int) -> None:
    """Removes the checkpoints that are older than `made` but the newest `keep` - 1 that verify;
    with `keep` 1 all others, and without `made` all but the newest that verifies."""
    others = [p for p in _steps(folder) if p != made]
    if made and keep > 1:
        others = [p for p in others if _age(p) < _age(made)]
    spared = keep - 1 if made else keep
    for path in reversed(others):
        with suppress(OSError):  # of one that cannot be read nothing is known: it stays
            if spared and fault(path) is None:
                spared -= 1
            else:
                _remove(path)


def _remove(path: Path) -> None:
    """Removes what `save` wrote there; what others put beside it stays. A death half-way leaves a
    checkpoint that does not verify, and one that cannot be removed ends no training."""
    with suppress(OSError):
        for name in (MANIFEST, STATE, POSITION):
            (path / name).unlink(missing_ok=True)
        path.rmdir()  # refused where something else is left


def _number(error: Exception) -> int | None:
    """The system's number of an error; safetensors names it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _cannot(folder: Path, step: int, state: dict[str, Tensor], error: Exception) -> OSError:
    number = _number(error)
    size = sum(tensor.nbytes for tensor in state.values())
    kept = ""
    with suppress(OSError):
        kept = next((f"{p.name} is kept; " for p in reversed(_steps(folder)) if not fault(p)), "")
    return OSError(
        f"the checkpoint of step {step} ({size / MIB:,.1f} MiB) cannot be saved in {folder}: "
        f"{os.strerror(number) if number else error}, {_free(folder)} free; "
        f"{kept}free some space there, or make it writable, and the same command goes on"
    )


def _free(folder: Path) -> str:
    """Free space of the disk that the folder is, or would be, on."""
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / MIB:,.1f} MiB"
