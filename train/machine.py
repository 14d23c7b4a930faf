"""This machine: the memory that is left on it, and how fast it is."""

import functools
import os
import resource
import time
from collections.abc import Iterable
from pathlib import Path

import torch


def memory_free(root: Path = Path("/")) -> int:
    """Bytes that this process can still have: of its GPU, else of the machine's memory within the
    limits of its control groups (both versions)."""
    if torch.cuda.is_available() and root == Path("/"):
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    meminfo = (root / "proc/meminfo").read_text(encoding="ascii")
    (line,) = [text for text in meminfo.splitlines() if text.startswith("MemAvailable:")]
    return min([int(line.split()[1]) * 1024, *_limits(root)])


def peak_memory() -> float:
    """The most that this process has held, MiB: on its GPU, else resident. (`ru_maxrss` is at
    least what its parent held when it was started.)"""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (line,) = [t for t in status.read_text(encoding="ascii").splitlines() if t.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


def _limits(root: Path) -> Iterable[int]:
    """What each control group above this process leaves it; file caches can be given up."""
    file = root / "proc/self/cgroup"
    groups = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for group in groups:
        _, kinds, place = group.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / kinds
        names = ("memory.max", "memory.current", "inactive_file")
        if kinds:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder = top / place.lstrip("/")
        for each in [folder, *folder.parents]:
            if each.is_relative_to(top) and (each / names[0]).is_file():
                most = (each / names[0]).read_text(encoding="ascii").strip()
                if most != "max":
                    yield max(0, int(most) - _used(each, names[1], names[2]))


def _used(group: Path, file: str, given_up: str) -> int:
    used = int((group / file).read_text(encoding="ascii"))
    stat = (group / "memory.stat").read_text(encoding="ascii").split()
    counts = dict(zip(stat[::2], stat[1::2], strict=True))
    return used - int(counts.get(given_up, 0))


def neighbours(ranks: int) -> int:
    """Ranks that share this rank's memory: those of its machine on a CPU; a GPU has one."""
    if torch.cuda.is_available():
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(local) if local else ranks


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def matrix_speed(dtype: str) -> float:
    """Floating-point operations a second of a matrix product on this machine, now."""
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    a = torch.ones(1024, 1024, device=device()).to(kind)
    begin, count = now(), 0
    while now() - begin < 0.3:
        torch.mm(a, a)
        count += 1
    return count * 2 * 1024**3 / (now() - begin)


@functools.cache
def memory_speed() -> float:
    """Bytes a second that this machine reads, measured now by summing 64 MiB."""
    a = torch.ones(2**24, device=device())
    begin, count = now(), 0
    while now() - begin < 0.2:
        a.sum().item()
        count += 1
    return count * 2**26 / (now() - begin)


def now() -> float:
    """Seconds, with all that was asked of a GPU done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def gib(size: float) -> str:
    """Bytes for a reader."""
    for unit, scale in (("TiB", 2**40), ("GiB", 2**30)):
        if size >= scale:
            return f"{size / scale:,.1f} {unit}"
    return f"{size / 2**20:,.0f} MiB"
