"""What do the losses hold and take, forward and backward, at vocabularies of 32,000 and 152,000?

    .venv/bin/python -m benchmarks.loss_memory --liger-python PYTHON

One head over given states, its loss and its gradients, three ways: ours (train/objectives.py, one
chunk of tokens at a time), naive (whole logits of both models, autograd), and liger-kernel's, where
PYTHON is of an environment that has it (its Triton kernels on a GPU, its chunked losses on a CPU,
which has none for `ce`). Each in a process of its own: the most memory it held, less what it held
before, the fastest of `--repeats` runs, and how far its gradients are from the naive ones.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.machine import peak_memory

LOSSES = ("ce", "forward_kl", "jsd", "tv")
SIDES = ("naive", "ours", "liger")

Run = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Loss summed over tokens, of states, head, labels, the target's states and its head."""


def main() -> None:
    asked = arguments()
    if asked.side:
        print(json.dumps(measure(asked)))
        return
    found = []
    for vocabulary in asked.vocabulary:
        for loss in asked.loss:
            found += compared(asked, vocabulary, loss)
    conditions = {k: str(v) for k, v in vars(asked).items() if k in ("tokens", "width", "dtype")}
    conditions |= {"device": device().type, "threads": str(torch.get_num_threads())}
    report = {"conditions": conditions, "found": found}
    Path(f"{asked.out}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000, 152_000])
    parser.add_argument("--loss", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--liger-python", help="python of an environment with liger-kernel")
    parser.add_argument("--out", default="benchmarks/results/loss_memory")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--gradients", type=Path)
    return parser.parse_args()


def compared(asked: argparse.Namespace, vocabulary: int, loss: str) -> list[dict[str, Any]]:
    """A line for each side, printed as it comes."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for side in SIDES:
            row: dict[str, Any] = {"vocabulary": vocabulary, "loss": loss, "side": side}
            row |= child(asked, vocabulary, loss, side, Path(folder) / side)
            if "left_out" not in row:
                row["gradients_off"] = off(Path(folder) / side, Path(folder) / "naive")
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def child(
    asked: argparse.Namespace, vocabulary: int, loss: str, side: str, gradients: Path
) -> dict[str, Any]:
    """What the process of one side measured, or why there was none."""
    python = asked.liger_python if side == "liger" else sys.executable
    if python is None:
        return {"left_out": "no --liger-python"}
    if side == "liger" and (loss == "tv" or (loss == "ce" and device().type == "cpu")):
        return {"left_out": f"liger-kernel has no fused {loss} for {device().type}"}
    command = [python, "-m", "benchmarks.loss_memory", "--side", side, "--loss", loss,
               "--vocabulary", str(vocabulary), "--tokens", str(asked.tokens), "--width",
               str(asked.width), "--dtype", asked.dtype, "--repeats", str(asked.repeats),
               "--gradients", str(gradients)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"left_out": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def off(mine: Path, naive: Path) -> list[float]:
    """Of the gradients of states and head: norm of the difference over norm of the naive one."""
    a, b = load_file(mine), load_file(naive)
    return [float((a[k] - b[k]).norm() / b[k].norm()) for k in ("hidden", "weight")]


def measure(asked: argparse.Namespace) -> dict[str, float]:
    """One side, `--repeats` times; memory is the first run's."""
    (vocabulary,), (loss,) = asked.vocabulary, asked.loss
    hidden, weight, labels, states, head = problem(asked, vocabulary)
    run = {"ours": ours, "naive": naive, "liger": liger}[asked.side](loss)
    before, peak, seconds = held(), 0.0, math.inf
    for _ in range(asked.repeats):
        hidden.grad = weight.grad = None
        begin = now()
        value = run(hidden, weight, labels, states, head)
        (value / asked.tokens).backward()
        seconds = min(seconds, now() - begin)
        peak = peak or held() - before
    assert hidden.grad is not None
    assert weight.grad is not None
    some = torch.arange(0, vocabulary, max(1, vocabulary // 4096), device=weight.device)
    save_file(
        {"hidden": hidden.grad.float().cpu(), "weight": weight.grad[some].float().cpu()},
        asked.gradients,
    )
    gradients = (hidden.grad.nbytes + weight.grad.nbytes) / 2**30
    return {
        "peak_gib": round(peak, 3),
        "gradients_gib": round(gradients, 3),
        "seconds": round(seconds, 3),
        "loss_per_token": float(value.detach()) / asked.tokens,
    }


def problem(asked: argparse.Namespace, vocabulary: int) -> tuple[Tensor, ...]:
    """Laws of a few likely tokens, the drafter's near the target's."""
    torch.manual_seed(0)
    kind = {"device": device(), "dtype": getattr(torch, asked.dtype)}
    states = torch.randn(asked.tokens, asked.width, **kind)
    hidden = states + 0.5 * torch.randn(asked.tokens, asked.width, **kind)
    head = torch.randn(vocabulary, asked.width, **kind).mul_(3 / math.sqrt(asked.width))
    weight = head.clone()
    labels = torch.randint(vocabulary, (asked.tokens,), device=device())
    return hidden.requires_grad_(), weight.requires_grad_(), labels, states, head


def ours(loss: str) -> Run:
    from decoding.target import Shape
    from drafters.base import Prediction
    from train.objectives import CE, JSD, TV, ForwardKL

    objective = {"ce": CE, "forward_kl": ForwardKL, "jsd": JSD, "tv": TV}[loss]()

    class Head(torch.nn.Module):
        def __init__(self, weight_VD: Tensor) -> None:
            super().__init__()
            self.weight_VD, self.shape = weight_VD, Shape(*weight_VD.shape, 1, 1, 1, 1, 1)

        def logits(self, hidden: Tensor) -> Tensor:
            return hidden @ self.weight_VD.T

    def run(hidden, weight, labels, states, head):
        target: Any = Head(head) if objective.needs_target else None
        known = states if objective.needs_target else None
        rows = torch.zeros_like(labels)
        return objective([Prediction(hidden, weight, labels, rows, known)], target)[0]

    return run


def naive(loss: str) -> Run:
    def run(hidden, weight, labels, states, head):
        log_q = (hidden @ weight.T).float().log_softmax(-1)
        if loss == "ce":
            return F.nll_loss(log_q, labels, reduction="sum")
        with torch.no_grad():
            log_p = (states @ head.T).float().log_softmax(-1)
        if loss == "forward_kl":
            return F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        if loss == "tv":
            return (1 - torch.minimum(log_p, log_q).exp().sum(-1)).sum()
        log_m = (0.5 * (log_p.exp() + log_q.exp())).log()
        halves = (F.kl_div(log_m, x, log_target=True, reduction="sum") for x in (log_p, log_q))
        return 0.5 * sum(halves)

    return run


def liger(loss: str) -> Run:
    if device().type == "cpu":
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        chunked = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta={"forward_kl": 0.0, "jsd": 0.5}[loss],
            compiled=False, chunk_size=256,
        )  # fmt: skip
        return lambda hidden, weight, labels, states, head: (
            chunked(hidden, weight, states, head, labels) * len(labels)
        )
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    if loss == "ce":
        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda hidden, weight, labels, states, head: fused(weight, hidden, labels)
    divergence = LigerFusedLinearJSD(jsd_beta={"forward_kl": 0.0, "jsd": 0.5}[loss])
    return lambda hidden, weight, labels, states, head: (
        divergence(hidden, weight, states, head, None) * len(labels)
    )


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def held() -> float:
    """The most this process has held, GiB."""
    return peak_memory() / 1024


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
