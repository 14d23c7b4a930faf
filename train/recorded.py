"""A target's states and laws on disk, and the target that reads them back instead of running.

A cache is a folder: `packed/` (the sequences), shards of `states/` and, last, cache.json, which
says what is kept of each position and gives every shard's size and hash.

Shapes: B batch, T tokens, P kept positions, D target width, L tapped layers, k likeliest tokens,
X = D or 2k + 1, C chunk, V vocabulary.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from data.pack import Packed
from decoding.borrowed import Borrowed
from decoding.pretrained import Pretrained
from decoding.ranks import Ranks
from decoding.target import Shape, Target, TargetOut
from drafters.base import Batch, Trained
from drafters.files import damage

NOTE, SPLITS = "cache.json", ("train", "validation")
# what a vector is scaled to have as its largest number, so that nothing overflows in less bits
LARGEST = {"float16": 2.0**15, "float8": 448.0}
KINDS = {"float16": torch.float16, "float8": torch.float8_e4m3fn}
OPEN = 128  # shards that are held open


@dataclass(frozen=True)
class Kept:
    """What is kept of a position.

    keep: `states`, the last state, from which the law follows through the target's head; or
    `top_k`, the `k` likeliest tokens with their log-probabilities, and neither head nor state.
    taps: indices into hidden_states, kept either way. dtype: of states. everywhere: of all tokens,
    as attention needs it; else of those alone whose next token is supervised.
    """

    width: int
    taps: tuple[int, ...]
    keep: str
    k: int
    dtype: str
    everywhere: bool

    @property
    def bytes(self) -> int:
        """Of one position: each state with its scale, each token with its log-probability, and
        which position of its sequence it is."""
        state = self.width * KINDS[self.dtype].itemsize + 4
        law = state if self.keep == "states" else 8 * self.k
        return law + len(self.taps) * state + 4

    def of(self, batch: Batch) -> Tensor:
        """Which positions of a batch are kept, boolean [B, T]."""
        if self.everywhere:
            return batch.doc_BT >= 0
        ahead_BT = torch.zeros_like(batch.mask_BT)
        ahead_BT[:, :-1] = batch.mask_BT[:, 1:]
        return ahead_BT

    def lacks(self, module: Trained) -> str | None:
        """What this drafter would read that is not kept, or None."""
        if missing := [tap for tap in module.taps if tap not in self.taps]:
            return f"the tapped layers {missing}; it holds {list(self.taps)}"
        if module.reads_last and self.keep != "states":
            return "the target's last states; it holds laws (keep: top_k)"
        if module.needs_target and not self.everywhere:
            return "states of all tokens; it holds those before supervised tokens"
        return None


def scaled(values: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Vectors in few bits, [..., D], and what each must be multiplied by, [...].

    In float16 by a power of two, so that states of a bfloat16 target are kept as they are."""
    most = values.float().abs().amax(-1).clamp(min=1e-30) / LARGEST[dtype]
    scale = torch.exp2(torch.ceil(torch.log2(most))) if dtype == "float16" else most
    return (values.float() / scale[..., None]).to(KINDS[dtype]), scale


def kept_of(kept: Kept, target: Target, batch: Batch) -> dict[str, Tensor]:
    """The tensors of a shard for these sequences, after one pass of the target."""
    here_BT = kept.of(batch)
    out = target(batch.ids_BT, doc_BT=batch.doc_BT, taps=kept.taps)
    last_PD = out.hidden_BTD[here_BT]
    found: dict[str, Tensor] = {"place": here_BT.nonzero()[:, 1].int()}
    if kept.keep == "states":
        found["last"], found["last_scale"] = scaled(last_PD, kept.dtype)
    else:
        step = max(1, 2**24 // target.shape.vocab_size)
        laws = [_top(target, part_CD, kept.k) for part_CD in last_PD.split(step)]
        found["logp"], found["tokens"] = (torch.cat(parts) for parts in zip(*laws, strict=True))
    if out.taps_BTLD is not None:
        found["taps"], found["taps_scale"] = scaled(out.taps_BTLD[here_BT], kept.dtype)
    counts = here_BT.sum(1)
    return {name: tensor.cpu() for name, tensor in found.items()} | {"count": counts.cpu()}


@torch.no_grad()
def _top(target: Target, last_CD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """log p of the likeliest tokens, and which they are, [C, k] each."""
    best = target.logits(last_CD).float().log_softmax(-1).topk(k)
    return best.values, best.indices.int()


class Recorded(Target):
    """A target that remembers its passes over the sequences of a cache and makes none: a sequence
    is looked up by its tokens, so that no other's states can be taken for its own.

    What heads borrow comes from the target's files, unless no drafter asks for it (`top_k` and a
    family that reads no state). With `top_k`, the tokens that are not among the k share what is
    left of the probability evenly.
    """

    def __init__(
        self, folder: Path, *, shape: Shape, dtype: torch.dtype, borrowed: Borrowed | None
    ) -> None:
        nn.Module.__init__(self)
        note = read_note(folder)
        self.kept, self.shape = kept_from(note), shape
        self.name, self.revision, self.graphs = note["target"], note["revision"], None
        self.borrowed, self.model = borrowed, borrowed.model if borrowed else None
        self._dtype = dtype
        self._note = note
        self._rows: dict[bytes, tuple[Path, int]] = {}
        packed = {s: Packed(folder / "packed" / s) for s in {x["split"] for x in note["shards"]}}
        self.length = packed["train"].length
        for shard in note["shards"]:
            file = folder / "states" / shard["file"]
            for row, mark in enumerate(
                _keys(packed[shard["split"]], shard["first"], shard["rows"])
            ):
                self._rows[mark] = (file, row)

    def require(self, target: Pretrained, borrowed: Borrowed | None, length: int) -> None:
        """Raises ValueError where the cache is of another target or of sequences of another
        length."""
        wrong = {"dtype": (self._note["dtype"], target.dtype), "length": (self.length, length)}
        wrong["target"] = (self.name, target.name)
        if borrowed is not None and self.name == target.name:
            wrong["target"] = (self.revision, borrowed.revision)
        for what, (mine, asked) in wrong.items():
            if mine != asked:
                raise ValueError(
                    f"the cache is of {what} {mine} and training asks for {asked}; give both "
                    "stages the same target and sequence_length"
                )

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def forward(
        self, ids_BT: Tensor, *, doc_BT: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> TargetOut:
        assert doc_BT is not None, "a cache holds packed sequences"
        (B, T), kept = ids_BT.shape, self.kept
        wide = kept.width if kept.keep == "states" else 2 * kept.k + 1
        kind = self._dtype if kept.keep == "states" else torch.float32
        hidden_BTX = torch.zeros(B, T, wide, dtype=kind)
        taps_BTLD = torch.zeros(B, T, len(taps), kept.width, dtype=self._dtype)
        chosen = [kept.taps.index(tap) for tap in taps]
        for b, (ids_T, doc_T) in enumerate(zip(ids_BT.cpu(), doc_BT.cpu(), strict=True)):
            found = self._read(key(ids_T, doc_T))
            at_P = found["place"].long()
            hidden_BTX[b, at_P] = self._last(found)
            if taps:
                taps_PLD = found["taps"].float() * found["taps_scale"][..., None]
                taps_BTLD[b, at_P] = taps_PLD[:, chosen].to(self._dtype)
        device = ids_BT.device
        return TargetOut(hidden_BTX.to(device), taps_BTLD.to(device) if taps else None)

    def embed(self, ids: Tensor) -> Tensor:
        return self._parts().embed(ids)

    def head_rows(self, ids: Tensor) -> Tensor:
        return self._parts().head_rows(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """From states through the head; with `top_k`, from what `forward` gives in their place."""
        if self.kept.keep == "states":
            return self._parts().logits(hidden)
        k, vocabulary = self.kept.k, self.shape.vocab_size
        tokens, logp, rest = hidden.split([k, k, 1], dim=-1)
        whole = rest.expand(*rest.shape[:-1], vocabulary)
        return whole.scatter(-1, tokens.long(), logp)

    def _parts(self) -> Borrowed:
        assert self.borrowed is not None, "this drafter was not expected to borrow anything"
        return self.borrowed

    def _last(self, found: dict[str, Tensor]) -> Tensor:
        """What stands for the last state, [P, X]: itself, or a law: tokens, their log p, and the
        log p of each other token. (A token's number is exact in float32.)"""
        if self.kept.keep == "states":
            return (found["last"].float() * found["last_scale"][:, None]).to(self._dtype)
        logp_Pk = found["logp"]
        left_P1 = (1 - logp_Pk.double().exp().sum(-1, keepdim=True)).clamp(min=1e-12)
        others = max(1, self.shape.vocab_size - self.kept.k)
        rest_P1 = (left_P1 / others).log().float()
        return torch.cat([found["tokens"].float(), logp_Pk, rest_P1], dim=-1)

    def _read(self, mark: bytes) -> dict[str, Tensor]:
        """The tensors of one sequence."""
        if mark not in self._rows:
            raise ValueError(
                f"a sequence is not in the cache of {self.name}, which holds {len(self._rows):,}: "
                "train on the cache's own sequences (needs: {cache: cache} and no other data)"
            )
        file, row = self._rows[mark]
        opened, ends = _opened(file)
        found = set(opened.keys()) - {"count"}
        at = slice(int(ends[row]), int(ends[row + 1]))
        return {name: opened.get_slice(name)[at] for name in found}


@functools.lru_cache(maxsize=OPEN)
def _opened(file: Path) -> tuple[Any, Tensor]:
    """A shard, and where each of its sequences begins and the last one ends, [rows + 1]."""
    opened = safe_open(str(file), "pt")
    return opened, torch.cat(
        [torch.zeros(1, dtype=torch.long), opened.get_tensor("count").cumsum(0)]
    )


def key(ids_T: Tensor, doc_T: Tensor) -> bytes:
    """Names a packed sequence: 16 bytes of a hash of its tokens and its documents."""
    raw = torch.stack([ids_T, doc_T]).int().numpy().tobytes()
    return hashlib.blake2b(raw, digest_size=16).digest()


def _keys(packed: Packed, first: int, rows: int) -> Iterator[bytes]:
    """The keys of so many sequences from the first on."""
    for at in range(first, first + rows, 256):
        batch = packed.batch(list(range(at, min(at + 256, first + rows))))
        yield from map(key, batch.ids_BT, batch.doc_BT)


def kept_from(note: dict[str, Any]) -> Kept:
    """What a cache's note says of it."""
    return Kept(**{**note["kept"], "taps": tuple(note["kept"]["taps"])})


def read_note(folder: Path) -> dict[str, Any]:
    """cache.json. Raises OSError where it is not there or not readable."""
    try:
        return json.loads((folder / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OSError(
            f"{folder / NOTE} is not there or damaged ({type(error).__name__}); delete "
            f"{folder.parent / 'DONE'} and run the same command again: what is whole stays"
        ) from None


def require_sound(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The note of a cache all of whose files are as they were written; each rank hashes its share.
    Raises OSError naming the first that is not."""
    note = read_note(folder)
    mine = [s for n, s in enumerate(note["shards"]) if ranks.has(n)]
    faults = ranks.gather([f for f in (fault(folder / "states", s) for s in mine) if f])
    if faults:
        raise OSError(
            f"the cache is damaged: {faults[0]} (in {folder / 'states'}; {len(faults)} of "
            f"{len(note['shards'])} files). Delete it and {folder.parent / 'DONE'} and run the "
            "same command again: only what is missing is made again"
        )
    return note


def fault(folder: Path, shard: dict[str, Any]) -> str | None:
    """What is wrong with a file of `states/`, or None."""
    return damage(folder, {shard["file"]: shard["digest"]})


def positions(kept: Kept, packed: Packed, rows: Iterable[int]) -> int:
    """How many positions of these sequences are kept."""
    numbers = list(rows)
    parts = [numbers[a : a + 256] for a in range(0, len(numbers), 256)]
    return sum(int(kept.of(packed.batch(part)).sum()) for part in parts)


def rows_a_shard(kept: Kept, packed: Packed, mib: int) -> int:
    """Sequences whose states make a file of about so many MiB."""
    each = kept.bytes * max(1.0, positions(kept, packed, range(len(packed))) / len(packed))
    return max(1, math.floor(mib * 2**20 / each))
