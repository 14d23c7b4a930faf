"""What draft heads share: what they read, how their losses add up, what the graph keeps.

Shapes: B batch, T tokens, N predictions, D width, V vocabulary.
"""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from contract import assert_drafted_as_trained, build, packed
from probes import Counting, cached, reach, scatter
from torch import Tensor
from toys import tiny_target

from drafters.base import Prediction
from drafters.heads import Heads, ahead
from train import objectives
from train.loop import _means
from train.objectives import CE, ForwardKL, LambdaHybrid

HEADS = ["medusa", "hydra_heads", "clover", "clover2", "eagle", "eagle3"]
OFF = {"attention": False, "regressive": False, "augmenting": False}  # clover's three parts


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("medusa", {"head": "shared", "layers": 2}),
        ("hydra_heads", {"prefix": True, "layers": 3}),
        ("clover", {"attention": False}),
        ("clover", {"augmenting": False}),
        ("clover2", {"layers": 1}),
        ("eagle", {"steps": 3}),
        ("eagle3", {"vocabulary": 12, "taps": [1]}),
    ],
    ids=str,
)
def test_variants_draft_as_they_were_trained(family, changes):
    """U6 for settings that the shipped configurations do not have."""
    assert_drafted_as_trained(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "table", "first_token", "first_state"),
    [
        ("medusa", {}, None, 0, 5),
        ("hydra_heads", {}, "embed", 6, 5),
        ("hydra_heads", {"prefix": True}, "embed", 6, 0),
        ("clover", {}, "head_rows", 6, 0),  # the token comes in behind the augmenting layer,
        ("clover2", {}, "head_rows", 1, 0),  # here before it, so that keys hold earlier tokens
        ("clover", {"augmenting": False}, "head_rows", 6, 5),
        ("clover", {"attention": False, "augmenting": False}, "head_rows", 6, 5),
        ("clover", OFF, None, 0, 5),
        ("eagle", {}, "embed", 1, 0),
        ("eagle3", {}, "embed", 1, 0),
    ],
    ids=str,
)
def test_a_head_reads_the_tokens_up_to_its_guess(
    monkeypatch, family, changes, table, first_token, first_state
):
    """By gradient: head k at pair t reads all of x_{t+1} to x_{t+k} or none, from the matrix that
    its paper names, and of the states those that its attention reaches, none after h_t."""
    target, t = tiny_target(vocab=40, tied=False), 5
    drafter = scatter(build(family, target.shape, **changes))
    for k in (1, 2, 3):
        tokens, seen = reach(drafter, target, k, t, monkeypatch)
        due = {"embed": set(), "head_rows": set()}
        due |= {table: set(range(first_token, t + k + 1))} if table else {}
        assert tokens == due
        assert seen == set(range(first_state, t + 1))


# --- the loss of all positions -------------------------------------------------------------------


@pytest.mark.parametrize("family", HEADS)
def test_position_n_weighs_decay_to_the_n_and_is_measured_by_itself(target, family):
    drafter = build(family, target.shape, decay=0.5, regression=0.0, heads=4)
    assert isinstance(drafter, Heads)
    batch = packed(40)
    loss, sums = drafter.double()(batch, target, Counting())
    tokens = [int(ahead(batch, k).sum()) for k in range(1, 5)]
    assert len(set(tokens)) == 4
    weighed = sum(0.5**n * count for n, count in enumerate(tokens))
    assert loss.item() == pytest.approx(drafter.objective_weight * weighed)
    names = [f"{name}{at}" for at in ("", "@2", "@3", "@4") for name in ("tokens", "top1")]
    assert list(sums) == names
    assert [int(sums[name]) for name in names[::2]] == tokens
    found = _means({name: float(sums[name]) for name in names})
    assert found == pytest.approx({"top1": 1, "top1@2": 1 / 2, "top1@3": 1 / 3, "top1@4": 1 / 4})


@pytest.mark.parametrize("family", ["clover2", "eagle"])
def test_features_are_taught_the_states_that_predict_their_tokens(target, family):
    """Head k at pair t guesses x_{t+1+k}, which h_{t+k} predicts."""
    drafter = scatter(build(family, target.shape, regression=3.0, decay=0.5))
    batch = cached(packed(40), target)
    due = 0.0
    for k, (feature_BTD, extra_BT) in enumerate(drafter.unroll(batch, target), start=1):
        truth_BTD = batch.cached.hidden_BTD[:, k:]
        gap_BT = F.smooth_l1_loss(feature_BTD, truth_BTD, reduction="none").mean(-1)
        torch.testing.assert_close(extra_BT, 3 * gap_BT, check_dtype=False)
        valid = ahead(batch, k)
        due += 0.5 ** (k - 1) * 3 * gap_BT[:, : valid.shape[1]][valid].sum().item()
    loss, _ = drafter(batch, target, Counting(0.0))
    assert loss.item() == pytest.approx(due, rel=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "loss", [CE(), ForwardKL(), LambdaHybrid()], ids=lambda x: type(x).__name__
)
def test_a_borrowed_head_teaches_what_an_explicit_one_does(target, monkeypatch, loss, softcap):
    """Loss and gradient of the states are those of the head's matrix; with a softcap, which no
    matrix has, those of autograd over the target's logits."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(target, "softcap", softcap)
    generator, D = torch.Generator().manual_seed(0), target.shape.hidden_size
    hidden_ND, truth_ND = (torch.randn(50, D, generator=generator).double() for _ in range(2))
    labels_N, weight_VD = torch.arange(50) % 40, target.model.get_output_embeddings().weight
    found = []
    for weight in (None, weight_VD):
        leaf = hidden_ND.clone().requires_grad_()
        given = Prediction(leaf, weight, labels_N, torch.zeros(50).long(), truth_ND)
        if softcap and weight is not None:  # by hand
            log_p, log_q = (target.logits(x).log_softmax(-1) for x in (truth_ND, leaf))
            given.weight_VD = None  # the hybrid asks it for its acceptance
            given.real_N = torch.ones(50)
            judge = loss.prepare([given], target)
            truth = objectives._Truth(log_p, labels_N, torch.ones(50), torch.ones(50))
            total = judge(0, log_q, truth, slice(0, 50)).sum()
        else:
            total, _ = loss([given], target)
        found.append((total.double(), torch.autograd.grad(3 * total, leaf)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert weight_VD.grad is None


class Kept:
    """Something that autograd keeps for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_logits(drafter: Heads, target, objective, monkeypatch) -> tuple[int, int]:
    """Of rows as long as the vocabulary: the most that one tensor of the graph held while the loss
    was computed, and all that the graph holds after it."""
    monkeypatch.setattr(objectives, "CHUNK_ELEMENTS", 1)
    refs, most, V = [], 0, target.shape.vocab_size

    def pack(tensor: Tensor) -> Kept:
        nonlocal most
        box = Kept(tensor)
        if tensor.ndim and tensor.shape[-1] == V and tensor.is_contiguous():  # no head transposed
            most = max(most, tensor.numel() // V)
            refs.append(weakref.ref(box))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss, _ = drafter.train()(packed(V, T=40), target, objective)
    gc.collect()
    alive = [box.tensor.numel() // V for box in (ref() for ref in refs) if box is not None]
    loss.backward()
    return most, sum(alive)


class Whole:
    """Cross-entropy of all logits at once: what no objective may do."""

    needs_target = False

    def __call__(self, predictions, target):
        logits = [p.logits(p.hidden_ND, target) for p in predictions]
        labels_N = predictions[0].labels_N
        loss = sum(F.cross_entropy(each_NV, labels_N, reduction="sum") for each_NV in logits)
        return loss, [{"tokens": torch.tensor(1.0)} for _ in predictions]


@pytest.mark.parametrize(("family", "head"), [(f, "own") for f in HEADS] + [("medusa", "shared")])
def test_no_head_keeps_its_logits(monkeypatch, family, head):
    """Neither heads x tokens x vocabulary nor tokens x vocabulary; a chunk has 16 tokens here."""
    target = tiny_target(vocab=203, tied=False)
    drafter = build(family, target.shape, head=head).double()
    assert isinstance(drafter, Heads)
    most, after = kept_logits(drafter, target, ForwardKL(), monkeypatch)
    assert 0 < most <= 16
    assert after == 0
    assert kept_logits(drafter, target, Whole(), monkeypatch)[1] > 4 * 20
