"""What else a machine does while it measures. All arms of a bench are then slow together, so that
neither their intervals nor their controls show it; yet such speeds are not those of a quiet one."""

import time
from collections.abc import Sequence

import psutil

LITTLE = 0.1  # of a core; what a machine that is left alone takes
IDLE = ("idle", "iowait", "guest", "guest_nice")  # a guest's time is in user's already


class Others:
    """Processor time of other processes on the cores that this one may use, with what other guests
    of the same host took of them."""

    def __init__(self) -> None:
        self._cores = cores()
        self._last = self._look()

    def since(self) -> tuple[float, float]:
        """Seconds, and seconds of processors that others used, since it was asked before."""
        then, self._last = self._last, self._look()
        return self._last[0] - then[0], self._last[1] - then[1]

    def _look(self) -> tuple[float, float]:
        times = psutil.cpu_times(percpu=True)
        mine = [times[core]._asdict() for core in self._cores if core < len(times)]
        busy = sum(v for each in mine for name, v in each.items() if name not in IDLE)
        return time.perf_counter(), busy - time.process_time()


def count() -> int:
    """How many cores this process may use."""
    return len(cores())


def cores() -> list[int]:
    """Those that this process may use."""
    try:
        return list(psutil.Process().cpu_affinity())
    except (AttributeError, psutil.Error):  # a system that does not say
        return list(range(psutil.cpu_count() or 1))


def taken(
    looks: Sequence[tuple[float, float]], threads: int, cores: int | None = None
) -> float | None:
    """Cores, on average, that others took while these looks (`since`) were made: beyond those that
    `threads` leave free. None where there was no look."""
    seconds = sum(look[0] for look in looks)
    if not seconds:
        return None
    free = max(0, (cores or count()) - threads)
    return round(max(0.0, sum(look[1] for look in looks) / seconds - free), 2)


def mind(found: float | None, so: str) -> str | None:
    """The sentence for what was measured beside other work; None where that was little."""
    if not found or found <= LITTLE:
        return None
    return f"Mind: other processes took {found:g} of this machine's cores meanwhile, so {so}."
