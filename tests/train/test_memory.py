"""What a training step asks of the target, and what it holds: one pass for all heads and steps, its
output matrix over supervised tokens alone, a chunk of them at a time.

Shapes: B batch, T tokens, N supervised tokens.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from drafters.base import Batch, Trained
from drafters.clover import Clover
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.heads import ahead
from drafters.hydra_heads import HydraHeads
from drafters.lm import LM
from drafters.medusa import Medusa
from tests.toys import tiny_target
from train import objectives
from train.objectives import CE, ForwardKL, LambdaHybrid, Loss

ROOT = Path(__file__).parents[2]
HEADS = 3


def supervised(heads: bool, batch: Batch) -> int:
    """Rows that the loss pads its tokens to: those of the first head, or a language model's."""
    n = int(ahead(batch, 1).sum() if heads else batch.mask_BT[:, 1:].sum())
    return -(-n // objectives.PAD) * objectives.PAD


Make = Callable[..., Trained]
FAMILIES: dict[str, tuple[Make, int]] = {
    # how it is made, how many of its heads or steps borrow the target's output matrix
    "lm": (lambda shape: LM(shape, width=64), 0),
    "medusa": (lambda shape: Medusa(shape, heads=HEADS), 0),
    "medusa, shared": (lambda shape: Medusa(shape, heads=HEADS, head="shared"), HEADS),
    "hydra_heads": (lambda shape: HydraHeads(shape, heads=HEADS), 0),
    "clover": (lambda shape: Clover(shape, heads=HEADS), HEADS),
    "eagle": (lambda shape: Eagle(shape, steps=HEADS), HEADS),
    "eagle3": (lambda shape: Eagle3(shape, steps=HEADS, taps=[0, 1, 2]), 0),
}


@pytest.mark.parametrize(
    "loss", [CE(), ForwardKL(), LambdaHybrid()], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_steps_share_one_pass_and_one_law_of_supervised_tokens(family, loss: Loss):
    make, borrows = FAMILIES[family]
    target = tiny_target(dtype=torch.float32)
    drafter = make(target.shape)
    drafter.initialise(target, lambda: torch.ones(target.shape.vocab_size))
    ids = torch.randint(64, (4, 100), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros_like(ids).bool()
    mask[:, 60:] = True
    batch = Batch(ids, mask, torch.zeros_like(ids))
    passes, rows = [], []
    target.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    target.model.get_output_embeddings().register_forward_hook(
        lambda _, given, out: rows.append(out.numel() // out.shape[-1])
    )
    total, _ = drafter(batch, target, loss)
    before = len(rows)
    total.backward()
    hidden_only = family == "lm" and not loss.needs_target
    assert len(passes) == (0 if hidden_only else 1)
    uses = int(loss.needs_target) + borrows
    uses *= 2 if isinstance(loss, LambdaHybrid) else 1  # alpha of a sequence first
    assert sum(rows) == uses * supervised(family != "lm", batch)
    assert len(rows) == before, "backward makes no logits again"


CHILD = """
import sys, torch
from benchmarks import loss_memory as lm
from types import SimpleNamespace
torch.set_num_threads(1)
hidden, weight, labels, states, head = lm.problem(
    SimpleNamespace(tokens=1024, width=32, dtype="float32"), 40_000
)
run = getattr(lm, sys.argv[1])("forward_kl")
run(hidden[:64], weight, labels[:64], states[:64], head).backward()  # what a first call loads
before = lm.held()
run(hidden, weight, labels, states, head).backward()
print((lm.held() - before) * 1024)
"""


def test_a_loss_holds_chunks_where_the_obvious_one_holds_the_whole():
    """1,024 tokens over 40,000: 156 MiB for each N x V in fp32, of which the obvious loss holds
    five at once and ours none (a dozen chunks of 10 MiB)."""
    peak = {}
    for side in ("ours", "naive"):
        command = [sys.executable, "-c", CHILD, side]
        out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peak[side] = float(out.stdout)
    assert peak["naive"] > 3 * 156
    assert peak["ours"] < 2 * 156
