"""A run of the training loop in a second: packed random documents, a tiny target, any family.

Shapes: T tokens.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from toys import tiny_target

from data import pack
from decoding.ranks import ranks
from decoding.target import Target
from drafters.base import Batch, Metrics, Trained
from tests.drafters.contract import build
from train import checkpoint
from train.loop import Look, Loop
from train.objectives import CE, ForwardKL
from train.schedule import AdamW, Schedule
from train.track import Jsonl, Tracker

T, ROWS, STEPS = 16, 4, 8  # sequence length, sequences a step, steps
VOCAB = 40

Step = Callable[[Any, Batch], tuple[Tensor, Metrics]]


def packed(out: Path, answer: int = 6) -> Path:
    """48 sequences to train on and 3 to validate with, of documents of 4 tokens and an answer."""
    rng = random.Random(0)

    def documents(n: int) -> list[pack.Document]:
        made = []
        for _ in range(n):
            size = rng.randint(1, answer)
            ids = [rng.randrange(VOCAB) for _ in range(4 + size)]
            made.append(pack.Document(ids, [False] * 4 + [True] * size))
        return made

    if not (out / "packed").is_dir():
        pack.write(out / "packed" / "train", documents(300), T, 48)
        pack.write(out / "packed" / "validation", documents(20), T, 3)
    return out


def target() -> Target:
    return tiny_target(vocab=VOCAB, seed=1, tied=False, dtype=torch.float32)


def family(name: str, **changes: Any) -> Trained:
    drafter = build(name, target().shape, **changes)
    assert isinstance(drafter, Trained)
    drafter.initialise(target(), lambda: torch.ones(VOCAB))
    return drafter


def loop_of(out: Path, tracker: Jsonl | None = None, **changes: Any) -> Loop:
    schedule = {
        "tokens": STEPS * ROWS * T, "batch_tokens": ROWS * T, "sequence_length": T,
        "micro_batch": 2, "dtype": "float32", **changes,
    }  # fmt: skip
    optim = AdamW(lr=3e-3, warmup=0.2, clip=0.5)
    return Loop(Schedule(**schedule), optim, packed(out), Tracker(out, ranks()[0], tracker))


def step_of(name: str) -> Step:
    """The training pass that Distill would make."""
    frozen, objective = target(), CE() if name == "lm" else ForwardKL()

    def step(engine: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        return engine(batch, None if name == "lm" else frozen, objective)

    return step


def trained(
    out: Path,
    name: str = "lm",
    wrap: Callable[[Step], Step] = lambda step: step,
    look: Look | None = None,
    every: int | None = None,
    **changes: Any,
) -> dict[str, float]:
    """A whole run, or what is left of one; `wrap` may spoil its training pass."""
    return loop_of(out, **changes).run(family(name), wrap(step_of(name)), look, every)


def state(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of the newest checkpoint."""
    found = checkpoint.newest(out / "checkpoints")
    assert found is not None
    return found[0], found[1]


def saved_steps(out: Path) -> list[int]:
    return sorted(int(p.name[5:13]) for p in (out / "checkpoints").glob("step-*"))


def lines(out: Path) -> list[dict[str, Any]]:
    text = (out / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def curve(out: Path, key: str = "loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in lines(out) if key in line}


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights and moments, bit for bit, at the same place."""
    (a, at), (b, there) = state(one), state(other)
    assert all(at[key] == there[key] for key in ("step", "applied", "skipped"))
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def counting(act: Callable[[int, Any], None]) -> Callable[[Step], Step]:
    """Calls act(n, engine) before the n-th training pass (from 1; validation does not count)."""

    def wrap(step: Step) -> Step:
        calls = 0

        def counted(engine: Any, batch: Batch) -> tuple[Tensor, Metrics]:
            nonlocal calls
            if torch.is_grad_enabled():
                calls += 1
                act(calls, engine)
            return step(engine, batch)

        return counted

    return wrap


def times(factors: dict[int, float]) -> Callable[[Step], Step]:
    """Multiplies the loss of the n-th training pass."""

    def wrap(step: Step) -> Step:
        calls = 0

        def spoilt(engine: Any, batch: Batch) -> tuple[Tensor, Metrics]:
            nonlocal calls
            loss, metrics = step(engine, batch)
            if torch.is_grad_enabled():
                calls += 1
                loss = loss * factors.get(calls, 1.0)
            return loss, metrics

        return spoilt

    return wrap
