"""What test_faults.py has two ranks do, in two halves.

Each rank leaves what it saw in FOLDER/rank-N.json. Between the halves, from FOLDER/begun to
FOLDER/go on, a single rank goes on with one of their runs.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from decoding.ranks import Ranks
from tests.train.looping import Step, counting, family, loop_of, step_of
from train import engine
from train.guard import Preempted, bits


def nothing(step: Step) -> Step:
    return step


def trained(out: Path, wrap: Callable[[Step], Step], **changes: Any) -> dict[str, Any]:
    """How a run with passes of one sequence each (two a step on each rank) ended."""
    loop = loop_of(out, **{"micro_batch": 1, **changes})
    module = family("lm")
    seen: dict[str, Any] = {}
    try:
        seen["steps"] = loop.run(module, wrap(step_of("lm")), every=2)["steps"]
    except Preempted as stopped:
        seen["stopped"] = str(stopped)
    at = loop.at
    return seen | {"at": [at.step, at.applied, at.validated]}


def only(rank: int, wrap: Callable[[Step], Step]) -> Callable[[Step], Step]:
    return wrap if Ranks.here().rank == rank else nothing


def poison(step: Step) -> Step:
    """The fifth pass, the first of step 3, is NaN."""
    calls = 0

    def spoilt(run: Any, batch: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        loss, metrics = step(run, batch)
        return (loss * float("nan") if calls == 5 and torch.is_grad_enabled() else loss), metrics

    return spoilt


def watched(seen: list[int], wrap: Callable[[Step], Step]) -> Callable[[Step], Step]:
    """Notes the bits of the weights before each step."""

    def act(call: int, run: Any) -> None:
        if call % 2:
            seen.append(bits([p.data for _, p in run.trained]))

    return lambda step: counting(act)(wrap(step))


def told(call: int, validating: bool = False) -> Callable[[Step], Step]:
    """SIGTERM reaches this rank in its n-th pass."""

    def wrap(step: Step) -> Step:
        calls = 0

        def spoilt(run: Any, batch: Any) -> Any:
            nonlocal calls
            calls += torch.is_grad_enabled() != validating
            if calls == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(run, batch)

        return spoilt

    return wrap


def begin(folder: Path) -> dict[str, Any]:
    """A poisoned pass, then stops that one rank alone hears, amid a step and a validation."""
    weights: list[int] = []
    found: dict[str, Any] = {"weights": weights}
    for rank in (0, 1):
        wrap = watched(weights, only(rank, poison))
        found[f"poisoned on {rank}"] = trained(folder / f"poison-{rank}", wrap)
    found["told"] = trained(folder / "elastic", only(1, told(7)), zero_stage=2)
    told_then = only(1, told(2, True))
    found["told in validation"] = trained(folder / "validating", told_then, zero_stage=3)
    return found


def finish(folder: Path) -> dict[str, Any]:
    """Goes on with what a single rank has left; rank 1 does not see the checkpoints. Then rank 1
    runs out of memory."""
    mine = folder / "elastic" if Ranks.here().first else folder / "without"
    found: dict[str, Any] = {"resumed": trained(mine, nothing, zero_stage=3)}
    write(folder, found)

    def full(call: int, _: Any) -> None:
        if call == 4:
            raise MemoryError

    try:
        trained(folder / "memory", only(1, counting(full)))
    except (MemoryError, RuntimeError, OSError) as error:
        return found | {"memory": [type(error).__name__, str(error)]}
    return found


def write(folder: Path, found: dict[str, Any]) -> None:
    (folder / f"rank-{Ranks.here().rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    engine.KEPT_WHOLE = 0  # even the smallest tensors are shared at stage 3
    write(folder, begin(folder))
    Ranks.here().barrier()
    (folder / "begun").touch()
    while not (folder / "go on").exists():
        time.sleep(0.1)
    found = finish(folder)
    write(folder, found)
    sys.exit(4 if "memory" in found else 0)
