"""The losses against closed forms, finite differences and a computation over the whole vocabulary.

Shapes: N tokens, D width, V vocabulary.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.target import Shape, Target
from drafters.base import Batch, Prediction
from drafters.lm import LM
from train import chunks, objectives
from train.chunks import chunked
from train.objectives import (
    CE,
    JSD,
    TV,
    ForwardKL,
    LambdaHybrid,
    Loss,
    NegLogAcceptance,
    ReverseKL,
)

DISTILLING = (ForwardKL, ReverseKL, JSD, TV, NegLogAcceptance, LambdaHybrid)


class Head(nn.Module):
    """A target that is nothing but a head: its states are given."""

    def __init__(self, weight_VD: Tensor) -> None:
        super().__init__()
        self.weight = weight_VD
        self.shape = Shape(*weight_VD.shape, 1, 1, 1, 1, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T


def laws(seed: int, n: int = 1, v: int = 7) -> tuple[Tensor, Tensor]:
    """Draft logits z and a target law, [n, v], fp64."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, v, generator=generator, dtype=torch.float64) * 1.5
    p = (torch.randn(n, v, generator=generator, dtype=torch.float64) * 1.5).softmax(-1)
    return z, p


def gradient(loss: Loss, z: Tensor, p: Tensor) -> Tensor:
    """d loss / d z by autograd, in fp64."""
    z = z.clone().requires_grad_()
    labels = torch.zeros(len(z), dtype=torch.long)
    per_token = loss.per_token if not isinstance(loss, LambdaHybrid) else None
    assert per_token is not None
    per_token(z.log_softmax(-1), p.clamp(min=1e-300).log(), labels).sum().backward()
    assert z.grad is not None
    return z.grad


def closed(loss: Loss, z: Tensor, p: Tensor) -> Tensor:
    """The same by hand; section (i) of the spec sheets."""
    q = z.softmax(-1)
    alpha = torch.minimum(p, q).sum(-1, keepdim=True)
    s = (q - p).sign()
    tv = 0.5 * q * (s - (q * s).sum(-1, keepdim=True))
    ratio = q.log() - p.log()
    if isinstance(loss, ForwardKL):
        return q - p
    if isinstance(loss, ReverseKL):
        return q * (ratio - (q * ratio).sum(-1, keepdim=True))
    if isinstance(loss, TV):
        return tv
    if isinstance(loss, NegLogAcceptance):
        return tv / alpha
    assert isinstance(loss, JSD)
    to_mix = q.log() - (loss.beta * p + (1 - loss.beta) * q).log()
    return (1 - loss.beta) * q * (to_mix - (q * to_mix).sum(-1, keepdim=True))


def make(hidden: Tensor, weight: Tensor, target_states: Tensor | None, position: int = 0):
    labels = torch.arange(len(hidden)) % len(weight)
    rows = torch.zeros(len(labels), dtype=torch.long)
    return Prediction(hidden, weight, labels, rows, target_states, position)


def judged(loss: Loss, prediction: Prediction, target: Head | None) -> tuple[Tensor, dict]:
    """Of one draft position."""
    total, (sums,) = loss([prediction], target)  # type: ignore[arg-type]
    return total, sums


def problem(n: int = 11, v: int = 13, d: int = 6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    return draw(n, d), draw(v, d), draw(n, d), Head(draw(v, d))


def value_of(loss: Loss, z: Tensor, p: Tensor) -> float:
    """Loss of laws given outright: identity heads make states of logits."""
    v = z.shape[1]
    target = Head(torch.eye(v))
    got, _ = judged(loss, make(z.float(), torch.eye(v), p.log().clamp(min=-1e4).float()), target)
    return float(got)


@pytest.mark.parametrize(
    "loss",
    [ForwardKL(), ReverseKL(), TV(), NegLogAcceptance(), JSD(), JSD(beta=0.9)],
    ids=lambda loss: type(loss).__name__,
)
def test_gradient_is_the_closed_form_and_the_finite_difference(loss: Loss):
    z, p = laws(1, n=4)
    found = gradient(loss, z, p)
    torch.testing.assert_close(found, closed(loss, z, p), rtol=1e-9, atol=1e-12)

    eps, labels = 1e-6, torch.zeros(4, dtype=torch.long)
    for v in range(z.shape[1]):
        up, down = z.clone(), z.clone()
        up[:, v] += eps
        down[:, v] -= eps
        a, b = (loss.per_token(x.log_softmax(-1), p.log(), labels) for x in (up, down))
        torch.testing.assert_close(found[:, v], (a - b) / (2 * eps), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cls", DISTILLING)
def test_equal_laws_give_the_minimum_and_no_gradient(cls: type[Loss]):
    _, p = laws(2, n=3)
    z = p.log().float().requires_grad_()
    target = Head(torch.eye(7))
    at_p, _ = judged(cls(), make(z, torch.eye(7), p.log().float()), target)
    at_p.backward()
    assert z.grad is not None
    assert abs(float(at_p.detach())) < 1e-6
    assert float(z.grad.abs().max()) < 1e-6
    for seed in range(3, 8):
        elsewhere, _ = laws(seed, n=3)
        assert value_of(cls(), elsewhere, p) > 0.01


def test_a_point_mass_makes_the_acceptance_loss_cross_entropy():
    z, _ = laws(3, n=7)
    p = torch.eye(7, dtype=torch.float64)
    labels = torch.arange(7)
    loss = NegLogAcceptance().per_token(z.log_softmax(-1), p.log(), labels)
    expected = CE().per_token(z.log_softmax(-1), None, labels)
    torch.testing.assert_close(loss, expected)
    dz = gradient(NegLogAcceptance(), z, p)
    torch.testing.assert_close(dz, z.softmax(-1) - p)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_total_variation_lies_between_0_and_1_and_is_half_the_absolute_difference(scale: float):
    z, p = laws(4, n=50)
    q = (z * scale).softmax(-1)
    tv = TV().per_token(q.log(), p.log(), torch.zeros(50, dtype=torch.long))
    torch.testing.assert_close(tv, 0.5 * (p - q).abs().sum(-1))
    assert 0 <= float(tv.min()) <= float(tv.max()) <= 1


def test_cold_start_has_no_total_variation_gradient_where_the_others_have_one():
    """Target on 5 tokens, uniform drafter, V = 32k: |grad TV| = 7e-5, |grad KL| = .447, -log alpha
    .41 (spec sheets (i))."""
    v = 32_000
    z = torch.zeros(1, v, dtype=torch.float64)
    p = torch.zeros(1, v, dtype=torch.float64)
    p[0, :5] = 0.2
    size = {cls: float(gradient(cls(), z, p).norm()) for cls in (TV, ForwardKL, NegLogAcceptance)}
    assert size[TV] == pytest.approx(7e-5, rel=0.05)
    assert size[ForwardKL] == pytest.approx(0.447, abs=0.001)
    assert size[NegLogAcceptance] == pytest.approx(0.447, abs=0.05)


def test_the_hybrid_mixes_by_the_mean_acceptance_of_the_group():
    hidden, weight, states, target = problem()
    p, q = target.logits(states).softmax(-1), (hidden @ weight.T).softmax(-1)
    alpha = torch.minimum(p, q).sum(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    for position in (0, 1, 3):
        mix = math.exp(-2.0 * float(alpha.mean()))
        expected = (mix * kl + (1 - mix) * (1 - alpha)).sum()
        got, _ = judged(LambdaHybrid(eta=2.0), make(hidden, weight, states, position), target)
        torch.testing.assert_close(got, expected)


def test_the_hybrid_averages_acceptance_over_each_sequence():
    """Else the loss would depend on which sequences share a micro-batch."""
    hidden, weight, states, target = problem()
    whole = make(hidden, weight, states)
    whole.row_N = (torch.arange(11) >= 4).long()
    together, _ = judged(LambdaHybrid(), whole, target)
    parts = [make(hidden[:4], weight, states[:4]), make(hidden[4:], weight, states[4:])]
    apart = [judged(LambdaHybrid(), part, target)[0] for part in parts]
    torch.testing.assert_close(together, apart[0] + apart[1])
    mixed, _ = judged(LambdaHybrid(), make(hidden, weight, states), target)
    assert not torch.allclose(together, mixed, rtol=1e-4)


def test_the_hybrid_does_not_differentiate_its_mixture():
    """The gradient is that of a loss in which lambda is a number."""
    hidden, weight, states, target = problem()
    hidden.requires_grad_()
    got, _ = judged(LambdaHybrid(), make(hidden, weight, states), target)
    (found,) = torch.autograd.grad(got, hidden)

    p, q = target.logits(states).softmax(-1), (hidden @ weight.T).softmax(-1)
    alpha, kl = torch.minimum(p, q).sum(-1), (p * (p.log() - q.log())).sum(-1)
    mix = torch.exp(-3.0 * alpha.mean())
    (detached,) = torch.autograd.grad(
        (mix.detach() * kl + (1 - mix.detach()) * (1 - alpha)).sum(), hidden, retain_graph=True
    )
    (attached,) = torch.autograd.grad((mix * kl + (1 - mix) * (1 - alpha)).sum(), hidden)
    torch.testing.assert_close(found, detached, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, attached, rtol=1e-2)


def naive(loss: Loss, prediction: Prediction, target: Head) -> Tensor:
    """All N x V at once, by autograd."""
    z = prediction.hidden_ND @ prediction.weight_VD.T
    log_p = target.logits(prediction.target_ND).log_softmax(-1)
    real_N = prediction.real_N = torch.ones(len(z))
    per_token = loss.prepare([prediction], target)  # type: ignore[arg-type]
    truth = objectives._Truth(log_p, prediction.labels_N, real_N, real_N)
    return per_token(0, z.log_softmax(-1), truth, slice(0, len(z))).sum()


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("cls", [CE, *DISTILLING])
def test_chunks_give_the_loss_and_gradients_of_the_whole(cls, tokens: int, monkeypatch):
    """Chunks of 16 tokens, also where 16 does not divide N."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    hidden, weight, states, target = problem(n=tokens)
    found = {}
    for name, compute in {"chunked": lambda p: judged(cls(), p, target)[0], "naive": None}.items():
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        prediction = make(h, w, states)
        loss = compute(prediction) if compute else naive(cls(), prediction, target)
        found[name] = (loss, *torch.autograd.grad(3 * loss, (h, w)))
    for a, b in zip(found["chunked"], found["naive"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def test_gradients_of_rounded_weights_add_up_over_chunks(monkeypatch):
    """In bf16, to its rounding; made for 5 of the 13 rows at a time."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunks, "BLOCK", 5)
    hidden, weight, *_ = problem(n=100)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        h, w = (x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (hidden, weight))
        found.append(torch.autograd.grad(judged(CE(), make(h, w, None), None)[0], (h, w)))
    for rounded, exact in zip(*found, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_a_tied_head_gets_both_gradients(monkeypatch):
    """The head is the embedding: what it gets as one and as the other adds up."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    _, weight, states, target = problem(n=40)
    ids = torch.arange(40) % len(weight)
    grads = []
    for in_chunks in (True, False):
        w = weight.clone().requires_grad_()
        prediction = make(w[ids].tanh(), w, states)
        loss = (
            judged(ForwardKL(), prediction, target)[0]
            if in_chunks
            else naive(ForwardKL(), prediction, target)
        )
        grads.append(torch.autograd.grad(loss, w)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [CE, ForwardKL, LambdaHybrid])
def test_no_chunk_is_larger_than_asked_and_none_is_missed(cls, monkeypatch):
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 13 * 5)
    seen: list[tuple[int, ...]] = []
    softmax = Tensor.log_softmax

    def watch(self: Tensor, dim: int) -> Tensor:
        seen.append(tuple(self.shape))
        return softmax(self, dim)

    monkeypatch.setattr(Tensor, "log_softmax", watch)
    hidden, weight, states, target = problem(n=50)
    sizes: list[int] = []
    real = target.logits
    target.logits = lambda h: sizes.append(len(h)) or real(h)  # type: ignore[method-assign]
    loss, sums = judged(cls(), make(hidden.requires_grad_(), weight, states), target)
    loss.backward()
    assert max(n for n, _ in seen) == 20
    assert set(sizes) == {20, 4}  # 50 tokens are padded to 64
    assert float(sums["tokens"]) == 50


def test_the_graph_keeps_nothing_of_the_size_of_the_logits(monkeypatch):
    """Between forward and backward only gradients of states and head are held."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    hidden, weight, states, target = problem(n=100, v=500, d=4)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        loss, _ = judged(ForwardKL(), make(*inputs, states), target)
    assert max(kept) <= 16 * 500
    loss.backward()


def test_sums_are_counts_and_losses_over_tokens():
    hidden, weight, states, target = problem(n=30)
    prediction = make(hidden, weight, states)
    _, sums = judged(CE(), prediction, target)
    q, p = (hidden @ weight.T).softmax(-1), target.logits(states).softmax(-1)
    labels = prediction.labels_N
    torch.testing.assert_close(sums["ce"], -q[torch.arange(30), labels].log().sum())
    torch.testing.assert_close(sums["alpha"], torch.minimum(p, q).sum())
    assert float(sums["top1"]) == float((q.argmax(-1) == labels).sum())
    assert float(sums["agree"]) == float((q.argmax(-1) == p.argmax(-1)).sum())
    assert not any(value.requires_grad for value in sums.values())


def test_without_tokens_the_loss_is_zero_and_has_the_same_sums():
    """A rank whose share of a step has nothing supervised must still bring the same keys."""
    hidden, weight, states, target = problem(n=3)
    _, some = judged(ForwardKL(), make(hidden, weight, states), target)
    empty = make(hidden[:0].requires_grad_(), weight.requires_grad_(), states[:0])
    loss, none = judged(ForwardKL(), empty, target)
    loss.backward()
    assert float(loss.detach()) == 0
    assert set(none) == set(some)


def squares(at: slice):
    return lambda number, z: (z.square().sum(), {})


def test_backward_scales_with_what_comes_after():
    hidden, weight, _, _ = problem()
    grads = []
    for factor in (1.0, 2.5):
        h = hidden.clone().requires_grad_()
        prediction, parts = make(h, weight, None), [slice(0, 4), slice(4, 11)]
        loss, _ = chunked([prediction], None, squares, parts)
        (loss * factor).backward()
        grads.append(h.grad)
    torch.testing.assert_close(grads[0] * 2.5, grads[1])


def test_a_second_pass_over_one_graph_is_refused():
    """The first scaled the gradients in place."""
    hidden, weight, _, _ = problem()
    prediction = make(hidden.requires_grad_(), weight, None)
    loss, _ = chunked([prediction], None, squares, [slice(0, 11)])
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (2 * loss).backward()


@pytest.mark.parametrize(
    ("make_it", "said"),
    [
        (lambda: JSD(beta=0.0), "beta is 0.0; it must lie between 0 and 1"),
        (lambda: JSD(beta=1.0), "beta is 1.0"),
        (lambda: LambdaHybrid(eta=-1.0), "eta is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(make_it, said: str):
    with pytest.raises(ValueError, match=said):
        make_it()


SMALL = Shape(
    vocab_size=40, hidden_size=64, layers=1, heads=1, kv_heads=1, intermediate_size=128,
    max_positions=64, tied=True,
)  # fmt: skip


def pair() -> tuple[LM, Target]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=64, eos_token_id=None,
    )  # fmt: skip
    return LM(SMALL, layers=1, width=64), Target(LlamaForCausalLM(config))


def batch(ids: Tensor, mask: Tensor) -> Batch:
    return Batch(ids, mask, torch.zeros_like(ids))


@pytest.mark.parametrize("cls", [CE, *DISTILLING])
def test_unsupervised_tokens_behind_do_not_matter(cls):
    """Padding, and everything after the last supervised token, is read by no loss."""
    drafter, target = pair()
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 3:7] = True
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 11) % 40
    (a, m), (b, n) = (drafter(batch(x, mask), target, cls()) for x in (ids, changed))
    torch.testing.assert_close(a, b)
    assert float(m["tokens"]) == float(n["tokens"]) == 8
    earlier = ids.clone()
    earlier[:, 4] = (earlier[:, 4] + 11) % 40
    assert not torch.isclose(a, drafter(batch(earlier, mask), target, cls())[0])


def test_documents_of_a_sequence_do_not_see_each_other_in_either_model():
    """Two documents in one sequence give the loss of each alone."""
    drafter, target = pair()
    ids = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(2))
    doc = torch.tensor([[0] * 5 + [1] * 7])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, [0, 5]] = False
    together, _ = drafter(Batch(ids, mask, doc), target, ForwardKL())
    alone = sum(
        drafter(Batch(ids[:, at], mask[:, at], doc[:, at]), target, ForwardKL())[0]
        for at in (slice(0, 5), slice(5, 12))
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_labels_are_the_next_token_and_the_target_is_read_at_the_same_place():
    """By hand: state t predicts token t + 1 in both models."""
    drafter, target = pair()
    ids = torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids, dtype=torch.bool)
    q = drafter.model(ids).logits[0, :-1].log_softmax(-1)
    p = target.model(ids).logits[0, :-1].log_softmax(-1)
    ce, _ = drafter(batch(ids, mask), None, CE())
    torch.testing.assert_close(ce, -q[torch.arange(8), ids[0, 1:]].sum(), rtol=1e-5, atol=1e-5)
    kl, _ = drafter(batch(ids, mask), target, ForwardKL())
    torch.testing.assert_close(kl, (p.exp() * (p - q)).sum(), rtol=1e-5, atol=1e-5)
    assert all(x.grad is None and not x.requires_grad for x in target.parameters())


# --- several draft positions ---------------------------------------------------------------------


def positions(generator: torch.Generator, states: Tensor, heads: list[Tensor]) -> list[Prediction]:
    """One prediction a head, of the same tokens, of which each guesses others."""
    found = []
    for k, head in enumerate(heads):
        made = make(
            torch.randn(states.shape, generator=generator).requires_grad_(), head, states, k
        )
        made.row_N = (torch.arange(len(states)) % 3).long()
        made.real_N = torch.rand(len(states), generator=generator) < 0.7
        made.share = 0.5**k
        found.append(made)
    return found


@pytest.mark.parametrize("vocabulary", ["whole", "cut"])
@pytest.mark.parametrize("shared", [True, False], ids=["one head", "a head each"])
@pytest.mark.parametrize("cls", [CE, *DISTILLING])
def test_positions_judged_together_are_what_each_is_alone(cls, shared, vocabulary, monkeypatch):
    """Losses by share, metrics, gradients of the states and, added up, of the heads."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    _, weight, states, target = problem(n=50)
    ids_V = CUT if vocabulary == "cut" else torch.arange(len(weight))
    heads = [weight[ids_V] * (1 if shared else k) for k in (1, 2, 3)]
    heads = [heads[0]] * 3 if shared else heads
    distinct = [head.requires_grad_() for head in heads[: 1 if shared else 3]]
    given = positions(torch.Generator().manual_seed(1), states, heads)
    for prediction in given:
        prediction.vocabulary_V = CUT if vocabulary == "cut" else None
    inputs = [*(p.hidden_ND for p in given), *distinct]

    total, sums = cls()(given, target)
    found = torch.autograd.grad(3 * total, inputs)
    alone = [judged(cls(), replace(p.guessed(), share=1.0), target) for p in given]
    due = sum(p.share * loss for p, (loss, _) in zip(given, alone, strict=True))
    torch.testing.assert_close(total, due, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, torch.autograd.grad(3 * due, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for mine, (_, other) in zip(sums, alone, strict=True):
        assert set(mine) == set(other)
        for key, value in mine.items():
            torch.testing.assert_close(value, other[key], check_dtype=False)


def test_a_head_that_positions_share_has_one_gradient_in_the_graph():
    """Not one for each: of seven steps at a vocabulary of 32,000 that would be gigabytes."""
    _, weight, states, target = problem(n=20, v=500)
    given = positions(torch.Generator().manual_seed(1), states, [weight.requires_grad_()] * 5)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        ForwardKL()(given, target)
    assert kept.count(weight.numel()) == 1


# --- a smaller vocabulary of the drafter's -------------------------------------------------------

CUT = torch.tensor([1, 4, 5, 9])


def cut(n: int = 40) -> tuple[Prediction, Head, dict[str, Tensor]]:
    """Predictions over four of thirteen tokens; by hand: p as it is and renormalised, q, alpha, and
    where the target's likeliest token can be drafted."""
    hidden, weight, states, target = problem(n=n)
    prediction = make(hidden, weight[CUT], states)
    prediction.vocabulary_V = CUT
    whole = target.logits(states).softmax(-1)
    p, q = whole[:, CUT], (hidden @ weight[CUT].T).softmax(-1)
    inside = torch.isin(whole.argmax(-1), CUT)
    assert 3 < int(inside.sum()) < n - 3
    hand = {"p": p / p.sum(-1, keepdim=True), "q": q, "inside": inside}
    return prediction, target, hand | {"alpha": torch.minimum(p, q).sum(-1)}


def test_losses_on_alpha_are_those_of_the_acceptance_that_is_measured():
    """A token that cannot be drafted is neither renormalised away nor left out."""
    prediction, target, hand = cut()
    tv, sums = judged(TV(), prediction, target)
    torch.testing.assert_close(tv, (1 - hand["alpha"]).sum())
    torch.testing.assert_close(tv, sums["tokens"] - sums["alpha"])
    for loss in (TV(), NegLogAcceptance()):
        for at in torch.arange(40).split(1):
            single = make(prediction.hidden_ND[at], prediction.weight_VD, prediction.target_ND[at])
            single.vocabulary_V = CUT
            got, measured = judged(loss, single, target)
            alpha = measured["alpha"]
            torch.testing.assert_close(got, 1 - alpha if isinstance(loss, TV) else -alpha.log())


def test_the_hybrid_renormalises_for_kl_alone():
    prediction, target, hand = cut()
    p, q, alpha, inside = (hand[name] for name in ("p", "q", "alpha", "inside"))
    kl = (p * (p.log() - q.log())).sum(-1) * inside
    mix = math.exp(-2.0 * float(alpha.mean()))
    got, _ = judged(LambdaHybrid(eta=2.0), prediction, target)
    torch.testing.assert_close(got, (mix * kl + (1 - mix) * (1 - alpha)).sum())


def test_what_teaches_the_data_is_cross_entropy():
    assert all(isinstance(cls().hard, CE) for cls in (CE, *DISTILLING))
