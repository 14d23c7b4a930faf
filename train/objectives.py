"""What a drafter is trained to do: the losses, chunked over tokens so that N x V never exists.

Shapes: K draft positions, N supervised tokens, C of a chunk, D width, V vocabulary. p is the
target's law, q the drafter's.
Per-token values and gradients: reference (i) of the spec sheets; identities tested by finite
differences.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.target import Target
from drafters.base import Metrics, Prediction
from train.chunks import Judge, Sums, chunked

PAD = 64  # tokens that N is rounded up to a multiple of
CHUNK_ELEMENTS = 2**21  # logits of one chunk: 8 MiB in fp32, which the allocator reuses
GPU_CHUNKS = 32  # times as many on a GPU, where a matrix product pays from hundreds of tokens on

PerToken = Callable[[int, Tensor, "_Truth", slice], Tensor]


class Loss(ABC):
    """Loss and metrics of one group of predictions.

    Where the drafter's vocabulary is smaller than the target's, p is renormalised over it, and
    predictions whose likeliest token (whose label, without a target) lies outside do not count
    (EAGLE-3).
    """

    needs_target = True

    @property
    def hard(self) -> "Loss":
        """What teaches the tokens in the data in this loss's place."""
        return CE()

    def __call__(
        self, predictions: list[Prediction], target: Target | None
    ) -> tuple[Tensor, list[Metrics]]:
        padded = _padded(predictions)
        per_token = self.prepare(padded, target)

        def open_chunk(at: slice) -> Judge:
            law = _law(padded[0], target, at)

            def judge(number: int, q_CV: Tensor) -> tuple[Tensor, Sums]:
                log_q_CV = q_CV.float().log_softmax(-1)
                truth = law.of(padded[number], at)
                measured = _measure(log_q_CV.detach(), truth)  # before the loss holds as much again
                return per_token(number, log_q_CV, truth, at).sum(), measured

            return judge

        return chunked(padded, target, open_chunk, _slices(padded, target))

    def prepare(self, predictions: list[Prediction], target: Target | None) -> PerToken:
        """What turns a prediction's number, its log q, the truth of a chunk and which chunk it is
        into a loss per token, 0 for one that does not count."""
        return lambda number, log_q_CV, truth, at: self.counted(log_q_CV, truth)

    def counted(self, log_q_CV: Tensor, truth: "_Truth") -> Tensor:
        labels_C = truth.labels_C.clamp(min=0)
        return self.per_token(log_q_CV, truth.log_p_CV, labels_C) * truth.counts_C

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


class Acceptance(Loss):
    """A function of alpha = sum min(p, q), to which tokens outside the drafter's vocabulary add
    nothing: p is taken as it is there, and every prediction counts."""

    def counted(self, log_q_CV, truth):
        return self.per_token(log_q_CV, truth.whole_log_p_CV, truth.labels_C) * truth.real_C


class TV(Acceptance):
    """Total variation 1 - alpha. Its gradient vanishes for a drafter far from p: not for a start
    from scratch."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return 1 - _alpha(log_q_CV, log_p_CV)


class NegLogAcceptance(Acceptance):
    """-log alpha: the acceptance loss L_alpha of LK losses (2602.23881)."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return -_alpha(log_q_CV, log_p_CV).clamp(min=1e-30).log()


class LambdaHybrid(Loss):
    """lambda KL(p || q) + (1 - lambda) TV, lambda = exp(-eta alpha) (LK losses, 2602.23881).

    alpha is averaged over the predictions of a sequence at one draft position, and detached: of
    the paper's "batch or sequence" the one that does not depend on the micro-batch. The families
    weigh their draft positions themselves. Over a smaller vocabulary KL counts what `Loss` says,
    TV and alpha what `Acceptance` says.
    """

    def __init__(self, *, eta: float = 3.0) -> None:
        if eta < 0:
            raise ValueError(f"objective.eta is {eta}; it must be at least 0")
        self.eta = eta

    def prepare(self, predictions, target):
        mix_KN = torch.exp(-self.eta * _mean_alpha(predictions, target))

        def per_token(number: int, log_q_CV: Tensor, truth: _Truth, at: slice) -> Tensor:
            mix_C = mix_KN[number, at]
            kl_C, tv_C = (loss.counted(log_q_CV, truth) for loss in (ForwardKL(), TV()))
            return mix_C * kl_C + (1 - mix_C) * tv_C

        return per_token

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        raise AssertionError("lambda is known only for a whole sequence: prepare() gives the loss")


def _padded(predictions: list[Prediction]) -> list[Prediction]:
    """The same with N rounded up to a multiple of PAD, and what is real among it.

    The number of supervised tokens differs from batch to batch, and buffers of ever new sizes
    leave the C library's heap full of holes: resident memory grew by 30 MB a step.
    """
    first = predictions[0]
    n, device = len(first.labels_N), first.labels_N.device
    more = -n % PAD or (0 if n else PAD)
    states = first.target_ND
    same: dict[str, Any] = {
        "labels_N": F.pad(first.labels_N, (0, more)),
        "row_N": F.pad(first.row_N, (0, more)),
        "target_ND": None if states is None else F.pad(states, (0, 0, 0, more)),
    }
    whole_N = torch.ones(n, device=device)
    return [
        replace(
            p,
            hidden_ND=F.pad(p.hidden_ND, (0, 0, 0, more)),
            real_N=F.pad(whole_N if p.real_N is None else p.real_N.float(), (0, more)),
            **same,
        )
        for p in predictions
    ]


def _slices(predictions: list[Prediction], target: Target | None) -> list[slice]:
    """Chunks of tokens whose logits, the drafter's or the target's, have CHUNK_ELEMENTS; of a large
    vocabulary up to four times as many, since the head and its gradient are read anew for each:
    up to 32 MiB in fp32, above which the C library takes new memory each time (docs/scale.md)."""
    hidden_ND = predictions[0].hidden_ND
    rows = [len(p.weight_VD) for p in predictions if p.weight_VD is not None]
    rows += [target.shape.vocab_size] if target is not None else []
    room = CHUNK_ELEMENTS * (GPU_CHUNKS if hidden_ND.is_cuda else 1)
    step = max(16, room // max(rows), min(64, 4 * room // max(rows)))
    tokens = len(hidden_ND)
    return [slice(i, min(i + step, tokens)) for i in range(0, tokens, step)]


@dataclass
class _Truth:
    """What a chunk is judged by: log p (renormalised) and labels over the drafter's vocabulary,
    what is real (not padding), what counts, and log of the share of p inside that vocabulary."""

    log_p_CV: Tensor | None
    labels_C: Tensor
    real_C: Tensor
    counts_C: Tensor
    log_share_C1: Tensor | None = None  # all of it

    @property
    def whole_log_p_CV(self) -> Tensor:
        """log p as it is, without renormalising."""
        assert self.log_p_CV is not None, "this loss needs a target"
        return self.log_p_CV if self.log_share_C1 is None else self.log_p_CV + self.log_share_C1

    def of(self, prediction: Prediction, at: slice) -> "_Truth":
        """For one draft position, which does not guess every token."""
        assert prediction.real_N is not None
        real_C = prediction.real_N[at]
        return replace(self, real_C=real_C, counts_C=self.counts_C * real_C)


@torch.no_grad()
def _law(prediction: Prediction, target: Target | None, at: slice) -> _Truth:
    """What all draft positions have in common; see `Loss` for a smaller vocabulary."""
    labels_C = prediction.labels_N[at]
    all_C = torch.ones_like(labels_C, dtype=torch.float32)
    log_p_CV = None
    if prediction.target_ND is not None and target is not None:
        log_p_CV = target.logits(prediction.target_ND[at]).float().log_softmax(-1)
    ids_V = prediction.vocabulary_V
    if ids_V is None:
        return _Truth(log_p_CV, labels_C, all_C, all_C)
    decisive_C = labels_C if log_p_CV is None else log_p_CV.argmax(-1)
    counts_C = all_C * _within(decisive_C, ids_V)[1]
    place_C, inside_C = _within(labels_C, ids_V)
    labels_C = torch.where(inside_C, place_C, -1)
    if log_p_CV is None:
        return _Truth(None, labels_C, all_C, counts_C)
    kept_CV = log_p_CV[:, ids_V]
    log_share_C1 = kept_CV.logsumexp(-1, keepdim=True)
    return _Truth(kept_CV - log_share_C1, labels_C, all_C, counts_C, log_share_C1)


def _within(tokens_C: Tensor, ids_V: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the tokens among the sorted ids (0 for those that are not), and which are."""
    place_C = torch.searchsorted(ids_V, tokens_C).clamp(max=len(ids_V) - 1)
    inside_C = ids_V[place_C] == tokens_C
    return torch.where(inside_C, place_C, 0), inside_C


@torch.no_grad()
def _mean_alpha(predictions: list[Prediction], target: Target | None) -> Tensor:
    """alpha of each prediction's sequence, by draft position, [K, N]."""
    row_N = predictions[0].row_N
    rows, found = int(row_N.max()) + 1, []
    alphas: list[list[Tensor]] = [[] for _ in predictions]
    for at in _slices(predictions, target):
        law = _law(predictions[0], target, at)
        for mine, prediction in zip(alphas, predictions, strict=True):
            log_q = prediction.logits(prediction.hidden_ND[at], target).float().log_softmax(-1)
            truth = law.of(prediction, at)
            mine.append(_alpha(log_q, truth.whole_log_p_CV) * truth.real_C)
    for mine, prediction in zip(alphas, predictions, strict=True):
        alpha_N, real_N = torch.cat(mine), prediction.real_N
        assert real_N is not None
        total_B = alpha_N.new_zeros(rows).index_add(0, row_N, alpha_N)
        count_B = alpha_N.new_zeros(rows).index_add(0, row_N, real_N)
        found.append((total_B / count_B.clamp(min=1))[row_N])
    return torch.stack(found)


@torch.no_grad()
def _measure(log_q_CV: Tensor, truth: _Truth) -> Sums:
    """Sums over the chunk: tokens, ce, top-1 hits; with a target also alpha and agreement.

    A token outside the drafter's vocabulary is a miss, and what p gives it is no acceptance.
    """
    guess_C, labels_C, real_C = log_q_CV.argmax(-1), truth.labels_C, truth.real_C
    ce_C = F.nll_loss(log_q_CV, labels_C.clamp(min=0), reduction="none")
    sums = {
        "tokens": real_C.sum(),
        "ce": (ce_C * truth.counts_C).sum(),
        "top1": ((guess_C == labels_C) * real_C).sum(),
    }
    if truth.log_p_CV is not None:
        sums["alpha"] = (_alpha(log_q_CV, truth.whole_log_p_CV) * real_C).sum()
        sums["agree"] = ((guess_C == truth.log_p_CV.argmax(-1)) * truth.counts_C).sum()
    return sums


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _alpha(log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.minimum(log_q, log_p).exp().sum(-1)
