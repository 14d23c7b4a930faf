"""Rows that no one wants to learn from: broken characters, and the same again."""

import hashlib
import re
from collections import Counter

from data.rows import Row

LOOK = 4_000  # characters of a text that are looked at
FEWEST = 20  # rows below which shares say nothing
BROKEN = 0.2  # share of rows in broken characters above which it is the file that is wrong
REPEATED = 0.8  # the same of rows that repeat earlier ones; NLI sets have each premise three times
REMEMBERED = 2_000_000  # rows of a source among which repeated ones are found
MOJIBAKE, REPEAT = "in broken characters", "repeated"
FOREIGN = re.compile(r"[^\x00-\x7f]+")


def refuse_poor(name: str, read: int, dropped: Counter[str]) -> None:
    """Raises ValueError where so many of the `read` rows were dropped as broken or repeated that
    the file must be wrong."""
    for reason, most, advice in (
        (MOJIBAKE, BROKEN, "it was read in another encoding: fetch it again, or convert it"),
        (REPEAT, REPEATED, "the file holds its rows several times, or another column is meant"),
    ):
        found = dropped[reason]
        if read >= FEWEST and found > most * read:
            raise ValueError(
                f"{found:,} of {read:,} rows of {name} are {reason}, expected at most {most:.0%}: "
                f"{advice}"
            )


class Repeats:
    """Which rows are word for word an earlier one, among the first 2,000,000."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def __call__(self, row: Row) -> str | None:
        """The reason to drop the row, or None."""
        said = [row["text"]] if "text" in row else [t["content"] for t in row["messages"]]
        mark = int.from_bytes(hashlib.blake2b("\0".join(said).encode(), digest_size=8).digest())
        if mark in self._seen:
            return REPEAT
        if len(self._seen) < REMEMBERED:
            self._seen.add(mark)
        return None


def is_mojibake(text: str) -> bool:
    """Whether a text is UTF-8 that somebody read as Windows-1252 or Latin-1 ("schÃ¶n", "í•œêµ"), or
    lost many characters to U+FFFD. Only the first 4,000 characters are looked at.

    Of text that was read rightly, next to no run of foreign characters is valid UTF-8 in those
    encodings, since a lone letter never is.
    """
    text = text[:LOOK]
    if text.count("\ufffd") > max(1, 0.02 * len(text)):
        return True
    runs = FOREIGN.findall(text)
    return 2 * sum(_twice_encoded(run) for run in runs) > len(runs)


def _twice_encoded(run: str) -> bool:
    raw = bytearray()
    for character in run:
        try:
            raw += character.encode("cp1252")
        except UnicodeEncodeError:  # five bytes that Windows-1252 leaves out are read as Latin-1
            if ord(character) > 255:
                return False
            raw.append(ord(character))
    try:
        return len(raw) > 1 and bool(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return False
