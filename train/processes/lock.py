"""One job at a time in a folder: a lock that names its owner and recovers from a dead one."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

BEAT = 5.0  # seconds between two signs of the owner
AGES = 3 * BEAT  # without a sign, an owner on another machine is dead
LOOK, TELL = 0.5, 120.0  # seconds between two looks, and two lines, of one that waits
HELD = (errno.EAGAIN, errno.EACCES)
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # a file system that has no locks


class Busy(ValueError):
    """Another process is at work in the folder; `who` names it."""

    def __init__(self, who: str, folder: Path) -> None:
        super().__init__(f"{who} is at work in {folder}: let it finish, or end it first")
        self.who = who


class Lock:
    """Held from `take` to `free`, or as long as its process lives.

    The file says who holds it, and is written again every BEAT seconds. On one machine the
    system's own lock decides, which ends with its process and is not inherited by its children.
    Over NFS it holds between machines too, but not on every file system; so a note of another
    machine is watched for a while: an owner that lives changes it. No clocks are compared.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self.file = folder / name
        self.stream: int | None = None
        self.count = 0
        self._freed = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)

    def take(self) -> str:
        """Takes the lock; returns a line on the owner that left it behind, or nothing. Raises
        Busy with the owner's name where there is one at work."""
        self.stream = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in HELD:
                self._refuse(self._owner())
            if error.errno not in WITHOUT:  # there the note alone decides
                raise
        before = self._owner()
        if before and self._at_work(before):
            self._refuse(before)
        self._write()
        self._beats.start()
        return f"{_named(before)} has left this stage unfinished: going on" if before else ""

    def wait(self, tell: Callable[[str], None]) -> None:
        """Takes the lock, however long another has it; tells at once for whom it waits, and again
        every TELL seconds."""

        def tried() -> str:
            try:
                self.take()
            except Busy as busy:
                return busy.who
            return ""

        self._patiently(tried, tell)

    def wait_for(self, tell: Callable[[str], None]) -> None:
        """Waits, and tells as `wait` does, while another process has the lock; takes nothing."""
        self._patiently(self._at_it, tell)

    def _patiently(self, look: Callable[[], str], tell: Callable[[str], None]) -> None:
        """Until look() names nobody."""
        since = due = time.monotonic()
        while who := look():
            now = time.monotonic()
            if now >= due:
                due = now + TELL
                tell(f"{who} makes {self.file.parent.name}: waiting ({(now - since) / 60:.0f} min)")
            time.sleep(LOOK)

    def _at_it(self) -> str:
        """Who has the lock, as far as the system knows; "" for nobody."""
        if not self.file.is_file():
            return ""
        self.stream = os.open(self.file, os.O_RDWR)
        try:
            fcntl.lockf(self.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return ""
        except OSError as error:
            return _named(self._owner()) if error.errno in HELD else ""
        finally:
            os.close(self.stream)
            self.stream = None

    def free(self) -> None:
        """Gives the lock back; an empty note has no owner."""
        self._freed.set()
        if self.stream is not None:
            self._beats.join(BEAT)
            with contextlib.suppress(OSError):
                os.ftruncate(self.stream, 0)
            os.close(self.stream)
            self.stream = None

    def _refuse(self, owner: dict[str, Any]) -> None:
        assert self.stream is not None
        os.close(self.stream)
        self.stream = None
        raise Busy(_named(owner), self.file.parent)

    def _at_work(self, owner: dict[str, Any]) -> bool:
        """Whether the process of this note lives, though the system's lock did not say so."""
        if owner["host"] == socket.gethostname():
            with contextlib.suppress(psutil.NoSuchProcess):
                born = psutil.Process(owner["pid"]).create_time()
                return abs(born - owner["born"]) < 1 and owner["pid"] != os.getpid()
            return False
        until = time.monotonic() + AGES
        while time.monotonic() < until:
            time.sleep(BEAT / 5)
            if self._owner() not in (owner, {}):
                return True
        return False

    def _owner(self) -> dict[str, Any]:
        """The note, through the one descriptor: closing another would give back the lock."""
        assert self.stream is not None
        try:
            found = json.loads(os.pread(self.stream, 4096, 0))
            return found if {"host", "pid", "born", "since", "count"} <= found.keys() else {}
        except (ValueError, AttributeError):
            return {}

    def _write(self) -> None:
        assert self.stream is not None
        self.count += 1
        me = psutil.Process()
        note = {"host": socket.gethostname(), "pid": me.pid, "born": me.create_time()}
        note |= {"since": time.strftime("%Y-%m-%d %H:%M"), "count": self.count}
        said = json.dumps(note).encode()
        os.pwrite(self.stream, said.ljust(256), 0)  # one write, of one length: never half a note
        os.ftruncate(self.stream, 256)

    def _beat(self) -> None:
        while not self._freed.wait(BEAT):
            with contextlib.suppress(OSError, AssertionError, psutil.Error):
                self._write()


def _named(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
