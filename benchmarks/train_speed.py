"""Is our training loop as fast as a plain transformers Trainer doing the same distillation?

    .venv/bin/python -m benchmarks.train_speed --target FOLDER --packed STAGE/packed/train

Forward KL from a frozen target on the same packed sequences (same masks, same documents), the same
drafter, batch, AdamW and bf16. Each side runs in a process of its own, in turn, `--repeats` times;
tokens per second over the steps after a warm-up, and peak memory of the process.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.arms import told
from data.pack import Packed
from decoding.pretrained import Pretrained
from decoding.target import Target
from drafters.base import Batch, write_json
from drafters.lm import LM

WARM = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--packed", required=True, type=Path)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, one micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "trainer"])
    parser.add_argument("--out", default="benchmarks/results/train_speed")
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps({"ours": ours, "trainer": trainer}[asked.side](asked)))
        return
    found: dict[str, list[dict]] = {"ours": [], "trainer": []}
    for _ in range(asked.repeats):
        for side in found:
            command = [sys.executable, "-m", "benchmarks.train_speed", *sys.argv[1:]]
            out = subprocess.run([*command, "--side", side], capture_output=True, text=True)
            if out.returncode:
                raise SystemExit(out.stderr)
            found[side].append(json.loads(out.stdout.strip().splitlines()[-1]))
    report: dict = {
        side: {key: median(r[key] for r in runs) for key in runs[0]} for side, runs in found.items()
    }
    ratios = sorted(
        a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in zip(found["ours"], found["trainer"], strict=True)
    )
    report |= {"speed, ours / trainer": [median(ratios), ratios[0], ratios[-1]]}
    report |= {"conditions": told(asked)}
    print(json.dumps(report, indent=1))
    write_json(Path(f"{asked.out}.json"), report)


def load(asked: argparse.Namespace) -> tuple[Target, LM, Packed]:
    torch.manual_seed(0)
    target = Pretrained(path=asked.target).load()
    return target, LM(target.shape, layers=1, width=asked.width), Packed(asked.packed)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ours(asked: argparse.Namespace) -> dict:
    from train.engine import Engine, join
    from train.objectives import ForwardKL

    target, drafter, packed = load(asked)
    join()
    engine = Engine(
        drafter, dtype="bfloat16", zero_stage=1, micro_batch=asked.batch, accumulation=1,
        clip=1.0, betas=(0.9, 0.95), weight_decay=0.1,
    )  # fmt: skip
    objective, begin = ForwardKL(), 0.0
    for step in range(asked.steps + WARM):
        if step == WARM:
            begin = time.perf_counter()
        batch = packed.batch(rows(step, asked, packed))
        loss, metrics = engine(batch, target, objective)
        engine.backward(loss / metrics["tokens"])
        engine.step(1e-3)
    return result(asked, packed, begin, reached(drafter, target, packed, asked))


def trainer(asked: argparse.Namespace) -> dict:
    """transformers.Trainer with the obvious compute_loss: whole logits of both models."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from decoding.target import document_mask

    target, drafter, packed = load(asked)
    clock = {"begin": 0.0}

    class Distillation(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            batch: Batch = inputs["batch"]
            mask, positions = document_mask(batch.ids_BT, batch.doc_BT)
            said = {"input_ids": batch.ids_BT, "attention_mask": mask, "position_ids": positions}
            q = model(**said).logits[:, :-1].float().log_softmax(-1)
            with torch.no_grad():
                p = target.model(**said).logits[:, :-1].float().log_softmax(-1)
            keep = batch.mask_BT[:, 1:]
            return F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[keep].mean()

    class InOrder(Distillation):  # the same sequences in the same steps as our side
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == WARM:
                clock["begin"] = time.perf_counter()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return asked.steps + WARM

        def __getitem__(self, step: int) -> Batch:
            return packed.batch(rows(step, asked, packed))

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, per_device_train_batch_size=1, max_steps=asked.steps + WARM, bf16=True,
            use_cpu=not torch.cuda.is_available(), learning_rate=1e-3, weight_decay=0.1,
            adam_beta2=0.95,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_num_workers=0, logging_strategy="no",
        )  # fmt: skip
        InOrder(
            drafter.model, settings, train_dataset=Rows(), callbacks=[Clock()],
            data_collator=lambda items: {"batch": items[0]},
        ).train()  # fmt: skip
    return result(asked, packed, clock["begin"], reached(drafter, target, packed, asked))


def rows(step: int, asked: argparse.Namespace, packed: Packed) -> list[int]:
    return [(step * asked.batch + i) % len(packed) for i in range(asked.batch)]


@torch.no_grad()
def reached(drafter: LM, target: Target, packed: Packed, asked: argparse.Namespace) -> float:
    """Forward KL a token on the last sequences, which neither side has trained on."""
    from train.objectives import ForwardKL

    batch = packed.batch(list(range(len(packed) - asked.batch, len(packed))))
    with torch.autocast(target.device.type, torch.bfloat16):
        loss, metrics = drafter.eval()(batch, target, ForwardKL())
    return float(loss / metrics["tokens"])


def result(asked: argparse.Namespace, packed: Packed, begin: float, loss: float) -> dict:
    seconds = time.perf_counter() - begin
    positions = asked.steps * asked.batch * packed.length
    return {"tokens_per_second": positions / seconds, "peak_mib": peak(), "loss_reached": loss}


if __name__ == "__main__":
    main()
