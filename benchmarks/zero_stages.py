"""What does a rank hold at each ZeRO stage, and how fast does it train, alone and as one of two?

    .venv/bin/python -m benchmarks.zero_stages

An `lm` drafter under cross-entropy, so that no target hides it; random tokens, one global batch
for any number of ranks. Each setting in processes of its own, under torchrun: tokens per second of
all ranks over the steps after a warm-up, and the most that a rank held (resident; on a GPU
allocated) beyond what training a tiny drafter holds. `states_mib` is what ZeRO's arithmetic
gives for weights, gradients, masters and moments alone: activations and buffers come on top.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.arms import told
from decoding.ranks import Ranks
from decoding.target import Shape
from drafters.base import Batch, write_json
from drafters.lm import LM
from train.engine import Engine, join
from train.machine import peak_memory
from train.objectives import CE

WARM = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step, over all ranks")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--worker", type=int, help="of this stage; what the command starts")
    parser.add_argument("--out", default="benchmarks/results/zero_stages")
    asked = parser.parse_args()
    if asked.worker is not None:
        work(asked, asked.worker)
    table = []
    for count in asked.ranks:
        for stage in asked.stages:
            table.append({"ranks": count, "stage": stage, **measured(count, stage)})
            print(json.dumps(table[-1]), flush=True)
    write_json(Path(f"{asked.out}.json"), {"table": table, "conditions": told(asked)})


def measured(count: int, stage: int) -> dict:
    """What the first of `count` ranks says at its end."""
    head = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"]
    own = ["benchmarks.zero_stages", *sys.argv[1:], "--worker", str(stage)]
    done = subprocess.run([sys.executable, *head, *own], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def work(asked: argparse.Namespace, stage: int) -> None:
    """One rank's part; ends the process."""
    _, world = join()
    tiny = {"layers": 1, "width": 64, "vocabulary": 64, "rows": world * asked.accumulation}
    train(argparse.Namespace(**vars(asked) | tiny), stage, world)  # what is imported on the way
    before, here = peak_memory(), Ranks.here()
    seconds, loss, count = train(asked, stage, world)
    said = {
        "tokens_per_second": asked.steps * asked.rows * asked.length / max(here.every(seconds)),
        "peak_mib": max(here.every(peak_memory() - before)),
        "states_mib": states(stage, world, asked.dtype) * count / 2**20,
        "parameters": count,
        "loss": loss,
    }
    if here.first:
        print(json.dumps(said), flush=True)
    here.barrier()
    os._exit(0)


def train(asked: argparse.Namespace, stage: int, world: int) -> tuple[float, float, int]:
    """Seconds of the steps after the warm-up, the last loss a token, and the drafter's size."""
    torch.manual_seed(0)
    drafter = LM(shape(asked), layers=asked.layers, width=asked.width)
    count = sum(p.numel() for p in drafter.parameters())
    micro = asked.rows // world // asked.accumulation
    engine = Engine(
        drafter, dtype=asked.dtype, zero_stage=stage, micro_batch=micro,
        accumulation=asked.accumulation, clip=1.0, betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    ids = torch.randint(asked.vocabulary, (micro, asked.length), device=engine.engine.device)
    batch, begin = Batch(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids)), 0.0
    for step in range(asked.steps + WARM):
        if step == WARM:
            begin = time.perf_counter()
        for _ in range(asked.accumulation):
            loss, metrics = engine(batch, None, CE())
            engine.backward(loss / metrics["tokens"])
            engine.step(1e-3)
    return time.perf_counter() - begin, float(loss.detach() / metrics["tokens"]), count


def states(stage: int, world: int, dtype: str) -> float:
    """Bytes a parameter: weights and gradients of a dtype, fp32 masters (fp32 weights are theirs
    at stage 0, and beside them above) and two moments, each shared from its stage on."""
    width = 2 if dtype == "bfloat16" else 4
    masters = 0 if dtype == "float32" and stage == 0 else 4
    weights, gradients = (width / (world if stage >= least else 1) for least in (3, 2))
    return weights + gradients + (masters + 8) / (world if stage else 1)


def shape(asked: argparse.Namespace) -> Shape:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=asked.vocabulary, hidden_size=asked.width, intermediate_size=2 * asked.width,
        num_hidden_layers=asked.layers, num_attention_heads=asked.width // 64,
        num_key_value_heads=asked.width // 64,
    )  # fmt: skip
    return Shape.of(config)


if __name__ == "__main__":
    main()
