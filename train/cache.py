"""Stage `cache`: the target's states on the training sequences, on disk, so that training needs no
target at all.

Shapes: B batch, T tokens.
"""

import json
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from data.documents import Documents
from data.pack import Packed
from data.sources import Source
from decoding.pretrained import Pretrained
from decoding.pulse import item
from decoding.ranks import Ranks
from decoding.target import Shape, Target
from drafters.base import Blueprint, Trained
from drafters.files import digests, flush, write_json
from train import recorded
from train.machine import gib
from train.packing import pack_into, rows_of
from train.recorded import Kept

SPARE = 2**30  # bytes of disk that a cache leaves free


@dataclass(frozen=True)
class Job:
    """One file to be: sequences `first` to `first + rows` of a split."""

    split: str
    first: int
    rows: int
    positions: int

    @property
    def file(self) -> str:
        return f"{self.split}-{self.first:08d}.safetensors"


class CacheStates:
    """Packs `data` (or the answers of a generate stage) as distill would, lets the target read it
    once, and keeps of it what `drafter` reads; a distill stage that needs it as `cache` trains on
    these sequences and never loads the target.

    keep: `states` keeps the last state, from which the law follows exactly; `top_k` keeps the `k`
    likeliest tokens instead, for families that read no last state (lm, eagle3). dtype: float16, or
    float8, half the size and coarser. tokens and sequence_length as in a distill stage, whose
    sequence_length must be the same. Files of about `shard_mib` are written whole, each once; the
    same command goes on with those that are missing. Several ranks share them.
    """

    free = frozenset({"batch_size"})

    def __init__(
        self,
        *,
        target: Pretrained,
        drafter: Blueprint,
        tokens: int,
        sequence_length: int,
        data: Source | None = None,
        keep: Literal["states", "top_k"] = "states",
        k: int = 64,
        dtype: Literal["float16", "float8"] = "float16",
        shard_mib: int = 256,
        batch_size: int = 8,
    ) -> None:
        if keep not in ("states", "top_k") or dtype not in recorded.KINDS:
            raise ValueError(
                f"cache.keep is {keep!r} and cache.dtype {dtype!r}; they must be states or top_k, "
                f"and {' or '.join(recorded.KINDS)}"
            )
        if min(sequence_length, k, shard_mib, batch_size) < 1 or tokens < sequence_length:
            raise ValueError(
                f"a cache of {tokens:,} tokens in sequences of {sequence_length:,}, k {k}, "
                f"shard_mib {shard_mib}, batch_size {batch_size}: each must be at least 1, and "
                "tokens at least one sequence"
            )
        given = drafter.arguments
        if given.get("target_lora"):
            raise ValueError(
                "a drafter with target_lora changes its target, whose states no cache can hold; "
                "train it with the target at hand (needs.cache=null)"
            )
        if keep == "top_k" and issubclass(drafter.cls, Trained) and drafter.cls.reads_last:
            raise ValueError(
                f"{drafter.cls.__name__} reads the target's last states, and the law follows from "
                "these: set keep=states"
            )
        self.target, self.drafter, self.data = target, drafter, data
        self.tokens, self.sequence_length = tokens, sequence_length
        self.keep, self.k, self.dtype = keep, k, dtype
        self.shard_mib, self.batch_size = shard_mib, batch_size

    def check(self, needs: Collection[str]) -> None:
        """Refuses, before anything starts, what cannot work with these needs."""
        if (self.data is None) == ("data" not in needs):
            raise ValueError(
                "a cache is made of its `data` or of the answers of a stage that it needs as "
                f"`data`; it has {'neither' if self.data is None else 'both'}"
            )

    def kept(self, shape: Shape) -> Kept:
        """What is kept of each position for this drafter."""
        with torch.device("meta"):
            module = self.drafter(shape)
        assert isinstance(module, Trained)
        k = min(self.k, shape.vocab_size) if self.keep == "top_k" else 0
        everywhere = module.needs_target
        return Kept(shape.hidden_size, module.taps, self.keep, k, self.dtype, everywhere)

    def run(
        self, out: Path, *, target: Path | None = None, data: Path | None = None
    ) -> dict[str, float]:
        """Writes artifact/: packed/, states/ and cache.json; returns positions and bytes."""
        ranks = Ranks.here(together=self.target.parallel is not None)
        tokenizer = self.target.tokenizer(target)
        folder = out / "artifact"
        if ranks.first:
            rows, source = rows_of(self.data, data)
            most = self.tokens // self.sequence_length
            said = pack_into(folder, rows, Documents(tokenizer, source), self.sequence_length, most)
            print(said, flush=True)
        ranks.barrier()
        kept = self.kept(self.target.shape_of(target))
        jobs = jobs_of(folder / "packed", kept, self.shard_mib)
        notes = folder / "states"
        done = ranks.decide(lambda: [written(notes, job) for job in jobs], alone=True)
        todo = [job for job, there in zip(jobs, done, strict=True) if not there]
        if ranks.first:
            announce(folder, kept, jobs, todo)
        ranks.barrier()
        mine = [job for n, job in enumerate(todo) if ranks.has(n)]
        model = self.target.load(target) if mine else None
        with tqdm(
            total=sum(j.rows for j in mine), unit="row", desc="cache", disable=not ranks.first
        ) as bar:
            for job in mine:
                assert model is not None
                tensors = self._states(model, kept, folder / "packed", job, bar)
                if ranks.first or not ranks.together:
                    write(notes, job, tensors)
        ranks.barrier()
        revision = ranks.decide(lambda: self._revision(model, target), alone=True)
        if ranks.first:
            finish(folder, kept, jobs, self.target, revision)
        ranks.barrier()
        count = sum(job.positions for job in jobs)
        return {"positions": count, "cache_bytes": count * kept.bytes}

    def _states(
        self, model: Target, kept: Kept, packed: Path, job: Job, bar: Any
    ) -> dict[str, Tensor]:
        """The tensors of one file."""
        sequences = Packed(packed / job.split)
        parts: list[dict[str, Tensor]] = []
        end = job.first + job.rows
        for at in range(job.first, end, self.batch_size):
            rows = list(range(at, min(at + self.batch_size, end)))
            with item("pass of the target"):
                batch = sequences.batch(rows).to(model.device)
                parts.append(recorded.kept_of(kept, model, batch))
            bar.update(len(rows))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _revision(self, model: Target | None, folder: Path | None) -> str | None:
        return (model or self.target.borrow(folder)).revision


def jobs_of(packed: Path, kept: Kept, mib: int) -> list[Job]:
    """The files of a cache over these sequences."""
    found = []
    for split in recorded.SPLITS:
        if not (packed / split).is_dir():  # too little data for a validation set
            continue
        sequences = Packed(packed / split)
        step = recorded.rows_a_shard(kept, sequences, mib)
        for first in range(0, len(sequences), step):
            rows = range(first, min(first + step, len(sequences)))
            count = recorded.positions(kept, sequences, rows)
            found.append(Job(split, first, len(rows), count))
    return found


def announce(folder: Path, kept: Kept, jobs: list[Job], todo: list[Job]) -> None:
    """Says how large the cache will be. Raises OSError if the disk is too small for it."""
    each = sum(job.positions for job in jobs)
    whole, more = each * kept.bytes, sum(job.positions for job in todo) * kept.bytes
    free = shutil.disk_usage(folder).free
    law = "the last state" if kept.keep == "states" else f"the {kept.k} likeliest tokens"
    taps = f" and {len(kept.taps)} tapped" if kept.taps else ""
    print(
        f"cache: {each:,} positions x {kept.bytes:,} bytes ({law}{taps}, states of {kept.width} in "
        f"{kept.dtype}) = {gib(whole)}; {gib(more)} of it to be written in {len(todo)} files, "
        f"{gib(free)} of disk are free",
        flush=True,
    )
    if more + SPARE > free:
        raise OSError(
            f"the cache needs {gib(more)} and {gib(SPARE)} to spare, and {gib(free)} are free in "
            f"{folder}: make room, set output_dir to another disk, or set cache.dtype=float8, "
            "cache.keep=top_k or fewer cache.tokens"
        )


def written(folder: Path, job: Job) -> bool:
    """Whether this file is there as it was written, of the same sequences."""
    try:
        shard = json.loads(_note(folder, job).read_text(encoding="utf-8"))
        same = (shard["rows"], shard["positions"]) == (job.rows, job.positions)
        return same and recorded.fault(folder, shard) is None
    except (OSError, ValueError, KeyError, TypeError):  # no note, or a damaged one
        return False


def write(folder: Path, job: Job, tensors: dict[str, Tensor]) -> None:
    """The file, whole, and then its note: one without is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / job.file
    part = file.with_suffix(".part")
    try:
        save_file(tensors, part)
        flush(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    (digest,) = digests(folder, [job.file]).values()
    write_json(_note(folder, job), {"file": job.file, **asdict(job), "digest": digest})


def finish(
    folder: Path, kept: Kept, jobs: list[Job], target: Pretrained, revision: str | None
) -> None:
    """Writes cache.json, by which a cache is whole."""
    shards = [json.loads(_note(folder / "states", j).read_text(encoding="utf-8")) for j in jobs]
    origin = {"target": target.name, "revision": revision, "dtype": target.dtype}
    write_json(folder / recorded.NOTE, origin | {"kept": asdict(kept), "shards": shards})


def _note(folder: Path, job: Job) -> Path:
    return (folder / job.file).with_suffix(".json")
