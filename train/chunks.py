"""A loss summed over chunks of tokens, forward and backward at once, so that N x V never exists.

Shapes: N supervised tokens, C tokens of a chunk, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from decoding.target import Target
from drafters.base import Prediction

Sums = dict[str, Tensor]
Judge = Callable[[Tensor, slice], tuple[Tensor, Sums]]


def chunked(
    prediction: Prediction,
    target: Target | None,
    judge: Judge,
    slices: list[slice],
) -> tuple[Tensor, Sums]:
    """Sums judge(logits, slice), a loss and its metrics, over chunks of tokens.

    Each chunk's logits are made, judged, differentiated and dropped in the forward pass, so that
    peak memory holds one chunk; backward only scales the gradients that were kept. A borrowed
    head is differentiated through, and gets no gradient itself.
    """
    sums: Sums = {}
    hidden_ND, weight_VD = prediction.hidden_ND, prediction.weight_VD

    def borrowed(hidden_CD: Tensor) -> Tensor:
        return prediction.logits(hidden_CD, target)

    head = borrowed if weight_VD is None else None
    loss = _Chunked.apply(hidden_ND, weight_VD, head, slices, judge, sums)
    return loss, sums


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor | None,
        head: Callable[[Tensor], Tensor] | None,
        slices: list[slice],
        judge: Judge,
        sums: Sums,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        learn, learn_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND if learn else total)
        grad_weight = None
        if weight_VD is not None and learn_head:
            grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
        for at in slices:
            with torch.set_grad_enabled(learn or learn_head):
                h_CD = hidden_ND[at].detach().requires_grad_(learn and weight_VD is None)
                if head is not None:
                    logits_CV = head(h_CD)
                else:
                    assert weight_VD is not None
                    logits_CV = (h_CD @ weight_VD.detach().T).requires_grad_(learn or learn_head)
                loss, measured = judge(logits_CV, at)
            total += loss.detach()
            for key, value in measured.items():
                sums[key] = sums.get(key, 0) + value
            if head is not None and learn:
                (grad_hidden[at],) = torch.autograd.grad(loss, h_CD)
            elif learn or learn_head:
                assert weight_VD is not None
                (grad_CV,) = torch.autograd.grad(loss, logits_CV)
                if learn:
                    grad_hidden[at] = grad_CV @ weight_VD
                if grad_weight is not None and grad_CV.dtype == torch.float32:
                    grad_weight.addmm_(grad_CV.T, h_CD)  # no second V x D beside it
                elif grad_weight is not None:
                    grad_weight += grad_CV.T @ h_CD
        ctx.save_for_backward(
            grad_hidden if learn else None,
            None if grad_weight is None or weight_VD is None else grad_weight.to(weight_VD.dtype),
        )
        return total

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad_out,
            None if grad_weight is None else grad_weight * grad_out,
            *[None] * 4,
        )
