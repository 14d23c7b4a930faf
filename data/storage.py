"""Files on storage that fails or hangs: a read is tried again, and at last named."""

import errno
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

TRIES = 4
PAUSE = 0.5  # seconds before the second try, doubled before each later one
STALL = 120.0  # seconds after which a read counts as hung
BLOCK = 1 << 20  # bytes read at once

T = TypeVar("T")


class Unreadable(OSError):
    """A file that is there and that its storage does not give, however often it is asked."""


class Patient(io.RawIOBase):
    """The bytes of `path`. A read that fails, or takes longer than STALL seconds, is tried again on
    the file opened anew, from where it was, so that no byte is given twice or left out.

    Raises ValueError for a file that this user may not read, Unreadable after TRIES tries.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._file: io.RawIOBase | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._path.stat().st_size}
        self._at = begin[whence] + offset
        self._drop()
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills the buffer as far as one read does; returns the number of bytes, 0 at the end."""
        block = self._insist(len(buffer))
        buffer[: len(block)] = block
        self._at += len(block)
        return len(block)

    def close(self) -> None:
        self._drop()
        super().close()

    def _insist(self, size: int) -> bytes:
        for attempt in range(1, TRIES + 1):
            try:
                self._file, block = within(
                    STALL, lambda: _read(self._file, self._path, self._at, size)
                )
                return block
            except PermissionError as error:
                raise ValueError(refused(self._path, error)) from None
            except OSError as error:
                self._file, why = None, error.strerror or str(error)
            if attempt < TRIES:
                time.sleep(PAUSE * 2 ** (attempt - 1))
        raise Unreadable(
            f"{self._path} cannot be read at byte {self._at:,} ({why}, tried {TRIES} times): check "
            "the disk or the mount; the same command goes on where it was"
        )

    def _drop(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


def stream(path: Path) -> io.BufferedReader:
    """The file, for reading in blocks; raises as Patient does, when it is read."""
    return io.BufferedReader(Patient(path), BLOCK)


def refused(path: Path, error: OSError) -> str:
    """The sentence for a name that the system will not open."""
    name = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
    advice = {
        errno.EACCES: "give yourself the right to read it (chmod), or name another",
        errno.EPERM: "give yourself the right to read it (chmod), or name another",
        errno.ENAMETOOLONG: "correct the name",
    }.get(error.errno or 0, "correct the name, or look at what it is")
    return f"{name} cannot be opened ({error.strerror or error}): {advice}"


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises; TimeoutError when it has not come back in time. Its thread is
    then left behind: nothing can end a read that the system itself waits for."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(work())
        except BaseException as error:  # it is the caller's
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:g} s")
    return done[0]


def _read(file: io.RawIOBase | None, path: Path, at: int, size: int) -> tuple[io.RawIOBase, bytes]:
    """The open file and its next block."""
    if file is None:
        file = path.open("rb", buffering=0)
        file.seek(at)
    return file, file.read(size) or b""
