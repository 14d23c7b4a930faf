"""Documents -> sequences of one length, on disk, with boundaries that attention respects.

Shapes: n sequences, T tokens a sequence.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafters.base import Batch, write_json

OPEN = 32  # sequences being filled at once
SHARD = 4096  # sequences a file


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
    """Fills sequences of `length` tokens, best fit among a few open ones.

    The first token of a document is never supervised: nothing of its own document predicts it.
    Documents longer than a sequence are cut if they may be, else dropped and counted.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.too_long = self.documents = 0
        self.longest: list[int] = []
        self._open: list[_Bin] = []

    def add(self, document: Document) -> Iterator[_Bin]:
        """Places a document; yields sequences that are full."""
        if len(document.ids) > self.length and not document.splittable:
            self.too_long += 1
            self.longest.append(len(document.ids))
            return
        self.documents += 1
        for begin in range(0, len(document.ids), self.length):
            piece = slice(begin, begin + self.length)
            yield from self._place(document.ids[piece], document.mask[piece])

    def finish(self) -> Iterator[_Bin]:
        """Yields what is still open."""
        yield from self._open
        self._open = []

    def _place(self, ids: list[int], mask: list[bool]) -> Iterator[_Bin]:
        fitting = [b for b in self._open if len(b.ids) + len(ids) <= self.length]
        if fitting:
            place = max(fitting, key=lambda b: len(b.ids))
        else:
            if len(self._open) == OPEN:
                fullest = max(self._open, key=lambda b: len(b.ids))
                self._open.remove(fullest)
                yield fullest
            place = _Bin()
            self._open.append(place)
        number = place.doc[-1] + 1 if place.doc else 0
        place.ids += ids
        place.mask += [False, *mask[1:]]
        place.doc += [number] * len(ids)
        if len(place.ids) == self.length:
            self._open.remove(place)
            yield place


def write(folder: Path, documents: Iterable[Document], length: int, most: int) -> "Packed":
    """Packs until `most` sequences are full, or the documents end; returns what was written.

    Raises ValueError when nothing could be packed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    packer, written = Packer(length), 0
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
    write_json(
        folder / "packed.json",
        {
            "length": length,
            "documents": packer.documents,
            "too_long": packer.too_long,
            "shards": shards,
        },
    )
    return Packed(folder)


class Packed:
    """Packed sequences on disk, read by index."""

    def __init__(self, folder: Path) -> None:
        note = json.loads((folder / "packed.json").read_text(encoding="utf-8"))
        self.length: int = note["length"]
        self.documents: int = note["documents"]
        self.too_long: int = note["too_long"]
        self._files = [safe_open(str(folder / s["file"]), "pt") for s in note["shards"]]
        self.tokens: int = sum(s["tokens"] for s in note["shards"])
        sizes = [s["sequences"] for s in note["shards"]]
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
        for file in self._files:
            ids = file.get_tensor("ids")[file.get_tensor("mask").bool()]
            total_V += torch.bincount(ids, minlength=vocabulary)
        return total_V

    def _read(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        shard = int(np.searchsorted(self._first, row, side="right")) - 1
        at = row - int(self._first[shard])
        file = self._files[shard]
        ids, mask, doc = (file.get_slice(key)[at] for key in ("ids", "mask", "doc"))
        return ids, mask, doc


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
    save_file(tensors, folder / name)
    return {"file": name, "sequences": n, "tokens": sum(len(b.ids) for b in bins)}


def _nothing(packer: Packer, length: int) -> str:
    if packer.too_long:
        median = sorted(packer.longest)[len(packer.longest) // 2]
        return (
            f"every row is longer than sequence_length {length}: all {packer.too_long:,} rows "
            f"dropped (median {median:,} tokens); raise sequence_length"
        )
    return "there is nothing to train on: the source gave no rows"
