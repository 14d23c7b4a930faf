"""One job at a time in a folder: a lock that names its owner and recovers from a dead one."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import psutil

BEAT = 5.0  # seconds between two signs of the owner
AGES = 3 * BEAT  # without a sign, an owner on another machine is dead
HELD = (errno.EAGAIN, errno.EACCES)
WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # a file system that has no locks


class Lock:
    """Held from `take` to `free`, or as long as its process lives.

    The file says who holds it, and is written again every BEAT seconds. On one machine the
    system's own lock decides, which ends with its process and is not inherited by its children.
    Over NFS it holds between machines too, but not on every file system; so a note of another
    machine is watched for a while: an owner that lives changes it. No clocks are compared.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ".lock"
        self.stream: int | None = None
        self.count = 0
        self._freed = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)

    def take(self) -> str:
        """Takes the lock; returns a line on the owner that left it behind, or nothing. Raises
        ValueError with the owner's name where there is one at work."""
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
        raise ValueError(
            f"{_named(owner)} is at work in {self.file.parent}: let it finish, or end it first"
        )

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
