"""Publishing: what the folder holds, what is refused, what never leaves this machine, and that the
recipe in it makes the same stages."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from data.sources import Local
from decoding.pretrained import Pretrained
from drafters.base import load, save
from drafters.files import damage
from drafters.lm import LM
from drafters.published import published
from eval.controls import Failed
from eval.report import summarise, write_report
from tests.eval.test_report import CONDITIONS, CONTROLS, many
from tests.local_server import hub_at
from tests.tiny import write_target, write_texts
from tests.train import composing, upload_server
from tests.train.composing import ROOT, command, compose
from train.compose import resolvers
from train.plan import Planned, plan
from train.publish import Publish, objections
from train.publishing import hub
from train.publishing.provenance import recipe, to_give
from train.run import _write

DRAFT = {"draft_length": 3, "stop_below": 0.0, "sample": True}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CANARIES = {"HF_TOKEN": "hf_c4naryc4naryc4naryc4nary", "MY_SECRET": "c4nary-of-nobody"}


def words(folder: Path) -> list[str]:
    """quickstart with a file of ours, one of the shared folder and Python's own text."""
    local = "_target_: data.sources.Local, text: '{text}', licence: mit"
    prompts = "_target_: data.sources.Local, prompt: '{text}', licence: null"
    shared = "${env:DRAFTSMITH_SHARED}/data/shared.jsonl"
    return [
        "recipe=quickstart",
        f"output_dir={folder / 'out'}",
        "~stages.target.data",
        f"+stages.target.data={{{local}, files: [{folder / 'own.jsonl'}]}}",
        "~stages.pretrain.data",
        f"+stages.pretrain.data={{{local}, files: ['{shared}']}}",
        "~stages.generate.prompts",
        f"+stages.generate.prompts={{{prompts}, files: ['{shared}']}}",
        "~stages.bench.prompts.python",
        f"+stages.bench.prompts.python={{{prompts}, files: ['{shared}'], limit: 50}}",
        "stages.publish.language=[ko]",
        "stages.export=null",
        "stages.serve=null",
        "stages.publish.needs.export=null",
        "stages.publish.needs.serve=null",
    ]


def stages(folder: Path, *more: str) -> dict[str, Planned]:
    config = compose(*words(folder), *more)
    return {stage.name: stage for stage in plan(config, folder / "out")}


def runs(ratio: float) -> list[dict]:
    return many(ratio) + many(ratio * 0.9, temperature=1.0)


def measured(ratio: float = 2.0, controls: dict = CONTROLS) -> dict[str, Any]:
    """report.json of a drafter that is so many times as fast at temperature 0, less at 1."""
    known = {"dtype": "bfloat16", "draft": DRAFT, "target_revision": "a" * 64}
    return summarise(runs(ratio), CONDITIONS | known, controls)


def slow(place: Path) -> None:
    (inputs(place)["report"] / "report.json").write_text(json.dumps(measured(0.5)))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where quickstart ran but for publish; its drafter is untrained, its report made
    up."""
    folder = tmp_path_factory.mktemp("ran")
    file = write_texts(folder, name="own.jsonl")
    (folder / "shared" / "data").mkdir(parents=True)
    write_texts(folder / "shared" / "data", name="shared.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DRAFTSMITH_SHARED", str(folder / "shared"))
        found = stages(folder)
    for stage in found.values():
        if stage.name != "publish":
            _write(stage)
            (stage.folder / "environment.json").write_text('{"processor": "P", "devices": []}')
            (stage.folder / "result.json").write_text('{"seconds": 12.0}')
    target = found["target"].folder / "artifact"
    write_target(target, file)
    spec = Pretrained(path=str(target))
    drafter = found["finetune"].folder / "artifact"
    save(LM(spec.load().shape, layers=1, width=64), drafter, {"layers": 1, "width": 64})
    spec.tokenizer().save_pretrained(drafter)
    write_report(found["bench"].folder / "artifact", measured(), runs(2.0))
    return folder


@pytest.fixture
def place(ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, for tests that break something, and the shared folder that it read."""
    monkeypatch.setenv("DRAFTSMITH_SHARED", str(ran / "shared"))
    shutil.copytree(ran / "out", tmp_path / "out")
    for file in (tmp_path / "out").rglob("stage.json"):
        file.write_text(file.read_text().replace(str(ran / "out"), str(tmp_path / "out")))
    return tmp_path


def inputs(place: Path, *names: str) -> dict[str, Path]:
    by = {"drafter": "finetune", "report": "bench", "target": "target"}
    return {k: next((place / "out/stages").glob(f"{v}-*")) / "artifact" for k, v in by.items()}


def publishing(**rest: Any) -> Publish:
    return Publish(**{"target": Pretrained(), "language": ["ko"], "licence": "mit"} | rest)


def run(place: Path, stage: Publish | None = None, **more: Path) -> Path:
    out = place / "out" / "stages" / "publish-0"
    (stage or publishing()).run(out, **inputs(place) | more)
    return out / "artifact"


def everything(folder: Path) -> str:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return "\n".join(file.read_bytes().decode("utf-8", "replace") for file in files)


# ---- the folder


def test_the_folder_is_a_drafter_that_loads_with_its_evidence(place):
    folder = run(place)
    assert {p.name for p in folder.iterdir()} >= {
        *("README.md", "provenance.json", "recipe.yaml", "manifest.json", "drafter.json"),
        *("report.json", "report.md", "report.html", "report.png", "runs.jsonl"),
        *("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"),
    }
    shape = Pretrained(path=str(inputs(place)["target"])).shape_of()
    drafter = load(folder, shape)
    assert {p.dtype for p in drafter.parameters()} <= {torch.bfloat16, torch.float32}
    assert drafter.draft_length == 3
    kept = json.loads((folder / "generation_config.json").read_text())
    assert (kept["num_assistant_tokens"], kept["assistant_confidence_threshold"]) == (3, 0.0)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_manifest_has_every_other_file_and_finds_a_changed_byte(place):
    folder = run(place)
    known = json.loads((folder / "manifest.json").read_text())["files"]
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert known.keys() == there - {"manifest.json"}
    assert damage(folder, known) is None
    (folder / "README.md").write_text((folder / "README.md").read_text() + " ")
    assert "README.md has" in str(damage(folder, known))


def test_staging_again_gives_the_same_bytes(place):
    first = json.loads((run(place) / "manifest.json").read_text())
    assert json.loads((run(place) / "manifest.json").read_text()) == first


def test_after_an_interrupted_upload_the_folder_is_not_made_again(place, monkeypatch, capsys):
    """Unless an input, a setting or a file of it is another."""
    sent: list[Path] = []

    def upload(folder: Path, *a: Any, **k: Any) -> str:
        sent.append(folder)
        if len(sent) == 1:
            raise ConnectionError("the Hub does not answer")
        return COMMIT

    monkeypatch.setattr(hub, "upload", upload)
    with pytest.raises(ConnectionError):
        run(place, publishing(repository="me/mine"))
    made = sent[0].stat().st_ino
    monkeypatch.setattr("train.publish.card", lambda facts: pytest.fail("made again"))
    folder = run(place, publishing(repository="me/mine"))
    assert (folder.stat().st_ino, len(sent)) == (made, 2)
    assert "nothing has changed since the folder was made" in capsys.readouterr().out
    assert (folder.parent / "published.json").is_file()
    monkeypatch.setattr("train.publish.card", lambda facts: "another card")
    (folder / "README.md").write_text("touched")
    assert (
        run(place, publishing(repository="me/mine")) / "README.md"
    ).read_text() == "another card"
    monkeypatch.setattr("train.publish.card", lambda facts: "of another setting")
    changed = run(place, publishing(repository="me/mine", language=["ja"]))
    assert (changed / "README.md").read_text() == "of another setting"
    monkeypatch.setattr("train.publish.card", lambda facts: "of another report")
    (inputs(place)["report"] / "report.md").write_text("another")
    changed = run(place, publishing(repository="me/mine", language=["ja"]))
    assert (changed / "README.md").read_text() == "of another report"


def test_nothing_of_this_machine_is_in_it(place, ran):
    text = everything(run(place))
    for here in (str(place), str(ran), str(ROOT), str(Path.home())):
        assert here not in text
    assert "${env:DRAFTSMITH_SHARED}/data/shared.jsonl" in text
    assert '"own.jsonl"' in text


def test_a_link_and_a_secret_are_refused_and_leave_nothing(place):
    drafter = inputs(place)["drafter"]
    (drafter / "link.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"link\.json is a symbolic link, expected a file"):
        run(place)
    (drafter / "link.json").unlink()
    (drafter / "chat_template.jinja").write_text("{{ 'hf_" + "x" * 30 + "' }}")
    with pytest.raises(ValueError, match=r"chat_template\.jinja.* looks like a token") as error:
        run(place)
    assert "xxx" not in str(error.value)
    assert not (place / "out/stages/publish-0/artifact").exists()


def test_canaries_of_the_environment_are_nowhere(place, monkeypatch, capsys):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hub, "upload", lambda *a, **k: COMMIT)
    folder = run(place, publishing(repository="me/mine"))
    shown = capsys.readouterr()
    assert "c4nary" not in everything(folder.parent) + shown.out + shown.err
    (inputs(place)["drafter"] / "chat_template.jinja").write_text(CANARIES["MY_SECRET"])
    with pytest.raises(ValueError, match=r"chat_template\.jinja") as error:
        run(place)
    assert "c4nary" not in str(error.value)


# ---- formats


def exported(place: Path, **files: dict[str, str]) -> Path:
    """A stage export that left these formats: name of a file -> its text."""
    folder = place / "out" / "stages" / "export-1" / "artifact"
    folder.mkdir(parents=True)
    drafter = str(inputs(place)["drafter"])
    config = {"_target_": "train.publish.Publish", "target": None}
    note = {"name": "export", "fingerprint": "1", "config": config, "inputs": {"drafter": drafter}}
    (folder.parent / "stage.json").write_text(json.dumps(note))
    (folder / "export.json").write_text(
        json.dumps({name: {"engines": ["vllm"], "notes": ["a trap"]} for name in files})
    )
    for name, texts in files.items():
        for file, text in texts.items():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / file).write_text(text)
    return folder


def test_other_formats_stand_in_folders_of_their_names(place):
    left = exported(place, vllm={"config.json": "{}"}, gguf={"x.txt": "x"})
    save_file({"x": torch.ones(2)}, left / "vllm" / "model.safetensors")
    folder = run(place, export=left)
    noted = json.loads((folder / "drafter.json").read_text())["files"]
    assert noted.keys() == {"model.safetensors"}  # so that nobody has to fetch the others
    assert (folder / "vllm" / "config.json").read_text() == "{}"
    assert (folder / "gguf" / "x.txt").is_file()
    text = (folder / "README.md").read_text()
    assert "- `vllm/`: the drafter in the layout `vllm`, read by vllm; a trap" in text
    assert "vllm/config.json" in json.loads((folder / "manifest.json").read_text())["files"]


def test_a_format_of_the_same_tensors_becomes_the_folder_itself(place):
    """Its configuration is the one that was proved; ours lacks the target's end tokens."""
    config = json.loads((inputs(place)["drafter"] / "config.json").read_text())
    proved = json.dumps(config | {"eos_token_id": 77})
    left = exported(place, transformers={"config.json": proved})
    tensors = load_file(inputs(place)["drafter"] / "model.safetensors")
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(halved, left / "transformers" / "model.safetensors", metadata={"a": "b"})
    folder = run(place, export=left)
    assert not (folder / "transformers").exists()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 77
    shape = Pretrained(path=str(inputs(place)["target"])).shape_of()
    assert load(folder, shape).draft_length == 3  # and its hashes are those of drafter.json
    (name, first), *_ = halved.items()
    save_file(halved | {name: first + 1}, left / "transformers" / "model.safetensors")
    folder = run(place, export=left)
    assert (folder / "transformers").is_dir()
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] != 77


def test_what_engines_did_comes_along_and_is_not_asked_of_others(place):
    folder = place / "out" / "stages" / "serve-2" / "artifact"
    (folder / "logs").mkdir(parents=True)
    config = {"_target_": "eval.serve.Serve", "engines": {"vllm": "/etc/hostname"}}
    made = {"drafter": str(inputs(place)["drafter"])}
    note = {"name": "serve", "fingerprint": "2", "config": config, "inputs": made}
    (folder.parent / "stage.json").write_text(json.dumps(note))
    asked = {"conditions": {"dtype": "float32", "draft_length": 4}, "rows": [], "nobody": ""}
    gone = [{"engine": "vllm", "format": "transformers", "why": "not here"}]
    (folder / "served.json").write_text(json.dumps(asked | {"not_run": gone}))
    (folder / "logs" / "vllm.log").write_text("it said this")
    left = run(place, serve=folder)
    assert (left / "logs" / "vllm.log").read_text() == "it said this"
    assert (left / "served.json").is_file()
    assert '"num_speculative_tokens": 4' in (left / "README.md").read_text()
    assert "serve" in json.loads((left / "provenance.json").read_text())["stages"]
    assert "serve" not in yaml.safe_load((left / "recipe.yaml").read_text())["stages"]
    assert "but for serve, which needs the engines" in (left / "README.md").read_text()


def test_a_format_that_leads_elsewhere_is_refused(place):
    left = exported(place, vllm={"config.json": "{}"})
    (left / "export.json").write_text('{"../../x": {}}')
    with pytest.raises(ValueError, match=r"a format is '\.\./\.\./x'"):
        run(place, export=left)


# ---- what is not published

SLOW = r"not published: At temperature 0, batch 1: slower than no drafting, 0\.50x .* 8 prompts"


def test_a_slow_drafter_is_refused_with_its_numbers(place, monkeypatch):
    monkeypatch.setattr(hub, "upload", lambda *a, **k: pytest.fail("uploaded"))
    slow(place)
    with pytest.raises(Failed, match=SLOW):
        run(place, publishing(repository="me/mine"))
    assert not (place / "out/stages/publish-0").exists()


def test_without_a_repository_its_folder_is_made_and_says_so(place, capsys):
    slow(place)
    text = (run(place) / "README.md").read_text()
    lines = [line for line in text.split("---\n", 2)[2].splitlines() if line]
    assert lines[1].startswith("**Mind: At temperature 0, batch 1: slower than no drafting")
    assert "mind: At temperature 0, batch 1: slower" in capsys.readouterr().out


def test_by_force_it_is_published_and_the_card_says_so_first(place, monkeypatch):
    sent = []
    monkeypatch.setattr(hub, "upload", lambda *a, **k: sent.append((a, k)) or COMMIT)
    slow(place)
    folder = run(place, publishing(repository="me/mine", force=True, tag="v1"))
    ((where, repository), options) = sent[0]
    assert (where, repository) == (folder, "me/mine")
    assert (options["private"], options["tag"]) == (True, "v1")
    assert "**Mind: At temperature 0" in (folder / "README.md").read_text()
    known = json.loads((folder.parent / "published.json").read_text())
    assert known == {"repository": "me/mine", "commit": COMMIT}


def test_what_speaks_against_a_drafter():
    assert objections(measured(), None) == []
    told = objections(measured(0.5), None)
    assert [line[:24] for line in told] == ["At temperature 0, batch ", "At temperature 1, batch "]
    assert all("batch 1: slower than no drafting" in line for line in told)
    warm, cold = objections(measured(1.02), None)  # and at temperature 1 less
    assert warm.startswith("At temperature 1, batch 1: slower than no drafting, 0.92x")
    assert "not shown to be faster than no drafting (At temperature 0, batch 1: no diff" in cold
    unmeasured = objections(summarise([], CONDITIONS, CONTROLS), None)
    assert unmeasured == [
        "at batch 1 it was not shown to be faster than no drafting (not measured)"
    ]
    wrong = {"exactness": {"passed": False, "found": "7 of 8 identical"}}
    told = objections(measured(controls=wrong), None)
    assert told == ["the control exactness failed: 7 of 8 identical"]
    assert "no control was run" in objections(measured(controls={}), None)[0]


def test_faster_at_one_temperature_and_undecided_at_another_is_published():
    spread = many(1.5) + [
        run | {"temperature": 1.0, "seconds": run["seconds"] * (1 + 0.2 * (run["group"] % 2))}
        for run in many(1.0)
    ]
    known = summarise(spread, CONDITIONS, CONTROLS)
    assert [e["verdict"] for e in known["headline"]] == ["faster", "no difference shown"]
    assert objections(known, None) == []
    only = summarise([r for r in spread if r["temperature"] == 1.0], CONDITIONS, CONTROLS)
    assert "not shown to be faster" in objections(only, None)[0]


def test_a_fine_tune_that_is_worse_than_its_parent_is_refused():
    known = summarise(many(), CONDITIONS, CONTROLS)
    one = {"value": 0.9, "low": 0.85, "high": 0.95, "n": 8}
    row = {"set": "old", "temperature": 0.0, "ratio": one, "said": "speedup and tau"}
    row |= {"tau": {"before": {"value": 2.5}, "after": {"value": 2.2}}}
    better = row | {"set": "new", "verdict": "better"}
    compared = {"rows": [row | {"verdict": "worse"}, better], "worse": True}
    assert objections(known, compared) == [
        "on old, temperature 0, its speedup and tau is worse than that of the drafter which it was "
        "trained on from: 0.90x [0.85x, 0.95x] as fast, tau 2.20 after 2.50"
    ]
    assert objections(known, {"rows": [better], "worse": False}) == []


def test_a_report_of_another_drafter_is_refused(place):
    other = inputs(place)["drafter"].parents[1] / "pretrain-x" / "artifact"
    shutil.copytree(inputs(place)["drafter"], other)
    with pytest.raises(ValueError, match=r"the report is of finetune-\w+ and the drafter is pretr"):
        run(place, drafter=other)


# ---- before anything starts

BAD = {
    "language": ({"language": ["Korean"]}, r"publish\.language has 'Korean', expected ISO 639"),
    "name": ({"repository": "../mine"}, r"neither a folder here nor a name on the Hub"),
    "no owner": ({"repository": "mine"}, r"expected user/name"),
    "tag": ({"repository": "me/mine", "tag": "a/../b"}, r"publish\.tag is 'a/\.\./b'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_found_when_it_is_made(case):
    settings, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        publishing(**settings)


def test_rehearsing_asks_the_hub_and_changes_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "check", lambda name, *, private: asked.append((name, private)) or "x")
    assert publishing(repository="me/mine", private=False).rehearse() == "x"
    assert asked == [("me/mine", False)]


# ---- to a Hub and back


def test_published_once_and_loaded_again_in_one_line(place, tmp_path, monkeypatch, capsys):
    target = Pretrained(path=str(inputs(place)["target"]), dtype="float32").load()
    with upload_server.publishing(CANARIES["HF_TOKEN"], "me") as there:
        hub_at(there.address, CANARIES["HF_TOKEN"], tmp_path / "cache", monkeypatch)
        stage = publishing(repository="me/mine", tag="v1")
        assert "makes the private repository me/mine" in stage.rehearse()
        folder = run(place, stage)
        run(place, stage)  # after it stopped before it was done, say
        there_now = there.repositories["me/mine"]
        assert len(there_now.commits) == 2  # the Hub's own first, and one
        assert there_now.private
        assert there_now.tags == {"v1": there_now.main}
        sent = there_now.files("v1")
        mine = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert sent.keys() - upload_server.ATTRIBUTES.keys() == mine
        assert all(sent[name] == (folder / name).read_bytes() for name in mine)
        drafter = published("me/mine", target, "v1")
    mine = load(folder, target.shape).state_dict()
    theirs = drafter.state_dict()
    assert all(torch.equal(theirs[name], mine[name].to(theirs[name].dtype)) for name in mine)
    shown = capsys.readouterr()
    assert "c4nary" not in shown.out + shown.err + everything(folder.parent)


# ---- the recipe in it


def again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    """The stages that the published recipe plans, in a clone that has it in recipes/."""
    recipes = tmp_path / "recipes"
    recipes.mkdir(exist_ok=True)
    shutil.copy(folder / "recipe.yaml", recipes)
    monkeypatch.setattr(composing, "RECIPES", recipes)
    config = compose("recipe=recipe", f"output_dir={tmp_path / 'out'}", *more)
    return {stage.name: stage for stage in plan(config, tmp_path / "out")}


def test_the_recipe_plans_the_same_stages(place, ran, tmp_path, monkeypatch):
    folder = run(place)
    own = f"stages.target.data.files=[{ran / 'own.jsonl'}]"
    planned = again(folder, tmp_path, monkeypatch, own)
    before = {n: s.folder.name for n, s in stages(ran).items() if n != "publish"}
    assert {name: stage.folder.name for name, stage in planned.items()} == before
    assert planned["finetune"].needs == {
        "target": "target",
        "drafter": "pretrain",
        "data": "generate",
    }
    known = json.loads((folder / "provenance.json").read_text())["stages"]
    assert {f"{name}-{stage['fingerprint']}" for name, stage in known.items()} == set(
        before.values()
    )
    assert all(stage["same_code"] for stage in known.values())
    told = (folder / "README.md").read_text()
    assert "-m train recipe=recipe 'stages.target.data.files=...'\n" in told


def test_what_is_not_published_has_to_be_given(place, tmp_path, monkeypatch):
    with pytest.raises(Exception, match=r"stages\.target\.data\.files"):
        again(run(place), tmp_path, monkeypatch)


def test_other_code_or_data_are_told_apart(place, ran):
    note = next((place / "out/stages").glob("generate-*")) / "stage.json"
    note.write_text(note.read_text().replace('"limit": 5000', '"limit": 5001'))
    known = json.loads((run(place) / "provenance.json").read_text())["stages"]
    assert (known["generate"]["same_code"], known["pretrain"]["same_code"]) == (False, True)
    shown = (place / "out/stages/publish-0/artifact/README.md").read_text()
    assert "or measured on another device: generate." in shown


def test_provenance_has_data_hashes_seeds_versions_and_hardware(place, ran):
    known = json.loads((run(place) / "provenance.json").read_text())
    mark = Local(files=[str(ran / "own.jsonl")], text="{text}").fingerprint()
    assert known["stages"]["target"]["data"]["own.jsonl"]["sha256"] == mark
    assert known["seeds"]["finetune.schedule.seed"] == 0
    assert known["environment"]["packages"]["torch"] == torch.__version__
    assert known["stages"]["bench"]["environment"]["processor"] == "P"
    assert known["seconds"] == pytest.approx(12.0 * 6)
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", known["draftsmith"]["commit"])
    assert known["target"]["revision"] == "a" * 64


def test_a_recipe_keeps_text_and_leaves_places_out(tmp_path, monkeypatch):
    """What looks like a path or a reference, and is none, stays as it is."""
    monkeypatch.setenv("DRAFTSMITH_SHARED", str(tmp_path))
    target = {"_target_": "decoding.pretrained.Pretrained", "path": str(tmp_path / "models/m")}
    texts = {"prompt": "/no_think ${q} {text}", "other": "~", "url": "owner/name", "more": "a/b/c"}
    places = {"files": ["/etc/hostname", "b"], "home": "~/x", "up": "../y", "shared": str(tmp_path)}
    note = {"name": "s", "fingerprint": "0", "inputs": {}}
    note["config"] = {"target": target, "texts": texts, "places": places, "free": None}
    (tmp_path / "stage.json").write_text(json.dumps(note))
    text = recipe({"s": tmp_path}, "Two\nlines")
    assert text.startswith("# Two lines\n")
    assert sorted(to_give(text)) == [
        *("'stages.s.places.files=...'", "'stages.s.places.home=...'", "'stages.s.places.up=...'"),
    ]
    resolvers()
    given = {"files": ["f"], "home": "h", "up": "u"}
    made = OmegaConf.merge(yaml.safe_load(text), {"stages": {"s": {"places": given}}})
    plain = OmegaConf.to_container(made, resolve=True, throw_on_missing=True)
    assert plain["stages"]["s"]["texts"] == texts
    assert plain["stages"]["s"]["target"] == plain["target"] == target
    assert plain["stages"]["s"]["places"] == given | {"shared": f"{tmp_path}/."}


@pytest.mark.soak
def test_a_clean_clone_takes_the_recipe(place, ran, tmp_path):
    """Through the command itself, and its checks of what a recipe may say."""
    folder, clone = run(place), tmp_path / "clone"
    for part in ("decoding", "drafters", "data", "eval", "train", "conf", "recipes"):
        shutil.copytree(ROOT / part, clone / part)
    shutil.copy(ROOT / "constraints.txt", clone)
    shutil.copy(folder / "recipe.yaml", clone / "recipes")
    own = f"stages.target.data.files=[{ran / 'own.jsonl'}]"
    done = command("recipe=recipe", own, "plan=true", cwd=clone, PYTHONPATH=str(clone))
    assert done.returncode == 0, done.stderr
    known = json.loads((folder / "provenance.json").read_text())["stages"]
    for name, stage in known.items():
        if name != "bench":  # of another process, with other threads
            assert f"{name}-{stage['fingerprint']}" in done.stdout
    text = yaml.safe_load((folder / "recipe.yaml").read_text())
    text["hydra"] = {"run": {"dir": "/"}}
    (clone / "recipes" / "recipe.yaml").write_text(yaml.safe_dump(text))
    assert command("--help", cwd=clone, PYTHONPATH=str(clone)).returncode == 2


# ---- the snippets


@pytest.mark.soak
def test_the_snippets_of_the_card_run(place):
    """Word for word, but for where target and drafter are."""
    folder = run(place)
    text = (folder / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    ours = [code for code in blocks if "vllm" not in code and "sglang" not in code]
    assert len(ours) == 2  # transformers, and draftsmith's loop
    for code in ours:
        code = code.replace("path/to/target", str(inputs(place)["target"]))
        done = subprocess.run(
            [sys.executable, "-c", code.replace("path/to/this/folder", str(folder))],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
