"""Reads records from files: jsonl, json, parquet, csv, tsv, txt, md, each plain, .xz or .gz."""

import csv
import difflib
import glob
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.lines import LONGEST, Lines, chunks, decoded_lines, packing, raw_lines
from data.storage import Unreadable, refused, stream

FORMATS = ("jsonl", "json", "parquet", "csv", "tsv", "txt", "md", "mdx", "py")
CELL = 1 << 26  # characters that a csv cell may have; Python's own limit of 131,072 is too small

Records = Iterator[tuple[str, dict[str, Any]]]  # ("line 12", {column: value})


def find(files: Sequence[str]) -> list[Path]:
    """The files that names and globs mean: in the given order, globs sorted, each file once.

    Raises ValueError for a name that does not exist (with near names), a folder, and a glob
    that matches nothing.
    """
    if isinstance(files, str):
        raise ValueError(f"files is the text {files!r}, expected a list: write [{files}]")
    if not files:
        raise ValueError("files is empty, expected at least one file name or glob")
    paths: dict[Path, None] = {}
    for name in files:
        paths.update(dict.fromkeys(_matches(name)))
    return list(paths)


def read(
    path: Path, *, columns: Sequence[str] | None, encoding: str, format: str | None
) -> Records:
    """Yields (where, record), streamed. Plain text has one column, `text`: a line of a txt file,
    or a run of paragraphs of at most CHUNK characters of md, mdx and py files.

    Raises ValueError for an unknown format, an empty file, broken content or another encoding.
    """
    kind = format or _format(path)
    if columns is not None and kind not in ("csv", "tsv"):
        raise ValueError(
            f"columns is given for {path}, but only csv and tsv files can lack a header: "
            "leave columns out"
        )
    empty = True
    for record in _records(path, kind, columns, encoding, named=format is not None):
        empty = False
        yield record
    if empty:
        header = " after the header (set columns if it has none)" if kind in ("csv", "tsv") else ""
        raise ValueError(f"{path} is empty, expected rows{header}: leave it out or fetch it again")


def _matches(name: str) -> list[Path]:
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            raise ValueError(f"{path} is a folder, expected a file: name its files, {path}/*.jsonl")
        if path.exists():
            raise ValueError(f"{path} is a pipe or a device, expected a file: save it to one")
    except OSError as error:  # a folder that this user may not enter, a name that is too long
        raise ValueError(refused(path, error)) from None
    if not glob.has_magic(name):
        raise ValueError(f"{path} does not exist{_near(path)}")
    # Path.glob takes no absolute pattern
    found = sorted(Path(match) for match in glob.glob(str(path), recursive=True))  # noqa: PTH207
    found = [match for match in found if match.is_file()]
    if not found:
        raise ValueError(f"no file matches {name}{_near(path)}")
    return found


def _near(path: Path) -> str:
    """Says what the nearest folder that exists holds, names like the missing one first."""
    folder, missing = path.parent, path.name
    while not folder.is_dir():
        folder, missing = folder.parent, folder.name
    names = sorted(entry.name for entry in folder.iterdir())
    near = difflib.get_close_matches(missing, names, n=3, cutoff=0.5)
    if near:
        return f"; near it in {folder}: {', '.join(near)}: correct the name"
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return f"; {folder} holds {shown or 'nothing'}: correct the name or fetch the file"


def _format(path: Path) -> str:
    suffixes = path.suffixes[:-1] if packing(path) else path.suffixes
    kind = suffixes[-1][1:].lower() if suffixes else ""
    if kind not in FORMATS:
        raise ValueError(
            f"{path} has the extension {'.' + kind if kind else 'none'}, expected one of "
            f"{', '.join(FORMATS)} (plain, .xz or .gz): rename it, or set format: txt"
        )
    return kind


def _records(
    path: Path, kind: str, columns: Sequence[str] | None, encoding: str, named: bool
) -> Records:
    """named: whether the user named the kind, so that the file's name says nothing of it."""
    if kind == "parquet":
        return _parquet(path)
    # An array of objects may well be one line; every other format has a row a line.
    lines = decoded_lines(path, encoding, -1 if kind == "json" else LONGEST)
    if kind == "jsonl":
        return _jsonl(path, lines)
    if kind == "json":
        return _json(path, lines)
    if kind in ("csv", "tsv"):
        return _table(path, _csv(path, lines) if kind == "csv" else _tsv(lines), columns)
    if kind == "txt":
        return _txt(path, lines, named)
    return ((f"line {n}", {"text": t}) for n, t in chunks(lines))


def _txt(path: Path, lines: Lines, named: bool) -> Records:
    looked = named
    for number, line in lines:
        if not line.strip():
            continue
        if not looked and line.startswith("{") and _is_object(line):
            raise ValueError(
                f"{path}, line {number}: a JSON object, expected plain text: name the file .jsonl, "
                "or set format: jsonl (or format: txt, if it shall be read as text)"
            )
        looked = True
        yield f"line {number}", {"text": line.rstrip("\r\n")}


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _jsonl(path: Path, lines: Lines) -> Records:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: broken JSON, {_why(error)}: correct or delete the line"
            ) from None
        yield f"line {number}", _object(record, f"{path}, line {number}")


def _json(path: Path, lines: Lines) -> Records:
    text = "".join(line for _, line in lines)
    if not text.strip():
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(
            f"{path}{line}: broken JSON, {_why(error)}: "
            "correct it (a file with an object on each line is called .jsonl)"
        ) from None
    if not isinstance(records, list):
        raise ValueError(
            f"{path} holds a {type(records).__name__}, expected a list of objects: convert it"
        )
    for number, record in enumerate(records, start=1):
        yield f"row {number}", _object(record, f"{path}, row {number}")


def _why(error: Exception) -> str:
    """What is wrong with JSON; besides its syntax, what Python refuses to take in."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"


def _object(record: Any, where: str) -> dict[str, Any]:
    if isinstance(record, dict):
        return record
    raise ValueError(
        f"{where}: a {type(record).__name__}, expected an object with named columns: convert it "
        "(a file with one array of objects is called .json)"
    )


def _csv(path: Path, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(CELL)
    reader = csv.reader((line for _, line in lines), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {number}: broken csv, {error}: "
            'close and double the quotes there ("" inside "...")'
        ) from None


def _tsv(lines: Lines) -> Iterator[tuple[int, list[str]]]:
    for number, line in lines:
        if line.strip():
            yield number, [_unquoted(cell) for cell in line.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """The cell without csv's quotes, if it has them: around it, and doubled inside it.

    Tabs need no quoting, so a cell that merely begins or ends with a quote means that quote.
    """
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '""' in inner
    if quoted and '"' not in inner.replace('""', ""):
        return inner.replace('""', '"')
    return cell


def _table(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: Sequence[str] | None
) -> Records:
    names = list(columns) if columns is not None else next(rows, (0, []))[1]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: column names occur twice in {', '.join(names)}: rename one")
    for number, cells in rows:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} columns, expected {len(names)} "
                f"({', '.join(names)}): correct the line, or columns if there is no header"
            )
        yield f"line {number}", dict(zip(names, cells, strict=True))


def _parquet(path: Path) -> Records:
    import pyarrow
    import pyarrow.parquet

    if not path.stat().st_size:
        return
    # Parquet is read from its end, so a compressed copy has to be unpacked in memory.
    source = _unpacked(path) if packing(path) else stream(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            for batch in file.iter_batches(batch_size=1_000):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except Unreadable:
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        read = f" behind row {number:,}" if number else ""
        raise ValueError(
            f"{path} is not whole parquet{read} ({' '.join(str(error).split())}): fetch it again"
        ) from None


def _unpacked(path: Path) -> io.BytesIO:
    return io.BytesIO(b"".join(raw for _, raw in raw_lines(path)))
