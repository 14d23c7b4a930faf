"""Where the frozen target is while a drafter is trained, in bytes, and whether it stayed as it was.

Three places: whole on each rank (target.parallel=null); shared by the ranks, each gathering layer
after layer as a pass goes (zero3); or not there at all, its states read from disk (stage `cache`).
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from decoding.pretrained import DTYPES
from decoding.ranks import Ranks
from decoding.sharded import Parted
from decoding.target import Shape, Target
from eval.controls import Failed
from train.machine import gib
from train.recorded import Kept

CHUNK = 2**22  # elements that are hashed at once


@dataclass(frozen=True)
class Placement:
    """Bytes of a target's weights on each rank, and on disk. replicated: whole; sharded: the layers
    divided, with one gathered layer and what lies outside of them whole; borrowed: of a cached
    target, what heads read (embedding, head, last layer); cache: of `positions` on disk."""

    replicated: int
    sharded: int
    borrowed: int
    cache: int
    ranks: int
    positions: int

    def lines(self, chosen: str | None, dtype: str) -> list[str]:
        """What was chosen (null, zero3, cache) and what else could be, for the person who has to
        choose."""
        ways = {
            None: f"whole, {gib(self.replicated)} of weights on each of {_ranks(self.ranks)}",
            "zero3": f"shared by {_ranks(self.ranks)}, {gib(self.sharded)} on each",
            "cache": f"cached, {gib(self.cache)} of disk for {self.positions:,} positions in "
            f"float16 and {gib(self.borrowed)} of weights on each of {_ranks(self.ranks)}",
        }
        hint = {
            None: "target.parallel=null",
            "zero3": "target.parallel=zero3",
            "cache": "needs.cache",
        }
        others = [k for k in ways if k != chosen and (k != "zero3" or self.ranks > 1)]
        instead = "; ".join(f"{ways[k]} ({hint[k]})" for k in others)
        return [f"target in {dtype}: {ways[chosen]}", f"  instead it could be {instead}"]


def placement(
    shape: Shape, *, dtype: str, ranks: int, positions: int, kept: Kept | None = None
) -> Placement:
    """The arithmetic, without loading anything; kept: of a cache (null: last states in float16)."""
    item = DTYPES[dtype].itemsize
    whole = shape.parameters()
    outside = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2) + shape.hidden_size
    layers = whole - outside
    one = layers // shape.layers
    kept = kept or Kept(shape.hidden_size, (), "states", 0, "float16", True)
    return Placement(
        replicated=whole * item,
        sharded=(outside + -(-layers // ranks) + (one if ranks > 1 else 0)) * item,
        borrowed=(outside + one) * item if kept.keep == "states" or kept.taps else 0,
        cache=positions * kept.bytes,
        ranks=ranks,
        positions=positions,
    )


def _ranks(count: int) -> str:
    return f"{count} ranks" if count > 1 else "1 rank"


@torch.no_grad()
def checksum(target: Target) -> str:
    """16 hex digits over all weights that the ranks hold of a target: the same on all of them, and
    others after a change of one number, or, but for a coincidence, of several."""
    found = [f"{name}:{_sum(_mine(p))}" for name, p in target.named_parameters() if not p.is_meta]
    digest = hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]
    every = Ranks.here(together=True).every(digest)
    if not isinstance(target, Parted) and len(set(every)) > 1:
        raise Failed(
            f"the ranks do not hold the same target: its checksums are {', '.join(every)}; look at "
            "target.path on each machine"
        )
    if len(set(every)) == 1:
        return digest
    return hashlib.sha256(" ".join(every).encode()).hexdigest()[:16]


def require_unchanged(target: Target, before: str) -> None:
    """Raises Failed when a frozen target has not the checksum that it had."""
    now = checksum(target)
    if now != before:
        raise Failed(
            f"the target changed while the drafter was trained (checksum {before} before, {now} "
            "after): what was learnt is not about this target. Something wrote into its weights; "
            "memory, if no code did"
        )


def _mine(parameter: Tensor) -> Tensor:
    """This rank's part."""
    local = getattr(parameter, "to_local", None)
    return local() if local else parameter


def _sum(values: Tensor) -> int:
    """Bits as integers, each times an odd number of its place, summed modulo 2^64: every order of
    summation gives the same. (Integers of 32 bits: of 64, the highest bit would be lost in every
    even number of changes.)"""
    flat = values.contiguous().flatten()
    if not flat.numel():  # more ranks than there is to divide
        return 0
    bits = flat.view(torch.int32 if flat.nbytes % 4 == 0 else torch.uint8)
    place = torch.arange(1, 2 * min(CHUNK, len(bits)), 2, device=bits.device)
    total = 0
    for number, part in enumerate(bits.split(CHUNK)):
        found = int((part * place[: len(part)]).sum())
        total = (total * 31 + found + number) % 2**64
    return total
