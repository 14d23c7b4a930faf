"""Lines and paragraphs of a text file: unpacked, decoded, numbered, never all in memory."""

import gzip
import lzma
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

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


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, undecoded line); ValueError for a broken .xz or .gz."""
    try:
        with _open(path) as file:
            yield from enumerate(file, start=1)
    except (lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole {path.suffix} file ({error}): fetch or compress it again"
        ) from None


def decoded_lines(path: Path, encoding: str) -> Lines:
    """Yields (line number, line with its end); ValueError for bytes of another encoding."""
    for number, raw in raw_lines(path):
        try:
            line = raw.decode(encoding)
        except UnicodeDecodeError:
            raise ValueError(
                f"{path} is not {encoding.upper()} at line {number}; {_guess(raw)}"
            ) from None
        yield number, line.removeprefix("\ufeff") if number == 1 else line


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
