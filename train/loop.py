"""The training loop: steps, validation, checkpoints, the same on one rank and on many.

Shapes: B batch, T tokens.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.pack import Packed
from decoding.pulse import item
from decoding.ranks import Ranks
from drafters.base import Batch, Metrics, write_json
from eval.controls import Failed
from train import resume
from train.engine import Engine, join, sum_over_ranks
from train.guard import STOP, Guard, Preempted, Told, naming_memory, poisoned, require_labels
from train.halving import record, step_at
from train.machine import peak_memory
from train.resume import Best, Paused, Position
from train.schedule import AdamW, Schedule
from train.track import Tracker

CHECKPOINTS = 5  # per run, and one
AT_LEAST = 900.0  # seconds of steps after the last
REPORTS = 8  # validations per run
SHOWN = ("loss", "alpha", "top1")

Step = Callable[[Any, Batch], tuple[Tensor, Metrics]]
Look = Callable[[Any], tuple[dict[str, float], str | None]]
"""What a validation wants to know of a module besides, and what must end its training (None:
nothing). Whoever gives a `validation_tau` chooses by it which step is saved."""


class Loop:
    """Steps, validation, checkpoints; resumes from the newest checkpoint that verifies."""

    def __init__(self, schedule: Schedule, optim: AdamW, out: Path, tracker: Tracker) -> None:
        self.schedule, self.optim, self.out, self.tracker = schedule, optim, out, tracker
        self.rank, self.world = join()
        self.ranks = Ranks(self.rank, self.world)
        self.train = Packed(out / "packed" / "train")
        held = out / "packed" / "validation"
        self.blamed = out / "fault.json"  # why an earlier start ended; asked again before going on
        self.validation = Packed(held) if self.ranks.decide(held.is_dir) else None
        self.training = self.validating = 0.0  # seconds
        self.at, self.saved, self.saved_at = Position(), 0, 0.0  # step, and second of training

    def run(
        self,
        module: nn.Module,
        step_fn: Step,
        look: Look | None = None,
        every: int | None = None,
        pause_at: int | None = None,
    ) -> dict[str, float]:
        """Trains `module`, and leaves it as it validated best (by `look`; else as it was last);
        step_fn(engine, batch) gives the summed loss and metrics. Validates after each `every`
        steps (None: eight times a run) and after the last.

        Raises Preempted, after saving, when any rank was told to stop; Paused, after validating and
        saving, when the first step is behind it that brings `pause_at` tokens, and is not the last;
        Failed, after saving, when `look` finds that training must end, and without when a guard
        does (train/guard.py).
        """
        every = every or max(1, self.schedule.steps // REPORTS)
        until = step_at(pause_at or self.schedule.tokens, self.schedule.batch_tokens)
        resume.reserve(self.out / "checkpoints", module, self.ranks)
        with STOP.listening():
            engine = self._engine(module)
            self.at = self._resume(engine)
            first, best = self.at.step, Best(self.out / "best", self.ranks)
            try:
                found = self._train(engine, step_fn, look, best, every, until)
                if until < self.schedule.steps:
                    self._pause(engine, step_fn, look, found, until)
            except Told:
                raise self._preempted(engine) from None
            finally:
                self.tracker.close()
        engine.finish()
        done = (self.schedule.steps - first) * self.schedule.batch_tokens
        speed = {"tokens_per_second": done / self.training} if done else {}
        spent = max(1e-9, self.validating + self.training)
        speed |= {"validation_share": self.validating / spent} if done else {}
        speed |= {"peak_memory_mib": peak_memory()}
        counts = {"steps": self.at.step, "skipped_steps": self.at.step - self.at.applied}
        return counts | speed | found | best.give(engine)

    def _train(
        self, engine: Engine, step_fn: Step, look: Look | None, best: Best, every: int, until: int
    ) -> dict[str, float]:
        """Steps to the end, or to step `until`; what the last validation found."""
        plan, at = self.schedule, self.at
        save = max(1, plan.steps // CHECKPOINTS)
        found, owed = dict[str, float](), False
        due = at.step % every == 0 and at.validated < at.step
        if at.step == plan.steps or due or self.ranks.decide(self.blamed.is_file):
            found = self._validate(engine, step_fn, look, best)
            if self.rank == 0:
                self.blamed.unlink(missing_ok=True)
        self.guard = Guard(engine, self.ranks, at.applied, plan.steps - at.step)
        with self._bar() as bar:
            while at.step < min(until, plan.steps):
                begin = time.perf_counter()
                measured = self._step(engine, step_fn, at.step, plan.micro(self.world))
                self.training += time.perf_counter() - begin
                bar.update(plan.batch_tokens)
                bar.set_postfix({k: f"{v:.3f}" for k, v in measured.items() if k in SHOWN})
                last = at.step == plan.steps
                if last or at.step % every == 0:
                    found = self._validate(engine, step_fn, look, best)
                # not amid steps that were skipped: what is kept is of before the trouble
                owed = owed or measured["owed"] > 0 or at.step % save == 0
                if last or (owed and not at.skipped):
                    self._save(engine)
                    owed = False
        return found

    def _pause(
        self,
        engine: Engine,
        step_fn: Step,
        look: Look | None,
        found: dict[str, float],
        until: int,
    ) -> None:
        """Ends this start, with the tau of this step on record. Raises Paused."""
        at, plan = self.at, self.schedule
        if at.step == until:
            if not found or at.validated < at.step:
                # a look alone: what is saved in the end must be what it is without a pause
                found = self._validate(engine, step_fn, look, None)
            self._save(engine)
            if self.rank == 0:
                record(self.out, at.step * plan.batch_tokens, found.get("validation_tau"))
        raise Paused(
            f"paused after step {at.step} of {plan.steps}, {at.step * plan.batch_tokens:,} tokens; "
            "the same command with a later pause_at, or with none, goes on from there"
        )

    def _engine(self, module: nn.Module) -> Engine:
        plan = self.schedule
        micro = plan.micro(self.world)
        return Engine(
            module,
            dtype=plan.dtype,
            zero_stage=plan.zero_stage,
            micro_batch=micro,
            accumulation=plan.rows // (micro * self.world),
            clip=self.optim.clip,
            betas=self.optim.betas,
            weight_decay=self.optim.weight_decay,
            compiled=plan.compile,
        )

    def _step(self, engine: Engine, step_fn: Step, step: int, micro: int) -> dict[str, float]:
        """One global batch. The loss is the mean over the supervised tokens of all ranks."""
        rows = self.order(step)
        supervised = int(self.train.supervised[rows].sum())
        if not supervised:
            raise ValueError(
                f"step {step + 1} has no supervised token: look at the data (view=true)"
            )
        starts = range(self.rank * micro, len(rows), self.world * micro)
        rate = self.optim.rate(step, self.schedule.steps)
        sums: dict[str, float] = {}
        moved, bad = False, list[int]()
        engine.module.train()
        for start in starts:
            STOP.check()
            share = rows[start : start + micro]
            # what a pass draws depends on its place in the run alone: there is no state to save
            torch.manual_seed(self.schedule.seed * 2**40 + step * len(rows) + start)
            with item("a training pass"), naming_memory(step + 1, len(share), self.train.length):
                batch = _to_device(self.train.batch(share), engine)
                loss, metrics = step_fn(engine, batch)
                engine.backward(poisoned(loss, len(starts) * self.world / supervised))
                moved = engine.step(rate)
            bad += share if not loss.isfinite() else []
            _add(sums, {"loss": loss.detach(), **metrics})
        waited = self.training - self.saved_at > AT_LEAST
        sums["owed"] = float(waited and self.rank == 0)  # summed: all ranks save, or none
        sums = sum_over_ranks(sums)
        found = _means(sums) | {"lr": rate, "gradient_norm": engine.gradient_norm()}
        if not self.guard.begun:
            require_labels(sums, self.train)
            self.guard.begin()
        self._counted(found, moved, rows, bad)
        return found

    def _counted(
        self, found: dict[str, float], moved: bool, rows: list[int], bad: list[int]
    ) -> None:
        """Notes a step, and has it judged by the guard."""
        self.at.count(moved)
        step = self.at.step
        logged = {key: value for key, value in found.items() if key != "owed"}
        if moved:
            self.tracker.log(step, logged)
        else:
            blamed = self.guard.blamed(rows, bad)
            self.tracker.log(step, logged | {"skipped": 1.0}, blamed)
            self.guard.refused(step, self.at.skipped, blamed)
        self.guard.after(step, moved and found["gradient_norm"] != 0)

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
    def _validate(
        self, engine: Engine, step_fn: Step, look: Look | None, best: Best | None
    ) -> dict[str, float]:
        """What it found, which `best` is offered. Raises Failed, after saving, where training must
        end."""
        if self.validation is None:
            return {}
        begin = time.perf_counter()
        sums: dict[str, float] = {}
        module = engine.module.eval()
        with engine.whole():
            for row in range(len(self.validation)):
                STOP.check()
                with item("a validation pass"):
                    batch = _to_device(self.validation.batch([row]), engine)
                    loss, metrics = step_fn(module, batch)
                _add(sums, {"loss": loss.detach(), **metrics})
            seen, fault = look(module) if look else ({}, None)
        found = {f"validation_{k}": v for k, v in _means(sums).items()} | seen
        if best and "validation_tau" in found and not fault:
            best.offer(engine, self.at, found["validation_tau"])
        self.at.validated = self.at.step
        spent = time.perf_counter() - begin
        self.validating += spent
        self.tracker.log(self.at.step, found | {"validation_seconds": spent})
        if fault:
            self._end(engine, f"step {self.at.step}: {fault}")
        return found

    def _end(self, engine: Engine, fault: str) -> None:
        self._save(engine)
        if self.rank == 0:
            write_json(self.blamed, {"fault": fault})
        raise Failed(fault)

    def _save(self, engine: Engine) -> None:
        """Saves what is not saved yet."""
        if self.at.step > self.saved:
            resume.save(self.out / "checkpoints", engine, self.ranks, self.at)
        self.saved, self.saved_at = self.at.step, self.training

    def _preempted(self, engine: Engine) -> Preempted:
        self._save(engine)
        done = f"after step {self.at.step} of {self.schedule.steps}"
        return Preempted(f"stopped and saved {done}; the same command goes on from there")

    def _resume(self, engine: Engine) -> Position:
        at = resume.restore(self.out / "checkpoints", engine, self.ranks)
        self.tracker.rewind(at.step)
        self.saved = at.step
        if at.step and self.rank == 0:
            print(f"resumed after step {at.step} of {self.schedule.steps}", flush=True)
        return at

    def _bar(self) -> tqdm:
        plan = self.schedule
        return tqdm(
            initial=self.at.step * plan.batch_tokens,
            total=plan.steps * plan.batch_tokens,
            unit="tok",
            unit_scale=True,
            desc="train",
            disable=self.rank != 0,
        )


def _to_device(batch: Batch, engine: Engine) -> Batch:
    device = next(engine.module.parameters()).device
    return Batch(batch.ids_BT.to(device), batch.mask_BT.to(device), batch.doc_BT.to(device))


def _add(sums: dict[str, float], values: Metrics) -> None:
    for key, value in values.items():
        sums[key] = sums.get(key, 0.0) + float(value)


def _means(sums: dict[str, float]) -> dict[str, float]:
    """Per supervised token; what belongs to a later draft position k (`name@k`) by its own."""
    found = {}
    for key, value in sums.items():
        name, at, k = key.partition("@")
        if name != "tokens":
            found[key] = value / max(1.0, sums[f"tokens{at}{k}"])
    return found
