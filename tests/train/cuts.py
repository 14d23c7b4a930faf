"""Ends a process of ours at a chosen system call, cuts the power with it, or fills its disk. Linux.

The process is a fork that ptrace stops at each call, so that writes of safetensors count as well as
those of Python.
"""

import ctypes
import json
import os
import platform
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

LIBC = ctypes.CDLL(None, use_errno=True)
TRACEME, SYSCALL, SETOPTIONS, SYSCALL_INFO = 0, 24, 0x4200, 0x420E
GOOD, EXITKILL = 1, 0x100000
NEW_MOUNTS, NEW_USER, PRIVATE, READ_ONLY, REMOUNT = 0x20000, 0x10000000, 0x44000, 1, 32
CREATE = os.O_CREAT
REFUSED, FAILED = 77, 70  # exit codes of a fork: mounting is not allowed here; its work raised

CALLS = {  # number -> name, of the calls that change files
    "x86_64": {
        1: "write", 18: "write", 20: "write", 77: "write", 285: "write", 257: "open",
        74: "fsync", 75: "fsync", 82: "rename", 264: "renameat", 316: "renameat",
        83: "mkdir", 258: "mkdir", 84: "rmdir", 87: "unlink", 263: "unlink",
    },
    "aarch64": {
        64: "write", 68: "write", 66: "write", 46: "write", 47: "write", 56: "open",
        82: "fsync", 83: "fsync", 38: "renameat", 276: "renameat", 34: "mkdir", 35: "unlink",
    },
}.get(platform.machine(), {})  # fmt: skip


class _Info(ctypes.Structure):
    """struct ptrace_syscall_info, as it is when a call begins (op 1)."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


def forked(work: Callable[[], Any]) -> int:
    """The process id of a fork that does the work and exits with 0, or FAILED with a traceback."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(FAILED)
    return child


def cut(work: Callable[[], Any], folder: Path, when: int, power: bool = False) -> list[str]:
    """Does the work in a fork that dies as it begins its `when`-th call that changes `folder`.

    Returns the names of the calls begun; the last is the deadly one if there are `when`. With
    `power`, what was written and not yet flushed is lost: such files are cut in half.
    """
    if not CALLS:
        pytest.skip(f"the numbers of system calls on {platform.machine()} are not listed")

    def traced() -> None:
        LIBC.ptrace(TRACEME, 0, None, None)
        os.kill(os.getpid(), signal.SIGSTOP)
        work()

    child, begun, dirty = forked(traced), list[str](), set[str]()
    os.waitpid(child, 0)
    if LIBC.ptrace(SETOPTIONS, child, None, ctypes.c_void_p(GOOD | EXITKILL)):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.skip("this machine lets nobody trace a process")
    for name, paths in _stops(child, str(folder)):
        begun.append(name)
        if len(begun) == when:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            for file in map(Path, dirty if power else ()):
                if file.is_file():
                    os.truncate(file, file.stat().st_size // 2)
            break
        _follow(name, paths, dirty)
    return begun


def _stops(child: int, folder: str) -> Iterator[tuple[str, list[str]]]:
    """The name and the paths of each call as it begins; the child runs on when the next is asked
    for. Ends when the child has."""
    info, passed = _Info(), 0
    while True:
        LIBC.ptrace(SYSCALL, child, None, ctypes.c_void_p(passed))
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            assert status == 0, f"the work itself failed: status {status}"
            return
        stopped = os.WSTOPSIG(status)
        passed = 0 if stopped in (signal.SIGTRAP | 0x80, signal.SIGTRAP) else stopped
        if stopped != signal.SIGTRAP | 0x80:
            continue
        LIBC.ptrace(SYSCALL_INFO, child, ctypes.c_void_p(ctypes.sizeof(info)), ctypes.byref(info))
        name = CALLS.get(info.number) if info.op == 1 else None
        if name:
            paths = _paths(child, name, [int(a) for a in info.arguments])
            if any(path.startswith(folder) for path in paths):
                yield name, paths


def _paths(child: int, name: str, arguments: list[int]) -> list[str]:
    """What a call is about: an open file, or the paths that stand in the child's memory."""
    if name in ("write", "fsync"):
        return [_link(child, arguments[0])]
    if name == "open":
        return [_text(child, arguments[1])] if arguments[2] & CREATE else []
    if name == "renameat":
        return [_text(child, arguments[1]), _text(child, arguments[3])]
    if name == "rename":
        return [_text(child, arguments[0]), _text(child, arguments[1])]
    first = _text(child, arguments[0])  # mkdir, rmdir, unlink; else relative to an open folder
    return [first if first.startswith("/") else _below(child, arguments)]


def _below(child: int, arguments: list[int]) -> str:
    name = _text(child, arguments[1])
    return name if name.startswith("/") else f"{_link(child, arguments[0])}/{name}"


def _link(child: int, descriptor: int) -> str:
    try:
        return str(Path(f"/proc/{child}/fd/{descriptor}").readlink())
    except OSError:
        return ""


def _text(child: int, address: int) -> str:
    try:
        with Path(f"/proc/{child}/mem").open("rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(4096).split(b"\0")[0].decode(errors="replace")
    except (OSError, OverflowError, ValueError):
        return ""


def _follow(name: str, paths: list[str], dirty: set[str]) -> None:
    """Keeps account of the files whose bytes are not yet on the disk, under their present names."""
    if name == "write":
        dirty.add(paths[0])
    elif name == "fsync":
        dirty.discard(paths[0])
    elif name.startswith("rename"):
        old, new = paths
        for file in [f for f in dirty if f == old or f.startswith(f"{old}/")]:
            dirty.discard(file)
            dirty.add(new + file.removeprefix(old))


def on_small_disk(folder: Path, size: int, work: Callable[[], Any]) -> Any:
    """What the work gives, done in a fork that sees a disk of `size` bytes in `folder`."""

    def mounted() -> Any:
        mount(folder, f"size={size}")
        return work()

    return told(mounted)


def mount(folder: Path, options: str, flags: int = 0) -> None:
    """Mounts a tmpfs that this process alone sees, or mounts it again with other flags."""
    if not flags & REMOUNT:
        me, users = os.getuid(), 0 if os.getuid() == 0 else NEW_USER
        if LIBC.unshare(NEW_MOUNTS | users) or LIBC.mount(b"none", b"/", None, PRIVATE, None):
            os._exit(REFUSED)
        if users:
            Path("/proc/self/uid_map").write_text(f"0 {me} 1")
    if LIBC.mount(b"none", str(folder).encode(), b"tmpfs", flags, options.encode()):
        os._exit(REFUSED)


def told(work: Callable[[], Any]) -> Any:
    """What the work, done in a fork, gives as JSON; skips the test where mounting is refused."""
    out, into = os.pipe()
    child = forked(lambda: os.write(into, json.dumps(work()).encode()))
    os.close(into)
    with os.fdopen(out) as stream:
        said = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == REFUSED:
        pytest.skip("this machine lets nobody mount a small disk")
    assert code == 0, f"the fork ended with {code}"
    return json.loads(said)


def no_file_over(size: int) -> None:
    """From here on every write of this process beyond `size` bytes of a file fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
