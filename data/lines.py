"""Lines and paragraphs of a text file: unpacked, decoded, numbered, never all in memory."""

import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from data.storage import stream

LONGEST = 1 << 26  # bytes of a line; a longer one is no row, and would fill the memory
CHUNK = 2_000  # characters in a piece of prose or code, unless a single paragraph is longer

Lines = Iterator[tuple[int, str]]


def check_encoding(encoding: str) -> None:
    """Raises ValueError unless Python knows the encoding and its line breaks are ASCII's."""
    try:
        ascii_breaks = "\n".encode(encoding) == b"\n"
    except LookupError:
        raise ValueError(
            f"encoding is {encoding!r}, which Python does not know, expected a name such as "
            "utf-8, cp949 or gb18030: correct it"
        ) from None
    if not ascii_breaks:
        raise ValueError(
            f"encoding is {encoding!r}, which cannot be read line by line: "
            f"convert the file, iconv -f {encoding} -t UTF-8"
        )


def packing(path: Path) -> str:
    """How a file is compressed, by its name: ".xz", ".gz" or ""."""
    suffix = path.suffix.lower()
    return suffix if suffix in (".xz", ".gz") else ""


def _open(path: Path) -> BinaryIO:
    file = stream(path)
    if packing(path) == ".xz":
        return cast(BinaryIO, lzma.open(file, "rb"))
    if packing(path) == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    return cast(BinaryIO, file)


def raw_lines(path: Path, longest: int = -1) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, undecoded line); ValueError for a broken .xz or .gz, and for a line of
    more than `longest` bytes (-1: any)."""
    number, limit = 0, longest + 1 if longest >= 0 else -1
    try:
        with _open(path) as file:
            while line := file.readline(limit):
                number += 1
                if len(line) == limit:
                    raise ValueError(_too_long(path, number, longest))
                yield number, line
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole {packing(path)} file ({error}; {number:,} lines were read): "
            "fetch or compress it again"
        ) from None


def _too_long(path: Path, number: int, longest: int) -> str:
    return (
        f"{path}, line {number}: longer than {longest / 2**20:,.0f} MiB, expected a row a line: "
        "split or delete it (a file with one array of objects is called .json)"
    )


def decoded_lines(path: Path, encoding: str, longest: int = LONGEST) -> Lines:
    """Yields (line number, line with its end); ValueError for bytes of another encoding or format,
    and for a line of more than `longest` bytes."""
    for number, raw in raw_lines(path, longest):
        if number == 1:
            _refuse_formats(path, raw)
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError:
            raise ValueError(
                f"{path} is not {encoding.upper()} at line {number}; {_guess(raw)}"
            ) from None
        if "\0" in line:
            raise ValueError(
                f"{path}, line {number}: a NUL byte, so it is no text: binary, UTF-16, or a copy "
                "that was cut off: fetch or convert it again"
            )
        yield number, line.removeprefix("\ufeff")  # files that were joined have several


def _refuse_formats(path: Path, raw: bytes) -> None:
    """Raises ValueError for a first line that begins as a file of another format does."""
    for begin, format, advice in (
        (b"\x1f\x8b", "gzip", "add .gz to its name"),
        (b"\xfd7zXZ\0", "xz", "add .xz to its name"),
        (b"PAR1", "parquet", "name it .parquet"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unpack it (zstd -d)"),
        (b"BZh", "bzip2", "unpack it (bunzip2)"),
        (b"PK\x03\x04", "zip", "unpack it (unzip)"),
        (b"%PDF-", "PDF", "extract its text"),
        (b"SQLite format 3", "SQLite", "export its rows"),
    ):
        if raw.startswith(begin):
            raise ValueError(f"{path} is a {format} file by its first bytes: {advice}")


def _guess(raw: bytes) -> str:
    """Says in which encoding the bytes make sense: letters of one script, not just no error."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it reads as UTF-16: convert it, iconv -f UTF-16 -t UTF-8"
    # The strict forms of cp949 and gb18030 judge: the wide ones find a syllable in "Är" as well.
    for strict, encoding, name, letters, share in (
        ("utf-8", "utf-8", "UTF-8", r"[^\x00-\x7f]", 1.0),
        ("euc_kr", "cp949", "cp949/EUC-KR", r"[가-힣]", 0.9),  # of Chinese, half are ideographs
        ("cp932", "cp932", "Shift JIS", r"[ぁ-ヿ]", 0.2),
        ("euc_jp", "euc_jp", "EUC-JP", r"[ぁ-ヿ]", 0.2),
        ("gb2312", "gb18030", "GB18030", r"[一-鿿，。、？！：；“”《》]", 0.9),
    ):
        try:
            foreign = [c for c in raw.decode(strict) if ord(c) > 127]
        except UnicodeDecodeError:
            continue
        if foreign and len(re.findall(letters, "".join(foreign))) >= share * len(foreign):
            return f"it reads as {name}: set encoding: {encoding} or convert it with iconv"
    return "set encoding to what it is, or convert it with iconv"


def chunks(lines: Iterable[tuple[int, str]]) -> Lines:
    """Yields (first line, text): paragraphs joined up to CHUNK characters, none ever cut."""
    first, held, size = 0, list[str](), 0
    for number, block in _blocks(lines):
        if held and size + 2 + len(block) > CHUNK:
            yield first, "\n\n".join(held)
            held, size = [], 0
        first = first if held else number
        held.append(block)
        size += len(block) + 2
    if held:
        yield first, "\n\n".join(held)


def _blocks(lines: Iterable[tuple[int, str]]) -> Lines:
    first, held = 0, list[str]()
    for number, line in lines:
        if line.strip():
            first = first if held else number
            held.append(line.rstrip())
        elif held:
            yield first, "\n".join(held)
            held = []
    if held:
        yield first, "\n".join(held)
