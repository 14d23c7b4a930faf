"""What makes `eagle` EAGLE-1 or HASS, and `eagle3` EAGLE-3.

Shapes: B batch, T tokens, H heads, S steps, D width, V vocabulary, C tokens, d head width.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from contract import GREEDY, PROMPTS, Exact, Watching, assert_drafted_as_trained, build, packed
from probes import cached, reach, scatter, states
from safetensors.torch import load_file
from torch import Tensor
from toys import tiny_target
from transformers import LlamaConfig

from decoding.loop import decode
from decoding.target import Shape, Target
from drafters import eagle, eagle3
from drafters.base import Prediction, load, save
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.heads import pair_mask
from drafters.layer import Unrolled
from train.objectives import CE, ForwardKL

TAPS = [0, 1, 2]
LAYER = [f"self_attn.{c}_proj.weight" for c in "qkvo"]
LAYER += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
LAYER += ["post_attention_layernorm.weight"]


# --- steps on one's own guesses ------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_unrolled_attention_is_dense_attention_with_its_mask_written_out(kv_heads):
    """Guess s at pair t sees the true keys up to t of its document and guesses 1 to s at t."""
    mask, _ = pair_mask(packed(40))
    (B, _, T, _), S = mask.shape, 3
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(S + 1, B, heads, T, 6, generator=generator).double()
        for heads in (4, kv_heads, kv_heads)
    )
    allowed = torch.zeros(B, S + 1, T, S + 1, T, dtype=torch.bool)
    for s in range(S + 1):
        allowed[:, s, :, 0] = mask[:, 0]
        for earlier in range(1, s + 1):
            allowed[:, s, :, earlier] = torch.eye(T, dtype=torch.bool)
    flat_q, flat_k, flat_v = (x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in (q, k, v))
    flat_k, flat_v = (x.repeat_interleave(4 // kv_heads, dim=1) for x in (flat_k, flat_v))
    score = flat_q @ flat_k.transpose(-1, -2) / 6**0.5
    score = score.masked_fill(~allowed.view(B, 1, (S + 1) * T, (S + 1) * T), -torch.inf)
    due = (score.softmax(-1) @ flat_v).unflatten(2, (S + 1, T))
    attend = Unrolled(mask)
    for s in range(S + 1):
        torch.testing.assert_close(attend(q[s], k[s], v[s]), due[:, :, s])


class Forgetful(Unrolled):
    """Guesses that see the newest guess of their line alone."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._guessed = []
        return super().__call__(q, k, v)


class Lookahead(Unrolled):
    """Guesses that see the true key one place further on."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        said = super().__call__(q, k, v)
        self.mask = self.mask | torch.eye(self.mask.shape[-1]).bool().roll(1, 1)
        return said


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
@pytest.mark.parametrize("wrong", [Forgetful, Lookahead])
def test_training_that_is_not_drafting_is_noticed(monkeypatch, family, wrong):
    """The contract compares step s at pair t with s incremental steps, and can fail."""
    monkeypatch.setattr({"eagle": eagle, "eagle3": eagle3}[family], "Unrolled", wrong)
    with pytest.raises(AssertionError):
        assert_drafted_as_trained(family)


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_the_first_of_three_steps_is_the_only_one_of_one(target, family):
    """So EAGLE-1 is HASS with one step."""
    one, three = (scatter(build(family, target.shape, steps=steps)) for steps in (1, 3))
    batch = cached(packed(40), target, one.taps)
    (only,), (first, *more) = states(one, batch, target), states(three, batch, target)
    assert torch.equal(only, first)
    assert len(more) == 2
    assert not any(torch.allclose(a[:, : b.shape[1]], b) for a, b in pairwise([first, *more]))


@pytest.mark.parametrize(("family", "flows"), [("eagle", False), ("eagle3", True)])
def test_gradients_through_what_is_fed_back(target, family, flows):
    """HASS detaches its features between steps; EAGLE-3's training-time test does not."""
    drafter = scatter(build(family, target.shape))
    said: list[Tensor] = []
    layer = drafter.layers[0] if family == "eagle" else drafter.midlayer
    layer.register_forward_hook(lambda module, given, out: said.append(out))
    last = states(drafter, cached(packed(40), target, drafter.taps), target)[-1]
    grads = torch.autograd.grad(last.square().sum(), said[:-1], allow_unused=True)
    assert [grad is not None for grad in grads] == [flows] * 3


# --- eagle ---------------------------------------------------------------------------------------


def test_eagle_has_the_tensors_of_vllm_and_sglang(target, tmp_path):
    """No input norm; embeddings and head are the target's. SGLang's fc has a bias: in the file it
    is zero, in the drafter there is none."""
    drafter = build("eagle", target.shape)
    due = {"fc.weight", *(f"layers.0.{name}" for name in LAYER)}
    assert isinstance(drafter, Eagle)
    assert set(drafter.state_dict()) == due
    save(drafter.bfloat16(), tmp_path, {})
    saved = load_file(tmp_path / "model.safetensors")
    assert set(saved) == due | {"fc.bias"}
    assert torch.equal(saved["fc.bias"], torch.zeros(32, dtype=torch.bfloat16))
    assert set(load(tmp_path, target.shape).state_dict()) == due
    assert drafter.fc.weight.shape == (32, 64)
    assert drafter.config()["architectures"] == ["LlamaForCausalLM"]
    assert drafter.config()["num_hidden_layers"] == 1


@pytest.mark.parametrize("family", ["eagle", "eagle3"])
def test_the_rotary_base_is_told_in_both_spellings(target, family):
    """vLLM and SGLang on transformers 4 read `rope_theta`, and 10,000 where it is missing."""
    config = build(family, replace(target.shape, rope_theta=1e6)).config()  # type: ignore[attr-defined]
    assert (config["rope_theta"], config["rope_scaling"]) == (1e6, None)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}
    assert LlamaConfig.from_dict(config).rope_parameters == config["rope_parameters"]


def test_nothing_is_normed_before_eagles_attention(target, monkeypatch):
    """Its layer attends to what fc says, whatever its length."""
    drafter = scatter(build("eagle", target.shape, steps=1))
    read: list[Tensor] = []
    drafter.fc.register_forward_hook(lambda module, given, out: read.append(out))
    drafter.layers[0].self_attn.register_forward_pre_hook(
        lambda module, given: read.append(given[0])
    )
    states(drafter, cached(packed(40), target), target)
    assert torch.equal(*read)


@pytest.mark.parametrize(("family", "matrices"), [("eagle", ["fc"]), ("eagle3", ["q", "k", "v"])])
def test_embeddings_stand_first_in_what_is_read(monkeypatch, family, matrices):
    """Without its first D columns a drafter reads no token: the order of every serving engine."""
    target = tiny_target(vocab=40, tied=False)
    drafter = scatter(build(family, target.shape))
    with torch.no_grad():
        for name in matrices:
            attention = None if name == "fc" else drafter.midlayer.self_attn
            matrix = drafter.fc if attention is None else getattr(attention, f"{name}_proj")
            matrix.weight[:, : target.shape.hidden_size] = 0
    tokens, seen = reach(drafter, target, 1, 5, monkeypatch)
    assert tokens == {"embed": set(), "head_rows": set()}
    assert seen == {0, 1, 2, 3, 4, 5}


def test_noise_is_in_training_alone(target):
    """Uniform, of width 0.2 at 512 pairs and scaled by how many there are, on the states read."""
    drafter = scatter(build("eagle", target.shape, noise=0.2, steps=2))
    batch = cached(packed(40), target)
    read: list[Tensor] = []
    drafter.fc.register_forward_pre_hook(lambda module, given: read.append(given[0]))
    clean = states(drafter, batch, target)
    again = states(drafter, batch, target)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))
    noisy = states(drafter.train(), batch, target)
    assert not any(torch.allclose(a, b) for a, b in zip(clean, noisy, strict=True))
    D, pairs = target.shape.hidden_size, batch.ids_BT.shape[1] - 1
    truth = batch.cached.hidden_BTD[:, :-1]
    noise = read[4][..., D:] - truth
    assert torch.equal(read[0][..., D:], truth)
    assert torch.equal(read[4][..., :D], read[0][..., :D])
    half = 0.1 * 512 / pairs
    assert 0.99 * half < noise.max() <= half
    assert -half <= noise.min() < -0.99 * half
    drafter.noise = 0.0
    assert all(
        torch.equal(a, b) for a, b in zip(clean, states(drafter, batch, target), strict=True)
    )


# --- eagle3 --------------------------------------------------------------------------------------


def test_eagle3_has_the_tensors_of_vllm_and_sglang(target):
    drafter = build("eagle3", target.shape, vocabulary=9)
    layer = [*LAYER, "input_layernorm.weight", "hidden_norm.weight"]
    due = ["fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"]
    assert set(drafter.state_dict()) == {*due, *(f"midlayer.{name}" for name in layer)}
    whole = build("eagle3", target.shape).state_dict()
    assert {"d2t", "t2d"}.isdisjoint(whole)
    assert whole["fc.weight"].shape == (32, 96)
    assert whole["midlayer.self_attn.q_proj.weight"].shape == (32, 64)


def test_the_residual_is_on_g_alone_and_is_fed_back_before_the_norm(target):
    """With nothing written to the residual, every step says norm(g), g = fc of the taps side by
    side; an output fed back normed, or a residual that holds the embedding, is another thing."""
    drafter = scatter(build("eagle3", target.shape))
    with torch.no_grad():
        drafter.midlayer.self_attn.o_proj.weight.zero_()
        drafter.midlayer.mlp.down_proj.weight.zero_()
    batch = cached(packed(40), target, drafter.taps)
    out = target.model(input_ids=batch.ids_BT[:1, :7], output_hidden_states=True).hidden_states
    g = torch.cat([out[k] for k in TAPS], dim=-1) @ drafter.fc.weight.T  # of the first document
    due = drafter.norm(g)
    assert not torch.allclose(drafter.norm(due), due, atol=1e-2)
    for said in states(drafter, batch, target):
        torch.testing.assert_close(said[:1, :7], due)


def test_taps_are_three_unless_named():
    shape = replace(Shape.of(tiny_target(vocab=40).model.config), layers=12)
    assert Eagle3(shape).taps == (2, 6, 9)
    assert Eagle3(replace(shape, layers=7)).taps == (2, 3, 4)
    with pytest.raises(ValueError, match=r"6 layers.*drafter\.taps"):
        Eagle3(replace(shape, layers=6))
    named = Eagle3(replace(shape, layers=2), taps=[2, 0])
    assert named.taps == (2, 0)
    assert named.fc.in_features == 2 * shape.hidden_size
    for wrong in ([13], [-1], [3, 3], []):
        with pytest.raises(ValueError, match=r"drafter\.taps is .*distinct indices"):
            Eagle3(shape, taps=wrong)


def test_each_engine_is_told_of_other_taps_in_its_own_count():
    """vLLM reads k at the top as hidden_states[k], SGLang reads it nested, as hidden_states[k + 1];
    what both take for granted is not written."""
    shape = replace(Shape.of(tiny_target(vocab=40).model.config), layers=12)
    for taps in (None, [2, 6, 9]):
        assert not {k for k in Eagle3(shape, taps=taps).config() if "aux" in k or "eagle" in k}
    config = Eagle3(shape, taps=[1, 5, 11], vocabulary=30).config()
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 5, 11]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 4, 10]
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["vocab_size"], config["draft_vocab_size"]) == (40, 30)
    assert (config["norm_before_residual"], config["target_hidden_size"]) == (False, 32)


COMMON = [1, 4, 5, 17, 23, 38]


def truncated(target: Target) -> Eagle3:
    """Over the commonest six tokens of forty."""
    counts = torch.ones(40)
    counts[COMMON] = torch.tensor([9.0, 5.0, 7.0, 8.0, 6.0, 4.0])
    drafter = scatter(build("eagle3", target.shape, vocabulary=6))
    assert isinstance(drafter, Eagle3)
    drafter.initialise(target, lambda: counts)
    return drafter


def test_the_draft_vocabulary_is_the_commonest_tokens(target, tmp_path):
    """d2t holds offsets: row i is token i + d2t[i]; t2d marks those tokens."""
    drafter = truncated(target)
    saved = {"fresh": build("eagle3", target.shape, vocabulary=6).state_dict()}
    saved["made"] = drafter.state_dict()
    save(drafter, tmp_path, {"vocabulary": 6, "taps": TAPS})
    saved["file"] = load_file(tmp_path / "model.safetensors")
    saved["read"] = load(tmp_path, target.shape).state_dict()
    for name, tensors in saved.items():
        d2t, t2d = tensors["d2t"], tensors["t2d"]
        ids = (torch.arange(6) + d2t).tolist()
        assert ids == ([0, 1, 2, 3, 4, 5] if name == "fresh" else COMMON)
        assert t2d.nonzero()[:, 0].tolist() == ids
        assert (d2t.dtype, t2d.dtype, len(t2d)) == (torch.int64, torch.bool, 40)
    assert torch.equal(drafter.lm_head.weight, target.model.lm_head.weight[COMMON])


@pytest.mark.parametrize("sampling", [GREEDY, Exact(temperature=1.0)], ids=["greedy", "sampled"])
def test_only_tokens_of_the_draft_vocabulary_are_drafted(target, sampling):
    watching = Watching(truncated(target))
    decode(target, watching, PROMPTS, sampling=sampling, max_new_tokens=20, end_ids=frozenset())
    drafted = {i for _, draft in watching.rounds for i in draft.ids_BN.flatten().tolist()}
    assert drafted <= set(COMMON)
    assert len(drafted) > 2
    for _, draft in watching.rounds if not sampling.greedy else []:
        assert draft.q_BMV is not None
        assert draft.q_BMV.shape[-1] == 40
        torch.testing.assert_close(
            draft.q_BMV[..., COMMON].sum(-1), torch.ones(1).double().expand(draft.q_BMV.shape[:2])
        )


@pytest.mark.parametrize("loss", [CE(), ForwardKL()], ids=["ce", "forward-kl"])
def test_predictions_outside_the_draft_vocabulary_do_not_count(target, loss):
    """By the label without a target, by the likeliest token of its law with one, which is made a
    law over the draft vocabulary; by hand."""
    generator, ids_V = torch.Generator().manual_seed(0), torch.tensor(COMMON)
    hidden_ND, truth_ND = torch.randn(2, 200, 32, generator=generator).double()
    labels_N = torch.randint(40, (200,), generator=generator)
    weight_VD = torch.randn(6, 32, generator=generator).double()
    kl = isinstance(loss, ForwardKL)
    leaf = hidden_ND.clone().requires_grad_()
    given = Prediction(
        leaf, weight_VD, labels_N, torch.zeros(200).long(), truth_ND if kl else None, 0, ids_V
    )
    total, (sums,) = loss([given], target)
    (gradient,) = torch.autograd.grad(total, leaf)
    logits_NV = target.logits(truth_ND)
    counts_N = torch.isin(logits_NV.argmax(-1) if kl else labels_N, ids_V)
    log_q = (hidden_ND @ weight_VD.T).log_softmax(-1)
    log_p = logits_NV[:, ids_V].log_softmax(-1)
    each_N = (log_p.exp() * (log_p - log_q)).sum(-1)
    if not kl:
        place_N = torch.tensor([COMMON.index(i) if i in COMMON else 0 for i in labels_N.tolist()])
        each_N = -log_q[torch.arange(200), place_N]
    assert 10 < int(counts_N.sum()) < 100
    assert int(sums["tokens"]) == 200, "what cannot be drafted is a miss, not left out"
    inside_N = torch.isin(labels_N, ids_V)
    hits_N = ids_V[log_q.argmax(-1)] == labels_N
    assert int(sums["top1"]) == int((hits_N & inside_N).sum())
    if kl:
        whole = logits_NV.softmax(-1)[:, ids_V]
        alpha = torch.minimum(whole, log_q.exp()).sum(-1).sum().float()
        torch.testing.assert_close(sums["alpha"], alpha, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, each_N[counts_N].sum().float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(gradient.any(1), counts_N)
