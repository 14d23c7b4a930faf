"""Layouts are two-way, strict, and what engines compute of them is the drafter."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding.target import Target
from drafters import base
from drafters.base import Trained
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.heads import Heads
from drafters.lm import LM
from drafters.medusa import Medusa
from eval.controls import Failed
from tests.toys import tiny_model
from train.export import export
from train.layouts import files, plain
from train.layouts.given import Facts, Lent
from train.layouts.proof import CLOSE, judged, prove
from train.layouts.table import LAYOUTS, arguments, detect, formats

V, LAYERS = 96, 5
IDS = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def target() -> Target:
    """Half as many key heads as heads; its output matrix is not its embedding."""
    model = tiny_model(vocab=V, width=64, layers=LAYERS, kv_heads=2, tied=False, spread=0.2)
    return Target(model.float(), name="tiny")


@pytest.fixture(scope="module")
def facts(target: Target) -> Facts:
    return Facts(
        target.shape, draft_length=3, architectures=("LlamaForCausalLM",), lent=Lent(target)
    )


def part(drafter: Eagle3) -> Eagle3:
    """With a vocabulary that begins at the target's third token and leaves some out."""
    assert drafter.d2t is not None
    assert drafter.t2d is not None
    ids_R = torch.arange(len(drafter.d2t)) * 2 + 3
    drafter.d2t.copy_(ids_R - torch.arange(len(ids_R)))
    drafter.t2d.zero_()[ids_R] = True
    return drafter


MADE: dict[str, tuple[str, Callable[[Any], Trained]]] = {
    "lm": ("lm", lambda s: LM(s, layers=2, width=64, draft_length=3)),
    "medusa": ("medusa", lambda s: Medusa(s, heads=3)),
    "medusa_shared": ("medusa", lambda s: Medusa(s, heads=3, layers=2, head="shared")),
    "eagle": ("eagle", lambda s: Eagle(s)),
    "eagle3": ("eagle3", lambda s: Eagle3(s, taps=[1, 2, 3])),
    "eagle3_part": ("eagle3", lambda s: part(Eagle3(s, taps=[0, 2, 4], vocabulary=30))),
    "eagle3_unsorted": ("eagle3", lambda s: Eagle3(s, taps=[4, 1], vocabulary=None)),
}
CASES = [(name, form) for name, (family, _) in MADE.items() for form in LAYOUTS[family]]


def make(name: str, target: Target) -> Trained:
    """A random drafter, no parameter of which is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        drafter = MADE[name][1](target.shape)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return drafter.eval()


def written(name: str, form: str, folder: Path, facts: Facts) -> tuple[Trained, Path]:
    assert facts.lent is not None
    drafter, place = make(name, facts.lent.target), folder / form
    place.mkdir(parents=True)
    LAYOUTS[MADE[name][0]][form].write(drafter, place, facts)
    return drafter, place


@pytest.mark.parametrize(("name", "form"), CASES, ids=map("-".join, CASES))
def test_a_layout_is_the_drafter_and_comes_back(
    name: str, form: str, tmp_path: Path, target: Target, facts: Facts
):
    family = MADE[name][0]
    drafter = make(name, target)
    entry = export(family, form, drafter, tmp_path / "out", facts)
    assert entry["difference"] < CLOSE / 10, "the tolerance has room for other machines"
    assert entry["files"].keys() >= {"config.json"}
    assert detect(tmp_path / "out") == (family, form)
    layout = LAYOUTS[family][form]
    again = layout.read(tmp_path / "out", target.shape, target)
    mine, theirs = drafter.state_dict(), again.state_dict()
    changed = {"fc.weight"} if name == "eagle3_unsorted" else set()
    assert mine.keys() == theirs.keys()
    assert {k for k in mine if not torch.equal(mine[k], theirs[k])} == changed
    base.save(again, tmp_path / "ours", arguments(again))
    loaded = base.load(tmp_path / "ours", target.shape)
    for prompt in facts.prompts():
        for a, b in zip(judged(again, prompt, facts), judged(loaded, prompt, facts), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "form"), CASES, ids=map("-".join, CASES))
def test_files_have_the_dtype_that_was_measured_and_name_their_layout(
    name: str, form: str, tmp_path: Path, target: Target, facts: Facts
):
    """What is the target's stays in its dtype: engines share it where it is equal."""
    family = MADE[name][0]
    rounded = replace(facts, dtype=torch.bfloat16)
    entry = export(family, form, make(name, target), tmp_path / "out", rounded)
    assert entry["difference"] < CLOSE
    tensors = files.tensors(tmp_path / "out")
    kinds = {k: t.dtype for k, t in tensors.items() if t.is_floating_point()}
    borrowed = {k for k, dtype in kinds.items() if dtype == torch.float32}
    assert set(kinds.values()) <= {torch.bfloat16, torch.float32}
    assert borrowed == {
        "speculators": {"embed_tokens.weight"},
        "medusa_shared-vllm": {"lm_heads.0.weight"},
        "medusa_shared-original": {f"{i}.2.weight" for i in range(3)},
    }.get(form if form == "speculators" else f"{name}-{form}", set())
    if form != "transformers":
        (file,) = (tmp_path / "out").glob("*.safetensors")
        assert f"{family}/{form}".encode() in file.read_bytes()[:3000]


# --- planted faults ------------------------------------------------------------------------------


def configured(**changes: Any) -> Callable[[Path], None]:
    """Changes config.json; a value of None takes the key out."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {k: v for k, v in config.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return change


def stored(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        (file,) = folder.glob("*.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return rewrite


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return stored(lambda t: t.update({new: t.pop(old)}))


def scaled(name: str) -> Callable[[Path], None]:
    return stored(lambda t: t.update({name: t[name] * 1.001}))


def swapped(a: str, b: str) -> Callable[[Path], None]:
    return stored(lambda t: t.update({a: t[b], b: t[a]}))


def moved(tensors: dict[str, Tensor]) -> None:
    """The draft vocabulary one token on, its marks too: the maps still agree with each other."""
    tensors["d2t"] += 1
    tensors["t2d"] = tensors["t2d"].roll(1)


def both(ids: list[int]) -> dict[str, Any]:
    return {IDS: ids, "eagle_config": {IDS: [k - 1 for k in ids]}}


FAULTS: dict[str, tuple[str, str, Callable[[Path], None], str]] = {
    "bias dropped": ("medusa", "vllm", configured(medusa_fc_bias=None), "drops them"),
    "heads swapped": (
        "medusa", "vllm", swapped("lm_heads.0.weight", "lm_heads.1.weight"), "position 1",
    ),
    "blocks swapped": (
        "medusa", "original", swapped("1.0.linear.weight", "2.0.linear.weight"), "position 2",
    ),
    "a head renamed": (
        "medusa", "original", renamed("0.1.weight", "0.2.weight"),
        "lm_heads.0.weight is missing; 0.2.weight is unknown",
    ),
    "another output matrix": (
        "medusa_shared", "vllm", scaled("lm_heads.0.weight"), "position 1",
    ),
    "shared heads without their matrix": (
        "medusa_shared", "vllm", renamed("lm_heads.0.weight", "lm_head.weight"),
        "no lm_heads.0.weight",
    ),
    "fc turned": ("eagle", "vllm", stored(lambda t: t.update(
        {"fc.weight": t["fc.weight"].roll(64, dims=1)})), "position 1"),
    "another rotary base": ("eagle", "vllm", configured(
        rope_theta=5e5, rope_parameters={"rope_theta": 5e5}), "rope_theta 500000.0, not 10000.0"),
    "rotary bases that differ": ("eagle", "vllm", configured(rope_theta=5e5), "make them equal"),
    "an input norm": ("eagle", "vllm", stored(lambda t: t.update(
        {"layers.0.input_layernorm.weight": torch.ones(64)})), "input_layernorm.weight is unknown"),
    "a tensor renamed": (
        "eagle3", "vllm", renamed("norm.weight", "model.norm.weight"), "norm.weight is missing",
    ),
    "taps one early": ("eagle3", "vllm", configured(**both([0, 1, 2])), "position 1"),
    "taps one late, speculators": (
        "eagle3", "speculators", configured(**{IDS: [2, 3, 4]}), "position 1",
    ),
    "taps in one dialect for both": ("eagle3", "vllm", configured(
        eagle_config={IDS: [1, 2, 3]}), "make them agree"),
    "taps unsorted": ("eagle3_unsorted", "vllm", stored(lambda t: t.update(
        {"fc.weight": t["fc.weight"].roll(64, dims=1)})), "position 1"),
    "residual after the norm": (
        "eagle3", "vllm", configured(norm_before_residual=True), "asks for norm_before_residual",
    ),
    "residual not said": (
        "eagle3", "speculators", configured(norm_before_residual=None), "write both",
    ),
    "norms exchanged": ("eagle3", "vllm", swapped(
        "midlayer.input_layernorm.weight", "midlayer.hidden_norm.weight"), "position 1"),
    "draft vocabulary one on": ("eagle3_part", "vllm", stored(moved), "drafts other tokens"),
    "d2t one on": ("eagle3_part", "speculators", stored(
        lambda t: t["d2t"].add_(1)), "do not name the same 30 tokens"),
    "d2t holds ids": ("eagle3_part", "vllm", stored(
        lambda t: t["d2t"].add_(torch.arange(30))), "ids where offsets are expected"),
    "no d2t": ("eagle3_part", "vllm", stored(lambda t: t.pop("d2t")), "no d2t of 30 offsets"),
    "another embedding": (
        "eagle3", "speculators", scaled("embed_tokens.weight"), "other than that of tiny",
    ),
    "an lm's layer scaled": (
        "lm", "transformers", scaled("model.layers.1.mlp.down_proj.weight"), "position 1",
    ),
    "an lm's tensor renamed": (
        "lm", "transformers", renamed("model.norm.weight", "model.norms.weight"), "norm.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_the_export(fault: str, tmp_path: Path, facts: Facts):
    name, form, plant, said = FAULTS[fault]
    drafter, folder = written(name, form, tmp_path, facts)
    layout = LAYOUTS[MADE[name][0]][form]
    assert prove(layout, drafter, folder, facts) < CLOSE
    plant(folder)
    with pytest.raises(Failed, match="export in") as failed:
        prove(layout, drafter, folder, facts)
    assert said in str(failed.value)


UNSAID = ["bias dropped", "taps one early", "residual after the norm", "residual not said"]


@pytest.mark.parametrize("fault", UNSAID)
def test_what_no_strict_reading_would_find_shows_in_what_an_engine_computes(
    fault: str, tmp_path: Path, facts: Facts
):
    """These files are whole, and vLLM loads them without a word."""
    name, form, plant, _ = FAULTS[fault]
    drafter, folder = written(name, form, tmp_path, facts)
    plant(folder)
    prompt = next(iter(facts.prompts()))
    truth = judged(drafter, prompt, facts)
    found = LAYOUTS[MADE[name][0]][form].logits(folder, prompt, facts, len(truth))
    gap = (truth[0] - found[0][: len(truth[0])]).abs().max() / truth[0].abs().max()
    assert gap > 100 * CLOSE


def test_a_plain_layer_is_transformers_own():
    """Whatever our drafters compute."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = tiny_model(width=64, kv_heads=2).config
    config.rope_parameters["rope_theta"] = 5000.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs, x = LlamaDecoderLayer(config, 0).eval(), torch.randn(7, 64)
    places = LlamaRotaryEmbedding(config)(x[None], torch.arange(7)[None])
    mask = torch.full((1, 1, 7, 7), -torch.inf).triu(1)
    with torch.no_grad():
        out = theirs(x[None], attention_mask=mask, position_embeddings=places)
        mine = plain.Layer.of(theirs.state_dict(), "", config.to_dict())
        found = mine(x, mine.norm("input_layernorm", x))
    torch.testing.assert_close(found, out.reshape(7, 64), atol=2e-6, rtol=0)


# --- drafters from elsewhere ---------------------------------------------------------------------


def test_ids_inside_eagle_config_alone_are_one_less_and_none_at_all_the_default(
    tmp_path: Path, facts: Facts
):
    """As SpecForge and ModelOpt write them, which is not as vLLM reads them."""
    _, folder = written("eagle3", "vllm", tmp_path, facts)
    read = LAYOUTS["eagle3"]["vllm"].read
    configured(**{IDS: None})(folder)
    assert read(folder, facts.shape).taps == (1, 2, 3)
    configured(eagle_config={IDS: [0, 2, 3]})(folder)
    assert read(folder, facts.shape).taps == (1, 3, 4)
    configured(eagle_config=None)(folder)
    with pytest.raises(ValueError, match="name three with drafter"):
        read(folder, facts.shape)  # of 5 layers the default ids are no three


def test_maps_of_a_whole_vocabulary_and_either_name_of_the_layer_are_read(
    tmp_path: Path, facts: Facts
):
    drafter, folder = written("eagle3", "vllm", tmp_path, facts)
    maps = {"d2t": torch.zeros(V, dtype=torch.int32), "t2d": torch.ones(V, dtype=torch.bool)}
    stored(lambda t: t.update(maps))(folder)
    stored(lambda t: [t.update({k.replace("midlayer", "layers.0"): t.pop(k)}) for k in list(t)])(
        folder
    )
    again = LAYOUTS["eagle3"]["vllm"].read(folder, facts.shape)
    assert torch.equal(again.state_dict()["lm_head.weight"], drafter.state_dict()["lm_head.weight"])


def test_a_repeated_embedding_needs_the_target_to_be_compared_with(tmp_path: Path, facts: Facts):
    _, folder = written("eagle", "vllm", tmp_path, facts)
    target = facts.borrowed.target
    own = {"embed_tokens.weight": target.embed(torch.arange(V)).clone()}
    stored(lambda t: t.update(own))(folder)
    read = LAYOUTS["eagle"]["vllm"].read
    assert isinstance(read(folder, facts.shape, target), Eagle)
    with pytest.raises(ValueError, match="name the target"):
        read(folder, facts.shape)
    stored(lambda t: t["fc.bias"].add_(0.1))(folder)
    with pytest.raises(ValueError, match="bias other than zero"):
        read(folder, facts.shape, target)


def test_shared_heads_without_a_target_at_hand_become_their_own(tmp_path: Path, facts: Facts):
    drafter, folder = written("medusa_shared", "vllm", tmp_path, facts)
    again = LAYOUTS["medusa"]["vllm"].read(folder, facts.shape)
    assert isinstance(again, Medusa)
    assert len(again.lm_heads) == 3
    prompt = next(iter(facts.prompts()))
    for a, b in zip(judged(drafter, prompt, facts), judged(again, prompt, facts), strict=True):
        torch.testing.assert_close(a, b)


FOREIGN: dict[str, tuple[str, str, Callable[[Path], Any], str]] = {
    "pickle alone": ("eagle", "vllm", lambda f: (f / "model.safetensors").rename(
        f / "pytorch_model.bin"), "pytorch_model.bin is a pickle, which can run code"),
    "an lm as a pickle": ("lm", "transformers", lambda f: (f / "model.safetensors").rename(
        f / "pytorch_model.bin"), "is a pickle"),
    "a damaged file": ("eagle", "vllm", lambda f: (f / "model.safetensors").write_bytes(
        b"\xff" * 90), "is damaged"),
    "a part missing": ("eagle", "vllm", lambda f: (f / "model.safetensors.index.json").write_text(
        '{"weight_map": {"fc.weight": "other.safetensors"}}'), "names other.safetensors"),
    "a name twice": ("eagle", "vllm", lambda f: save_file(
        {"fc.weight": torch.ones(1)}, f / "more.safetensors"), "holds fc.weight twice"),
    "no configuration": ("eagle", "vllm", lambda f: (f / "config.json").unlink(), "is not there"),
    "no JSON": ("eagle3", "vllm", lambda f: (f / "config.json").write_text("[1]"), "is damaged"),
    "more layers": ("eagle3", "vllm", configured(num_hidden_layers=2), "layers 2, not 1"),
    "other heads": ("eagle", "vllm", configured(num_key_value_heads=4), "heads 4, not 2"),
    "qwen3": ("eagle3", "vllm", configured(model_type="qwen3"), "'qwen3', not 'llama'"),
    "scaled rope": ("eagle", "vllm", configured(
        rope_parameters={"rope_theta": 1e4, "rope_type": "llama3"}), "of type llama3"),
    "old scaled rope": ("eagle", "vllm", configured(rope_scaling={"rope_type": "yarn"}), "yarn"),
    "one norm for fc": ("eagle3", "vllm", configured(fc_norm=True), "asks for fc_norm"),
    "fed back normed": ("eagle3", "speculators", configured(norm_output=True), "norm_output"),
    "no taps": ("eagle3", "vllm", configured(
        eagle_config={"use_aux_hidden_state": False}), "use_aux_hidden_state false"),
    "a wider target": ("eagle3", "vllm", configured(target_hidden_size=128), "states of width 128"),
    "another vocabulary": ("medusa", "vllm", configured(vocab_size=95), "and 95 tokens"),
    "another lm vocabulary": ("lm", "transformers", configured(vocab_size=95), "95 tokens"),
    "no count of heads": ("medusa", "vllm", configured(num_heads="3"), "how many heads"),
    "heads over a part": ("medusa", "vllm", configured(truncated_vocab_size=20), "cannot load"),
    "no count, original": ("medusa", "original", configured(medusa_num_heads=0), "how many heads"),
    "more heads said": ("medusa", "original", configured(medusa_num_heads=4), "is missing"),
    "a shape": ("medusa", "vllm", stored(lambda t: t.update(
        {"blocks.0.layers.0.bias": torch.ones(65)})), "is [65], expected [64]"),
    "tokens out of order": ("eagle3_part", "vllm", stored(lambda t: t["d2t"].copy_(
        t["d2t"].flip(0) + torch.arange(29, -30, -2))), "out of order"),
    "integers": ("medusa", "vllm", stored(lambda t: t.update(
        {"blocks.0.layers.0.bias": torch.ones(64, dtype=torch.int8)})), "is torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_folder_that_is_not_the_layout_is_refused_in_a_sentence(
    case: str, tmp_path: Path, facts: Facts
):
    name, form, change, said = FOREIGN[case]
    _, folder = written(name, form, tmp_path, facts)
    change(folder)
    with pytest.raises(ValueError, match=re.escape(said)):
        LAYOUTS[MADE[name][0]][form].read(folder, facts.shape, facts.borrowed.target)


def test_an_unknown_folder_is_in_no_layout(tmp_path: Path):
    save_file({"a.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "architectures": ["Bert"]}')
    with pytest.raises(ValueError, match=r"no layout that draftsmith reads .*model_type 'bert'"):
        detect(tmp_path)


# --- what cannot be written ----------------------------------------------------------------------


def test_a_tap_of_the_last_state_cannot_be_named(tmp_path: Path, target: Target, facts: Facts):
    drafter = Eagle3(target.shape, taps=[1, 2, LAYERS])
    with pytest.raises(ValueError, match=f"taps hidden_states.{LAYERS}., the last state"):
        LAYOUTS["eagle3"]["vllm"].write(drafter, tmp_path, facts)


def test_heads_cannot_share_a_matrix_with_a_bias(tmp_path: Path):
    model = tiny_model(vocab=V, width=64, layers=2, tied=False).float()
    model.lm_head.bias = torch.nn.Parameter(torch.ones(V))
    biased = Target(model, name="biased")
    facts = Facts(biased.shape, draft_length=3, lent=Lent(biased))
    with pytest.raises(ValueError, match="has a bias"):
        LAYOUTS["medusa"]["vllm"].write(Medusa(biased.shape, head="shared"), tmp_path, facts)


def test_an_lm_of_another_vocabulary_is_not_written(tmp_path: Path, target: Target, facts: Facts):
    drafter = LM(replace(target.shape, vocab_size=V + 1), width=64)
    with pytest.raises(ValueError, match="97 tokens and the target 96"):
        LAYOUTS["lm"]["transformers"].write(drafter, tmp_path, facts)


def test_medusa_2_takes_its_matrices_along(tmp_path: Path, target: Target):
    """The heads read the changed target's states, and a note says so."""
    drafter = Medusa(target.shape, heads=2, target_lora={"rank": 2, "alpha": 4})
    assert drafter.adapter is not None
    drafter.adapter.fit(target)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    lent = Lent(drafter.on(target))
    assert not torch.equal(lent.prompts[0].states_LTD, Lent(target).prompts[0].states_LTD)
    facts = Facts(target.shape, draft_length=2, lent=lent)
    for form in ("vllm", "original"):
        entry = export("medusa", form, drafter, tmp_path / form, facts)
        assert entry["difference"] < CLOSE
        assert "merge target_adapter" in entry["notes"][-1]
        peft = load_file(tmp_path / form / "target_adapter" / "adapter_model.safetensors")
        assert sum(map(torch.numel, peft.values())) == sum(
            map(torch.numel, drafter.adapter.parameters())
        )


def test_families_without_a_server_say_what_can_be_exported():
    assert formats("lm") == ["transformers", "gguf"]
    for family in ("hydra_heads", "clover", "clover2"):
        with pytest.raises(ValueError, match=r"stages.export=null.*medusa: vllm, original"):
            formats(family)


def test_the_prompts_reach_every_position_that_training_judges(facts: Facts):
    """Three guesses of an EAGLE, whose fed-back output would else go untried."""
    assert facts.lent is not None
    for name in ("eagle", "eagle3"):
        drafter = make(name, facts.lent.target)
        assert isinstance(drafter, Heads)
        prompt = next(iter(facts.prompts()))
        assert [len(rows) for rows in judged(drafter, prompt, facts)] == [14, 13, 12]
