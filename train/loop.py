"""The training loop: steps, validation, checkpoints, the same on one rank and on many.

Shapes: B batch, T tokens.
"""

import math
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.pack import Packed
from drafters.base import Batch, Metrics, write_json
from eval.controls import Failed
from train import checkpoint
from train.engine import Engine, barrier, join, sum_over_ranks
from train.schedule import AdamW, Schedule
from train.track import Tracker

CHECKPOINTS = 5  # per run
REPORTS = 8  # validations per run
SHOWN = ("loss", "alpha", "top1")


class Preempted(Exception):
    """The run was told to stop, and has saved where it was."""


Step = Callable[[Any, Batch], tuple[Tensor, Metrics]]
Look = Callable[[Any], tuple[dict[str, float], str | None]]
"""What a validation wants to know of a module besides, and what must end its training (None:
nothing). Whoever gives a `validation_tau` chooses by it which step is saved."""


class Loop:
    """Steps, validation, checkpoints; resumes from the newest checkpoint that verifies."""

    def __init__(self, schedule: Schedule, optim: AdamW, out: Path, tracker: Tracker) -> None:
        self.schedule, self.optim, self.out, self.tracker = schedule, optim, out, tracker
        self.rank, self.world = join()
        self.train = Packed(out / "packed" / "train")
        held = out / "packed" / "validation"
        self.validation = Packed(held) if held.is_dir() else None
        self.validating = 0.0  # seconds
        self.told_to_stop = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._tell)
            signal.signal(signal.SIGINT, self._tell)

    def _tell(self, *_: Any) -> None:
        """First signal: save at the end of the step. A second one ends at once."""
        if self.told_to_stop:
            raise KeyboardInterrupt
        self.told_to_stop = True

    def run(
        self, module: nn.Module, step_fn: Step, look: Look | None = None, every: int | None = None
    ) -> dict[str, float]:
        """Trains `module`, and leaves it as it validated best (by `look`; else as it was last);
        step_fn(engine, batch) gives the summed loss and metrics. Validates after each `every`
        steps (None: eight times a run) and after the last. Raises Failed, after saving, when
        `look` finds that training must end."""
        plan = self.schedule
        micro = plan.micro(self.world)
        engine = self._engine(module, micro)
        first = self._resume(engine)
        best = Best(self.out / "best", self.rank)
        save = max(1, plan.steps // CHECKPOINTS)
        every = every or max(1, plan.steps // REPORTS)
        seconds = 0.0  # in steps alone
        found, fault = dict[str, float](), None
        blamed = self.out / "fault.json"  # why an earlier start ended; asked again before going on
        if first == plan.steps or blamed.is_file():
            found, fault = self._validate(engine, step_fn, look, best, first)
            blamed.unlink(missing_ok=True)
        with self._bar(first) as bar:
            for step in range(first, plan.steps if not fault else first):
                begin = time.perf_counter()
                measured = self._step(engine, step_fn, step, micro)
                seconds += time.perf_counter() - begin
                bar.update(plan.batch_tokens)
                bar.set_postfix({k: f"{v:.3f}" for k, v in measured.items() if k in SHOWN})
                self.tracker.log(step + 1, **{k: v for k, v in measured.items() if k != "stop"})
                last = step + 1 == plan.steps
                if last or (step + 1) % every == 0:
                    found, fault = self._validate(engine, step_fn, look, best, step + 1)
                stop = measured.pop("stop") > 0
                if last or stop or fault or (step + 1) % save == 0:
                    self._save(engine, step + 1)
                if fault:
                    break
                if stop and not last:
                    raise Preempted(
                        f"stopped and saved after step {step + 1} of {plan.steps}; the same "
                        "command goes on from there"
                    )
        if fault:
            if self.rank == 0:
                write_json(blamed, {"fault": fault})
            raise Failed(fault)
        engine.finish()
        self.tracker.close()
        done = (plan.steps - first) * plan.batch_tokens
        speed = {"tokens_per_second": done / seconds} if done else {}
        speed["validation_share"] = self.validating / max(1e-9, self.validating + seconds)
        speed["peak_memory_mib"] = peak_memory()
        return {"steps": plan.steps, **speed, **found, **best.give(engine)}

    def _engine(self, module: nn.Module, micro: int) -> Engine:
        plan = self.schedule
        return Engine(
            module,
            dtype=plan.dtype,
            zero_stage=plan.zero_stage,
            micro_batch=micro,
            accumulation=plan.rows // (micro * self.world),
            clip=self.optim.clip,
            betas=self.optim.betas,
            weight_decay=self.optim.weight_decay,
        )

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
        sums["stop"] = float(self.told_to_stop)  # summed, so that all ranks agree on the step
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
    def _validate(
        self, engine: Engine, step_fn: Step, look: Look | None, best: "Best", step: int
    ) -> tuple[dict[str, float], str | None]:
        if self.validation is None:
            return {}, None
        begin = time.perf_counter()
        sums: dict[str, float] = {}
        engine.module.eval()
        for row in range(len(self.validation)):
            loss, metrics = step_fn(engine.module, _to_device(self.validation.batch([row]), engine))
            _add(sums, {"loss": loss.detach(), **metrics})
        found = {f"validation_{k}": v for k, v in _means(sums).items()}
        seen, fault = look(engine.module) if look else ({}, None)
        found |= seen
        if "validation_tau" in found and not fault:
            best.offer(engine, step, found["validation_tau"])
        spent = time.perf_counter() - begin
        self.validating += spent
        self.tracker.log(step, **found, validation_seconds=spent)
        return found, f"step {step}: {fault}" if fault else None

    def _save(self, engine: Engine, step: int) -> None:
        state = engine.state()
        if self.rank == 0:
            checkpoint.save(self.out / "checkpoints", step, state, {"seed": self.schedule.seed})
        barrier()

    def _resume(self, engine: Engine) -> int:
        found = checkpoint.newest(self.out / "checkpoints")
        if found is None:
            self.tracker.rewind(0)
            return 0
        state, position, skipped = found
        for why in skipped if self.rank == 0 else []:
            print(f"skipped checkpoint {why}", flush=True)
        engine.restore(state, position["step"])
        self.tracker.rewind(position["step"])
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


class Best:
    """The weights that decoded best so far, one copy, written and verified as checkpoints are.

    It may be of a later step than the checkpoint that a crashed run goes on from: it was measured,
    and the steps up to it are trained and measured again.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.step, self.tau = 0, 0.0
        found = checkpoint.newest(folder)
        if found is not None:
            self.step, self.tau = int(found[1]["step"]), float(found[1]["tau"])

    def offer(self, engine: Engine, step: int, tau: float) -> None:
        """Keeps the weights of this step if none decoded better: of equals the one trained longer.
        Every rank must call it with the same tau."""
        if tau < self.tau:
            return
        self.step, self.tau = step, tau
        state = engine.state()
        if self.rank == 0:
            weights = {name: state[name] for name, _ in engine.trained}
            made = checkpoint.save(self.folder, step, weights, {"tau": tau})
            for other in self.folder.iterdir():
                if other != made:
                    shutil.rmtree(other, ignore_errors=True)
        barrier()

    def give(self, engine: Engine) -> dict[str, float]:
        """Puts them into a finished engine's module; their step and tau, {} if there are none."""
        if not self.step:
            return {}
        found = checkpoint.newest(self.folder)
        if found is None:
            print(f"the copy in {self.folder} is damaged: the last step is saved", flush=True)
            return {}
        for name, parameter in engine.trained:
            parameter.data = found[0][name].to(parameter.device)
        return {"artifact_step": found[1]["step"], "artifact_tau": found[1]["tau"]}


def peak_memory() -> float:
    """The most this process has held, MiB: on its GPU, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
