"""Runs that are made on several ranks, and meet in the order in which one rank makes them.

Each rank writes its own file, so that a stop loses no more than the run at work; any number of
ranks goes on with what any other number has left.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from decoding.ranks import Ranks

Row = dict[str, Any]
KEYS = ("arm", "temperature", "batch", "repeat", "group")  # what names a run


def place_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What names the run that a row is of."""
    return tuple(row[key] for key in KEYS)


class Rows:
    """The rows of runs.jsonl, in memory and on disk; to be entered as a context.

    kept: runs.jsonl of a single rank; of several, rank n writes runs-n.jsonl beside it. arms and
    cells, (batch, temperature), are in the order in which they are measured.
    """

    def __init__(
        self, kept: Path, ranks: Ranks, *, arms: list[str], cells: list[tuple[int, float]]
    ) -> None:
        self.ranks = ranks
        self._arms = {name: place for place, name in enumerate(arms)}
        self._cells = {cell: place for place, cell in enumerate(cells)}
        before = ranks.decide(lambda: read(kept), alone=True)  # before any rank writes
        self._rows = {place_of(row): row for row in before}
        self._new: list[Row] = []
        own = kept if ranks.world == 1 else kept.with_stem(f"{kept.stem}-{ranks.rank}")
        writes = ranks.first or not ranks.together
        file = own if writes else Path(os.devnull)
        # line by line: a signal ends a process without emptying its buffers
        self._stream = file.open("a", encoding="utf-8", buffering=1)
        if before:
            self._stream.write("\n")  # the last line may have been cut short

    def __enter__(self) -> "Rows":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def __contains__(self, place: tuple[Any, ...]) -> bool:
        return place in self._rows

    @property
    def rows(self) -> list[Row]:
        """All that have met here, in the order of one rank: by cell, repeat, group and arm."""
        return sorted(self._rows.values(), key=self._order)

    def add(self, row: Row) -> None:
        """Takes a run that this rank has made; it replaces an earlier one of its name."""
        self._rows[place_of(row)] = row
        self._new.append(row)
        self._stream.write(json.dumps(row) + "\n")

    def meet(self) -> list[Row]:
        """Waits for all ranks and returns the rows of all of them. Raises OSError where a rank has
        ended."""
        met = self.ranks.gather(self._new)
        self._rows |= {place_of(row): row for row in met}
        self._new = []
        return self.rows

    def _order(self, row: Row) -> tuple[int, int, int, int]:
        cell = self._cells[row["batch"], row["temperature"]]
        return cell, row["repeat"], row["group"], self._arms[row["arm"]]


def read(kept: Path) -> list[Row]:
    """The runs that earlier starts of this stage made, on any number of ranks; a line that was cut
    short is left out, to be made again."""
    rows = []
    for file in [kept, *sorted(kept.parent.glob(f"{kept.stem}-*{kept.suffix}"))]:
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
    return rows
