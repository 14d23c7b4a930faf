"""speculators' side of benchmarks/train_speed.py, run by the Python of its own environment: its
EAGLE-3 model, loss, optimiser and `Trainer.train_epoch` on the states that the other side wrote.

Reads a JSON file; the last line that it prints is what it measured. speculators packs the sequences
of a step into one row; a pair is what its collator makes of a document, (x_{t+1}, taps and state of
t, law of t + 1), and there is none before a document's first token. Its Trainer knows GPUs alone:
without one it is told that its device is the CPU, and given its own losses that need no Triton.

Shapes: B sequences of a step, T tokens, P pairs.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from speculators.models.eagle3 import Eagle3DraftModel
from speculators.train import trainer as theirs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig

GPU = torch.cuda.is_available()


class Steps(Dataset):
    """Each step's pairs, padded to the positions of its sequences."""

    def __init__(self, file: str, steps: int) -> None:
        self.file, self.steps = safe_open(file, "pt"), steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        return pairs(*(self.file.get_tensor(f"{step}.{name}") for name in NAMES))


NAMES = ("ids", "mask", "doc", "hidden", "taps")


def pairs(ids_BT: Tensor, mask_BT: Tensor, doc_BT: Tensor, hidden: Tensor, taps: Tensor) -> dict:
    whole = (doc_BT[:, :-1] == doc_BT[:, 1:]) & (doc_BT[:, 1:] >= 0)
    number_BT = doc_BT + torch.arange(len(doc_BT))[:, None] * (doc_BT.max() + 1)
    length = ids_BT.numel()

    def packed(values: Tensor, empty: int = 0) -> Tensor:
        found = values[whole]
        out = found.new_full((1, length, *found.shape[1:]), empty)
        out[0, : len(found)] = found
        return out

    document_P = number_BT[:, 1:][whole]
    first = torch.ones_like(document_P, dtype=torch.bool)
    first[1:] = document_P[1:] != document_P[:-1]
    at = torch.arange(len(document_P))
    begin = torch.where(first, at, 0).cummax(0).values
    position = torch.ones(1, length, dtype=torch.long)
    position[0, : len(at)] = at - begin + 1
    # a pair is supervised where the token that it predicts, two on, is of its document and counts
    ahead = torch.zeros_like(whole)
    ahead[:, :-1] = mask_BT[:, 2:] & whole[:, 1:]
    return {
        "hidden_states": packed(taps.flatten(2)[:, :-1]),
        "input_ids": packed(ids_BT[:, 1:]),
        "verifier_last_hidden_states": packed(hidden[:, 1:]),
        "loss_mask": packed(ahead),
        "document_ids": packed(number_BT[:, 1:], -1),
        "position_ids": position,
        "error_records": 0,
    }


def model_of(asked: dict[str, Any]) -> Eagle3DraftModel:
    """One layer over the same taps, its head trained as ours is (speculators freezes it), and the
    target's states taken as they are: ours come after its last norm."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(asked["target"])
    config.num_hidden_layers = 1
    model = Eagle3DraftModel.from_training_args(
        config, draft_vocab_size=config.vocab_size, norm_before_residual=False,
        ttt_steps=asked["draft_steps"], verifier_name_or_path=asked["target"],
        target_layer_ids=asked["taps"],
        draft_attn_impl="simple_flex_attention" if GPU else asked["attention"],
    )  # fmt: skip
    model.lm_head.weight.requires_grad_(True)
    model.verifier_norm = torch.nn.Identity()
    return model


def main(asked: dict[str, Any]) -> None:
    if not GPU:
        theirs.get_local_rank = lambda: "cpu"
        torch.accelerator.synchronize = lambda *_: None
    model, warm, steps = model_of(asked), asked["warm"], asked["steps"]
    call, _ = Eagle3DraftModel.get_trainer_kwargs(
        loss_fn="kl_div", loss_implementation="fused" if GPU else "eager",
        ttt_steps=asked["draft_steps"], ttt_step_loss_decay=asked["decay"],
    )  # fmt: skip
    loader = DataLoader(Steps(asked["states"], steps + warm), batch_size=None)
    clock: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = theirs.TrainerConfig(
            lr=asked["rate"], num_epochs=1, save_path=folder, train_call_kwargs=call,
            weight_decay=0.1, scheduler_type="none", log_freq=10**9, checkpoint_freq=1,
        )  # fmt: skip
        trainer = theirs.Trainer(model, settings, loader)
        trainer.device_type = "cuda" if GPU else "cpu"
        trainer.train_epoch(0, step_callback=lambda: clock.append(time.perf_counter()))
    held = pairs(*(safe_open(asked["states"], "pt").get_tensor(f"held.{n}") for n in NAMES))
    batch = {k: v.to(trainer.local_rank) if isinstance(v, Tensor) else v for k, v in held.items()}
    with torch.no_grad(), torch.autocast(trainer.device_type, torch.bfloat16):
        _, _, found = model.eval()(**batch, **call)
    print(json.dumps({
        "tokens_per_second": steps * asked["positions"] / (clock[-1] - clock[warm - 1]),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss_reached": [
            float(found[f"loss_{k}_sum"]) / asked["decay"] ** k for k in range(asked["draft_steps"])
        ],
    }))  # fmt: skip


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
