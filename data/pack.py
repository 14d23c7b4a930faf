"""Documents -> sequences of one length, on disk, with boundaries that attention respects.

Shapes: n sequences, T tokens a sequence.
"""

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafters.base import Batch
from drafters.files import flush, sha256, write_json

WINDOW = 256  # sequences being filled at once
SHARD = 4096  # sequences a file
NOTE = "packed.json"  # written last: without it there is no set
CHECKED_AT_ONCE = (
    2**30
)  # bytes of a set whose files are all hashed when it is opened: about a second


@dataclass
class Document:
    """Ids and which of them are supervised; `splittable`: it may be cut to fit (running text)."""

    ids: list[int]
    mask: list[bool]
    splittable: bool = False


@dataclass
class _Bin:
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    doc: list[int] = field(default_factory=list)


class Packer:
    """Fills sequences of `length` tokens: best fit, the longest first among those that wait.

    Up to `window` sequences' worth of documents wait; then each, from the longest on, joins the
    sequence that it leaves the least room in. The first token of a document is never supervised:
    nothing of its own document predicts it. Documents longer than a sequence are cut if they may
    be, else dropped and counted.
    """

    def __init__(self, length: int, window: int = WINDOW) -> None:
        self.length, self.window = length, window
        self.too_long = self.documents = 0
        self.longest: list[int] = []
        self._waiting: list[tuple[list[int], list[bool]]] = []
        self._tokens = 0  # of those that wait
        self._open: list[_Bin] = []  # the fullest first
        self._rooms: list[int] = []  # and how many tokens more each takes

    def add(self, document: Document) -> Iterator[_Bin]:
        """Takes a document; yields sequences that are full."""
        if len(document.ids) > self.length and not document.splittable:
            self.too_long += 1
            self.longest.append(len(document.ids))
            return
        self.documents += 1
        for begin in range(0, len(document.ids), self.length):
            ids = document.ids[begin : begin + self.length]
            self._waiting.append((ids, document.mask[begin : begin + self.length]))
            self._tokens += len(ids)
            if self._tokens >= self.window * self.length:
                yield from self._settle()

    def finish(self) -> Iterator[_Bin]:
        """Yields what is left."""
        yield from self._settle()
        yield from self._open
        self._open, self._rooms = [], []

    def _settle(self) -> Iterator[_Bin]:
        for ids, mask in sorted(self._waiting, key=lambda piece: -len(piece[0])):
            yield from self._place(ids, mask)
        self._waiting, self._tokens = [], 0
        while len(self._open) > self.window:
            self._rooms.pop(0)
            yield self._open.pop(0)

    def _place(self, ids: list[int], mask: list[bool]) -> Iterator[_Bin]:
        at, room, place = bisect_left(self._rooms, len(ids)), self.length, _Bin()
        if at < len(self._rooms):
            room, place = self._rooms.pop(at), self._open.pop(at)
        number = place.doc[-1] + 1 if place.doc else 0
        place.ids += ids
        place.mask += [False, *mask[1:]]
        place.doc += [number] * len(ids)
        room -= len(ids)
        if not room:
            yield place
            return
        at = bisect_left(self._rooms, room)
        self._rooms.insert(at, room)
        self._open.insert(at, place)


def write(folder: Path, documents: Iterable[Document], length: int, most: int) -> "Packed":
    """Packs until `most` sequences are full, or the documents end; returns what was written.

    Raises ValueError when nothing could be packed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packer, written = Packer(length, max(1, min(WINDOW, most // 4))), 0
    full: list[_Bin] = []
    shards: list[dict[str, Any]] = []

    def flush() -> None:
        shards.append(_write_shard(folder, len(shards), full, length))
        full.clear()

    for document in documents:
        full += packer.add(document)
        if len(full) >= SHARD or written + len(full) >= most:
            written += len(full)
            flush()
        if written >= most:
            break
    else:
        full += packer.finish()
        if full:
            flush()
    if not sum(shard["sequences"] for shard in shards):
        raise ValueError(_nothing(packer, length))
    note = {
        "length": length,
        "documents": packer.documents,
        "too_long": packer.too_long,
        "shards": shards,
    }
    write_json(folder / NOTE, note | {"sha256": _digest_of(note)})
    return Packed(folder)


class Packed:
    """Packed sequences on disk, read by index.

    A file is compared with the size and hash that packed.json has for it before anything of it is
    used: of a set of up to CHECKED_AT_ONCE bytes when it is opened, of a larger one at its first
    row, since shuffled rows come from every file within the first steps anyway. Raises ValueError,
    naming the file, where they differ.
    """

    def __init__(self, folder: Path) -> None:
        note = _read_note(folder)
        self.folder = folder
        self.length: int = note["length"]
        self.documents: int = note["documents"]
        self.too_long: int = note["too_long"]
        self.tokens: int = sum(s["tokens"] for s in note["shards"])
        self._shards: list[dict[str, Any]] = note["shards"]
        self._trusted: set[int] = set()
        for shard in self._shards:
            _check_size(folder / shard["file"], shard["bytes"])
        if sum(shard["bytes"] for shard in self._shards) <= CHECKED_AT_ONCE:
            for number in range(len(self._shards)):
                self._check(number)
        self._files = [_open(folder / s["file"]) for s in self._shards]
        sizes = [s["sequences"] for s in self._shards]
        self._first = np.concatenate([[0], np.cumsum(sizes)])
        self.supervised = torch.cat([f.get_tensor("supervised") for f in self._files])

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(self, rows: list[int]) -> Batch:
        """Sequences `rows` as a Batch on the CPU; padding is unsupervised, its own document."""
        parts = [self._read(row) for row in rows]
        ids, mask, doc = (torch.stack([p[k] for p in parts]) for k in range(3))
        return Batch(ids.long(), mask.bool(), doc.long())

    def counts(self, vocabulary: int) -> Tensor:
        """How often each token is a supervised one, [V]."""
        total_V = torch.zeros(vocabulary, dtype=torch.long)
        for number, file in enumerate(self._files):
            self._check(number)
            ids = file.get_tensor("ids")[file.get_tensor("mask").bool()]
            total_V += torch.bincount(ids, minlength=vocabulary)
        return total_V

    def _read(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        at = row - int(self._first[shard])
        self._check(shard)
        file = self._files[shard]
        ids, mask, doc = (file.get_slice(key)[at] for key in ("ids", "mask", "doc"))
        return ids, mask, doc

    def _check(self, number: int) -> None:
        """Compares a file with its hash, once."""
        if number in self._trusted:
            return
        file, expected = self.folder / self._shards[number]["file"], self._shards[number]["sha256"]
        found = _digest(file, file.stat().st_mtime_ns)
        if found != expected:
            raise _damaged(f"{file} has sha256 {found[:12]}..., expected {expected[:12]}...")
        self._trusted.add(number)


def _write_shard(folder: Path, number: int, bins: list[_Bin], length: int) -> dict[str, Any]:
    n = len(bins)
    ids = torch.zeros(n, length, dtype=torch.int32)
    mask = torch.zeros(n, length, dtype=torch.uint8)
    doc = torch.full((n, length), -1, dtype=torch.int16)
    for i, b in enumerate(bins):
        used = len(b.ids)
        ids[i, :used] = torch.tensor(b.ids, dtype=torch.int32)
        mask[i, :used] = torch.tensor(b.mask, dtype=torch.uint8)
        doc[i, :used] = torch.tensor(b.doc, dtype=torch.int16)
    name = f"packed-{number:05d}.safetensors"
    tensors = {"ids": ids, "mask": mask, "doc": doc, "supervised": mask.sum(1, dtype=torch.int32)}
    part = folder / f"{name}.part"
    save_file(tensors, part)
    flush(part)
    made = {"bytes": part.stat().st_size, "sha256": _digest(part, part.stat().st_mtime_ns)}
    part.replace(folder / name)
    return {"file": name, "sequences": n, "tokens": sum(len(b.ids) for b in bins)} | made


@cache
def _digest(file: Path, changed: int) -> str:
    """sha256 of a file; a process hashes it once, unless the time of its last change is another."""
    return sha256(file)


def _digest_of(note: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()


def _read_note(folder: Path) -> dict[str, Any]:
    """packed.json, which carries a hash of its own."""
    file = folder / NOTE
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        expected = note.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as why:
        raise _damaged(f"{file} is not what packing writes") from why
    if _digest_of(note) != expected:
        raise _damaged(f"{file} does not fit the hash in it")
    return note


def _check_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else 0
    if found != expected:
        raise _damaged(f"{file} has {found:,} bytes, expected {expected:,}")


def _open(file: Path) -> Any:
    """A file of sequences, mapped; of a large set its hash has not been looked at yet."""
    try:
        opened: Any = safe_open(str(file), "pt")
        opened.get_slice("supervised")
    except SafetensorError as why:
        raise _damaged(f"{file} does not open ({why})") from why
    return opened


def _damaged(what: str) -> ValueError:
    return ValueError(
        f"packed data are damaged: {what}; delete the stage's folder `packed` and run again, which "
        "packs them anew"
    )


def _nothing(packer: Packer, length: int) -> str:
    if packer.too_long:
        median = sorted(packer.longest)[len(packer.longest) // 2]
        return (
            f"every row is longer than sequence_length {length}: all {packer.too_long:,} rows "
            f"dropped (median {median:,} tokens); raise sequence_length"
        )
    return "there is nothing to train on: the source gave no rows"
