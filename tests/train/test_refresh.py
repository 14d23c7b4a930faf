"""Training on from a drafter that is there: what is taken over, what is refused, what is replayed,
and the recipe from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.chat import prompt_ids
from data.language import Gated
from data.replay import Replay
from data.sources import Local
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.base import Blueprint, Trained, cast, load, save
from drafters.eagle3 import Eagle3
from drafters.lm import LM
from drafters.medusa import Medusa
from tests.drafters import contract
from tests.tiny import write_chats, write_target, write_texts
from tests.train.composing import compose
from train.compose import build, find
from train.layouts import table
from train.layouts.given import Facts, Lent
from train.parent import Parent
from train.plan import plan
from train.vocabulary import compare, resized

TAPS = [0, 1]
MEDUSA = {"heads": 2, "layers": 1, "head": "own"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target and its text."""
    folder = tmp_path_factory.mktemp("refresh")
    write_target(folder / "target", write_texts(folder), ends=20)
    write_chats(folder)
    return folder


def target_of(place: Path) -> Pretrained:
    return Pretrained(path=str(place / "target"), dtype="float32")


def blueprint(family: str, **arguments: Any) -> Blueprint:
    target = contract.arguments(family, **arguments)
    return Blueprint(find(target.pop("_target_"), family), target)


def published(
    place: Path, folder: Path, drafter: Blueprint, dtype: torch.dtype = torch.float32
) -> Trained:
    """The drafter, as random as it was drawn, saved as one that was published."""
    torch.manual_seed(3)
    made = drafter(target_of(place).shape_of())
    assert isinstance(made, Trained)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save(cast(made, dtype), folder, drafter.arguments)
    target_of(place).tokenizer().save_pretrained(folder)
    return made


def adopted(place: Path, checkpoint: Path, drafter: Blueprint, out: Path, **target: Any) -> Trained:
    """What stage `parent` leaves, loaded."""
    stage = Parent(
        target=Pretrained(**({"path": str(place / "target"), "dtype": "float32"} | target)),
        drafter=drafter,
        checkpoint=str(checkpoint),
    )
    stage.check({})
    stage.run(out)
    return load(out / "artifact", stage.target.shape_of())


def require_equal(found: Trained, expected: Trained) -> None:
    mine, theirs = found.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype != torch.bfloat16
        assert torch.equal(tensor, theirs[name].to(tensor.dtype)), name


# ---- what is taken over


@pytest.mark.parametrize("family", contract.TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_family_is_taken_over_whole_and_in_fp32(family, dtype, place, tmp_path, capsys):
    """Weights published in bf16 must not stay so: a step of 1e-4 would be rounded away."""
    drafter = blueprint(family)
    made = published(place, tmp_path / "there", drafter, dtype)
    require_equal(adopted(place, tmp_path / "there", drafter, tmp_path / "out"), made)
    note = json.loads((tmp_path / "out" / "artifact" / "parent.json").read_text())
    assert (note["layout"], note["checkpoint"]) == ("draftsmith", "there")
    assert note["vocabulary"]["verdict"] == "identical"
    said = capsys.readouterr().out
    assert f"all {len(made.state_dict())} tensors" in said
    assert str(tmp_path) not in json.dumps(note)


LAYOUTS = [
    (family, form) for family in ("medusa", "eagle", "eagle3") for form in table.LAYOUTS[family]
]


@pytest.mark.parametrize(("family", "form"), LAYOUTS, ids=["-".join(pair) for pair in LAYOUTS])
def test_layouts_of_others_are_read(family, form, place, tmp_path):
    """Without drafter.json: the family is known by the files."""
    settings = {"medusa": MEDUSA, "eagle3": {"taps": TAPS, "vocabulary": 200}}.get(family, {})
    drafter = blueprint(family, **settings)
    made = published(place, tmp_path / "own", drafter)
    if isinstance(made, Eagle3):
        taken = torch.arange(200) + 50
        made.d2t.copy_(taken - torch.arange(200))
        made.t2d.zero_()[taken] = True
    target = target_of(place).load()
    facts = Facts(shape=target.shape, draft_length=2, lent=Lent(target))
    folder = tmp_path / "there"
    folder.mkdir()
    table.LAYOUTS[family][form].write(made, folder, facts)
    assert not (folder / "drafter.json").exists()
    require_equal(adopted(place, folder, drafter, tmp_path / "out"), made)
    note = json.loads((tmp_path / "out" / "artifact" / "parent.json").read_text())
    assert (note["layout"], note["vocabulary"]["verdict"]) == (form, "untold")


def language_model(place: Path, folder: Path, **changes: Any) -> Any:
    """A plain causal LM of transformers, with the target's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": target_of(place).shape_of().vocab_size, "hidden_size": 48}
    sizes |= {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 3}
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(sizes | {"max_position_embeddings": 256} | changes)))
    model.save_pretrained(folder)
    target_of(place).tokenizer().save_pretrained(folder)
    return model


def test_a_plain_language_model_is_read_and_named_as_checkpoint(place, tmp_path):
    model = language_model(place, tmp_path / "there")
    with pytest.raises(ValueError, match=r"add drafter=lm drafter\.checkpoint=") as error:
        adopted(place, tmp_path / "there", blueprint("lm", width=64), tmp_path / "x")
    assert "it is of another architecture" in str(error.value)
    given = blueprint("lm", checkpoint=str(tmp_path / "there"))
    found = adopted(place, tmp_path / "there", given, tmp_path / "out")
    assert isinstance(found, LM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_training_goes_on_from_the_parent(place, tmp_path):
    """Nothing of the random start is left: a rate near zero leaves the parent as it was."""
    from train.distill import Distill
    from train.objectives import CE
    from train.schedule import AdamW, Schedule

    drafter = blueprint("lm", width=64)
    made = published(place, tmp_path / "there", drafter, torch.bfloat16)
    adopted(place, tmp_path / "there", drafter, tmp_path / "out")
    stage = Distill(
        target=target_of(place),
        drafter=drafter,
        objective=CE(),
        schedule=Schedule(tokens=128, batch_tokens=64, sequence_length=64, dtype="float32"),
        optim=AdamW(lr=1e-9, weight_decay=0.0),
        data=Local(files=[str(place / "text.jsonl")], text="{text}"),
    )
    stage.run(tmp_path / "trained", drafter=tmp_path / "out" / "artifact")
    found = load(tmp_path / "trained" / "artifact", target_of(place).shape_of())
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor, made.state_dict()[name].float(), atol=1e-6), name


def test_a_name_on_the_hub_is_noted_with_its_commit(place, tmp_path, monkeypatch):
    """What a branch meant when it was fetched."""
    drafter = blueprint("medusa", **MEDUSA)
    snapshot = tmp_path / "snapshots" / ("c0ffee" * 6 + "1234")
    made = published(place, snapshot, drafter)
    asked = []
    monkeypatch.setattr("train.parent.fetch", lambda *given: asked.append(given) or snapshot)
    stage = Parent(target=target_of(place), drafter=drafter, checkpoint="me/mine", revision="v1")
    stage.check({})
    assert asked == []
    stage.run(tmp_path / "out")
    assert asked == [("me/mine", "v1")]
    note = json.loads((tmp_path / "out" / "artifact" / "parent.json").read_text())
    assert (note["checkpoint"], note["revision"]) == ("me/mine", snapshot.name)
    require_equal(load(tmp_path / "out" / "artifact", target_of(place).shape_of()), made)


# ---- what does not fit


def other_width(place: Path, folder: Path) -> None:
    """A drafter of the same settings for a wider target."""
    from dataclasses import replace

    shape = replace(target_of(place).shape_of(), hidden_size=128)
    save(Medusa(shape, **MEDUSA), folder, MEDUSA)


def other_taps(place: Path, folder: Path) -> None:
    published(place, folder, blueprint("eagle3", taps=[1, 0]))


def other_positions(place: Path, folder: Path) -> None:
    """The same shapes, turned otherwise by the positions."""
    published(place, folder, blueprint("eagle"))
    config = json.loads((folder / "config.json").read_text())
    turned = {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    (folder / "config.json").write_text(json.dumps(config | turned))


def other_model_positions(place: Path, folder: Path) -> None:
    published(place, folder, blueprint("lm", width=64))
    config = json.loads((folder / "config.json").read_text())
    turned = {"rope_theta": 5e5, "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": turned}))


def other_tensors(place: Path, folder: Path) -> None:
    published(place, folder, blueprint("medusa", **MEDUSA))
    saved = load_file(folder / "model.safetensors")
    saved["blocks.0.layers.0.gain"] = saved.pop("blocks.0.layers.0.bias")
    save_file(saved, folder / "model.safetensors")
    note = json.loads((folder / "drafter.json").read_text())
    del note["files"]
    (folder / "drafter.json").write_text(json.dumps(note))


def other_model(place: Path, folder: Path) -> None:
    """A language model whose file lacks a matrix: transformers would draw a new one."""
    language_model(place, folder, tie_word_embeddings=False)
    saved = load_file(folder / "model.safetensors")
    del saved["lm_head.weight"]
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})


def damaged(place: Path, folder: Path) -> None:
    published(place, folder, blueprint("medusa", **MEDUSA))
    saved = load_file(folder / "model.safetensors")
    saved["blocks.0.layers.0.bias"] += 1
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})


MISFITS: dict[str, tuple[Callable[[Path, Path], Any], str, dict[str, Any], str]] = {
    "family": (
        lambda p, f: published(p, f, blueprint("medusa", **MEDUSA)), "lm", {},
        r"is of the family medusa \(layout draftsmith\), and a drafter of the family lm was to be "
        r"trained: add drafter=medusa drafter\.heads=2 drafter\.layers=1 drafter\.head=own",
    ),
    "settings": (
        lambda p, f: published(p, f, blueprint("medusa", **MEDUSA)), "medusa", {"heads": 3},
        r"it has no blocks\.2\..*; to train on it, add drafter=medusa drafter\.heads=2",
    ),
    "target": (
        other_width, "medusa", MEDUSA,
        r"is 128 x 128, expected 64 x 64; .* its settings are the configured ones, so it was made "
        r"for another target than this one, of width 64, 2 layers and 300 tokens",
    ),
    "taps": (
        other_taps, "eagle3", {"taps": TAPS},
        r"it taps hidden_states \[1, 0\] of the target, and \[0, 1\] are configured; to train on "
        r"it, add .*'drafter\.taps=\[1,0\]'",
    ),
    "positions": (other_positions, "eagle", {}, r"rope_theta 500000\.0, not 10000\.0"),
    "positions of an lm": (
        other_model_positions, "lm", {"width": 64},
        r"of another architecture: rope_parameters is .*500000\.0.*, not .*10000\.0",
    ),
    "tensors": (
        other_tensors, "medusa", MEDUSA,
        r"it has no blocks\.0\.layers\.0\.bias; its blocks\.0\.layers\.0\.gain is unknown",
    ),
    "missing": (other_model, "lm", {"checkpoint": "there"}, r"asks for: lm_head\.weight"),
    "damaged": (damaged, "medusa", MEDUSA, r"the hash of model\.safetensors differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_what_does_not_fit_is_a_sentence_with_what_would(case, place, tmp_path):
    make, family, settings, sentence = MISFITS[case]
    there = tmp_path / "there"
    make(place, there)
    if "checkpoint" in settings:
        settings = {"checkpoint": str(there)}
    with pytest.raises(ValueError, match=sentence):
        adopted(place, there, blueprint(family, **settings), tmp_path / "out")
    assert not (tmp_path / "out" / "artifact").exists()


def test_a_parent_that_is_here_is_judged_before_anything_starts(place, tmp_path):
    """Of a plan, too; a name on the Hub is only looked at as a name."""
    published(place, tmp_path / "there", blueprint("medusa", **MEDUSA))
    stage = Parent(
        target=target_of(place), drafter=blueprint("lm"), checkpoint=str(tmp_path / "there")
    )
    with pytest.raises(ValueError, match="add drafter=medusa"):
        stage.check({})
    for bad in ("../there", "/nowhere/at/all", "a/b/c"):
        with pytest.raises(ValueError, match="neither a folder here nor a name on the Hub"):
            Parent(target=target_of(place), drafter=blueprint("lm"), checkpoint=bad).check({})
    unnamed = Parent(target=target_of(place), drafter=blueprint("lm"))
    unnamed.check({})
    with pytest.raises(ValueError, match=r"set stages\.parent\.checkpoint="):
        unnamed.run(tmp_path / "out")


# ---- vocabularies


def changed_tokenizer(place: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The target's tokenizer with another tokenizer.json."""
    target_of(place).tokenizer().save_pretrained(folder)
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    change(words)
    file.write_text(json.dumps(words))


def swap(words: dict[str, Any]) -> None:
    vocabulary = words["model"]["vocab"]
    a, b = (next(t for t, i in vocabulary.items() if i == at) for at in (41, 47))
    vocabulary[a], vocabulary[b] = 47, 41


def longer(words: dict[str, Any]) -> None:
    size = 300
    words["added_tokens"].append({
        "id": size, "content": "<|new|>", "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    })  # fmt: skip


def no_merges(words: dict[str, Any]) -> None:
    words["model"]["merges"] = words["model"]["merges"][:5]


@pytest.mark.parametrize(
    ("change", "rows", "verdict"),
    [
        (lambda words: None, 300, "identical"),
        (lambda words: None, 320, "suffix-padded"),
        (longer, 301, "suffix-padded"),
        (swap, 300, r"id 41 is .* in it and .* in the target's; a drafter reads and guesses ids"),
        (no_merges, 300, r"is \[.*\] in it and \[.*\] in the target's; a drafter must share"),
        (lambda words: None, 290, "290 rows for the 300 tokens"),
    ],
    ids=["same", "more rows", "a token more", "two swapped", "cut otherwise", "fewer rows"],
)
def test_vocabularies_are_compared_by_ids_and_texts(change, rows, verdict, place, tmp_path):
    changed_tokenizer(place, tmp_path / "it", change)
    ours = target_of(place).tokenizer()
    if verdict in ("identical", "suffix-padded"):
        found = compare(ours, tmp_path / "it", rows, 300)
        assert found.verdict == verdict
        assert found.tokens == 300
        assert ("its 320 rows become 300" in found.said) == (rows == 320)
    else:
        with pytest.raises(ValueError, match=verdict):
            compare(ours, tmp_path / "it", rows, 300)


def test_without_a_tokenizer_the_size_must_be_the_targets(place, tmp_path):
    ours = target_of(place).tokenizer()
    assert compare(ours, tmp_path, 300, 300).verdict == "untold"
    with pytest.raises(ValueError, match="has 320 tokens and the target 300, and no tokenizer"):
        compare(ours, tmp_path, 320, 300)


def test_rows_that_are_added_are_never_the_likeliest():
    matrix = torch.randn(50, 8)
    wider = resized(matrix, 60)
    assert torch.equal(wider[:50], matrix)
    logits = torch.randn(100, 8) @ wider.T
    assert (logits[:, 50:].amax(1) < logits[:, :50].amax(1)).all()
    assert torch.equal(resized(matrix, 40), matrix[:40])
    assert resized(torch.ones(4, dtype=torch.bool), 6).tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("family", ["lm", "medusa", "eagle3"])
@pytest.mark.parametrize("rows", [290, 320], ids=["the target has fewer", "the target has more"])
def test_padded_vocabularies_are_padded_or_cut(family, rows, place, tmp_path):
    """A target of other rows and the same tokens, as Qwen's sizes differ."""
    from transformers import AutoModelForCausalLM

    settings = {"medusa": MEDUSA, "lm": {"width": 64}}.get(
        family, {"taps": TAPS, "vocabulary": None}
    )
    drafter = blueprint(family, **settings)
    made = published(place, tmp_path / "there", drafter)
    model = AutoModelForCausalLM.from_pretrained(place / "target")
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(tmp_path / "target")
    # of the tokens, only those that have a row in the smaller target
    words = target_of(place).tokenizer()
    words.save_pretrained(tmp_path / "target")
    if rows < 300:
        shorten(tmp_path / "target", rows)
        shorten(tmp_path / "there", rows)
    found = adopted(tmp_path, tmp_path / "there", drafter, tmp_path / "out")
    small = min(rows, 300)
    compared = 0
    for name, tensor in found.state_dict().items():
        before = made.state_dict()[name]
        if tensor.shape == before.shape:
            assert torch.equal(tensor, before), name
        else:
            assert len(tensor) == rows
            assert torch.equal(tensor[:small], before[:small]), name
            compared += 1
    assert compared
    note = json.loads((tmp_path / "out" / "artifact" / "parent.json").read_text())
    assert note["vocabulary"]["verdict"] == "suffix-padded"


def shorten(folder: Path, rows: int) -> None:
    """Leaves a tokenizer its first tokens."""
    file = folder / "tokenizer.json"
    words = json.loads(file.read_text())
    model = words["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < rows}
    merged = (
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", "", 1)
        for pair in model["merges"]
    )
    model["merges"] = [
        m for m, whole in zip(model["merges"], merged, strict=True) if whole in model["vocab"]
    ]
    words["added_tokens"] = [t for t in words["added_tokens"] if t["id"] < rows]
    file.write_text(json.dumps(words))


# ---- what comes from strangers


def pickled(folder: Path, marker: Path) -> None:
    """A pickle that writes the marker when it is opened."""
    code = f"cos\nsystem\n(S'touch {marker}'\ntR."
    for name in ("pytorch_model.bin", "medusa_lm_head.pt", "optimizer.pkl", "training_args.bin"):
        (folder / name).write_bytes(code.encode())


def test_a_pickle_beside_safetensors_is_never_opened(place, tmp_path):
    marker = tmp_path / "marker"
    for family, settings in (("medusa", MEDUSA), ("lm", {"width": 64})):
        there = tmp_path / family
        published(place, there, blueprint(family, **settings))
        pickled(there, marker)
        adopted(place, there, blueprint(family, **settings), tmp_path / f"out_{family}")
    language_model(place, tmp_path / "plain")
    pickled(tmp_path / "plain", marker)
    given = blueprint("lm", checkpoint=str(tmp_path / "plain"))
    adopted(place, tmp_path / "plain", given, tmp_path / "out")
    assert not marker.exists()


def only_pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    note = json.loads((folder / "drafter.json").read_text())
    del note["files"]
    (folder / "drafter.json").write_text(json.dumps(note))


def changed(name: str, **settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(said | settings))

    return change


def foreign_code(folder: Path) -> None:
    (folder / "drafter.json").unlink()
    (folder / "modeling_evil.py").write_text("raise SystemExit('the code was run')")
    auto = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    changed("config.json", auto_map=auto)(folder)


def renamed(folder: Path) -> None:
    """transformers would turn to the pickle."""
    (folder / "drafter.json").unlink()
    (folder / "model.safetensors").rename(folder / "weights.safetensors")


def no_layout(folder: Path) -> None:
    (folder / "drafter.json").unlink()
    (folder / "config.json").write_text(json.dumps({"architectures": ["Nothing"]}))


STRANGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle only": (only_pickle, "holds no weights as safetensors; a pickle"),
    "code": (foreign_code, "needs code that comes with it, which draftsmith never runs"),
    "family": (changed("drafter.json", family="../../evil"), "names a family that is not one of"),
    "family of code": (changed("drafter.json", family="os"), "names a family that is not one of"),
    "family no text": (changed("drafter.json", family=["lm"]), "drafter.json is not readable"),
    "a name that leads away": (
        changed("drafter.json", files={"../../secret": {"bytes": 1, "sha256": "0"}}),
        "lists a file outside its folder",
    ),
    "renamed": (renamed, "its weights are in no file that transformers reads"),
    "no layout": (no_layout, "in no layout that draftsmith reads"),
    "broken": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_strangers_send_is_refused_with_a_sentence(case, place, tmp_path, monkeypatch):
    make, sentence = STRANGE[case]
    published(place, tmp_path / "there", blueprint("lm", width=64))
    pickled(tmp_path / "there", tmp_path / "marker")
    make(tmp_path / "there")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=sentence) as error:
        adopted(place, tmp_path / "there", blueprint("lm", width=64), tmp_path / "out")
    assert "trust_remote_code=True" not in str(error.value)
    assert not (tmp_path / "marker").exists()


def test_what_is_to_be_typed_comes_from_no_stranger(place, tmp_path):
    """A note's settings are repeated only where they are plain."""
    published(place, tmp_path / "there", blueprint("medusa", **MEDUSA))
    odd = {"heads": 2, "x; rm -rf ~": 1, "head": "$(rm -rf ~)", "tree": {"kind": "static"}}
    changed("drafter.json", arguments=odd)(tmp_path / "there")
    with pytest.raises(ValueError, match=r"add drafter=medusa drafter\.heads=2$"):
        adopted(place, tmp_path / "there", blueprint("lm", width=64), tmp_path / "out")


# ---- replay


def written(folder: Path, name: str, rows: int, word: str = "Haus") -> Local:
    file = folder / f"{name}.jsonl"
    lines = [json.dumps({"q": f"{name} {i}: {word} {i * 7} {word[::-1]}"}) for i in range(rows)]
    file.write_text("\n".join(lines) + "\n")
    return Local(files=[str(file)], prompt="{q}")


def asked(source: Replay) -> list[str]:
    return [row["messages"][0]["content"].split()[0] for row in Gated(source, of="prompt")]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.75])
def test_of_any_first_rows_the_share_is_old(share: float, tmp_path: Path, capsys) -> None:
    new, old = written(tmp_path, "new", 60), written(tmp_path, "old", 400)
    names = asked(Replay(new=new, old=old, share=share))
    for n in range(1, len(names) + 1):
        assert names[:n].count("old") == int(n * share), n
    assert names.count("new") == 60
    assert names[-1] == "new"
    said = f"replay: {names.count('old')} of {len(names)} rows are old"
    assert said in capsys.readouterr().out


def test_old_rows_that_end_or_are_absent_leave_the_new(tmp_path: Path, capsys) -> None:
    new, old = written(tmp_path, "new", 60), written(tmp_path, "old", 4)
    names = asked(Replay(new=new, old=old, share=0.2))
    assert (names.count("new"), names.count("old")) == (60, 4)
    assert "replay: 4 of 64 rows are old" in capsys.readouterr().out
    for without in (Replay(new=new), Replay(new=new, old=old, share=0.0)):
        assert asked(without) == ["new"] * 60
    with pytest.raises(ValueError, match="expected 0 or more and less than 1"):
        Replay(new=new, old=old, share=1.0)


def test_a_reader_that_has_enough_is_told_the_share(tmp_path: Path, capsys) -> None:
    rows = Gated(
        Replay(new=written(tmp_path, "new", 60), old=written(tmp_path, "old", 60)), of="prompt"
    )
    assert len(list(islice(rows, 20))) == 20
    del rows
    assert "rows are old" in capsys.readouterr().out


def test_other_rows_or_another_share_are_another_source(tmp_path: Path) -> None:
    new, old = written(tmp_path, "new", 60), written(tmp_path, "old", 60)
    marks = [
        Replay(new=new, old=old, share=share).fingerprint() for share in (0.2, 0.3)
    ] + [Replay(new=old, old=new).fingerprint(), Replay(new=new).fingerprint()]  # fmt: skip
    assert len(set(marks)) == 4
    assert Replay(new=new, old=old).fingerprint() == marks[0]


def test_each_part_is_gated_for_its_own_language(tmp_path: Path) -> None:
    """A part in another language than it names is an error, whatever its share."""
    korean = written(tmp_path, "old", 60, word="나는 오늘 학교에 갔다")
    german = written(tmp_path, "new", 60)
    korean.language = "de"
    with pytest.raises(ValueError, match="asked for de, found"):
        asked(Replay(new=german, old=korean))


# ---- the recipe


def successor(folder: Path, changed: float) -> None:
    """Makes of a target a chain of words: each token has one likely successor. `changed`: the share
    of tokens that have another one than without."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    rng = torch.Generator().manual_seed(1)
    size, width = model.config.vocab_size, model.config.hidden_size
    words_VD = torch.randn(size, width, generator=rng)
    after = torch.randperm(size, generator=rng)
    some = torch.randperm(size, generator=rng)[: int(changed * size)]
    after[some] = after[some.roll(1)]
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(words_VD)
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(size, width))
        model.lm_head.weight[after] = 0.14 * words_VD
    model.save_pretrained(folder)


SMALL = {
    "generate": {"limit": 160, "max_new_tokens": 24, "temperatures": "[1.0]"},
    "finetune": {
        "schedule.tokens": 16_384, "schedule.batch_tokens": 512, "schedule.sequence_length": 64,
        "schedule.dtype": "float32", "optim.lr": "1e-2", "validate_every": 1000,
    },
    "bench": {
        "limit": 16, "max_new_tokens": 24, "temperatures": "[1.0]", "batch_sizes": "[1]",
        "draft_lengths": "[2]", "trial_prompts": 1, "control_prompts": 1, "repeats": 1,
        "law_samples": 0, "dtype": "float32", "heldout_only": "false", "baselines": "{ngram: null}",
    },
}  # fmt: skip


def run(config: dict[str, Any], root: Path) -> dict[str, Path]:
    """Every stage of a recipe in this process; the artifacts."""
    found = {}
    for stage in plan(config, root):
        stage.folder.mkdir(parents=True)
        inputs = {name: str(place) for name, place in stage.inputs.items()}
        note = {"name": stage.name, "fingerprint": stage.fingerprint, "config": stage.config}
        (stage.folder / "stage.json").write_text(json.dumps(note | {"inputs": inputs}))
        build(stage.config).run(stage.folder, **stage.inputs)
        found[stage.name] = stage.folder / "artifact"
    return found


def recipe(folder: Path, *words: str) -> dict[str, Any]:
    """refresh for Medusa heads on the tiny target and its text."""
    local = "_target_: data.sources.Local, prompt: '{question}'"
    mine = ["recipe=refresh", "drafter=medusa", "drafter.heads=2", "target.dtype=float32"]
    mine += [f"stages.{name}.{k}={v}" for name, said in SMALL.items() for k, v in said.items()]
    for stage in ("generate", "bench"):
        for part in ("new", "old"):
            slot = f"stages.{stage}.prompts.{part}"
            mine += [f"~{slot}", f"+{slot}={{{local}, files: [{folder / part}.jsonl]}}"]
    return compose(*mine, *words)


@pytest.fixture(scope="module")
def outdated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two revisions of a target, the second of another mind about half of its words, with prompts;
    and a drafter that learnt from the first."""
    folder = tmp_path_factory.mktemp("outdated")
    texts = write_texts(folder)
    for name, share in (("first", 0.0), ("second", 0.5)):
        write_target(folder / name, texts, ends=20)
        successor(folder / name, share)
    for name, seed in (("new", 0), ("old", 1000)):
        lines = [{"question": f"{seed + i}? Hund sieht Katze"} for i in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    later = ("parent", "bench_parent", "bench", "compare", "export", "publish")
    absent = [f"stages.{name}=null" for name in later]
    config = recipe(
        folder, f"target.path={folder / 'first'}", "stages.finetune.needs.drafter=null", *absent
    )
    return folder, run(config, folder / "before")["finetune"]


def tau(folder: Path, drafter: Path) -> float:
    """Tokens per call of the second target on prompts of the new file."""
    target = Pretrained(path=str(folder / "second"), dtype="float32")
    model, words = target.load(), target.tokenizer()
    asked = [[{"role": "user", "content": f"{i}? Hund sieht Katze"}] for i in range(300, 340)]
    done = decode(
        model, load(drafter, model.shape), [prompt_ids(words, turns) for turns in asked],
        sampling=Sampling(temperature=1.0), max_new_tokens=24,
    )  # fmt: skip
    rounds = sum(len(answer.accepted) for answer in done.answers)
    return sum(len(answer.ids) for answer in done.answers) / rounds


def test_a_drafter_of_an_older_target_learns_the_new_one(outdated, tmp_path, capsys):
    folder, parent = outdated
    absent = [
        f"stages.{name}=null" for name in ("bench_parent", "bench", "compare", "export", "publish")
    ]
    words = [f"target.path={folder / 'second'}", f"stages.parent.checkpoint={parent}"]
    found = run(recipe(folder, *words, *absent), tmp_path)
    before, after = tau(folder, found["parent"]), tau(folder, found["finetune"])
    assert before < 1.4 < 1.6 < after
    assert "rows are old" in capsys.readouterr().out
    shards = found["generate"].glob("shard-*.jsonl")
    rows = [json.loads(line)["prompt"] for f in shards for line in f.read_text().splitlines()]
    old = sum(int(prompt.split("?")[0]) >= 1000 for prompt in rows)
    assert 0.1 < old / len(rows) < 0.3


@pytest.mark.soak
def test_the_whole_recipe_says_better_on_both_sets(outdated, tmp_path):
    folder, parent = outdated
    words = [f"target.path={folder / 'second'}", f"stages.parent.checkpoint={parent}"]
    found = run(recipe(folder, *words), tmp_path)
    said = json.loads((found["compare"] / "comparison.json").read_text())
    assert {row["set"] for row in said["rows"]} == {"new", "old"}
    for row in said["rows"]:
        assert row["verdict"] == "better", row
        assert row["tau"]["change"]["low"] > 0.1
    assert said["worse"] is False
    card = (found["publish"] / "README.md").read_text()
    assert "better" in card
    assert (found["publish"] / "comparison.json").is_file()
