"""The stage `export`: planned with the formats of the family, proved, and written whole or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file

from decoding.borrowed import Borrowed
from decoding.pretrained import Pretrained
from drafters.base import Trained, load, save
from drafters.clover import Clover
from drafters.eagle3 import Eagle3
from drafters.files import damage
from drafters.lm import LM
from drafters.medusa import Medusa
from eval.controls import Failed
from eval.forms import forms
from tests import tiny
from tests.train.composing import compose
from train.export import Export, facts_of, measured
from train.layouts import eagle3_vllm, medusa_vllm
from train.layouts.given import Facts, Lent
from train.layouts.proof import CLOSE, judged
from train.plan import plan


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of 2 layers that two tokens end."""
    folder = tmp_path_factory.mktemp("target")
    tiny.write_target(folder / "target", tiny.write_texts(folder), ends=1)
    return folder / "target"


@pytest.fixture
def spec(place: Path) -> Pretrained:
    return Pretrained(path=str(place), dtype="float32")


def saved(cls: type, folder: Path, spec: Pretrained, **arguments: Any) -> Path:
    """A random drafter as a training leaves it."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drafter: Trained = cls(spec.shape_of(), **arguments)
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save(drafter, folder, arguments)
    return folder


def reported(folder: Path, **draft: Any) -> Path:
    folder.mkdir()
    conditions = {"dtype": "bfloat16", "draft": {"stop_below": 0.2, "sample": True} | draft}
    (folder / "report.json").write_text(json.dumps({"conditions": conditions}))
    return folder


def told(out: Path) -> dict[str, Any]:
    return json.loads((out / "artifact" / "export.json").read_text(encoding="utf-8"))


def test_an_lm_is_ready_for_assisted_generation(
    tmp_path: Path, place: Path, spec: Pretrained, capsys: pytest.CaptureFixture[str]
):
    """With the dtype and draft length that were measured, the target's special tokens and its
    tokenizer; every file is listed with its hash."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    drafter = saved(LM, tmp_path / "lm", spec, width=64, draft_length=5)
    report = reported(tmp_path / "report", draft_length=3)
    found = Export(target=spec).run(tmp_path, drafter=drafter, report=report)
    folder, entry = tmp_path / "artifact" / "transformers", told(tmp_path)["transformers"]
    assert not damage(folder, entry["files"])
    assert {p.name for p in folder.iterdir()} == entry["files"].keys()
    assert entry["engines"][:2] == ["transformers", "vllm"]
    assert entry["dtype"] == "bfloat16"
    assert found == {
        "bytes": sum(p.stat().st_size for p in folder.iterdir()),
        "difference": entry["difference"],
    }
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    target = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == target.config.vocab_size
    assert model.generation_config.num_assistant_tokens == 3
    assert model.generation_config.num_assistant_tokens_schedule == "constant"
    assert model.generation_config.assistant_confidence_threshold == 0.2
    assert len(target.generation_config.eos_token_id) == 2
    assert model.generation_config.eos_token_id == target.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == spec.tokenizer().get_vocab()
    ids = torch.tensor([tokenizer.encode("Hund Katze")])
    answer = target.generate(ids, assistant_model=model.float(), max_new_tokens=12)
    assert torch.equal(answer, target.generate(ids, max_new_tokens=12))
    said = capsys.readouterr().out
    assert "transformers: 0." in said
    assert "embed_tokens 0.04" in said
    assert "layers 0.10" in said


def test_all_formats_of_a_family_are_written_and_no_place_of_this_machine(
    tmp_path: Path, spec: Pretrained
):
    drafter = saved(Eagle3, tmp_path / "eagle3", spec, taps=[0, 1], vocabulary=50)
    Export(target=spec).run(tmp_path, drafter=drafter)
    assert list(told(tmp_path)) == ["vllm", "speculators"]
    text = [p.read_text() for p in (tmp_path / "artifact").rglob("*.json")]
    assert len(text) == 3
    assert not any(str(spec.path) in t or "/tmp" in t for t in text)
    assert "is not on the Hub" in told(tmp_path)["speculators"]["notes"][0]


def test_a_target_of_the_hub_is_named_in_the_files(tmp_path: Path, spec: Pretrained):
    drafter = saved(Eagle3, tmp_path / "eagle3", spec, taps=[0, 1])
    stage = Export(target=spec, format="speculators", base_model="some/target")
    stage.run(tmp_path, drafter=drafter)
    assert list(told(tmp_path)) == ["speculators"]
    config = json.loads((tmp_path / "artifact/speculators/config.json").read_text())
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
    hub = Pretrained(path="some/target", shape={})
    named = facts_of(spec, None, load(drafter, spec.shape_of())).base_model
    assert (hub.name, named) == ("some/target", None)


def test_a_broken_layout_leaves_nothing(
    tmp_path: Path, spec: Pretrained, monkeypatch: pytest.MonkeyPatch
):
    """An exporter that forgets the flag for the biases, once told by no error of any engine."""
    drafter = saved(Medusa, tmp_path / "medusa", spec, heads=2)
    right = medusa_vllm.write_json

    def forgetful(path: Path, value: dict[str, Any]) -> None:
        right(path, {k: v for k, v in value.items() if k != "medusa_fc_bias"})

    monkeypatch.setattr("train.layouts.medusa_vllm.write_json", forgetful)
    with pytest.raises(Failed, match="vLLM drops them"):
        Export(target=spec).run(tmp_path, drafter=drafter)
    assert not (tmp_path / "artifact").exists()
    monkeypatch.undo()
    Export(target=spec).run(tmp_path, drafter=drafter)  # over what the first try left
    assert list(told(tmp_path)) == ["vllm", "original"]


def changing(folder: Path, spec: Pretrained) -> Path:
    """A Medusa-2 that changes its target a little; the folder of a training."""
    drafter = Medusa(spec.shape_of(), heads=2, target_lora={"rank": 2, "alpha": 4})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drafter.initialise(spec.load(), lambda: torch.ones(300))
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save(drafter, folder, {"heads": 2, "target_lora": {"rank": 2, "alpha": 4}})
    return folder


def test_with_medusa_2_comes_the_target_that_it_changes(tmp_path: Path, spec: Pretrained):
    """Merged: the adapted target's logits, from a plain folder; and engines are given that one."""
    drafter = changing(tmp_path / "medusa", spec)
    Export(target=spec).run(tmp_path, drafter=drafter)
    entry = told(tmp_path)["target"]
    folder = tmp_path / "artifact" / "target"
    assert not damage(folder, entry["files"])
    assert entry["difference"] < CLOSE
    assert (entry["engines"], entry["dtype"]) == (["vllm"], "float32")
    ours = load(drafter, spec.shape_of())
    merged, original = Pretrained(path=str(folder), dtype="float32").load(), spec.load()
    ids_BT = torch.tensor([[7, 3, 99, 4, 250]])
    due = ours.on(original)(ids_BT).hidden_BTD
    found = merged(ids_BT).hidden_BTD
    torch.testing.assert_close(found, due, atol=1e-5, rtol=0)
    assert (original(ids_BT).hidden_BTD - due).abs().max() > 1e-2
    assert Pretrained(path=str(folder)).tokenizer().get_vocab() == spec.tokenizer().get_vocab()
    served, nobody = forms(drafter, ours, tmp_path / "artifact")
    assert ([form.name for form in served], nobody) == (["vllm", "original"], "")
    assert forms(drafter, ours, None) == (
        [], "this medusa changes its target: merge target_adapter into it before serving"
    )  # fmt: skip


def test_a_merged_target_that_is_another_fails(
    tmp_path: Path, spec: Pretrained, monkeypatch: pytest.MonkeyPatch
):
    """Without its matrices, say."""
    drafter = changing(tmp_path / "medusa", spec)
    original = spec.load()
    right = type(original.model).save_pretrained
    monkeypatch.setattr(
        type(original.model), "save_pretrained", lambda _, folder: right(original.model, folder)
    )
    with pytest.raises(Failed, match="is not the one that the drafter changed"):
        Export(target=spec).run(tmp_path, drafter=drafter)
    assert not (tmp_path / "artifact").exists()


def test_fc_columns_in_another_order_than_engines_hand_over_fail(
    tmp_path: Path, spec: Pretrained, monkeypatch: pytest.MonkeyPatch
):
    drafter = saved(Eagle3, tmp_path / "eagle3", spec, taps=[1, 0])
    monkeypatch.setattr(eagle3_vllm, "rising", lambda d: (list(d.taps), d.state_dict()))
    with pytest.raises(Failed, match=r"as engines read them.* position 1"):
        Export(target=spec, format="vllm").run(tmp_path, drafter=drafter)


def test_heads_of_a_sharded_target_are_proved_on_states_drawn_at_random(
    tmp_path: Path, place: Path, spec: Pretrained
):
    """Whose layers one process need not hold."""
    drafter = saved(Eagle3, tmp_path / "eagle3", spec, taps=[0, 1])
    sharded = Pretrained(path=str(place), dtype="float32", parallel="tensor")
    found = Export(target=sharded).run(tmp_path, drafter=drafter)
    assert 0 < found["difference"] < CLOSE
    lent = Lent(spec.borrow())
    assert isinstance(lent.target, Borrowed)
    a, b = lent.prompts
    assert not torch.equal(a.states_LTD[0], lent.embed(a.ids_T))
    assert not torch.equal(a.ids_T, b.ids_T)
    whole = Lent(spec.load())
    assert torch.equal(whole.prompts[0].states_LTD[0], whole.embed(whole.prompts[0].ids_T))


def test_the_states_that_exports_are_proved_on_are_those_that_a_drafter_reads(spec: Pretrained):
    target = spec.load()
    lent = Lent(target)
    prompt = lent.prompts[1]
    out = target(prompt.ids_T[None], taps=(0, 1))
    assert out.taps_BTLD is not None
    torch.testing.assert_close(prompt.states_LTD[-1], out.hidden_BTD[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        prompt.states_LTD[:2].transpose(0, 1), out.taps_BTLD[0], atol=1e-5, rtol=0
    )


def test_what_is_judged_is_the_drafter_as_it_is_stored(spec: Pretrained):
    """Rounded to the file's dtype; nobody's weights are changed by it."""
    drafter = Medusa(spec.shape_of(), heads=1).eval()
    with torch.no_grad():
        drafter.lm_heads[0].weight.normal_()
    before = drafter.lm_heads[0].weight.clone()
    facts = Facts(spec.shape_of(), draft_length=1, lent=Lent(spec.load()))
    (prompt, _) = facts.prompts()
    exact = judged(drafter, prompt, facts)[0]
    rounded = judged(drafter, prompt, Facts(**{**vars(facts), "dtype": torch.bfloat16}))[0]
    assert torch.equal(drafter.lm_heads[0].weight, before)
    states_TD = prompt.states_LTD[-1][: len(exact)]
    torch.testing.assert_close(exact, states_TD @ before.T)
    torch.testing.assert_close(rounded, states_TD @ before.bfloat16().float().T)


def test_after_a_tree_engines_get_the_drafters_own_length(tmp_path: Path, spec: Pretrained):
    facts = Facts(spec.shape_of(), draft_length=4, stop_below=0.1)
    tree = reported(tmp_path / "tree", tree={"kind": "static"})
    assert measured(facts, None) == facts
    assert measured(facts, tree).draft_length == 4
    assert measured(facts, tree).stop_below == 0.2
    assert measured(facts, reported(tmp_path / "chain", draft_length=2)).draft_length == 2


# --- before anything starts ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "onnx", "family": "medusa"}, "is 'onnx'; .* medusa are: vllm, original"),
        ({"format": ["vllm", "../x"], "family": "eagle"}, "is '../x'; .* eagle are: vllm"),
        ({"format": "original", "family": "drafters.lm.LM"}, "are: transformers, gguf"),
        ({"format": "gguf", "family": "lm"}, "gguf_converter to its convert_hf_to_gguf.py"),
        ({"gguf_converter": "/no/convert.py"}, "gguf_converter is /no/convert.py, which is not"),
        ({"format": [], "family": "lm"}, "name each format once: transformers, gguf"),
        ({"format": ["vllm", "vllm"], "family": "eagle"}, "name each format once"),
        (
            {"family": "drafters.clover.Clover", "format": "vllm"},
            r"family clover .*stages\.export=null.* lm: tr",
        ),
        ({"family": "hydra_heads", "format": "vllm"}, "no format of the family hydra_heads"),
    ],
    ids=[
        "unknown",
        "a path",
        "another family's",
        "gguf",
        "no converter",
        "none",
        "twice",
        "clover",
        "hydra",
    ],
)
def test_a_format_that_the_family_lacks_is_found_at_once(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Export(target=Pretrained(), **settings)


def test_without_a_converter_all_formats_of_an_lm_are_those_that_need_none():
    assert Export(target=Pretrained()).formats("lm") == ["transformers"]
    here = Export(target=Pretrained(), gguf_converter=__file__)
    assert here.formats("lm") == ["transformers", "gguf"]


def test_of_a_family_that_no_engine_serves_nothing_is_exported(
    tmp_path: Path, spec: Pretrained, capsys: pytest.CaptureFixture[str]
):
    """A recipe of all families ends well; who asks for a format is told. A recipe may give its
    stages drafters of their own, so that the folder says which family it is."""
    drafter = saved(Clover, tmp_path / "clover", spec)
    Export(target=spec).run(tmp_path, drafter=drafter)
    assert json.loads((tmp_path / "artifact" / "export.json").read_text()) == {}
    assert "no engine serves clover" in capsys.readouterr().out
    assert forms(drafter, load(drafter, spec.shape_of(None)), tmp_path / "artifact")[0] == []
    with pytest.raises(ValueError, match="no format of the family clover"):
        Export(target=spec, format="vllm").run(tmp_path, drafter=drafter)


def planned(*words: str) -> list[str]:
    try:
        config = compose(
            "recipe=quickstart", *words,
        )  # fmt: skip
    except OmegaConfBaseException as error:
        pytest.skip(str(error))
    return [stage.name for stage in plan(config, Path("nowhere"))]


def test_the_stage_is_planned_with_the_recipes_drafter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.plan.fingerprint", lambda config, inputs: "0" * 12)
    assert "export" in planned("stages.export.format=transformers")
    assert "export" in planned("drafter=eagle", "stages.export.format=[vllm]")
    with pytest.raises(ValueError, match=r"is 'vllm'; .* lm are: transformers"):
        planned("stages.export.format=vllm")
    with pytest.raises(ValueError, match="no format of the family clover2"):
        planned("drafter=clover2", "stages.export.format=vllm")
    assert "export" in planned("drafter=clover2")


def test_another_code_of_the_layouts_is_another_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = Export(target=Pretrained()).fingerprint()
    (tmp_path / "files.py").write_text("changed")
    monkeypatch.setattr("train.layouts.files.__file__", str(tmp_path / "files.py"))
    assert Export(target=Pretrained()).fingerprint() != before


def test_what_is_the_targets_has_the_dtype_that_was_measured(tmp_path: Path, spec: Pretrained):
    """So that engines, which load the target in it, find their own matrix and share it."""
    drafter = saved(Medusa, tmp_path / "medusa", spec, heads=2, head="shared")
    report = reported(tmp_path / "report", draft_length=2)
    Export(target=spec, format="vllm").run(tmp_path, drafter=drafter, report=report)
    tensors = load_file(tmp_path / "artifact" / "vllm" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "lm_heads.1.weight" not in tensors
    target = spec.load(dtype="bfloat16")
    assert torch.equal(tensors["lm_heads.0.weight"], target.head_rows(torch.arange(300)))


def test_an_lm_as_gguf_is_the_converters_work(
    tmp_path: Path, spec: Pretrained, monkeypatch: pytest.MonkeyPatch
):
    """From a proved transformers layout with its tokenizer, which is not left behind."""
    drafter = saved(LM, tmp_path / "lm", spec, width=64)
    seen: dict[str, Any] = {}

    def write(folder: Path, out: Path, *given: str | None) -> list[str]:
        seen.update(files={p.name for p in folder.iterdir()}, given=given)
        out.mkdir()
        (out / "drafter.gguf").write_bytes(b"GGUF")
        return ["a note"]

    monkeypatch.setattr("train.layouts.gguf.write", write)
    script = tmp_path / "convert.py"
    script.touch()
    stage = Export(target=spec, format="gguf", gguf_converter=str(script))
    found = stage.run(tmp_path, drafter=drafter)
    assert {"model.safetensors", "tokenizer.json", "generation_config.json"} <= seen["files"]
    assert seen["given"] == (str(script), None, None)
    entry = told(tmp_path)["gguf"]
    assert (entry["engines"], entry["notes"]) == (["llama_cpp"], ["a note"])
    assert (entry["difference"], found["difference"]) == (None, 0.0)
    assert entry["dtype"] == "float32"
    assert {p.name for p in (tmp_path / "artifact").iterdir()} == {"gguf", "export.json"}
