"""What does a training step of draft heads hold at a vocabulary of 150,000, and what would the
obvious one?

    .venv/bin/python -m benchmarks.head_memory

Medusa heads over a random target (two layers of 256); forward KL. Ours makes, judges and drops
the logits of a chunk of tokens at a time; the obvious step makes them for all heads and tokens.
Each in a process of its own; peak resident memory, less what the process held before the step.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import told
from decoding.target import Target
from drafters.base import Batch, write_json
from drafters.heads import ahead
from drafters.medusa import Medusa
from train.machine import peak_memory
from train.objectives import ForwardKL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--head", default="shared", choices=["shared", "own"])
    parser.add_argument("--side", choices=["ours", "obvious"])
    parser.add_argument("--out", default="benchmarks/results/head_memory")
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(step(asked)))
        return
    report: dict[str, Any] = {}
    for side in ("ours", "obvious"):
        command = [sys.executable, "-m", "benchmarks.head_memory", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        report[side] = json.loads(done.stdout.strip().splitlines()[-1])
    report |= {"conditions": told(asked)}
    print(json.dumps(report, indent=1))
    write_json(Path(f"{asked.out}.json"), report)


def step(asked: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass."""
    target = random_target(asked.vocabulary, asked.width)
    torch.manual_seed(1)
    drafter = Medusa(target.shape, heads=asked.heads, head=asked.head)
    drafter.initialise(target, lambda: torch.ones(asked.vocabulary))
    ids = torch.randint(asked.vocabulary, (2, asked.tokens // 2))
    batch = Batch(ids, torch.ones_like(ids).bool(), torch.zeros_like(ids))
    before, begin = peak_memory(), time.perf_counter()
    if asked.side == "ours":
        loss, metrics = drafter(batch, target, ForwardKL())
        loss = loss / metrics["tokens"]
    else:
        loss = obvious(drafter, batch, target)
    loss.backward()
    return {
        "peak_mib": peak_memory() - before,
        "seconds": time.perf_counter() - begin,
        "loss": float(loss.detach()),
    }


def obvious(drafter: Medusa, batch: Batch, target: Target) -> Tensor:
    """All heads' logits for all tokens, then one loss over them."""
    hidden_BTD = target(batch.ids_BT).hidden_BTD
    with torch.no_grad():
        log_p = target.logits(hidden_BTD).log_softmax(-1)
    K = len(drafter.blocks)
    states = [blocks(hidden_BTD[:, :-1]) for blocks in drafter.blocks]
    heads = drafter.lm_heads or [target.logits] * K
    log_q = [head(x).log_softmax(-1) for head, x in zip(heads, states, strict=True)]
    total = torch.zeros(())
    for k in range(1, K + 1):
        valid = ahead(batch, k)
        p = log_p[:, k:-1][valid]
        q = log_q[k - 1][:, : valid.shape[1]][valid]
        total = total + drafter.decay ** (k - 1) * (p.exp() * (p - q)).sum()
    return total / ahead(batch, 1).sum()


def random_target(vocabulary: int, width: int) -> Target:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return Target(LlamaForCausalLM(config))


if __name__ == "__main__":
    main()
