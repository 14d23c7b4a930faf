"""What each rank does in the engine's tests; as a program, all of it: `... zero.py FOLDER`, where
each rank leaves what it found in rank-N.safetensors.

Shapes: B rows, F features.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from toys import tiny_target

from decoding.loop import decode
from decoding.ranks import ranks
from decoding.sampling import Sampling
from drafters.base import Trained
from tests.drafters.contract import PROMPTS, TRAINED, build, packed
from train import engine
from train.engine import Engine, join, sum_over_ranks
from train.objectives import ForwardKL

ROWS, RATE, CLIP, DECAY, BETAS = 8, 1e-2, 0.5, 0.1, (0.9, 0.99)
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """How an engine is set up. kept: stage 3's KEPT_WHOLE; bucket: its BUCKET."""

    dtype: str
    stage: int
    accumulation: int = 4
    kept: int = 0
    bucket: int = 50_000_000

    def __str__(self) -> str:
        more = f"-kept{self.kept}" * bool(self.kept) + f"-bucket{self.bucket}" * (self.bucket < 99)
        return f"{self.dtype}-zero{self.stage}-{self.accumulation}{more}"

    def engine(self, module: nn.Module) -> Engine:
        before = engine.KEPT_WHOLE, engine.BUCKET
        engine.KEPT_WHOLE, engine.BUCKET = self.kept, self.bucket
        try:
            return Engine(
                module, dtype=self.dtype, zero_stage=self.stage,
                micro_batch=ROWS // ranks()[1] // self.accumulation,
                accumulation=self.accumulation, clip=CLIP, betas=BETAS, weight_decay=DECAY,
            )  # fmt: skip
        finally:
            engine.KEPT_WHOLE, engine.BUCKET = before


FP32 = [Case("float32", stage, n) for stage in range(4) for n in (1, 4)]
CASES = [
    *FP32,
    *(Case("bfloat16", stage) for stage in range(4)),
    Case("bfloat16", 1, 1),  # DeepSpeed has another optimiser for it
    Case("bfloat16", 3, kept=100),
    Case("float32", 2, bucket=8),
    Case("float32", 3, bucket=8),
]
ON_TWO = [case for case in CASES if case.accumulation > 1]


class Toy(nn.Module):
    """Sizes that two ranks do not divide, a matrix read outside of its own layer, a frozen layer, a
    buffer; `poison` is added to the gradient of one bias."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.frozen = nn.Linear(6, 7), nn.Linear(7, 7).requires_grad_(False)
            self.head = nn.Linear(7, 5, bias=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.tensor(4 / 3))
        self.poison = 0.0
        self.first.bias.register_hook(lambda gradient: gradient + self.poison)

    def forward(self, x_BF: Tensor, y_B: Tensor) -> tuple[Tensor, Found]:
        h_BF = self.first(x_BF.to(self.head.weight.dtype))
        h_BF = torch.tanh(self.frozen(h_BF) * self.scale.to(h_BF.dtype))
        return F.cross_entropy((h_BF @ self.head.weight.T).float(), y_B, reduction="sum"), {}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The rows of a step, of all ranks."""
    rng = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 6, generator=rng), torch.randint(5, (ROWS,), generator=rng)


def shares(step: int, accumulation: int) -> list[tuple[Tensor, Tensor]]:
    """This rank's micro-batches of a step."""
    rank, world = ranks()
    x_BF, y_B = batch(step)
    micro = ROWS // world // accumulation
    cut = [(x_BF[i : i + micro], y_B[i : i + micro]) for i in range(0, ROWS, micro)]
    return cut[rank::world]


def train(made: Engine, case: Case, steps: range, poison: float = 0.0) -> list[float]:
    """The mean loss of each step; `poison` goes into the last rank's first micro-batch. What
    `step` says of each micro-batch must be as the contract has it."""
    losses = []
    for step in steps:
        total = 0.0
        mine = shares(step, case.accumulation)
        for i, (x_BF, y_B) in enumerate(mine):
            first_of_last = i == 0 and ranks()[0] == ranks()[1] - 1
            made.module.poison = poison if first_of_last else 0.0
            loss, _ = made(x_BF, y_B)
            made.backward(loss * (len(mine) * ranks()[1] / ROWS))
            moved = made.step(RATE)
            assert moved == (i == len(mine) - 1 and not poison), (case, step, i, moved)
            total += loss.item() / ROWS
        assert torch.tensor(made.gradient_norm()).isfinite() == (not poison)
        losses.append(sum_over_ranks({"loss": total})["loss"])
    return losses


def everything(made: Engine) -> Found:
    """Masters, moments, AdamW's count of steps, and the weights that the module computes with."""
    with made.whole():
        named = {f"weight/{n}": p.detach().clone() for n, p in made.module.named_parameters()}
    (count,) = {float(inner["step"]) for inner in made.adamw.state.values()}
    return made.state() | named | {"count": torch.tensor(count)}


def course(case: Case) -> Iterator[tuple[str, Found]]:
    """Six steps straight; from a save after three, again; and again after a poisoned batch."""
    made = case.engine(Toy())
    losses = train(made, case, range(3))
    saved = everything(made)
    yield "saved", saved
    losses += train(made, case, range(3, 6))
    yield "end", everything(made) | {"losses": torch.tensor(losses, dtype=torch.float64)}
    again = case.engine(Toy())
    again.restore(saved, 3)
    yield "restored", everything(again)
    train(again, case, range(3, 6))
    yield "resumed", everything(again)
    spoilt = case.engine(Toy())
    spoilt.restore(saved, 3)
    train(spoilt, case, range(99, 100), poison=float("nan"))
    train(spoilt, case, range(98, 99), poison=float("inf"))
    yield "spoilt", everything(spoilt)
    train(spoilt, case, range(3, 6))
    yield "recovered", everything(spoilt)
    made.finish()
    yield "finished", {n: v.clone() for n, v in made.module.state_dict().items()}


def family(name: str, stage: int) -> Found:
    """A drafter's losses in training, in validation within whole(), of answers drafted there, of
    a step after that, and its weights when finished."""
    target = tiny_target(vocab=40, seed=0, tied=False, dtype=torch.float32)
    drafter = build(name, target.shape, noise=0.0)
    assert isinstance(drafter, Trained)
    made = Case("float32", stage, 1).engine(drafter)
    losses = []
    for step in range(3):
        if step == 2:
            drafter.eval()
            with torch.no_grad(), made.whole():
                losses.append(float(drafter(packed(40, seed=50), target, ForwardKL())[0]))
                done = decode(
                    target, drafter, PROMPTS[1:], sampling=Sampling(), max_new_tokens=4,
                    end_ids=frozenset(),
                )  # fmt: skip
                losses.append(float(sum(sum(answer.accepted) for answer in done.answers)))
        drafter.train()
        loss, _ = made(packed(40, seed=10 * step + ranks()[0]), target, ForwardKL())
        made.backward(loss / 30)
        assert made.step(RATE)
        losses.append(sum_over_ranks({"loss": loss.item()})["loss"])
    made.finish()
    last, _ = drafter.eval()(packed(40, seed=51), target, ForwardKL())  # an ordinary module again
    losses.append(last.item())
    state = {n: v.detach().contiguous().clone() for n, v in drafter.named_parameters()}
    return state | {"losses": torch.tensor(losses, dtype=torch.float64)}


def main() -> None:
    torch.set_num_threads(1)
    join()
    found: Found = {}
    for case in ON_TWO:
        for at, part in course(case):
            found |= {f"{case}/{at}/{key}": value for key, value in part.items()}
    for name in TRAINED:
        for stage in (1, 3):
            part = family(name, stage)
            found |= {f"{name}-{stage}/{key}": value for key, value in part.items()}
    save_file(found, Path(sys.argv[1]) / f"rank-{ranks()[0]}.safetensors")
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
