"""Files that are whole or not there, and known again by their hashes."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

Digests = dict[str, dict[str, Any]]
"""Name of a file below some folder -> its `bytes` and `sha256`."""


@contextmanager
def whole(path: Path) -> Iterator[TextIO]:
    """A stream of UTF-8 into `path`, which is there, whole and durable, once the block has ended.

    If the block or a write fails, or the process dies, `path` is what it was before. OSError comes
    through; what was written so far is removed.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes whole or not at all, and durably."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    with whole(path) as stream:
        stream.write(text)


def flush(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path, names: Iterable[str]) -> Digests:
    """Size and hash of each of these files of `folder`."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }


def damage(folder: Path, known: Any) -> str | None:
    """What differs between the files of `folder` and the digests that were noted of them, or None.

    A note that is no Digests (it was damaged itself) is a difference too.
    """
    if not isinstance(known, dict) or not known:
        return "the list of its files is not readable"
    for name, noted in known.items():
        file = folder / name
        if not isinstance(noted, dict) or noted.keys() != {"bytes", "sha256"}:
            return f"what is noted of {name} is not readable"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != noted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {noted['bytes']}"
        if sha256(file) != noted["sha256"]:
            return f"the hash of {name} differs from the one noted when it was written"
    return None
