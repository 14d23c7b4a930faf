"""Losses summed over chunks of tokens, forward and backward at once: N x V never exists.

Shapes: N supervised tokens, C tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decoding.target import Target
from drafters.base import Prediction

BLOCK = 4096  # rows of a head whose gradient is made at once on a CPU
Sums = dict[str, Tensor]
Judge = Callable[[int, Tensor], tuple[Tensor, Sums]]  # a prediction's number, its logits


def chunked(
    predictions: list[Prediction],
    target: Target | None,
    open_chunk: Callable[[slice], Judge],
    slices: list[slice],
) -> tuple[Tensor, list[Sums]]:
    """Sums what judge(number, logits) = (loss, metrics) gives over chunks of tokens and over the
    predictions of each; a loss counts `share` times.

    Each chunk's logits are made, judged, differentiated and dropped in the forward pass, so that
    peak memory holds one chunk; backward only scales the gradients that were kept, one for each
    matrix, however many draft positions share it. A borrowed head is differentiated through, and
    gets no gradient itself.
    """
    heads = {id(p.weight_VD): p.weight_VD for p in predictions if p.weight_VD is not None}
    work = _Work(predictions, target, open_chunk, slices, list(heads))
    total = _Chunked.apply(work, *(p.hidden_ND for p in predictions), *heads.values())
    return total, work.sums


@dataclass
class _Work:
    """What the autograd function is given beside tensors; `heads` are the ids of the distinct
    matrices, in the order of their gradients."""

    predictions: list[Prediction]
    target: Target | None
    open_chunk: Callable[[slice], Judge]
    slices: list[slice]
    heads: list[int]
    sums: list[Sums] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = [{} for _ in self.predictions]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor) -> Tensor:
        count = len(work.predictions)
        needed = ctx.needs_input_grad[1:]
        grads: list[Tensor | None] = [None] * len(tensors)
        for i, tensor in enumerate(tensors):
            if needed[i]:  # matrices in fp32: many chunks add up
                kind = tensor.dtype if i < count else torch.float32
                grads[i] = torch.zeros_like(tensor, dtype=kind)
        total = torch.zeros((), dtype=torch.float32, device=tensors[0].device)
        for at in work.slices:
            judge = work.open_chunk(at)
            for number, prediction in enumerate(work.predictions):
                weight_VD, grad_VD = prediction.weight_VD, None
                if weight_VD is not None:
                    grad_VD = grads[count + work.heads.index(id(weight_VD))]
                total += _judged(work, number, at, judge, grads[number], grad_VD)
        kinds = [tensor.dtype for tensor in tensors]
        kept = [None if g is None else g.to(kind) for g, kind in zip(grads, kinds, strict=True)]
        ctx.save_for_backward(*kept)
        return total

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients in place; autograd refuses a second pass over the same graph."""
        return None, *(None if grad is None else grad.mul_(grad_out) for grad in ctx.saved_tensors)


def _judged(
    work: _Work,
    number: int,
    at: slice,
    judge: Judge,
    grad_ND: Tensor | None,
    grad_VD: Tensor | None,
) -> Tensor:
    """The loss of a chunk of one prediction, whose gradients are added to those given."""
    prediction = work.predictions[number]
    weight_VD = prediction.weight_VD
    learns = grad_ND is not None or grad_VD is not None
    with torch.set_grad_enabled(learns):
        h_CD = prediction.hidden_ND[at].detach()
        if weight_VD is None:
            logits_CV = prediction.logits(h_CD.requires_grad_(learns), work.target)
        else:
            logits_CV = (h_CD @ weight_VD.detach().T).requires_grad_(learns)
        loss, measured = judge(number, logits_CV)
        loss = loss * prediction.share
    sums = work.sums[number]
    for key, value in measured.items():
        sums[key] = sums.get(key, 0) + value
    if learns and weight_VD is None:
        assert grad_ND is not None
        (grad_ND[at],) = torch.autograd.grad(loss, h_CD)
    elif learns and weight_VD is not None:
        (grad_CV,) = torch.autograd.grad(loss, logits_CV)
        if grad_ND is not None:
            grad_ND[at] = grad_CV @ weight_VD
        if grad_VD is not None:
            _add_product(grad_VD, grad_CV, h_CD)
    return loss.detach()


def _add_product(grad_VD: Tensor, grad_CV: Tensor, h_CD: Tensor) -> None:
    """Adds grad_CV^T h_CD, in fp32 and without a second V x D beside it: rounded products are made
    for a block of rows at a time, which stays in a CPU's cache (one of all rows is new memory for
    each chunk, and took nearly half of a bf16 loss at V = 152,000)."""
    if grad_CV.dtype == torch.float32:
        grad_VD.addmm_(grad_CV.T, h_CD)
        return
    rows = len(grad_VD) if grad_VD.is_cuda else BLOCK
    for begin in range(0, len(grad_VD), rows):
        block = slice(begin, begin + rows)
        grad_VD[block] += grad_CV[:, block].T @ h_CD
