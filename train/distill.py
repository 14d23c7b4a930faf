"""Stage `distill`: the only training loop, for pretraining on text and for fine-tuning on what the
target answered. Runs on one process or many; the same data order and global batch on any number.

Shapes: B batch, T tokens.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import pack
from data.chat import require_same_tokenizer
from data.documents import Documents, is_validation
from data.generate import read
from data.language import Gate
from data.pack import Packed
from data.rows import Row, Sample
from data.sources import Source, heldout, prompt_of
from decoding.target import Pretrained, Shape
from drafters.base import Batch, Blueprint, Metrics, Trained, save
from train import checkpoint
from train.engine import Engine, barrier, join, sum_over_ranks
from train.objectives import Loss
from train.track import Jsonl, Tracker

VALIDATION_SEQUENCES = 16
CHECKPOINTS = 5  # per run
REPORTS = 10  # validations per run


@dataclass(frozen=True)
class AdamW:
    """conf/optim/adamw.yaml: rate, its warm-up and cosine, and what else the optimiser needs.

    warmup and floor are shares: of the steps, and of the peak rate where the cosine ends.
    """

    lr: float = 3e-4
    warmup: float = 0.03
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of 0-based `step` of `steps`."""
        warm = max(1, math.ceil(self.warmup * steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        progress = (step - warm) / max(1, steps - warm)
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """How many tokens, and in what portions. Everything is counted in packed positions.

    tokens: of the whole run; batch_tokens: of one optimiser step over all ranks; micro_batch:
    sequences that one rank holds at once (changes speed and memory, never the result).
    """

    free = frozenset({"micro_batch", "zero_stage"})

    tokens: int
    batch_tokens: int
    sequence_length: int
    micro_batch: int = 8
    zero_stage: int = 1
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch_tokens, self.sequence_length, self.micro_batch) < 1:
            raise ValueError(
                f"schedule has tokens {self.tokens}, batch_tokens {self.batch_tokens}, "
                f"sequence_length {self.sequence_length}, micro_batch {self.micro_batch}; each "
                "must be at least 1"
            )
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"schedule.dtype is {self.dtype!r}; it must be bfloat16 or float32")
        if self.batch_tokens % self.sequence_length or self.tokens < self.batch_tokens:
            raise ValueError(
                f"batch_tokens {self.batch_tokens:,} must be a multiple of sequence_length "
                f"{self.sequence_length:,} and at most tokens {self.tokens:,}; otherwise there is "
                "not one whole step"
            )

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens

    @property
    def rows(self) -> int:
        """Sequences of one optimiser step."""
        return self.batch_tokens // self.sequence_length

    def micro(self, world: int) -> int:
        """The largest micro-batch, at most the configured one, that divides a rank's share."""
        if self.rows % world:
            raise ValueError(
                f"a step of {self.rows} sequences cannot be shared by {world} ranks; make "
                "batch_tokens a multiple of sequence_length x ranks"
            )
        share = self.rows // world
        return max(m for m in range(1, min(self.micro_batch, share) + 1) if share % m == 0)


class Distill:
    """Trains `drafter` on `data` (or on the answers of a generate stage) under `objective`.

    The target is loaded only if the objective reads its law. `init` names a folder that a
    distill stage wrote, to start from; a stage that provides `drafter` does the same.
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
    ) -> None:
        self.target, self.drafter, self.objective = target, drafter, objective
        self.schedule, self.optim = schedule, optim
        self.data, self.init, self.tracker = data, init, tracker

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
        frozen = self.target.load(target) if self.objective.needs_target else None
        shape = frozen.shape if frozen else shape_of(self.target, target)
        module = self._drafter(shape, drafter, tokenizer)
        warn_if_large(module, shape)

        def step(engine: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
            return engine(batch, frozen, self.objective)

        tracker = Tracker(out, rank, self.tracker)
        metrics = Loop(self.schedule, self.optim, out, tracker).run(module, step)
        if rank == 0:
            save(module, out / "artifact", self.drafter.arguments)
            tokenizer.save_pretrained(out / "artifact")
        barrier()
        return metrics

    def _drafter(self, shape: Shape, parent: Path | None, tokenizer: Any) -> Trained:
        torch.manual_seed(self.schedule.seed)
        module = self.drafter(shape)
        assert isinstance(module, Trained), f"{type(module).__name__} has nothing to train"
        module.initialise()
        start = parent or self.init or self.drafter.arguments.get("checkpoint")
        if start:
            require_same_tokenizer(tokenizer, str(start))
        if parent or self.init:
            module.read(Path(parent or str(self.init)))
        return module


def rows_of(source: Source | None, generated: Path | None) -> tuple[Iterable[Row | Sample], str]:
    """The rows to train on, of a language-checked source or of a generate stage, and their name."""
    if (source is None) == (generated is None):
        raise ValueError(
            "a distill stage trains on its `data` or on the answers of a stage that it needs as "
            f"`data`; it has {'neither' if source is None else 'both'}"
        )
    if generated is not None:
        return read(generated), "the target's answers"
    assert source is not None
    return _gated(source), source.name


def _gated(source: Source) -> Iterator[Row]:
    gate = Gate(source.language, of="all")
    try:
        for row in gate(source.rows(), source.name):
            if "messages" not in row or not heldout(prompt_of(row)):
                yield row
    finally:  # also when the reader has enough before the source ends
        print(f"{source.name}: {gate.summary()}", flush=True)


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
    except ValueError:  # too little data for one validation row; training goes on without
        shutil.rmtree(part / "validation", ignore_errors=True)
    part.rename(folder)
    positions = len(train) * train.length
    print(
        f"{documents.name}: {train.documents:,} documents in {len(train):,} sequences of "
        f"{train.length} ({documents.tokens / positions:.0%} filled, "
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


Step = Callable[[Any, Batch], tuple[Tensor, Metrics]]


class Loop:
    """Steps, validation, checkpoints; resumes from the newest checkpoint that verifies."""

    def __init__(self, schedule: Schedule, optim: AdamW, out: Path, tracker: Tracker) -> None:
        self.schedule, self.optim, self.out, self.tracker = schedule, optim, out, tracker
        self.rank, self.world = join()
        self.train = Packed(out / "packed" / "train")
        held = out / "packed" / "validation"
        self.validation = Packed(held) if held.is_dir() else None

    def run(self, module: nn.Module, step_fn: Step) -> dict[str, float]:
        """Trains `module`; step_fn(engine, batch) gives the summed loss and metrics."""
        plan = self.schedule
        micro = plan.micro(self.world)
        engine = Engine(
            module,
            dtype=plan.dtype,
            zero_stage=plan.zero_stage,
            micro_batch=micro,
            accumulation=plan.rows // (micro * self.world),
            clip=self.optim.clip,
            betas=self.optim.betas,
            weight_decay=self.optim.weight_decay,
        )
        first = self._resume(engine)
        every = max(1, plan.steps // CHECKPOINTS)
        look = max(1, plan.steps // REPORTS)
        begin, found = time.perf_counter(), {}
        with self._bar(first) as bar:
            for step in range(first, plan.steps):
                measured = self._step(engine, step_fn, step, micro)
                bar.update(plan.batch_tokens)
                bar.set_postfix({k: f"{v:.3f}" for k, v in measured.items() if k in SHOWN})
                self.tracker.log(step + 1, **measured)
                last = step + 1 == plan.steps
                if last or (step + 1) % look == 0:
                    found = self._validate(engine, step_fn, step + 1)
                if last or (step + 1) % every == 0:
                    self._save(engine, step + 1)
        seconds = time.perf_counter() - begin
        engine.finish()
        self.tracker.close()
        done = (plan.steps - first) * plan.batch_tokens
        return {"steps": plan.steps, "tokens_per_second": done / max(seconds, 1e-9), **found}

    def _step(self, engine: Engine, step_fn: Step, step: int, micro: int) -> dict[str, float]:
        """One optimiser step. The loss is the mean over the supervised tokens of all ranks."""
        rows = self.order(step)
        supervised = int(self.train.supervised[rows].sum())
        if not supervised:
            raise ValueError(
                f"step {step + 1} has no supervised token: look at the data (view=true)"
            )
        shares = [rows[i : i + micro] for i in range(0, len(rows), micro)]
        mine = shares[self.rank :: self.world]
        sums: dict[str, float] = {}
        engine.module.train()
        for share in mine:
            batch = _to_device(self.train.batch(share), engine)
            loss, metrics = step_fn(engine, batch)
            engine.backward(loss * (len(mine) * self.world / supervised))
            engine.step(self.optim.rate(step, self.schedule.steps))
            _add(sums, {"loss": loss.detach(), **metrics})
        found = _means(sum_over_ranks(sums))
        if not math.isfinite(found["loss"]):
            raise ArithmeticError(f"the loss is {found['loss']} at step {step + 1}; lower optim.lr")
        rate = self.optim.rate(step, self.schedule.steps)
        return found | {"lr": rate, "gradient_norm": engine.gradient_norm()}

    def order(self, step: int) -> list[int]:
        """Sequences of a step: the same on any number of ranks, each epoch shuffled anew."""
        n, rows = len(self.train), self.schedule.rows
        picked = []
        for index in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(index, n)
            picked.append(int(self._shuffled(epoch)[at]))
        return picked

    def _shuffled(self, epoch: int) -> Tensor:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(self.schedule.seed * 1_000_003 + epoch)
            self._epoch = epoch
            self._permutation = torch.randperm(len(self.train), generator=generator)
        return self._permutation

    @torch.no_grad()
    def _validate(self, engine: Engine, step_fn: Step, step: int) -> dict[str, float]:
        if self.validation is None:
            return {}
        sums: dict[str, float] = {}
        engine.module.eval()
        for row in range(len(self.validation)):
            loss, metrics = step_fn(engine.module, _to_device(self.validation.batch([row]), engine))
            _add(sums, {"loss": loss.detach(), **metrics})
        found = {f"validation_{k}": v for k, v in _means(sums).items()}
        self.tracker.log(step, **found)
        return found

    def _save(self, engine: Engine, step: int) -> None:
        state = engine.state()
        if self.rank == 0:
            checkpoint.save(self.out / "checkpoints", step, state, {"seed": self.schedule.seed})
        barrier()

    def _resume(self, engine: Engine) -> int:
        found = checkpoint.newest(self.out / "checkpoints")
        if found is None:
            return 0
        state, position, skipped = found
        for why in skipped if self.rank == 0 else []:
            print(f"skipped checkpoint {why}", flush=True)
        engine.restore(state, position["step"])
        if self.rank == 0:
            print(f"resumed after step {position['step']} of {self.schedule.steps}", flush=True)
        return int(position["step"])

    def _bar(self, first: int) -> tqdm:
        plan = self.schedule
        return tqdm(
            initial=first * plan.batch_tokens,
            total=plan.steps * plan.batch_tokens,
            unit="tok",
            unit_scale=True,
            desc="train",
            disable=self.rank != 0,
        )


SHOWN = ("loss", "alpha", "top1")


def _to_device(batch: Batch, engine: Engine) -> Batch:
    device = next(engine.module.parameters()).device
    return Batch(batch.ids_BT.to(device), batch.mask_BT.to(device), batch.doc_BT.to(device))


def _add(sums: dict[str, float], values: Metrics) -> None:
    for key, value in values.items():
        sums[key] = sums.get(key, 0.0) + float(value)


def _means(sums: dict[str, float]) -> dict[str, float]:
    tokens = max(1.0, sums["tokens"])
    return {key: value / tokens for key, value in sums.items() if key != "tokens"}
