"""What keeps training from going wrong in silence: signals, bad gradients, full memory, no motion.

Shapes: B batch, T tokens.
"""

import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from data.pack import Packed
from decoding.ranks import Ranks
from drafters.heads import ahead
from eval.controls import Failed
from train.engine import Engine, sum_over_ranks
from train.processes.watch import ECHO

SKIPPED = 3  # steps in a row that may have a gradient that is not finite
WINDOW = 100  # steps in which some weight must have moved
NAMED = 5  # of what a sentence lists


class Preempted(Exception):
    """The run was told to stop, and has saved where it was."""


class Told(Exception):
    """All ranks know that one of them was told to stop; nothing is saved yet."""


class Stop:
    """What the process was told by SIGTERM or Ctrl-C. Signals belong to the process, so there is
    one for all: STOP."""

    def __init__(self) -> None:
        self.told = False
        self.since = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it the first signal is only noted, for `check`, and the second ends at once."""
        self.told = False
        if threading.current_thread() is not threading.main_thread():
            yield  # signals are the main thread's, and so is deciding on them
            return
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self._hear) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)

    def check(self) -> None:
        """Raises Told on every rank if any of them was told; all must ask at the same places.

        They ask before each micro-batch and each item of a validation, so that none of them waits
        in a collective for one that has left.
        """
        if sum_over_ranks({"told": float(self.told)})["told"]:
            raise Told

    def _hear(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if not self.told:
            self.told, self.since = True, now
        elif now - self.since > ECHO:
            os.write(2, b"told twice to stop: stopped at once\n")  # print is not reentrant
            os._exit(128 + number)  # no unwinding: what is written is whole at any moment


STOP = Stop()


class Guard:
    """Watches the steps of one start of a run. Every rank asks it at the same places, and all of
    them come to the same answer."""

    def __init__(self, engine: Engine, ranks: Ranks, applied: int, steps: int) -> None:
        """applied: how many steps have moved the weights; steps: how many are to come."""
        self.engine, self.ranks = engine, ranks
        self.window = WINDOW if applied else min(WINDOW, steps)
        self.passed, self.learnt = 0, False  # in this window: steps, and whether one taught
        self.begun = False
        self.reached: set[str] = set()
        self.hooks = [p.register_hook(self._reaches(name)) for name, p in engine.trained]
        self.weights = self._bits()

    def begin(self) -> None:
        """After the first step: raises Failed when a trained parameter was not reached by any
        gradient (a zero one counts: that of some starts is), or another one was."""
        self.begun = True
        for hook in self.hooks:
            hook.remove()
        trained = {name for name, _ in self.engine.trained}
        others = (p for p in self.engine.module.named_parameters() if p[0] not in trained)
        missed = self.ranks.every(sorted(trained - self.reached))
        frozen = self.ranks.every([name for name, p in others if p.grad is not None])
        if nowhere := set.intersection(*map(set, missed)):
            raise Failed(
                f"no gradient reached {_some(sorted(nowhere))} in the first step: the loss does "
                "not depend on what is to be trained; use it in the training pass, or freeze it"
            )
        if moved := set.union(*map(set, frozen)):
            raise Failed(
                f"{_some(sorted(moved))} got a gradient in the first step and is not trained: it "
                "must not require one, or must do so before training begins"
            )

    def after(self, step: int, learnt: bool) -> None:
        """After each step; `learnt`: it was applied, and its gradient was not zero. Raises Failed
        when a whole window was without such a step, or no weight has changed in it."""
        self.passed, self.learnt = self.passed + 1, self.learnt or learnt
        if self.passed < self.window:
            return
        if not self.learnt:
            raise Failed(
                f"the gradient was zero, or not finite, in all of the {self.passed} steps up to "
                f"step {step}: nothing is learnt. Look at the supervised tokens (view=true), at "
                "the objective and at what the drafter freezes"
            )
        weights = self._bits()
        if weights == self.weights:
            raise Failed(
                f"no weight of the drafter has changed in the {self.passed} steps up to step "
                f"{step}, though gradients were applied: look at optim.lr, and at what "
                "schedule.dtype rounds away"
            )
        self.weights, self.passed, self.learnt = weights, 0, False

    def blamed(self, rows: list[int], mine: list[int]) -> list[int]:
        """Of a step whose gradient was not finite, the sequences whose loss was not (`mine`, of
        every rank), or all of them."""
        return sorted(row for rank in self.ranks.every(mine) for row in rank) or sorted(rows)

    def refused(self, step: int, in_a_row: int, blamed: list[int]) -> None:
        """Says that a step was skipped. Raises Failed after too many in a row; the newest
        checkpoint is then of a step before them."""
        said = f"the gradient of step {step} is not finite, with sequences {_some(blamed)}"
        if in_a_row > SKIPPED:
            raise Failed(
                f"{said} of packed/train, and {SKIPPED} steps before it were skipped for the same: "
                "no weight has moved in them. The newest checkpoint is of before; look at these "
                "sequences (view=true), and lower optim.lr or optim.clip"
            )
        if self.ranks.first:
            print(f"{said}: the step is skipped, {in_a_row} in a row", flush=True)

    def _reaches(self, name: str) -> Any:
        def note(_: Tensor) -> None:
            self.reached.add(name)

        return note

    def _bits(self) -> int:
        with self.engine.whole():
            return bits([parameter.data for _, parameter in self.engine.trained])


@torch.no_grad()
def bits(tensors: list[Tensor]) -> int:
    """A number that changes with any bit of the tensors (bar a one in 2^64 coincidence)."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = 0
    for number, tensor in enumerate(tensors):
        raw = tensor.contiguous().view(kinds[tensor.element_size()])
        found = (found * 31 + number + int(raw.sum(dtype=torch.int64))) % 2**64
    return found


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors in which some value is not a finite number."""
    return [name for name, tensor in state.items() if not tensor.isfinite().all()]


def poisoned(loss: Tensor, scale: float) -> Tensor:
    """The loss times `scale`, or NaN if it is not finite, so that its gradient is not either and
    the engine leaves out the step on all ranks."""
    return loss * torch.where(loss.detach().isfinite(), scale, math.nan)


def require_labels(sums: dict[str, float], data: Packed) -> None:
    """Raises ValueError when a draft head has no supervised token in all of the data; `sums` are of
    the first step, and name what is worth a look (`tokens`, and `tokens@k` of head k)."""
    for key, value in sums.items():
        name, _, number = key.partition("@")
        k = int(number or 1) if number.isdigit() or not number else 0
        if name != "tokens" or value or not k:
            continue
        chunks = (list(range(n, min(n + 64, len(data)))) for n in range(0, len(data), 64))
        if not any(ahead(data.batch(rows), k).any() for rows in chunks):
            raise ValueError(
                f"head {k} of the drafter has no supervised token in all {len(data):,} training "
                f"sequences: it guesses the token {k + 1} places after a state of the target, and "
                "no document is supervised that far in; train fewer heads, or on longer answers"
            )


@contextmanager
def naming_memory(step: int, rows: int, length: int) -> Iterator[None]:
    """Where memory runs out within it, raises MemoryError with a sentence. It ends all ranks: one
    that went on with a smaller micro-batch would have another number of passes than the others."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(
            "can't allocate memory|out of memory", said
        ):
            raise
        asked = re.search(r"[Tt]r(?:ied|ying) to allocate ([\d.]+ ?\w+)", said)
        wanted = f" when {asked[1]} more were wanted" if asked else ""
        smaller = "schedule.micro_batch (the global batch stays as it is)" if rows > 1 else ""
        raise MemoryError(
            f"memory ran out in step {step}, in a micro-batch of {rows} sequences of {length:,} "
            f"tokens{wanted}; lower {smaller or 'schedule.sequence_length'}"
            f"{' or schedule.sequence_length' if smaller else ''}, and the same command goes on"
        ) from error


def _some(things: list[Any]) -> str:
    shown = ", ".join(map(str, things[:NAMED]))
    return shown + (f" and {len(things) - NAMED} more" if len(things) > NAMED else "")
