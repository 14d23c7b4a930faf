"""What else a machine does while it measures. All arms of a bench are then slow together, so that
neither their intervals nor their controls show it; yet such speeds are not those of a quiet one.

Processors alone are watched: other work on a GPU is not seen.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

LITTLE = 0.1  # of a core; what a machine that is left alone takes, or this share of its threads:
SHARE = 0.02
LEAST = 1.0  # seconds of watching that tell something: a system counts in hundredths
IDLE = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in user's already
QUOTA = Path("/sys/fs/cgroup/cpu.max")

Look = tuple[float, float]
"""Seconds, and seconds of processors that others used meanwhile."""


class Others:
    """Processor time of other processes on the cores that this one may use, with what other guests
    of the same host took of them."""

    def __init__(self) -> None:
        self._cores = cores()
        self._last = self._look()

    def since(self) -> Look | None:
        """What others did since it was asked before; None where the system does not say."""
        then, self._last = self._last, self._look()
        if then is None or self._last is None:
            return None
        return self._last[0] - then[0], self._last[1] - then[1]

    def _look(self) -> Look | None:
        times = psutil.cpu_times(percpu=True)
        mine = [times[core]._asdict() for core in self._cores if core < len(times)]
        if not mine or len(mine) < len(self._cores):  # a container that hides cores
            return None
        busy = sum(v for each in mine for name, v in each.items() if name not in IDLE)
        return time.perf_counter(), busy - time.process_time()


def cores() -> list[int]:
    """Those that this process may use; none where it has a share of them, which others' work does
    not touch."""
    try:
        if QUOTA.read_text(encoding="ascii").split()[0] != "max":
            return []
    except (OSError, IndexError):  # another system
        pass
    try:
        return list(psutil.Process().cpu_affinity())
    except (AttributeError, psutil.Error):  # a system that does not say
        return list(range(psutil.cpu_count() or 1))


def taken(looks: Sequence[Look | None], threads: int | None = None) -> float | None:
    """Cores, on average, that others took while these looks were made: beyond those that `threads`
    (as many as torch has on a CPU, one beside a GPU) leave free, with their hyperthreads. None
    where too little was seen."""
    seen = [look for look in looks if look]
    seconds = sum(look[0] for look in seen)
    if seconds < LEAST:
        return None
    siblings = (psutil.cpu_count() or 1) / (psutil.cpu_count(logical=False) or 1)
    used = (threads or needed()) * max(1.0, siblings)
    free = max(0.0, len(cores()) - used)
    return round(max(0.0, sum(look[1] for look in seen) / seconds - free), 2)


def needed() -> int:
    """Threads that a measurement computes with here."""
    return 1 if torch.cuda.is_available() else torch.get_num_threads()


def much(found: float | None, threads: int | None = None) -> bool:
    """Whether so many cores are more than a machine that is left alone takes."""
    return (found or 0.0) > max(LITTLE, SHARE * (threads or needed()))


def mind(found: float | None, so: str) -> str | None:
    """The sentence for what was measured beside other work; None where that was little."""
    if not much(found):
        return None
    return f"Mind: other processes took {found:g} of this machine's cores meanwhile, so {so}."
