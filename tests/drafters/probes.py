"""What a head says and what it reads, for the tests of single families."""

from typing import Any

import torch
from contract import PROMPTS, SAMPLED, Watching
from torch import Tensor, nn

from decoding.loop import decode
from decoding.target import Target, TargetOut
from drafters.base import Batch, Prediction
from drafters.heads import Heads


def scatter(module: nn.Module, std: float = 0.2) -> Any:
    """Every parameter moved, biases and norms too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return module.double().eval()


def line(ids: list[int]) -> Batch:
    """One document, all of it supervised."""
    ids_BT = torch.tensor([ids])
    return Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT))


def cached(batch: Batch, target: Target, taps: tuple[int, ...] = ()) -> Batch:
    """With the target's states."""
    batch.cached = target(batch.ids_BT, doc_BT=batch.doc_BT, taps=taps)
    return batch


def states(drafter: Heads, batch: Batch, target: Target) -> list[Tensor]:
    """What head 1, 2, ... says before its output matrix, [B, T', D]."""
    found = drafter.unroll(batch, target)
    return [each[0] if isinstance(each, tuple) else each for each in found]


def drafts(drafter: Heads, target: Target) -> list[tuple[list, list]]:
    """Every draft of a few sampled answers."""
    watching = Watching(drafter)
    decode(target, watching, PROMPTS, sampling=SAMPLED, max_new_tokens=12, end_ids=frozenset())
    return [(draft.ids_BN.tolist(), draft.size) for _, draft in watching.rounds]


def reach(
    drafter: Heads, target: Target, k: int, t: int, monkeypatch
) -> tuple[dict[str, set[int]], set[int]]:
    """Which tokens (by the matrix that they are read from) and which states of the target head k
    at pair t depends on, by gradient. Token i stands at place i."""
    tables = {
        "embed": target.model.get_input_embeddings().weight.clone().requires_grad_(),
        "head_rows": target.model.get_output_embeddings().weight.clone().requires_grad_(),
    }
    for name, table in tables.items():
        monkeypatch.setattr(target, name, lambda ids, table=table: table[ids])
    batch = line(list(range(12)))
    known = target(batch.ids_BT, taps=drafter.taps)
    hidden_BTD = known.hidden_BTD.clone().requires_grad_()
    taps_BTLD = None if known.taps_BTLD is None else known.taps_BTLD.clone().requires_grad_()
    batch.cached = TargetOut(hidden_BTD, taps_BTLD)
    said_D = states(drafter, batch, target)[k - 1][0, t]
    (said_D * torch.linspace(-1, 2, len(said_D))).sum().backward()
    read = hidden_BTD if taps_BTLD is None else taps_BTLD
    assert read.grad is not None
    return {name: _used(table.grad) for name, table in tables.items()}, _used(read.grad[0])


def _used(gradient: Tensor | None) -> set[int]:
    return set() if gradient is None else set(gradient.flatten(1).any(1).nonzero()[:, 0].tolist())


class Counting:
    """An objective that gives `each` for every token."""

    needs_target = False

    def __init__(self, each: float = 1.0) -> None:
        self.each = each

    def __call__(
        self, predictions: list[Prediction], target: Target | None
    ) -> tuple[Tensor, list[dict]]:
        loss, found = torch.zeros(()), []
        for p in predictions:
            n = torch.tensor(float(len(p.guessed().labels_N)))
            loss = loss + p.share * (p.hidden_ND.sum() * 0 + self.each * n)
            found.append({"tokens": n, "top1": n / (1 + p.position)})
        return loss, found
