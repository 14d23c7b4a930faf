"""Whether an export is the drafter: it is read back, and computed from its files alone.

Shapes: T tokens, N rows of a draft position, V vocabulary.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.target import TargetOut
from drafters.base import Batch, Metrics, Prediction, Trained, cast
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.heads import Heads
from eval.controls import Failed
from train.layouts.given import Facts, Prompt
from train.layouts.table import Layout

CLOSE = 2e-5  # of the largest logit: fp32 sums in another order differ by less than a tenth of it
DEPTH = 3  # guesses of a drafter that reads its own output


def prove(layout: Layout, drafter: Trained, folder: Path, facts: Facts) -> float:
    """The largest difference of a logit, over the largest logit, between the training module and
    the files. Raises Failed where they differ, or cannot be read back whole."""
    try:
        target = facts.lent.target if facts.lent else None
        again = layout.read(folder, facts.shape, target)
    except ValueError as error:
        raise Failed(f"the export in {folder.name} could not be read back: {error}") from None
    worst = 0.0
    for prompt in facts.prompts():
        truth = judged(drafter, prompt, facts)
        worst = max(worst, _compare(truth, judged(again, prompt, facts), "read back", folder.name))
        alone = _alone(layout, folder, prompt, facts, len(truth))
        worst = max(worst, _compare(truth, alone, "as engines read them", folder.name))
    return worst


def _alone(layout: Layout, folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    try:
        return layout.logits(folder, prompt, facts, depth)
    except (AssertionError, KeyError, IndexError, RuntimeError, ValueError) as error:
        raise Failed(
            f"the files of the export in {folder.name} do not make a drafter as engines read them "
            f"({error}); nothing was exported"
        ) from None


class _Keep:
    """An objective that keeps what it is given to judge."""

    needs_target = False

    def __init__(self) -> None:
        self.seen: list[Prediction] = []

    def __call__(self, predictions: list[Prediction], target: Any) -> tuple[Tensor, list[Metrics]]:
        self.seen += [prediction.guessed() for prediction in predictions]
        return predictions[0].hidden_ND.sum() * 0, [{} for _ in predictions]


@torch.no_grad()
def judged(drafter: Trained, prompt: Prompt, facts: Facts) -> list[Tensor]:
    """What training judges at each draft position, [N, V], its weights as the file stores them and
    all sums in fp32."""
    drafter = copy.deepcopy(drafter).eval()
    cast(cast(drafter, facts.dtype) if facts.dtype else drafter, torch.float32)
    if isinstance(drafter, Eagle | Eagle3):
        drafter.steps = DEPTH
    ids_BT, keep = prompt.ids_T[None], _Keep()
    batch = Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT))
    if not isinstance(drafter, Heads):
        drafter(batch, None, keep)
        return [_logits(p, facts) for p in keep.seen]
    states_LTD = prompt.states_LTD
    taps = states_LTD[list(drafter.taps)].transpose(0, 1)[None] if drafter.taps else None
    batch.cached = TargetOut(states_LTD[-1][None], taps)
    lent: Any = facts.borrowed  # all that a head asks of a target is its embedding
    Heads.forward(drafter, batch, lent, keep)  # not Medusa-2's own, which trains the target too
    return [_logits(p, facts) for p in keep.seen]


def _logits(prediction: Prediction, facts: Facts) -> Tensor:
    weight_VD = prediction.weight_VD
    if weight_VD is None:
        weight_VD = facts.borrowed.head_VD
    logits_NV = prediction.hidden_ND @ weight_VD.T
    ids_V = prediction.vocabulary_V
    if ids_V is None:
        return logits_NV
    whole = logits_NV.new_full((len(logits_NV), facts.shape.vocab_size), -torch.inf)
    return whole.index_copy(1, ids_V, logits_NV)


def _compare(truth: Sequence[Tensor], found: Sequence[Tensor], how: str, name: str) -> float:
    """The largest difference over the largest logit. Raises Failed where it is not tiny."""
    said = f"the export in {name}, {how}, does not compute what the drafter does"
    if len(found) != len(truth):
        raise Failed(f"{said}: {len(found)} draft positions, expected {len(truth)}")
    worst = 0.0
    for position, (true_NV, all_NV) in enumerate(zip(truth, found, strict=True), start=1):
        logits_NV = all_NV[: len(true_NV)]  # rows without a label have no counterpart
        drafted = true_NV.isfinite()
        if logits_NV.shape != true_NV.shape or not torch.equal(drafted, logits_NV.isfinite()):
            raise Failed(f"{said}: it drafts other tokens at position {position}; nothing exported")
        largest = float(true_NV[drafted].abs().max())
        gap = float((true_NV - logits_NV)[drafted].abs().max()) / max(largest, 1e-9)
        if not gap <= CLOSE:
            raise Failed(
                f"{said}: at draft position {position} a logit is off by {gap:.2g} of the largest, "
                f"expected at most {CLOSE:g}; nothing was exported"
            )
        worst = max(worst, gap)
    return worst
