"""Stage `distill`: pretraining on text of the language, fine-tuning on what the target answered.

Shapes: B batch, T tokens.
"""

import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import pack
from data.chat import require_same_tokenizer
from data.documents import Documents, is_validation
from data.generate import read
from data.language import Gated
from data.rows import Row, Sample
from data.sources import Source, heldout, prompt_of
from decoding.pretrained import Pretrained, contents_hash
from decoding.target import Shape
from drafters.base import Batch, Blueprint, Metrics, Trained, save
from train.decoded import Decoded, keep_prompts, last_quarter, told
from train.engine import barrier, join
from train.loop import Loop
from train.objectives import Loss
from train.schedule import AdamW, Schedule
from train.track import Jsonl, Tracker

VALIDATION_SEQUENCES = 16


class Distill:
    """Trains `drafter` on `data` (or on the answers of a generate stage) under `objective`.

    The target is loaded only if the objective reads its law. `init` names a folder that a
    distill stage wrote, to start from; a stage that provides `drafter` does the same.

    With a target loaded and answers of its own to train on, each validation (after every
    `validate_every` steps; null: eight times a run) also decodes held-out prompts: the drafter that
    is saved is the one that decoded best, and training ends with exit code 3 when decoding and the
    training pass disagree on what it guesses.
    """

    free = frozenset({"tracker"})

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
    ) -> None:
        if validate_every is not None and validate_every < 1:
            raise ValueError(
                f"validate_every is {validate_every}; it must be a number of steps from 1, or null"
            )
        self.target, self.drafter, self.objective = target, drafter, objective
        self.schedule, self.optim = schedule, optim
        self.data, self.init, self.tracker = data, init, tracker
        self.validate_every = validate_every

    def check(self, needs: Collection[str]) -> None:
        """Refuses, before anything starts, what cannot work with these needs."""
        if (self.data is None) == ("data" not in needs):
            raise ValueError(
                "a distill stage trains on its `data` or on the answers of a stage that it needs "
                f"as `data`; it has {'neither' if self.data is None else 'both'}"
            )
        given = self.drafter.arguments
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

    def run(
        self,
        out: Path,
        *,
        target: Path | None = None,
        drafter: Path | None = None,
        data: Path | None = None,
    ) -> dict[str, float]:
        """Trains and saves the drafter to artifact/; returns validation metrics and speed."""
        rank, _ = join()
        tokenizer = self.target.tokenizer(target)
        rows, source = rows_of(self.data, data)
        documents = Documents(tokenizer, source)
        if rank == 0:
            prepare(out, rows, documents, self.schedule)
        barrier()
        shape = shape_of(self.target, target)
        module = self._drafter(shape)
        reads = self.objective.needs_target or module.needs_target
        frozen = self.target.load(target) if reads else None
        module.initialise(frozen, lambda: _counts(out, shape))
        self._start_from(drafter, module, tokenizer)
        if drafter or self.init or self.drafter.arguments.get("checkpoint"):
            module.adapt()  # what trains from nothing is trained whole
        if frozen is not None:
            frozen = module.learning(frozen)
        warn_if_large(module, shape)

        def step(engine: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
            return engine(batch, frozen, self.objective)

        tracker = Tracker(out, rank, self.tracker)
        look = Decoded(frozen, out / "packed" / "prompts.json") if frozen else None
        loop = Loop(self.schedule, self.optim, out, tracker)
        metrics = loop.run(module, step, look, self.validate_every)
        if rank == 0:
            if "artifact_step" in metrics:
                gain = last_quarter(out / "metrics.jsonl", self.schedule.steps)
                metrics |= {} if gain is None else {"last_quarter_gain": gain}
                print(told(metrics, gain), flush=True)
            save(module, out / "artifact", self.drafter.arguments)
            tokenizer.save_pretrained(out / "artifact")
        barrier()
        return metrics

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
            module.read(Path(parent or str(self.init)))


def _counts(out: Path, shape: Shape) -> Tensor:
    return pack.Packed(out / "packed" / "train").counts(shape.vocab_size)


def rows_of(source: Source | None, generated: Path | None) -> tuple[Iterable[Row | Sample], str]:
    """The rows to train on, of a language-checked source or of a generate stage, and their name."""
    if generated is not None:
        return read(generated), "the target's answers"
    assert source is not None, "check() refuses a stage with neither"
    return _gated(source), source.name


def _gated(source: Source) -> Iterator[Row]:
    rows = Gated(source, of="all")
    try:
        for row in rows:
            if "messages" not in row or not heldout(prompt_of(row)):
                yield row
    finally:  # also when the reader has enough before the source ends
        print(rows.summary(), flush=True)


def prepare(
    out: Path, rows: Iterable[Row | Sample], documents: Documents, schedule: Schedule
) -> None:
    """Packs training and validation data into out/packed, once, and prints what it found."""
    folder = out / "packed"
    if (folder / "train" / "packed.json").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    part = out / "packed.part"
    shutil.rmtree(part, ignore_errors=True)
    most = schedule.tokens // schedule.sequence_length
    bar = tqdm(rows, unit="row", desc="tokenise and pack")
    kept: list[Row | Sample] = []
    train = pack.write(
        part / "train", documents(_aside(bar, kept), False), schedule.sequence_length, most
    )
    bar.close()
    documents.complain()  # also where the source was not read to its end
    held = Documents(documents.tokenizer, documents.name)
    try:
        pack.write(
            part / "validation", held(kept, True), schedule.sequence_length, VALIDATION_SEQUENCES
        )
    except ValueError as why:  # too little data for a validation set; training goes on without
        print(f"no validation: {why}", flush=True)
        shutil.rmtree(part / "validation", ignore_errors=True)
    keep_prompts(part / "prompts.json", kept, schedule.sequence_length)
    part.rename(folder)
    positions = len(train) * train.length
    print(
        f"{documents.name}: {documents.rows:,} rows read, {len(train):,} sequences of "
        f"{train.length} ({train.tokens / positions:.0%} filled, "
        f"{documents.supervised / max(1, documents.tokens):.0%} supervised"
        f"{f', {train.too_long:,} dropped as too long' if train.too_long else ''}); "
        f"{schedule.steps * schedule.batch_tokens / positions:.2f} epochs, {schedule.steps} steps",
        flush=True,
    )


def _aside(rows: Iterable[Row | Sample], kept: list[Row | Sample]) -> Iterator[Row | Sample]:
    """Passes rows on, remembering those that validation will want."""
    for row in rows:
        if len(kept) < 2000 and is_validation(row):
            kept.append(row)
        yield row


def shape_of(spec: Pretrained, folder: Path | None) -> Shape:
    """The target's shape from its configuration alone."""
    from transformers import AutoConfig

    revision = None if folder else spec.revision
    return Shape.of(AutoConfig.from_pretrained(str(folder or spec.path), revision=revision))


def warn_if_large(module: nn.Module, shape: Shape) -> None:
    """A drafter larger than its target cannot pay."""
    count = sum(p.numel() for p in module.parameters())
    if count > shape.parameters():
        print(
            f"warning: the drafter has {count:,} parameters and its target about "
            f"{shape.parameters():,}: drafting will cost more than it saves",
            flush=True,
        )
