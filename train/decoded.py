"""Decode-validation: tokens per target call on held-out prompts, while a drafter is trained.

A validation loss can fall while the drafter as it will be used stands still, or is broken; this
number is made by the loop that users decode with.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from decoding.loop import decode
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Trained, write_json

PROMPTS = 64
NEW_TOKENS = 32
TOGETHER = 16  # prompts of a batch, since their caches stand beside the training's memory
PLATEAU = 0.02  # a drafter whose last quarter added more was still learning


def keep_prompts(file: Path, rows: Iterable[Mapping[str, Any]], longest: int) -> None:
    """Writes the first prompts, each once, of answers that are held out for validation."""
    ids = [row["prompt_ids"] for row in rows if "prompt_ids" in row]
    fitting = dict.fromkeys(tuple(prompt) for prompt in ids if len(prompt) <= longest)
    write_json(file, list(fitting)[:PROMPTS])


class Decoded:
    """Decodes the kept prompts with the drafter as it is, greedily, a few at a time."""

    def __init__(self, target: Target, file: Path) -> None:
        self.target = target
        prompts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
        self.prompts: list[list[int]] = sorted(prompts, key=len)

    def __call__(self, drafter: Trained) -> dict[str, float]:
        """{"validation_tau": tokens per target call}; {} without prompts that fit both models."""
        most = min(self.target.shape.max_positions, drafter.max_positions) - NEW_TOKENS
        prompts = [prompt for prompt in self.prompts if len(prompt) <= most]
        if not prompts:
            return {}
        tokens = calls = 0
        for at in range(0, len(prompts), TOGETHER):
            with torch.inference_mode():
                done = decode(
                    self.target, drafter, prompts[at : at + TOGETHER], sampling=Sampling(),
                    max_new_tokens=NEW_TOKENS,
                )  # fmt: skip
            tokens += done.tokens
            calls += sum(len(answer.accepted) for answer in done.answers)
        return {"validation_tau": tokens / calls}


def last_quarter(metrics: Path, steps: int) -> float | None:
    """What the last quarter of the steps added to validation_tau, as a share; None if unknown."""
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    tau = {line["step"]: line["validation_tau"] for line in lines if "validation_tau" in line}
    before = [step for step in tau if step <= 0.8 * steps]
    if not before or steps not in tau:
        return None
    at = min(before, key=lambda step: abs(step - 0.75 * steps))
    return tau[steps] / tau[at] - 1


def told(tau: float, gain: float | None) -> str:
    """One line for the end of a run."""
    said = f"decoded on held-out prompts: {tau:.2f} tokens per target call"
    if gain is None:
        return said
    more = "; it is still learning, so raise schedule.tokens" if gain > PLATEAU else ""
    return f"{said}, {gain:+.1%} in the last quarter of training{more}"
