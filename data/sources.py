"""Where the text of a stage comes from: local files, the Hub, or several sources in turn."""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import final

from data import hub
from data.files import FORMATS, Records, find, read
from data.lines import CHUNK, check_encoding
from data.rows import Only, Row, Shape, value_of
from data.storage import BLOCK, stream


def prompt_of(row: Row) -> str:
    """The user's first turn, by which rows are split, so that conversations which begin alike
    stay on one side; of a row without messages its text."""
    if "messages" not in row:
        return row["text"]
    return next((turn["content"] for turn in row["messages"] if turn["role"] == "user"), "")


def prompt_key(prompt: str) -> str:
    """32 hex digits, the same for prompts that differ in width, case or white space only."""
    plain = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()[:32]


def heldout(prompt: str, share: float = 0.02) -> bool:
    """Whether this prompt, in any of its spellings, is one of the `share` kept from training.

    Depends on the prompt alone, so every source, run and machine splits alike, and a larger
    share holds out all that a smaller one does.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held-out share is {share}, expected 0 or more and less than 1: set it")
    return int(prompt_key(prompt)[:16], 16) < share * 16**16


LOOKED_AT = 1_000  # rows, before anything starts; a broken one behind them ends its stage


class Source(ABC):
    """Text, read as a stream. `rows` starts from the beginning each time it is called."""

    name: str  # how messages call it
    language: str | None = None  # ISO 639-1; None: do not check
    licence: str | None = None
    evaluation: bool = False  # a set to measure on as a whole: no stage trains on it

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """All rows, always in the same order; ValueError where the text is not as described."""

    @abstractmethod
    def fingerprint(self) -> str:
        """64 hex digits that change when the rows do."""

    def parts(self) -> "list[Source]":
        """The sources that its rows come from, each with a language and a licence of its own."""
        return [self]

    def revisions(self) -> dict[str, str]:
        """Name -> commit of each data set of the Hub that the rows come from, for the record."""
        return {}


@final
class Local(Source):
    """Files of this machine: names or globs, read in order.

    text | prompt (and answer) | messages, schema: see data.rows.Shape.
    only: which rows are taken, such as {category: [qa, rag]}.
    columns: the names of the columns of csv and tsv files that have no header.
    format: of files whose extension does not tell (such as news.ko: txt).
    group: consecutive rows of a file with the same value in this column become one text of at
    most CHUNK characters, a row a line (a longer row stays whole); for `text` only.
    limit: rows that are read at most, counted after `only` and grouping.
    """

    def __init__(
        self,
        *,
        files: Sequence[str],
        text: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        messages: str | None = None,
        schema: str | None = None,
        only: Mapping[str, Sequence[str]] | None = None,
        columns: Sequence[str] | None = None,
        format: str | None = None,
        group: str | None = None,
        encoding: str = "utf-8",
        limit: int | None = None,
        language: str | None = None,
        licence: str | None = None,
        evaluation: bool = False,
    ) -> None:
        self._shape = Shape(text, prompt, answer, messages, schema)
        self._only = Only(only or {})
        if group is not None and text is None:
            raise ValueError("group is given without text, expected both: only texts are joined")
        if format is not None and format not in FORMATS:
            raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}")
        check_encoding(encoding)
        self._limit = check_limit(limit)
        self._files, self._columns, self._format = files, columns, format
        self._group, self._encoding = group, encoding
        self.language, self.licence, self.evaluation = language, licence, evaluation
        self.name = files if isinstance(files, str) else ", ".join(files)

    def rows(self) -> Iterator[Row]:
        return islice(self._all(), self._limit)

    def fingerprint(self) -> str:
        """Of what the files hold and how it is read; their names and dates do not count.

        ValueError, as of `rows`, where one of the first rows is not as described: a plan finds it.
        """
        for _ in islice(self._all(), LOOKED_AT):
            continue
        columns = None if self._columns is None else list(self._columns)
        shape = (self._shape.key(), self._only.allowed, self._group)
        how = (shape, columns, self._format, self._encoding, self._limit)
        digest = hashlib.sha256(repr(how).encode())
        for path in find(self._files):
            digest.update("".join(path.suffixes[-2:]).encode())
            with stream(path) as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        return digest.hexdigest()

    def _all(self) -> Iterator[Row]:
        seen: dict[str, set[str]] = {}
        for path in find(self._files):
            records = self._records(path, seen)
            if self._group is None:
                yield from (self._shape(record, where) for where, record in records)
            else:
                yield from self._grouped(records, self._group)
        self._only.check(seen, self.name)

    def _grouped(self, records: Records, group: str) -> Iterator[Row]:
        last, held, size = None, list[str](), 0
        for where, record in records:
            value = value_of(record, group, where)
            text = self._shape(record, where)["text"]
            if held and (value != last or size + len(text) > CHUNK):
                yield {"text": "\n".join(held)}
                held, size = [], 0
            held.append(text)
            last, size = value, size + len(text) + 1
        if held:
            yield {"text": "\n".join(held)}

    def _records(self, path: Path, seen: dict[str, set[str]]) -> Records:
        """(file and line, record), of the records that `only` takes."""
        for line, record in read(
            path, columns=self._columns, encoding=self._encoding, format=self._format
        ):
            where = f"{path}, {line}"
            if self._only.takes(record, where, seen):
                yield where, record


@final
class Hub(Source):
    """A data set of the Hugging Face Hub, streamed in its own order; no code of it is run.

    text | prompt (and answer) | messages, schema: see data.rows.Shape; only: see Local.
    name: the configuration. revision: a commit, so that the rows stay as they are; null or a
    branch: what it holds when it is read, see `revisions`.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        revision: str | None = None,
        text: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        messages: str | None = None,
        schema: str | None = None,
        only: Mapping[str, Sequence[str]] | None = None,
        limit: int | None = None,
        language: str | None = None,
        licence: str | None = None,
        evaluation: bool = False,
    ) -> None:
        self._shape = Shape(text, prompt, answer, messages, schema)
        self._only = Only(only or {})
        self._limit = check_limit(limit)
        self._path, self._config, self._split, self._revision = path, name, split, revision
        self._commit: str | None = None
        self.language, self.licence, self.evaluation = language, licence, evaluation
        self.name = " ".join(part for part in (path, name, split) if part)

    def rows(self) -> Iterator[Row]:
        """ValueError for a data set, configuration or split that is not there (as far as the
        Hub says); ConnectionError when the Hub cannot be reached, also half-way."""
        return islice(self._all(), self._limit)

    def fingerprint(self) -> str:
        """Of the names, the revision and the templates: the Hub's content is named by its
        revision, so without one (or with a branch) a changed data set goes unnoticed."""
        named = (self._path, self._config, self._split, self._revision)
        how = (named, self._shape.key(), self._only.allowed, self._limit)
        return hashlib.sha256(repr(how).encode()).hexdigest()

    def revisions(self) -> dict[str, str]:
        """The commit, of 40 hex digits, that the Hub names for this revision; from now on `rows`
        reads that one. Raises as `rows` does."""
        self._commit = hub.commit(self._path, self._revision, self.name)
        return {self.name: self._commit}

    def _all(self) -> Iterator[Row]:
        seen: dict[str, set[str]] = {}
        count, revision = 0, self._commit or self._revision
        records = hub.stream(self._path, self._config, self._split, revision, self.name)
        for count, record in enumerate(records, start=1):
            where = f"{self.name}, row {count}"
            if self._only.takes(record, where, seen):
                yield self._shape(record, where)
        if not count:
            raise ValueError(f"{self.name} is empty, expected rows: name another split")
        self._only.check(seen, self.name)


@final
class Mix(Source):
    """Several sources by turns: one row of each, in the order of `parts`, until all have ended.

    How much a part holds is not known while it streams, so the longest is alone at the end:
    give parts a `limit` to balance them. A part that is null is absent; each is checked for the
    language that it names itself.
    """

    def __init__(self, *, parts: Mapping[str, Source | None]) -> None:
        self._parts = {name: part for name, part in parts.items() if part is not None}
        if not self._parts:
            raise ValueError("parts is empty, expected at least one source: name one")
        self.name = " + ".join(f"{name} ({part.name})" for name, part in self._parts.items())
        languages = {part.language for part in self._parts.values()}
        self.language = languages.pop() if len(languages) == 1 else None
        licences = dict.fromkeys(part.licence for part in self._parts.values() if part.licence)
        self.licence = ", ".join(licences) or None
        self.evaluation = all(part.evaluation for part in self._parts.values())

    def rows(self) -> Iterator[Row]:
        return by_turns(part.rows() for part in self.parts())

    def parts(self) -> list[Source]:
        return [leaf for part in self._parts.values() for leaf in part.parts()]

    def revisions(self) -> dict[str, str]:
        return {name: sha for part in self.parts() for name, sha in part.revisions().items()}

    def fingerprint(self) -> str:
        named = [(name, part.fingerprint()) for name, part in self._parts.items()]
        return hashlib.sha256(repr(named).encode()).hexdigest()


def by_turns(streams: Iterable[Iterator[Row]]) -> Iterator[Row]:
    """One row of each stream, again and again, until all have ended."""
    turns = list(streams)
    while turns:
        for turn in list(turns):
            row = next(turn, None)
            if row is None:
                turns.remove(turn)
            else:
                yield row


def check_limit(limit: int | None) -> int | None:
    """The limit; ValueError unless it lets a row through."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more rows: set it, or null for all")
    return limit
