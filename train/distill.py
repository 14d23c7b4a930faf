"""Stage `distill`: pretraining on text of the language, fine-tuning on what the target answered.

Shapes: B batch, T tokens.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import pack
from data.chat import require_same_tokenizer
from data.documents import Documents
from data.sources import Source
from decoding.pretrained import DTYPES, Pretrained, contents_hash
from decoding.ranks import Ranks
from decoding.sharded import Parted
from decoding.target import Shape, Target
from drafters.base import Batch, Blueprint, Metrics, Trained, require_intact, save
from train.decoded import Decoded, last_quarter, told
from train.engine import barrier, join
from train.loop import Look, Loop, Step
from train.machine import device
from train.objectives import Loss
from train.packing import prepare, rows_of, take_over
from train.placement import checksum, placement, require_unchanged
from train.probe import longest, probe
from train.recorded import Kept, Recorded, kept_from, require_sound
from train.schedule import AdamW, Schedule
from train.track import Jsonl, Tracker


class Distill:
    """Trains `drafter` on `data` (or on the answers of a generate stage) under `objective`.

    The target is loaded only if the drafter or the objective reads it: whole on each rank, shared
    by the ranks (target.parallel=zero3), or, with a stage that provides `cache`, not at all.
    `init` names a folder that a distill stage wrote, to start from; a stage that provides `drafter`
    does the same.

    With a target loaded and answers of its own to train on, each validation (after every
    `validate_every` steps; null: eight times a run) also decodes held-out prompts: the drafter that
    is saved is the one that decoded best, and training ends with exit code 3 when decoding and the
    training pass disagree on what it guesses.

    After `pause_at` tokens (null: never) it validates, saves and ends without being done; with a
    later one, or none, it goes on to the same drafter, bit for bit (train/halving.py).
    """

    free = frozenset({"tracker", "pause_at"})

    def __init__(
        self,
        *,
        target: Pretrained,
        drafter: Blueprint,
        objective: Loss,
        schedule: Schedule,
        optim: AdamW,
        data: Source | None = None,
        init: str | None = None,
        tracker: Jsonl | None = None,
        validate_every: int | None = None,
        pause_at: int | None = None,
    ) -> None:
        if pause_at is not None and pause_at < 1:
            raise ValueError(f"pause_at is {pause_at}; it must be null or at least 1 token")
        if validate_every is not None and validate_every < 1:
            raise ValueError(
                f"validate_every is {validate_every}; it must be a number of steps from 1, or null"
            )
        self.target, self.drafter, self.objective = target, drafter, objective
        self.schedule, self.optim = schedule, optim
        self.data, self.init, self.tracker = data, init, tracker
        self.validate_every, self.pause_at = validate_every, pause_at

    def check(self, needs: Collection[str]) -> None:
        """Refuses, before anything starts, what cannot work with these needs."""
        sources = (self.data is not None) + ("data" in needs) + ("cache" in needs)
        if sources != 1:
            several = "both" if "cache" not in needs else "more than a cache"
            raise ValueError(
                "a distill stage trains on its `data`, on the answers of a stage that it needs "
                f"as `data` or on a `cache`; it has {'neither' if not sources else several}"
            )
        given = self.drafter.arguments
        refuse_placement(self.target.parallel, given, self.reads_target, "cache" in needs)
        if given.get("target_lora") and self.schedule.zero_stage == 3:
            raise ValueError(
                "deepspeed=zero3 shards the weights of what is trained, and a drafter with "
                "target_lora trains inside its target; set deepspeed=zero2"
            )
        starts = "drafter" in needs or self.init or given.get("checkpoint")
        if given.get("lora") and "data" in needs and not starts:
            raise ValueError(
                "drafter.lora adds to a model that is there already: give drafter.checkpoint, or "
                "let an earlier stage provide the drafter (needs: {drafter: pretrain})"
            )
        if given.get("target_lora") and "data" not in needs:
            raise ValueError(
                "a drafter with target_lora changes its target, so it learns from the target's own "
                "answers only: stages.pretrain=null stages.finetune.needs.drafter=null"
            )

    def fingerprint(self) -> str:
        """Contents of the folders that training starts from."""
        starts = (self.init, self.drafter.arguments.get("checkpoint"))
        return ",".join(contents_hash(s) for s in starts if s and Path(s).is_dir())

    @property
    def reads_target(self) -> bool:
        """Whether training reads states of the target."""
        assert issubclass(self.drafter.cls, Trained)
        return self.objective.needs_target or self.drafter.cls.needs_target

    def decodes(self, needs: Collection[str]) -> bool:
        """Whether its validations decode with these needs, and so have a validation_tau."""
        return self.reads_target and "data" in needs and "cache" not in needs

    def run(
        self,
        out: Path,
        *,
        target: Path | None = None,
        drafter: Path | None = None,
        data: Path | None = None,
        cache: Path | None = None,
    ) -> dict[str, float]:
        """Trains and saves the drafter to artifact/; returns validation metrics and speed."""
        rank, _ = join()
        tokenizer = self.target.tokenizer(target)
        if rank == 0 and cache:
            take_over(cache, out)
        elif rank == 0:
            rows, source = rows_of(self.data, data)
            prepare(out, rows, Documents(tokenizer, source), self.schedule)
        barrier()
        shape = self.target.shape_of(target)
        module = self._drafter(shape)
        whole = self._target(out, module, shape, target, cache)
        self._begin(out, module, shape, whole, target)
        self._start_from(drafter, module, tokenizer)
        if drafter or self.init or self.drafter.arguments.get("checkpoint"):
            module.adapt()  # what trains from nothing is trained whole
        before = checksum(whole) if whole is not None else ""
        frozen = module.learning(whole) if whole is not None else None
        warn_if_large(module, shape)

        def step(engine: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
            return engine(batch, frozen, self.objective)

        tracker = Tracker(out, rank, self.tracker)
        loop = Loop(self.schedule, self.optim, out, tracker)
        print(self._probe(module, step, loop, frozen), flush=True)
        metrics = loop.run(module, step, look_of(frozen, out), self.validate_every, self.pause_at)
        if whole is not None:
            require_unchanged(whole, before)
        if rank == 0:
            if "artifact_step" in metrics:
                gain = last_quarter(out / "metrics.jsonl", self.schedule.steps)
                metrics |= {} if gain is None else {"last_quarter_gain": gain}
                print(told(metrics, gain), flush=True)
            save(module, out / "artifact", self.drafter.arguments)
            tokenizer.save_pretrained(out / "artifact")
        barrier()
        return metrics

    def _target(
        self, out: Path, module: Trained, shape: Shape, folder: Path | None, cache: Path | None
    ) -> Target | None:
        """What training asks for the target's states: itself, its cache, or nothing."""
        if not self.reads_target:
            return None
        kind = "cache" if cache else self.target.parallel
        ranks = Ranks.here()
        plan, dtype = self.schedule, self.target.dtype
        packed = pack.Packed(out / "packed" / "train")
        count = len(packed) * packed.length
        reads = Kept(shape.hidden_size, module.taps, "states", 0, "float16", module.needs_target)
        where = placement(shape, dtype=dtype, ranks=ranks.world, positions=count, kept=reads)
        print(*where.lines(kind, dtype), sep="\n", flush=True)
        if cache is None:
            return self.target.load(folder)
        kept = kept_from(require_sound(cache, ranks))
        if lacks := kept.lacks(module):
            raise ValueError(
                f"the cache {cache} was not made for this drafter, which reads {lacks}; give the "
                "stage `cache` the same drafter"
            )
        borrows = module.needs_target or kept.keep == "states"
        borrowed = self.target.borrow(folder) if borrows else None
        found = Recorded(cache, shape=shape, dtype=DTYPES[dtype], borrowed=borrowed)
        found.require(self.target, borrowed, plan.sequence_length)
        return found

    def _probe(self, module: Trained, step: Step, loop: Loop, frozen: Target | None) -> str:
        """Measures one step at its longest, before anything depends on it; what it found."""
        rows = list(range(min(self.schedule.micro(loop.world), len(loop.train))))
        batch = loop.train.batch(rows)
        if not isinstance(frozen, Recorded):  # which knows the supervised tokens alone
            batch = longest(batch)
        return probe(module, step, batch.to(device()), self.schedule, loop.world, frozen)

    def _begin(
        self, out: Path, module: Trained, shape: Shape, whole: Target | None, folder: Path | None
    ) -> None:
        """Sets the weights that training starts from, which may be copies of whole matrices."""
        begin = self.target.borrow(folder) if isinstance(whole, Parted) else whole
        module.initialise(begin, lambda: _counts(out, shape))

    def _drafter(self, shape: Shape) -> Trained:
        torch.manual_seed(self.schedule.seed)
        module = self.drafter(shape)
        assert isinstance(module, Trained), f"{type(module).__name__} has nothing to train"
        return module

    def _start_from(self, parent: Path | None, module: Trained, tokenizer: Any) -> None:
        start = parent or self.init or self.drafter.arguments.get("checkpoint")
        if start:
            require_same_tokenizer(tokenizer, str(start))
        if parent or self.init:
            start = Path(parent or str(self.init))
            require_intact(start)
            module.read(start)


def _counts(out: Path, shape: Shape) -> Tensor:
    return pack.Packed(out / "packed" / "train").counts(shape.vocab_size)


def refuse_placement(
    parallel: str | None, drafter: dict[str, Any], reads: bool, cached: bool
) -> None:
    """Raises ValueError for a place of the target that this training cannot use."""
    if cached and not reads:
        raise ValueError(
            "this training reads nothing of the target (an lm with objective ce), so a cache of "
            "its states is of no use: needs.cache=null, and data of its own"
        )
    if drafter.get("target_lora") and (cached or parallel):
        raise ValueError(
            "a drafter with target_lora changes its target, which must be whole for that: "
            "target.parallel=null and needs.cache=null"
        )
    if reads and parallel == "tensor" and not cached:
        raise ValueError(
            "target.parallel=tensor is for decoding: its ranks must all read the same tokens, and "
            "in training each has rows of its own; set target.parallel=zero3, or train from a "
            "stage `cache`"
        )


def look_of(frozen: Target | None, out: Path) -> Look | None:
    """Decode-validation where there is a whole target to decode with; says where there is none."""
    prompts = out / "packed" / "prompts.json"
    if isinstance(frozen, Recorded):
        print("no decode-validation: a cache cannot decode, so bench is the first to", flush=True)
        return None
    return Decoded(frozen, prompts) if frozen is not None else None


def warn_if_large(module: nn.Module, shape: Shape) -> None:
    """A drafter larger than its target cannot pay."""
    count = sum(p.numel() for p in module.parameters())
    if count > shape.parameters():
        print(
            f"warning: the drafter has {count:,} parameters and its target about "
            f"{shape.parameters():,}: drafting will cost more than it saves",
            flush=True,
        )
