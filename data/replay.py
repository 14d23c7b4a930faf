"""Old rows among new ones, so that what trains on the new forgets less of the old."""

import hashlib
from collections.abc import Iterator
from typing import final

from data.language import Gated
from data.rows import Row
from data.sources import Mix, Source


@final
class Replay(Source):
    """The rows of `new`, with a `share` of rows of `old` among them: n x share of the first n,
    rounded down, for every n.

    It ends with `new`. Where `old` ends earlier the rest is new; the share that was reached is
    printed. old null: new rows alone. Both are behind gates for the languages that they name
    before they are counted (data/language.py), so that dropped rows do not change the share.
    """

    def __init__(self, *, new: Source, old: Source | None = None, share: float = 0.2) -> None:
        if not 0 <= share < 1:
            raise ValueError(
                f"share is {share}, expected 0 or more and less than 1: the part of all rows that "
                "is old"
            )
        self._parts = {"new": new} if old is None or not share else {"new": new, "old": old}
        self._share = share
        both = Mix(parts=self._parts)
        self.name, self.licence, self.evaluation = both.name, both.licence, both.evaluation

    def rows(self) -> Iterator[Row]:
        gates = {name: Gated(part, of="prompt") for name, part in self._parts.items()}
        old = iter(gates["old"]) if "old" in gates else iter(())
        total = replayed = 0
        try:
            for row, again in woven(iter(gates["new"]), old, self._share):
                total, replayed = total + 1, replayed + again
                yield row
        finally:  # also when the reader has enough before the source ends
            print(*(gate.summary() for gate in gates.values()), sep="\n")
            print(f"replay: {replayed:,} of {total:,} rows are old", flush=True)

    def revisions(self) -> dict[str, str]:
        return {name: sha for p in self._parts.values() for name, sha in p.revisions().items()}

    def fingerprint(self) -> str:
        named = {name: part.fingerprint() for name, part in self._parts.items()}
        return hashlib.sha256(repr((named, self._share)).encode()).hexdigest()


def woven(new: Iterator[Row], old: Iterator[Row], share: float) -> Iterator[tuple[Row, bool]]:
    """The rows, and whether each is an old one."""
    total = replayed = 0
    for row in new:
        while int((total + 1) * share) > replayed and (again := next(old, None)) is not None:
            total, replayed = total + 1, replayed + 1
            yield again, True
        total += 1
        yield row, False
