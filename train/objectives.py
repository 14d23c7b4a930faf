"""What a drafter is trained to do: the losses, chunked over tokens so that N x V never exists.

Shapes: N supervised tokens, D width, V vocabulary. p is the target's law, q the drafter's.
Per-token values and gradients: reference (i) of the spec sheets; identities tested by finite
differences.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.target import Target
from drafters.base import Metrics, Prediction

PAD = 64  # tokens that N is rounded up to a multiple of
CHUNK_ELEMENTS = 2**21  # logits of one chunk: 8 MiB in fp32, which the allocator reuses

Sums = dict[str, Tensor]
PerToken = Callable[[Tensor, Any, Tensor, slice], Tensor]
Judge = Callable[[Tensor, slice], tuple[Tensor, Sums]]


class Loss(ABC):
    """Loss and metrics of one group of predictions; `weight` scales it (by draft position, say)."""

    needs_target = True

    def __call__(self, prediction: Prediction, target: Target | None) -> tuple[Tensor, Metrics]:
        per_token = self.prepare(prediction, target)
        padded, real_N = _pad(prediction)

        def judge(q_CV: Tensor, at: slice) -> tuple[Tensor, Sums]:
            log_q_CV = q_CV.float().log_softmax(-1)
            labels_C, real_C = padded.labels_N[at], real_N[at]
            log_p_CV = _target_law(padded, target, at)
            loss_C = per_token(log_q_CV, log_p_CV, labels_C, at)
            return (loss_C * real_C).sum(), _measure(log_q_CV.detach(), log_p_CV, labels_C, real_C)

        return chunked(padded.hidden_ND, padded.weight_VD, judge)

    def prepare(self, prediction: Prediction, target: Target | None) -> PerToken:
        """What turns (log q, log p, labels) of a chunk, and which it is, into a loss per token."""
        return lambda log_q_CV, log_p_CV, labels_C, at: self.per_token(log_q_CV, log_p_CV, labels_C)

    @abstractmethod
    def per_token(self, log_q_CV: Tensor, log_p_CV: Any, labels_C: Tensor) -> Tensor:
        """[C] losses, differentiable in log_q_CV."""


class CE(Loss):
    """-log q(x) of the tokens in the data: next-token loss, or on the target's own answers
    sequence-level distillation (Yi et al. 2024). Needs no pass of the target."""

    needs_target = False

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return F.nll_loss(log_q_CV, labels_C, reduction="none")


class ForwardKL(Loss):
    """KL(p || q); gradient q - p."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return _kl(log_p_CV, log_q_CV)


class ReverseKL(Loss):
    """KL(q || p)."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return _kl(log_q_CV, log_p_CV)


class JSD(Loss):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""

    def __init__(self, *, beta: float = 0.5) -> None:
        if not 0 < beta < 1:
            raise ValueError(f"objective.beta is {beta}; it must lie between 0 and 1")
        self.beta = beta

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        mix = self.beta * log_p_CV.exp() + (1 - self.beta) * log_q_CV.exp()
        log_m = mix.clamp(min=1e-30).log()
        return self.beta * _kl(log_p_CV, log_m) + (1 - self.beta) * _kl(log_q_CV, log_m)


class TV(Loss):
    """Total variation 1 - alpha. Its gradient vanishes for a drafter far from p: not for a start
    from scratch."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return 1 - _alpha(log_q_CV, log_p_CV)


class NegLogAcceptance(Loss):
    """-log alpha, alpha = sum min(p, q): the acceptance loss L_alpha of LK losses (2602.23881)."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return -_alpha(log_q_CV, log_p_CV).clamp(min=1e-30).log()


class LambdaHybrid(Loss):
    """lambda KL(p || q) + (1 - lambda) TV, lambda = exp(-eta alpha) (LK losses, 2602.23881).

    alpha is averaged over the predictions of a sequence at one draft position, and detached: of
    the paper's "batch or sequence" the one that does not depend on the micro-batch. Draft position
    n weighs decay^n.
    """

    def __init__(self, *, eta: float = 3.0, decay: float = 0.8) -> None:
        if eta < 0 or not 0 < decay <= 1:
            raise ValueError(
                f"objective has eta {eta} and decay {decay}; eta must be >= 0, decay in (0, 1]"
            )
        self.eta, self.decay = eta, decay

    def prepare(self, prediction, target):
        padded, real_N = _pad(prediction)
        mix_N = torch.exp(-self.eta * _mean_alpha(padded, real_N, target))
        weight = self.decay**prediction.position

        def per_token(log_q_CV: Tensor, log_p_CV: Any, labels_C: Tensor, at: slice) -> Tensor:
            mix_C, tv_C = mix_N[at], 1 - _alpha(log_q_CV, log_p_CV)
            return weight * (mix_C * _kl(log_p_CV, log_q_CV) + (1 - mix_C) * tv_C)

        return per_token

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        raise AssertionError("lambda is known only for a whole sequence: prepare() gives the loss")


def chunked(
    hidden_ND: Tensor, weight_VD: Tensor, judge: Callable[[Tensor, slice], tuple[Tensor, Sums]]
) -> tuple[Tensor, Sums]:
    """Sums judge(hidden @ weight.T, slice) over chunks of tokens.

    Each chunk's logits are made, judged, differentiated and dropped in the forward pass, so that
    peak memory holds one chunk; backward only scales the gradients that were kept.
    """
    sums: Sums = {}
    loss = _Chunked.apply(hidden_ND, weight_VD, judge, sums)
    return loss, sums


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, judge: Judge, sums: Sums) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        need = ctx.needs_input_grad[0]
        grad_hidden = torch.zeros_like(hidden_ND if need else total)
        grad_weight = torch.zeros_like(weight_VD if need else total, dtype=torch.float32)
        for at in _slices(hidden_ND.shape[0], weight_VD.shape[0]):
            with torch.set_grad_enabled(need):
                h = hidden_ND[at].detach().requires_grad_(need)
                logits_CV = h.detach() @ weight_VD.detach().T
                logits_CV.requires_grad_(need)
                loss, measured = judge(logits_CV, at)
            total += loss.detach()
            for key, value in measured.items():
                sums[key] = sums.get(key, 0) + value
            if need:
                (grad_CV,) = torch.autograd.grad(loss, logits_CV)
                grad_hidden[at] = grad_CV @ weight_VD
                grad_weight += grad_CV.T @ hidden_ND[at]
        if need:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_out, grad_weight * grad_out, None, None


def _pad(prediction: Prediction) -> tuple[Prediction, Tensor]:
    """Rounds N up to a multiple of PAD, and 1 for what is real, [N].

    The number of supervised tokens differs from batch to batch, and buffers of ever new sizes
    leave the C library's heap full of holes: resident memory grew by 30 MB a step.
    """
    n, device = len(prediction.labels_N), prediction.labels_N.device
    more = -n % PAD or (0 if n else PAD)
    real_N = (torch.arange(n + more, device=device) < n).float()
    states = prediction.target_ND
    padded = Prediction(
        hidden_ND=F.pad(prediction.hidden_ND, (0, 0, 0, more)),
        weight_VD=prediction.weight_VD,
        labels_N=F.pad(prediction.labels_N, (0, more)),
        row_N=F.pad(prediction.row_N, (0, more)),
        target_ND=None if states is None else F.pad(states, (0, 0, 0, more)),
        position=prediction.position,
    )
    return padded, real_N


def _slices(tokens: int, vocabulary: int) -> list[slice]:
    step = max(16, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


def _target_law(prediction: Prediction, target: Target | None, at: slice) -> Tensor | None:
    if prediction.target_ND is None or target is None:
        return None
    with torch.no_grad():
        return target.logits(prediction.target_ND[at]).float().log_softmax(-1)


@torch.no_grad()
def _mean_alpha(prediction: Prediction, real_N: Tensor, target: Target | None) -> Tensor:
    """alpha of each prediction's sequence, [N]."""
    alphas = []
    for at in _slices(len(prediction.labels_N), prediction.weight_VD.shape[0]):
        log_q = (prediction.hidden_ND[at] @ prediction.weight_VD.T).float().log_softmax(-1)
        log_p = _target_law(prediction, target, at)
        assert log_p is not None, "the hybrid loss needs a target"
        alphas.append(_alpha(log_q, log_p))
    alpha_N, row_N = torch.cat(alphas) * real_N, prediction.row_N
    rows = int(row_N.max()) + 1
    total_B = alpha_N.new_zeros(rows).index_add(0, row_N, alpha_N)
    count_B = alpha_N.new_zeros(rows).index_add(0, row_N, real_N)
    return (total_B / count_B.clamp(min=1))[row_N]


@torch.no_grad()
def _measure(log_q_CV: Tensor, log_p_CV: Tensor | None, labels_C: Tensor, real_C: Tensor) -> Sums:
    """Sums over the chunk: tokens, ce, top-1 hits; with a target also alpha and agreement."""
    guess_C = log_q_CV.argmax(-1)
    sums = {
        "tokens": real_C.sum(),
        "ce": (F.nll_loss(log_q_CV, labels_C, reduction="none") * real_C).sum(),
        "top1": ((guess_C == labels_C) * real_C).sum(),
    }
    if log_p_CV is not None:
        sums["alpha"] = (_alpha(log_q_CV, log_p_CV) * real_C).sum()
        sums["agree"] = ((guess_C == log_p_CV.argmax(-1)) * real_C).sum()
    return sums


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _alpha(log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.minimum(log_q, log_p).exp().sum(-1)
