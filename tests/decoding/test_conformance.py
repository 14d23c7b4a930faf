"""What the target gives for each architecture is what the model itself gives, or it is refused."""

import itertools
from typing import Any

import pytest
import torch
from architectures import (
    ARCHITECTURES,
    FAMILIES,
    LAYERS,
    SIZES,
    heads_for,
    random_model,
    random_target,
)
from scripted import GREEDY, NO_END, PROMPTS, Scripted, ids_of, plain, random_lm, tree
from torch import Tensor
from toys import tiny_target

from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.probe import probe
from decoding.round import Draft, Verdict
from decoding.target import Shape, Target

TAPS = (0, 1, 2, 3)
ALL = [(name, tied) for name in ARCHITECTURES for tied in (True, False)]
STATIC = {"kind": "static", "paths": [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [1, 0, 1]]}


@pytest.fixture(params=ALL, ids=[f"{name}, {'tied' if tied else 'untied'}" for name, tied in ALL])
def target(request) -> Target:
    return random_target(*request.param)


def close(ours: Tensor, due: Tensor) -> None:
    """Some norms and softmaxes of transformers round to single precision."""
    scale = due.abs().max().item() if due.numel() else 0.0
    torch.testing.assert_close(ours, due, atol=2e-5 * scale, rtol=0)


def own(target: Target, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The model's logits [T, V] and its states [T, L, D] of one sequence."""
    with torch.inference_mode():
        out = target.model(torch.tensor([ids]), output_hidden_states=True)
    assert len(out.hidden_states) == LAYERS + 1
    return out.logits[0], torch.stack(out.hidden_states, dim=2)[0]


def random_ids(rows: int, count: int) -> Tensor:
    return torch.randint(48, (rows, count), generator=torch.Generator().manual_seed(2))


# --- states, logits and trees --------------------------------------------------------------------


def test_logits_and_taps_are_the_models_own(target):
    ids_BT = random_ids(2, 9)
    out = target(ids_BT, taps=TAPS)
    for b, ids in enumerate(ids_BT.tolist()):
        logits, states = own(target, ids)
        close(target.logits(out.hidden_BTD[b]), logits)
        close(out.taps_BTLD[b], states)
        close(out.hidden_BTD[b], states[:, -1])


def test_documents_of_a_pack_are_read_alone(target):
    ids_BT, cuts = random_ids(1, 16), [0, 1, 6, 14, 16]
    doc_BT = torch.tensor([[0, 1, 1, 1, 1, 1, 7, 7, 7, 7, 7, 7, 7, 7, -1, -1]])
    out = target(ids_BT, doc_BT=doc_BT, taps=TAPS)
    for begin, end in itertools.pairwise(cuts):
        logits, states = own(target, ids_BT[0, begin:end].tolist())
        close(target.logits(out.hidden_BTD[0, begin:end]), logits)
        close(out.taps_BTLD[0, begin:end], states)


def test_embeddings_and_rows_are_what_drafters_take_them_for(target):
    """embed: the model's hidden_states[0] (Gemma's factor is in its embedding module; Granite's
    comes after it). head_rows: logits = state x row, + bias, before the softcap."""
    ids_BT = random_ids(2, 9)
    out = target(ids_BT, taps=(0,))
    factor = getattr(target.model.config, "embedding_multiplier", 1.0)
    close(target.embed(ids_BT) * factor, out.taps_BTLD[:, :, 0])
    logits = out.hidden_BTD @ target.head_rows(torch.arange(48)).T
    bias = target.model.get_output_embeddings().bias
    logits = logits + (0 if bias is None else bias)
    if target.softcap:
        logits = torch.tanh(logits / target.softcap) * target.softcap
    close(target.logits(out.hidden_BTD), logits)


def test_trees_are_scored_as_their_paths_alone(target):
    """Ragged prefill, a tree, the path that is kept (with gaps) and the pass after it."""
    count = [6, 1, 4]
    ids_BS = random_ids(3, 6)
    row = [ids_BS[b, :n].tolist() for b, n in enumerate(count)]
    room = target.new_cache(3, 12)
    seen = target.prefill(ids_BS, count, room, TAPS)
    for b, ids in enumerate(row):
        _, states = own(target, ids)
        close(seen.taps_BSLD[b, 1 : count[b]], states[:-1])
        close(seen.hidden_BSD[b, 1 : count[b]], states[:-1, -1])
    parents_BN = torch.tensor([[-1, -1, 0, 1, 3, 3], [-1, 0, 0, 2, -1, 4], [-1, 0, 1, 2, 3, 4]])
    draft = Draft(random_ids(3, 6).flip(1), parents_BN, [6, 6, 6])
    scored = target.score(torch.tensor([ids[-1] for ids in row]), draft, room, TAPS)
    path: dict[tuple[int, int], list[int]] = {}
    for b, ids in enumerate(row):
        path[b, -1] = []
        for n in range(-1, 6):
            if n >= 0:
                path[b, n] = [*path[b, int(parents_BN[b, n])], n]
            logits, states = own(target, ids + draft.ids_BN[b, path[b, n]].tolist())
            close(scored.logits_BMV[b, n + 1], logits[-1])
            close(scored.taps_BMLD[b, n + 1], states[-1])
    taken = [path[0, 5], path[1, 5], []]
    seen = target.keep(draft, scored, Verdict(taken, [7, 8, 9]), room)
    after = target.score(torch.tensor([7, 8, 9]), Draft.empty(3), room, TAPS)
    for b, ids in enumerate(row):
        logits, states = own(target, [*ids, *draft.ids_BN[b, taken[b]].tolist(), 7 + b])
        close(after.logits_BMV[b, 0], logits[-1])
        close(after.taps_BMLD[b, 0], states[-1])
        close(seen.taps_BSLD[b, : len(taken[b]) + 1], states[len(ids) - 1 : -1])


# --- answers -------------------------------------------------------------------------------------


def test_greedy_answers_are_what_transformers_generates(target):
    """Without a drafter, with a chain, with trees that are partly right, and with an end."""
    truth = plain(target, PROMPTS, 14)
    assert max(len(set(ids)) for ids in truth) > 5, "a constant answer proves nothing"
    end = truth[1][4]
    due = []
    for prompt in PROMPTS:
        out = target.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=end,
            pad_token_id=0,
        )
        due.append(out[0, len(prompt) :].tolist())
    assert len(due[1]) <= 5
    assert due == [ids[: ids.index(end) + 1] if end in ids else ids for ids in truth]
    scripted = Scripted(dict(enumerate(truth)), tree)
    trees = [heads_for(family, target, tree=STATIC) for family in ("medusa", "eagle")]
    for drafter in (None, random_lm(target, draft_length=3), scripted, *trees):
        out = decode(
            target, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=14, end_ids=frozenset({end})
        )
        assert ids_of(out) == due


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_drafts_for_every_shape(family, name):
    target = random_target(name, False)
    truth = plain(target, PROMPTS, 7)
    drafter = heads_for(family, target, draft_length=3)
    out = decode(target, drafter, PROMPTS, sampling=GREEDY, max_new_tokens=7, end_ids=NO_END)
    assert ids_of(out) == truth
    assert all(max(answer.drafted) == 3 for answer in out.answers)


def test_shapes_of_configurations_that_name_things_differently():
    from transformers import GPT2Config, GPTNeoXConfig, MambaConfig

    neox = Shape.of(GPTNeoXConfig(**{**SIZES, "num_key_value_heads": 4}))
    assert (neox.kv_heads, neox.head_dim, neox.intermediate_size) == (4, 8, 40)
    assert random_target("Qwen3", True).shape.head_dim == 16
    assert random_target("Qwen3", True).shape.tied
    gpt = Shape.of(GPT2Config(n_embd=32, n_head=4, n_layer=2, n_positions=64))
    assert (gpt.intermediate_size, gpt.max_positions, gpt.layers) == (128, 64, 2)
    with pytest.raises(ValueError, match="type mamba has no one number of attention heads"):
        Shape.of(MambaConfig())


# --- refusals ------------------------------------------------------------------------------------

ROPE = {"rope_theta": 1e4, "factor": 2.0}
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_type": "longrope"}
LATE = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
NEO = {"attention_types": [[["global", "local"], 1]], "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("Mistral", {"sliding_window": 16}, r"\(sliding_window 16\), whose state cannot be crop"),
        ("Gemma2", {"layer_types": None}, r"\(sliding_attention\).*choose a target with full"),
        ("Qwen2", LATE, r"\(sliding_attention\), whose state cannot be cropped"),
        ("GPTNeo", NEO, r"\(local\), whose"),
        ("OlmoHybrid", {}, r"\(linear_attention\), whose state cannot be cropped"),
        ("Mamba", {}, r"\(linear_attention\), whose state cannot be cropped"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE}}, "of type dynamic, which"),
        ("Llama", {"rope_parameters": {**LONG, **ROPE}}, "of type longrope, which change with the"),
    ],
)
def test_models_that_drafts_would_break_are_refused(name, changes, words):
    with pytest.raises(ValueError, match=words):
        Target(random_model(name, **changes))


def test_a_window_that_no_layer_uses_is_none():
    Target(random_model("Qwen2", sliding_window=4))  # use_sliding_window is off
    Target(random_model("Qwen2", **{**LATE, "max_window_layers": LAYERS}))


def test_encoder_decoders_are_refused(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match=r"is an encoder-decoder model \(t5\)"):
        Target(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no decoder-only model that transformers knows"):
        Pretrained(str(tmp_path)).load()


# --- the probe -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_passes_what_conforms(target, dtype):
    probe(target)
    probe(Target(random_model(target.name, tie_word_embeddings=True).to(dtype)))


@pytest.mark.parametrize("name", ["OPT", "Bloom", "Bart"])
def test_the_probe_refuses_models_of_other_makings(name):
    made = Target(random_model(name, is_encoder_decoder=False, use_cache=True), name="odd")
    with pytest.raises(ValueError, match=f"odd: {name}ForCausalLM does not run with a mask"):
        probe(made)


def as_causal(told: dict[str, Any]) -> None:
    """Whatever stands before a token is seen."""
    mask = told["attention_mask"]
    told["attention_mask"] = torch.ones_like(mask).tril(mask.shape[3] - mask.shape[2])


def as_if_in_order(told: dict[str, Any]) -> None:
    """Siblings of a tree stand behind each other."""
    begin = told["position_ids"][:, :1]
    told["position_ids"] = begin + torch.arange(told["input_ids"].shape[1])


def without_the_cache(told: dict[str, Any]) -> None:
    told["past_key_values"] = None
    M = told["input_ids"].shape[1]
    told["attention_mask"] = told["attention_mask"][..., -M:]


def nothing(told: dict[str, Any]) -> None:
    """The control."""


@pytest.mark.parametrize(
    ("change", "packed", "words"),
    [
        (nothing, True, None),
        (as_causal, True, "because LlamaForCausalLM does not keep packed documents apart"),
        (as_causal, False, "does not read a tree of drafted tokens over our cache"),
        (as_if_in_order, False, "does not read a tree of drafted tokens over our cache"),
        (without_the_cache, False, "does not read a tree of drafted tokens over our cache"),
    ],
)
def test_the_probe_hears_what_a_model_does_not(change, packed, words):
    """packed: passes without a cache are changed too."""
    target = tiny_target()
    inner = target.model.base_model.forward

    def forward(**told: Any) -> Any:
        if told.get("position_ids") is not None and (packed or told["past_key_values"] is not None):
            change(told)
        return inner(**told)

    target.model.base_model.forward = forward
    if words is None:
        return probe(target)
    with pytest.raises(ValueError, match=words):
        probe(target)


def test_the_probe_refuses_logits_that_are_changed_on_their_way():
    target = tiny_target()

    def double(model: Any, told: Any, out: Any) -> None:
        out.logits = out.logits * 2

    target.model.register_forward_hook(double)
    with pytest.raises(ValueError, match=r"differ .* by 50.*% .* changes them on their way"):
        probe(target)
