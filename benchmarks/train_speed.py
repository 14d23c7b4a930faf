"""How fast does our training loop train, and what does it hold, beside others doing the same work?

    .venv/bin/python -m benchmarks.train_speed --target FOLDER --packed STAGE/packed/train
    .venv/bin/python -m benchmarks.train_speed --target FOLDER --cache CACHE_STAGE/artifact
    .venv/bin/python -m benchmarks.train_speed --family eagle3 --target FOLDER --packed ... \\
        --speculators-python PYTHON

Forward KL from a frozen target on the same packed sequences (same masks, same documents), the same
drafter, batch, AdamW and bf16. Sides, each in a process of its own, in turn, `--repeats` times:

    online       ours: the target's pass and the drafter's
    compiled     ours, with schedule.compile (--compile)
    offline      ours, with a cache of states in the target's place (--cache)
    trainer      a plain transformers Trainer (family lm)
    given        ours, with the target's states in a file (family eagle3), as speculators has them
    speculators  its Trainer on that file (PYTHON: of an environment with speculators 0.9)

Reports tokens per second over the steps after a warm-up, peak memory of the process, and the
forward KL a token on sequences that none has trained on (of eagle3 by draft position).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.arms import told
from data.pack import Packed
from decoding.pretrained import DTYPES, Pretrained
from decoding.target import Target, TargetOut
from drafters.base import Batch, Metrics, Prediction, Trained, write_json
from drafters.eagle3 import Eagle3
from drafters.lm import LM
from train.machine import peak_memory

WARM, DECAY, RATE = 5, 0.8, 1e-3
NAMES = ("ids", "mask", "doc", "hidden", "taps")  # as benchmarks/speculators_side.py reads them


def main() -> None:
    asked = arguments()
    with tempfile.TemporaryDirectory() as folder:
        asked.states = asked.states or str(Path(folder) / "states.safetensors")
        if asked.side:
            print(json.dumps(SIDES[asked.side](asked)))
            return
        sides = ["online"]
        if asked.family == "eagle3":
            child(asked, "write")
            sides += ["given"] + ["speculators"] * bool(asked.speculators_python)
        else:
            sides += ["trainer"]
        sides += ["compiled"] * asked.compile + ["offline"] * bool(asked.cache)
        found: dict[str, list[dict]] = {side: [] for side in sides}
        for _ in range(asked.repeats):
            for side in found:
                found[side].append(child(asked, side))
                print(side, json.dumps(found[side][-1]), flush=True)
    report: dict = {side: middle(runs) for side, runs in found.items()}
    compared = [("online", "trainer"), ("compiled", "online"), ("offline", "online")]
    for a, b in (*compared, ("given", "speculators")):
        if a in found and b in found:
            pairs = zip(found[a], found[b], strict=True)
            ratios = sorted(x["tokens_per_second"] / y["tokens_per_second"] for x, y in pairs)
            report |= {f"speed, {a} / {b}": [median(ratios), ratios[0], ratios[-1]]}
    report |= {"conditions": told(asked)}
    print(json.dumps(report, indent=1))
    write_json(Path(f"{asked.out}.json"), report)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--packed", type=Path)
    where.add_argument("--cache", type=Path, help="what a stage `cache` left")
    parser.add_argument("--family", default="lm", choices=["lm", "eagle3"])
    parser.add_argument("--width", type=int, default=256, help="of an lm")
    parser.add_argument("--draft-steps", type=int, default=3, help="of eagle3")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step, one micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="beside it, compiled")
    parser.add_argument("--speculators-python")
    parser.add_argument("--attention", default="sdpa", help="of speculators on a CPU")
    parser.add_argument("--out", default="benchmarks/results/train_speed")
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--states", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(asked: argparse.Namespace, side: str) -> dict[str, Any]:
    """What the process of one side measured."""
    given = [*sys.argv[1:], "--states", asked.states]
    command = [sys.executable, "-m", "benchmarks.train_speed", *given, "--side", side]
    if side == "speculators":
        file = Path(asked.states).with_name("asked.json")
        write_json(file, to_speculators(asked))
        command = [asked.speculators_python, "-m", "benchmarks.speculators_side", str(file)]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout.strip().splitlines()[-1])


def to_speculators(asked: argparse.Namespace) -> dict[str, Any]:
    keys = ("target", "states", "steps", "draft_steps", "attention")
    said = {key: getattr(asked, key) for key in keys}
    positions = asked.batch * packed_of(asked).length
    taps = list(Eagle3(Pretrained(path=asked.target).shape_of()).taps)
    said |= {"warm": WARM, "decay": DECAY, "rate": RATE, "positions": positions, "taps": taps}
    return said


def middle(runs: list[dict]) -> dict[str, Any]:
    """Medians; of what is a list, by place."""
    return {
        key: [median(values) for values in zip(*(r[key] for r in runs), strict=True)]
        if isinstance(runs[0][key], list)
        else median(r[key] for r in runs)
        for key in runs[0]
    }


def packed_of(asked: argparse.Namespace) -> Packed:
    return Packed(asked.packed or asked.cache / "packed" / "train")


def load(asked: argparse.Namespace) -> tuple[Target, Trained, Packed]:
    torch.manual_seed(0)
    spec, packed = Pretrained(path=asked.target), packed_of(asked)
    if asked.side == "offline":
        from train.recorded import Recorded

        borrowed = spec.borrow()
        kind = DTYPES[spec.dtype]
        target: Target = Recorded(asked.cache, shape=borrowed.shape, dtype=kind, borrowed=borrowed)
    else:
        target = spec.load()
    drafter: Trained = LM(target.shape, layers=1, width=asked.width)
    if asked.family == "eagle3":
        drafter = Eagle3(target.shape, steps=asked.draft_steps, decay=DECAY)
    drafter.initialise(target, lambda: packed.counts(target.shape.vocab_size))
    return target, drafter, packed


def write(asked: argparse.Namespace) -> dict[str, Any]:
    """The target's states of every step's sequences and of those held out, for `given` and
    `speculators`."""
    target, drafter, packed = load(asked)
    steps = {str(step): rows(step, asked, packed) for step in range(asked.steps + WARM)}
    tensors = {}
    for name, numbers in (steps | {"held": heldout(asked, packed)}).items():
        batch = packed.batch(numbers)
        out = target(batch.ids_BT, doc_BT=batch.doc_BT, taps=drafter.taps)
        values = (batch.ids_BT, batch.mask_BT, batch.doc_BT, out.hidden_BTD, out.taps_BTLD)
        tensors |= {f"{name}.{n}": v.cpu() for n, v in zip(NAMES, values, strict=True)}
    save_file(tensors, asked.states)
    return {}


def batches(asked: argparse.Namespace, packed: Packed) -> Iterator[Batch]:
    file = safe_open(asked.states, "pt") if asked.side == "given" else None
    for step in range(asked.steps + WARM):
        if file is None:
            yield packed.batch(rows(step, asked, packed))
        else:
            ids, mask, doc, *states = (file.get_tensor(f"{step}.{n}") for n in NAMES)
            yield Batch(ids, mask, doc, TargetOut(*states))


def ours(asked: argparse.Namespace) -> dict[str, Any]:
    from train.engine import Engine, join
    from train.objectives import ForwardKL

    target, drafter, packed = load(asked)
    join()
    engine = Engine(
        drafter, dtype="bfloat16", zero_stage=1, micro_batch=asked.batch, accumulation=1,
        clip=1.0, betas=(0.9, 0.95), weight_decay=0.1, compiled=asked.side == "compiled",
    )  # fmt: skip
    objective, begin = ForwardKL(), 0.0
    for step, batch in enumerate(batches(asked, packed)):
        if step == WARM:
            begin = time.perf_counter()
        loss, metrics = engine(batch, target, objective)
        engine.backward(loss / metrics["tokens"])
        engine.step(RATE)
    return result(asked, packed, begin, drafter, target)


def trainer(asked: argparse.Namespace) -> dict[str, Any]:
    """transformers.Trainer with the obvious compute_loss: whole logits of both models."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from decoding.target import document_mask

    target, drafter, packed = load(asked)
    assert isinstance(drafter, LM)
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
            use_cpu=not torch.cuda.is_available(), learning_rate=RATE, weight_decay=0.1,
            adam_beta2=0.95,
            lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_num_workers=0, logging_strategy="no",
        )  # fmt: skip
        InOrder(
            drafter.model, settings, train_dataset=Rows(), callbacks=[Clock()],
            data_collator=lambda items: {"batch": items[0]},
        ).train()  # fmt: skip
    return result(asked, packed, clock["begin"], drafter, target)


def rows(step: int, asked: argparse.Namespace, packed: Packed) -> list[int]:
    """Sequences of a step; the last ones of the set are held out."""
    most = len(packed) - asked.batch
    return [(step * asked.batch + i) % most for i in range(asked.batch)]


def heldout(asked: argparse.Namespace, packed: Packed) -> list[int]:
    return list(range(len(packed) - asked.batch, len(packed)))


@torch.no_grad()
def reached(
    asked: argparse.Namespace, packed: Packed, drafter: Trained, target: Target
) -> list[float]:
    """Forward KL a token on the sequences held out, by draft position."""
    from train.objectives import ForwardKL

    class ByPosition(ForwardKL):
        def __call__(
            self, predictions: list[Prediction], target: Target | None
        ) -> tuple[Tensor, list[Metrics]]:
            for prediction in predictions:
                loss, (metrics,) = super().__call__([replace(prediction, share=1.0)], target)
                found.append(float(loss / metrics["tokens"]))
            return super().__call__(predictions, target)

    found: list[float] = []
    with torch.autocast(target.device.type, torch.bfloat16):
        drafter.eval()(packed.batch(heldout(asked, packed)), target, ByPosition())
    return found


def result(
    asked: argparse.Namespace, packed: Packed, begin: float, drafter: Trained, target: Target
) -> dict[str, Any]:
    seconds, most = time.perf_counter() - begin, peak_memory()
    positions = asked.steps * asked.batch * packed.length
    return {
        "tokens_per_second": positions / seconds,
        "peak_mib": most,
        "trained_parameters": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
        "loss_reached": reached(asked, packed, drafter, target),
    }


SIDES = {
    "online": ours, "compiled": ours, "given": ours, "offline": ours, "trainer": trainer,
    "write": write,
}  # fmt: skip


if __name__ == "__main__":
    main()
