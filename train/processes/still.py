"""Whether a rank works: what its process and those that it has started compute, read and write.

A rank that stands still is told apart from one that takes long, so that a hang is known soon also
where nobody knows how long a piece of work takes: in its first one.
"""

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import psutil

SHARE = 0.01  # of a core; what a process at rest uses for its timers, and a tracker for its signs
TRICKLE = 65_536  # bytes a second; what those read and write
ROUNDED = 0.06  # seconds that looks can be off, as the counters of processes tell hundredths
MINE = Path("/proc/thread-self/io")


class Still:
    """Looks of one thread, the watch's, whose own work does not count."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._looks: deque[tuple[float, float, int]] = deque()

    def look(self, begun: float, now: float, seconds: float) -> bool:
        """Looks now, and returns whether next to nothing was done in the last `seconds` of looks,
        all of them in the piece of work that began at `begun` (both as time.monotonic()).

        What comes over the network is not counted: a machine counts it for all its processes
        together. A download that is worth the wait takes more than SHARE of a core.
        """
        if begun != self._begun:
            self._looks.clear()
            self._begun = begun
        try:
            self._looks.append((now, *used()))
        except (psutil.Error, OSError):  # where nothing can be seen nothing is said
            self._looks.clear()
            return False
        while len(self._looks) > 1 and now - self._looks[1][0] >= seconds:
            self._looks.popleft()
        then, computed, moved = self._looks[0]
        past = now - then
        # less than before is work too: of a child that has ended, which is no longer counted
        busy = abs(self._looks[-1][1] - computed) >= SHARE * past + ROUNDED
        busy = busy or abs(self._looks[-1][2] - moved) >= TRICKLE * past
        return past >= seconds and not busy


def used() -> tuple[float, int]:
    """Seconds of processors and bytes (with the number of calls) that this process and all below
    it have used so far, without this thread's own. A data loader's workers are below it."""
    me = psutil.Process()
    with_children = [me, *me.children(recursive=True)]
    seconds, moved = 0.0, 0
    for process in with_children:
        try:
            seconds += sum(process.cpu_times()[:4])  # its own, and of the children that have ended
            moved += _moved(process)
        except psutil.Error:  # it has just ended
            continue
    return seconds - time.thread_time(), moved - _own()


def _moved(process: Any) -> int:
    """What it has read and written; 0 where the system does not say."""
    try:
        return sum(process.io_counters())
    except (AttributeError, psutil.AccessDenied):
        return 0


def _own() -> int:
    if not MINE.is_file() or not os.access(MINE, os.R_OK):
        return 0
    return sum(int(line.split()[1]) for line in MINE.read_text(encoding="ascii").splitlines()[:6])
