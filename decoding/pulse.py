"""Signs of progress: what the main thread is at, so that a watch can tell a hung rank from a busy
one. Nothing is watched outside of `item` and `paced`, whose pieces are known to end."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

FIRST = 1800.0  # seconds; the first piece of a kind may compile or read from a slow disk
SLOWER = 10  # times the longest piece so far: what the next may take

T = TypeVar("T")


@dataclass
class Pulse:
    """The piece of work at hand; written by the main thread, read by a watch."""

    doing: str | None = None
    since: float = 0.0  # when it began, time.monotonic()
    longest: dict[str, float] = field(default_factory=dict)  # seconds, by kind of piece
    least: dict[str, float] = field(default_factory=dict)  # what a kind is given in any case

    def limit(self, doing: str, hang_seconds: float) -> float:
        """Seconds that a piece of this kind may take, at work, before it counts as hung."""
        rest = self.rest(doing, hang_seconds)
        return max(rest, SLOWER * self.longest[doing] if doing in self.longest else FIRST)

    def rest(self, doing: str, hang_seconds: float) -> float:
        """Seconds that it may stand still: no process of it computes, reads or writes."""
        return max(hang_seconds, self.least.get(doing, 0.0))

    def begin(self, doing: str) -> None:
        self.since, self.doing = time.monotonic(), doing

    def end(self) -> None:
        if self.doing is not None:
            spent = time.monotonic() - self.since
            self.longest[self.doing] = max(spent, self.longest.get(self.doing, 0.0))
        self.doing = None


PULSE = Pulse()


@contextmanager
def item(doing: str, least: float = 0.0) -> Iterator[None]:
    """A piece of work, such as a training step: one that takes far longer than those before it,
    or stands still, is a hang and ends the job; it has `least` seconds in any case. Pieces do not
    nest: the inner one counts."""
    PULSE.least[doing] = least
    PULSE.begin(doing)
    try:
        yield
    finally:
        PULSE.end()


def paced(items: Iterable[T], doing: str, least: float = 0.0) -> Iterator[T]:
    """The same items; fetching each, and what is done with it, is a piece of work, which may take
    `least` seconds however quick those before it were."""
    PULSE.least[doing] = least
    try:
        PULSE.begin(doing)
        for each in items:
            yield each
            PULSE.end()
            PULSE.begin(doing)
    finally:
        PULSE.doing = None  # the end of the items, or of interest in them, is no piece
