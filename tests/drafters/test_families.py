"""What makes each family of draft heads the one that it is named after (EAGLE's: test_eagle.py).

Shapes: B batch, T tokens, D width, V vocabulary.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from contract import judged, logits_of, packed
from probes import cached, drafts, scatter, states

from drafters.base import Batch
from drafters.clover import AttentionDecoder, Clover, rows
from drafters.clover2 import Clover2
from drafters.heads import ahead
from drafters.hydra_heads import HydraHeads
from drafters.medusa import Medusa
from train.objectives import CE

OFF = {"attention": False, "regressive": False, "augmenting": False}

# --- medusa --------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["own", "shared"])
def test_fresh_medusa_heads_say_exactly_what_the_target_does(target, head):
    """The authors' code leaves PyTorch's random biases in: then no head starts as the target's."""
    drafter = Medusa(target.shape, layers=2, head=head).double()
    drafter.initialise(target, lambda: torch.empty(0))
    assert not any(p.any() for name, p in drafter.named_parameters() if name.startswith("blocks"))
    batch = cached(packed(40), target)
    due = [target.logits(batch.cached.hidden_BTD[:, : -1 - k][ahead(batch, k)]) for k in (1, 2, 3)]
    for prediction, logits in zip(judged(drafter, batch, target), due, strict=False):
        assert torch.equal(logits_of(prediction, target), logits)
    torch.nn.init.uniform_(drafter.blocks[1].layers[0].bias)
    same = zip(judged(drafter, batch, target), due, strict=False)
    assert [torch.equal(logits_of(p, target), logits) for p, logits in same] == [True, False, True]


def test_medusa_heads_and_their_layers_share_nothing(target):
    """`[ResBlock(width)] * layers`, as the authors have it, is one module; the names are vLLM's."""
    drafter = Medusa(target.shape, heads=3, layers=2)
    named = dict(drafter.named_parameters(remove_duplicate=False))
    blocks = itertools.product(range(3), range(2), ("weight", "bias"))
    due = [f"blocks.{k}.layers.{n}.{kind}" for k, n, kind in blocks]
    assert sorted(named) == sorted(due + [f"lm_heads.{k}.weight" for k in range(3)])
    assert len({p.data_ptr() for p in named.values()}) == len(named)


def test_vllm_is_told_of_medusas_that_it_can_load(target):
    """`shared` heads would need the target's output matrix in the folder."""
    sizes = {"hidden_size": 32, "vocab_size": 40, "num_heads": 3, "num_hidden_layers": 2}
    assert Medusa(target.shape, heads=3, layers=2, head="shared").config() == sizes
    assert Medusa(target.shape, heads=3, layers=2).config() == sizes | {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "truncated_vocab_size": 40,
        "medusa_fc_bias": True,
        "original_lm_head": False,
    }


def test_swapping_trained_heads_hurts(target):
    """After training on a cycle, head k names the token 1 + k after x_t; its neighbour another."""
    drafter = Medusa(target.shape, heads=3).double()
    drafter.initialise(target, lambda: torch.empty(0))
    ids_BT = (torch.arange(8)[:, None] + torch.arange(16)) % 11
    batch = cached(Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT)), target)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        drafter(batch, target, CE())[0].backward()
        optimiser.step()

    def right() -> list[float]:
        said = [s @ drafter.head(k).T for k, s in enumerate(states(drafter, batch, target), 1)]
        due = [(ids_BT[:, :-1] + 1 + k) % 11 for k in (1, 2, 3)]
        return [float((a.argmax(-1) == b).double().mean()) for a, b in zip(said, due, strict=True)]

    assert min(right()) > 0.95
    for modules in (drafter.blocks, drafter.lm_heads):
        modules[0], modules[1] = modules[1], modules[0]
    one, two, three = right()
    assert max(one, two) < 0.1
    assert three > 0.95


# --- hydra ---------------------------------------------------------------------------------------


def test_hydra_without_its_embedding_columns_is_medusa(target):
    D = target.shape.hidden_size
    hydra = scatter(HydraHeads(target.shape, heads=3, layers=2, draft_length=3))
    medusa = scatter(Medusa(target.shape, heads=3, layers=2, draft_length=3))
    unlike = drafts(hydra, target)
    with torch.no_grad():
        for mixer, blocks in zip(hydra.mixers, medusa.blocks, strict=True):
            mixer.residual.weight.zero_()[:, :D] = torch.eye(D)
            mixer.linear.weight[:, D:] = 0
            blocks.layers[0].weight.copy_(mixer.linear.weight[:, :D])
            blocks.layers[0].bias.copy_(mixer.linear.bias)
            blocks.layers[1].load_state_dict(mixer.rest.layers[0].state_dict())
    medusa.lm_heads.load_state_dict(hydra.lm_heads.state_dict())
    batch = packed(40)
    for a, b in zip(judged(hydra, batch, target), judged(medusa, batch, target), strict=True):
        torch.testing.assert_close(logits_of(a, target), logits_of(b, target))
    assert drafts(hydra, target) == drafts(medusa, target) != unlike


@pytest.mark.parametrize("family", ["hydra_heads", "clover"])
def test_fresh_heads_with_a_layer_before_them_say_what_the_target_does(target, family):
    """Hydra++'s prefix layer starts as the identity; Clover without its augmenting layer has
    nothing in the way, as W_V starts at zero."""
    cls = {"hydra_heads": HydraHeads, "clover": Clover}[family]
    drafter = cls(
        target.shape, **({"prefix": True} if cls is HydraHeads else {"augmenting": False})
    )
    drafter.double().initialise(target, lambda: torch.empty(0))
    batch = cached(packed(40), target)
    for k, prediction in enumerate(judged(drafter, batch, target), start=1):
        due = target.logits(batch.cached.hidden_BTD[:, : -1 - k][ahead(batch, k)])
        torch.testing.assert_close(logits_of(prediction, target), due)


# --- clover --------------------------------------------------------------------------------------


def test_clover_without_its_three_parts_is_medusa_with_the_targets_head(target):
    medusa = scatter(Medusa(target.shape, layers=2, head="shared"))
    clover = Clover(target.shape, layers=2, **OFF).double().eval()
    clover.load_state_dict(medusa.state_dict())
    batch = packed(40)
    for a, b in zip(judged(clover, batch, target), judged(medusa, batch, target), strict=True):
        assert torch.equal(logits_of(a, target), logits_of(b, target))
    assert drafts(clover, target) == drafts(medusa, target)


@pytest.mark.parametrize("augmenting", [True, False])
def test_without_values_every_head_sees_the_first_state(target, augmenting):
    drafter = Clover(target.shape, augmenting=augmenting).double()
    drafter.initialise(target, lambda: torch.empty(0))
    batch = cached(packed(40), target)
    first, *later = states(drafter, batch, target)
    assert torch.equal(first, batch.cached.hidden_BTD[:, :-1]) != augmenting
    assert all(torch.equal(h_BTD, first[:, : h_BTD.shape[1]]) for h_BTD in later)
    torch.nn.init.normal_(drafter.decoder.v.weight)
    first, *later = states(drafter, batch, target)
    assert not any(torch.allclose(h_BTD, first[:, : h_BTD.shape[1]]) for h_BTD in later)


def reached_at(target) -> list[set[str]]:
    """Which matrices of Clover's attention decoder get a gradient at the first three steps."""
    drafter = Clover(target.shape).double()
    drafter.initialise(target, lambda: torch.empty(0))
    optimiser, found = torch.optim.AdamW(drafter.parameters(), lr=1e-3, weight_decay=0), []
    for step in range(3):
        optimiser.zero_grad()
        drafter(packed(40, seed=step), target, CE())[0].backward()
        optimiser.step()
        grads = {name: getattr(drafter.decoder, name).weight.grad for name in "qkv"}
        found.append({name for name, grad in grads.items() if grad is not None and grad.any()})
    return found


def test_queries_and_keys_learn_from_the_second_step_on(target, monkeypatch):
    """W_V starts at zero and hides them once; a softmax over the one key would hide them always."""
    assert reached_at(target) == [{"v"}, {"q", "k", "v"}, {"q", "k", "v"}]
    monkeypatch.setattr(F, "cosine_similarity", lambda q, k, dim: torch.ones_like(q[..., 0]))
    assert reached_at(target) == [{"v"}, {"v"}, {"v"}]


@pytest.mark.parametrize("activate", [True, False])
def test_each_attention_head_has_a_cosine_for_its_gate(target, activate):
    decoder = scatter(AttentionDecoder(target.shape, activate))
    D, d = target.shape.hidden_size, target.shape.hidden_size // target.shape.heads
    h, e = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(1)).double()
    q, k, v = decoder.q(decoder.norm(h)), decoder.k(e), decoder.v(e)
    parts = []
    for i in range(0, D, d):
        a, b = q[:, i : i + d], k[:, i : i + d]
        gate = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        parts.append(gate[:, None] * v[:, i : i + d])
    mixed = torch.cat(parts, dim=-1)
    due = h + (mixed * torch.sigmoid(mixed) if activate else mixed)
    torch.testing.assert_close(decoder(h, e), due)
    assert len(parts) == target.shape.heads > 1


def test_tokens_are_rows_of_the_output_matrix_at_length_one(target):
    ids = torch.tensor([[3, 17, 17], [0, 39, 5]])
    found = rows(ids, target)
    weight_VD = target.model.lm_head.weight.float()
    assert torch.equal(found, F.normalize(weight_VD, dim=-1)[ids])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 3))
    assert not torch.allclose(found, F.normalize(target.embed(ids).float(), dim=-1), atol=0.1)


def test_attention_without_the_regressive_connection_is_refused(target):
    with pytest.raises(ValueError, match="switch attention off too"):
        Clover(target.shape, regressive=False)


def test_clover2s_later_heads_are_one(target):
    """A second decoder and projection serve every head after the first, and not the first."""
    few, many = (Clover2(target.shape, heads=heads).state_dict() for heads in (2, 6))
    assert {k: v.shape for k, v in few.items()} == {k: v.shape for k, v in many.items()}
    drafter = scatter(Clover2(target.shape, heads=4))
    weights = {name: p for name, p in drafter.named_parameters() if p.ndim == 2}
    for k, said in enumerate(states(drafter, cached(packed(40), target), target), start=1):
        grads = torch.autograd.grad(
            said.square().sum(), list(weights.values()), allow_unused=True, retain_graph=True
        )
        used = {name for name, grad in zip(weights, grads, strict=True) if grad is not None}
        others = "later" if k == 1 else "first_fc"
        assert used == {name for name in weights if not name.startswith(others)}


def test_clover2s_features_by_hand(target):
    """Without its layers. What is carried on is the decoder's output, not the projection's; e is
    the raw row of the output matrix; two norms, of the first state and of what is said."""
    drafter = scatter(Clover2(target.shape, heads=3, layers=1))
    drafter.layers[0].start_as_identity()
    batch = cached(packed(40), target)
    e_BTD = target.head_rows(batch.ids_BT).double()
    h = drafter.norm(drafter.first(batch.cached.hidden_BTD[:, :-1], e_BTD[:, 1:]))
    due = [drafter.head_norm(drafter.first_fc(h))]
    for k in (2, 3):
        h = drafter.later(h[:, :-1], e_BTD[:, k:])
        due.append(drafter.head_norm(drafter.later_fc(torch.cat([h, e_BTD[:, k:]], dim=-1))))
    for said, expected in zip(states(drafter, batch, target), due, strict=True):
        torch.testing.assert_close(said, expected)
    assert not drafter.first.activate
    assert not drafter.later.activate


def test_clover2_starts_from_the_targets_layer_and_norm(target):
    torch.nn.init.uniform_(target.model.base_model.norm.weight)
    drafter = Clover2(target.shape, heads=2, layers=2)
    drafter.initialise(target, lambda: torch.empty(0))
    for norm in (drafter.norm, drafter.head_norm):
        torch.testing.assert_close(norm.weight.double(), target.model.base_model.norm.weight)
    last = target.model.base_model.layers[-1].mlp.up_proj.weight
    for layer in drafter.layers:
        torch.testing.assert_close(layer.mlp.up_proj.weight.double(), last, rtol=0, atol=1e-6)
    for decoder in (drafter.first, drafter.later):
        assert decoder.v.weight.min() > 0
        assert decoder.v.weight.max() <= 0.01
