"""Stages in order, their folders, and which change of a configuration makes a new folder."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf.errors import OmegaConfBaseException

from tests.tiny import write_target, write_texts
from tests.train.composing import ROOT, STAGES, compose
from train import plan as planning
from train.plan import Planned, changes, plan
from train.run import run_recipe
from train.show import show

RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
MEASURED = STAGES[STAGES.index("tune_tree") :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plan")
    write_texts(place)
    return place


@pytest.fixture(scope="module")
def composed(folder: Path) -> dict[str, Any]:
    """quickstart on a small file of text: fingerprinting Python's library takes a while."""
    config = compose("recipe=quickstart")
    config["stages"] = {name: stage for name, stage in config["stages"].items() if stage}
    text = {"_target_": "data.sources.Local", "files": [str(folder / "text.jsonl")]}
    for stage in ("target", "pretrain"):
        config["stages"][stage]["data"] = text | {"text": "{text}"}
    config["stages"]["generate"]["prompts"] = text | {"prompt": "{text}"}
    for stage in ("bench", "serve"):
        config["stages"][stage]["prompts"] = {"text": text | {"prompt": "{text}"}}
    return config


def change(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    node = changed
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    return changed


def marks(config: dict[str, Any], root: Path) -> dict[str, str]:
    return {stage.name: stage.fingerprint for stage in plan(config, root)}


def changed_stages(a: dict[str, Any], b: dict[str, Any], root: Path) -> tuple[str, ...]:
    one, two = marks(a, root), marks(b, root)
    return tuple(name for name in two if one.get(name) != two[name])


def test_stages_come_after_what_they_need_and_read_its_artifact(composed, tmp_path: Path):
    stages = {s.name: s for s in plan(composed, tmp_path)}
    assert tuple(stages) == STAGES
    for stage in stages.values():
        assert stage.folder == tmp_path / "stages" / f"{stage.name}-{stage.fingerprint}"
        for argument, source in stage.needs.items():
            assert list(stages).index(source) < list(stages).index(stage.name)
            assert stage.inputs[argument] == stages[source].folder / "artifact"
    assert list(tmp_path.iterdir()) == []


BEHIND_PRETRAIN = ("pretrain", "finetune", *MEASURED)
CHANGES = {
    "stages.pretrain.optim.lr": (0.123, BEHIND_PRETRAIN),
    "stages.pretrain.objective": ({"_target_": "train.objectives.CE"}, ()),  # as it was
    "stages.finetune.objective": ({"_target_": "train.objectives.TV"}, BEHIND_PRETRAIN[1:]),
    "stages.pretrain.schedule.tokens": (100_000, BEHIND_PRETRAIN),
    "stages.pretrain.schedule.dtype": ("float32", BEHIND_PRETRAIN),
    "stages.pretrain.drafter.layers": (2, BEHIND_PRETRAIN),
    "stages.target.layers": (3, STAGES),
    "stages.generate.seed": (5, ("generate", *BEHIND_PRETRAIN[1:])),
    "stages.bench.repeats": (1, MEASURED[1:]),
    "stages.publish.licence": ("mit", ("publish",)),
    "stages.pretrain.schedule.micro_batch": (1, ()),
    "stages.pretrain.schedule.zero_stage": (2, ()),
    "stages.pretrain.tracker": ({"_target_": "train.track.Wandb"}, ()),
    "stages.pretrain.drafter.draft_length": (9, ()),
    "stages.pretrain.drafter.stop_below": (0.3, ()),
    "stages.generate.batch_size": (3, ()),
    "launch": ({"_target_": "train.launch.Launch", "how": "torchrun", "ranks": 2}, ()),
    "output_dir": ("elsewhere", ()),
}


@pytest.mark.parametrize("path", CHANGES)
def test_a_change_makes_new_folders_of_what_it_can_change_and_of_nothing_else(
    path: str, composed, tmp_path: Path
):
    value, expected = CHANGES[path]
    assert changed_stages(composed, change(composed, path, value), tmp_path) == expected


def test_changed_data_are_other_data_and_a_new_name_is_not(composed, folder: Path, tmp_path: Path):
    for stage in composed["stages"].values():
        assert stage is not None
    copied = shutil.copy(folder / "text.jsonl", tmp_path / "renamed.jsonl")
    moved = change(composed, "stages.pretrain.data.files", [str(copied)])
    data = composed["stages"]["pretrain"]["data"]
    from data.sources import Local

    def mark(config: dict[str, Any]) -> str:
        named = {k: v for k, v in config["stages"]["pretrain"]["data"].items() if k != "_target_"}
        return Local(**named).fingerprint()

    assert mark(moved) == mark(composed)
    with Path(copied).open("a") as stream:
        stream.write('{"text": "one more"}\n')
    assert mark(moved) != mark(composed)
    before = marks(moved, tmp_path)
    with Path(copied).open("a") as stream:
        stream.write('{"text": "and another"}\n')
    after = marks(moved, tmp_path)
    assert tuple(n for n in after if after[n] != before[n]) == BEHIND_PRETRAIN
    assert data["files"] != [str(copied)]


def test_a_changed_target_folder_is_another_target(composed, folder: Path, tmp_path: Path):
    path = write_target(tmp_path / "target", str(folder / "text.jsonl"))
    config = copy.deepcopy(composed)
    config["target"]["path"] = path
    for stage in config["stages"].values():
        if "target" in stage:
            stage["target"] = config["target"]
    before = marks(config, tmp_path)
    assert "target" not in before
    (tmp_path / "target" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    after = marks(config, tmp_path)
    assert {name for name in after if before[name] != after[name]} == set(before)


def test_comments_docstrings_and_layout_are_no_code(tmp_path: Path):
    code = 'def f(x):\n    """Old."""\n    return x + 1\n'
    same = '# a comment\ndef f(x):\n    """New,\n    longer."""\n\n    return (x + 1)  # one\n'
    other = 'def f(x):\n    """Old."""\n    return x + 2\n'
    found = []
    for number, text in enumerate((code, same, other)):
        file = tmp_path / f"module{number}.py"
        file.write_text(text)
        found.append(planning._source(file))
    assert found[0] == found[1] != found[2]


def test_changed_code_of_a_configured_class_is_another_stage(composed, tmp_path: Path, monkeypatch):
    before = marks(composed, tmp_path)
    real = planning._source

    def edited(file: Path) -> str:
        return "edited" if file.name == "generate.py" else real(file)

    monkeypatch.setattr(planning, "_source", edited)
    after = marks(composed, tmp_path)
    assert tuple(n for n in after if after[n] != before[n]) == ("generate", *BEHIND_PRETRAIN[1:])


def test_bench_depends_on_the_device_and_training_does_not(composed, tmp_path: Path, monkeypatch):
    before = marks(composed, tmp_path)
    monkeypatch.setattr(planning, "device", lambda: "another machine, 99 threads")
    after = marks(composed, tmp_path)
    assert tuple(n for n in after if after[n] != before[n]) == MEASURED


def test_absent_stages_and_needs(composed, tmp_path: Path):
    """Arm F: no pretraining, the fine-tuning from random weights."""
    config = change(composed, "stages.pretrain", None)
    with pytest.raises(ValueError, match=r"finetune.needs.drafter=pretrain is not a setting"):
        plan(config, tmp_path)
    config["stages"]["finetune"]["needs"]["drafter"] = None
    stages = {s.name: s for s in plan(config, tmp_path)}
    assert tuple(stages) == tuple(name for name in STAGES if name != "pretrain")
    assert stages["finetune"].needs == {"target": "target", "data": "generate"}
    assert stages["finetune"].fingerprint != marks(composed, tmp_path)["finetune"]


def test_arm_f_through_overrides(tmp_path: Path, monkeypatch):
    from data.builtin import Builtin

    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    config = compose(
        "recipe=quickstart", "stages.pretrain=null", "stages.finetune.needs.drafter=null"
    )
    assert "pretrain" not in marks(config, tmp_path)


def test_a_target_at_hand_takes_its_stage_out(composed, folder: Path, tmp_path: Path):
    config = copy.deepcopy(composed)
    config["target"]["path"] = write_target(tmp_path / "target", str(folder / "text.jsonl"))
    stages = plan(config, tmp_path)
    assert [s.name for s in stages] == list(STAGES[1:])
    assert all("target" not in s.inputs for s in stages)


BROKEN: dict[str, tuple[str, Any, str]] = {
    "circle": ("stages.pretrain.needs.drafter", "finetune", "need each other in a circle"),
    "itself": ("stages.pretrain.needs.drafter", "pretrain", "pretrain.* in a circle"),
    "unknown": (
        "stages.finetune.needs.drafter",
        "pretrian",
        "needs.drafter=pretrian is not a setting; did you mean 'pretrain'",
    ),
    "argument": (
        "stages.finetune.needs.datas",
        "generate",
        "needs.datas is not a setting; did you mean 'data'.* Valid names: .*data, drafter, target",
    ),
    "missing": ("stages.publish.needs.report", None, "stages.publish.needs.report is missing"),
    "no target": ("stages.generate.needs.target", None, "stages.generate has no target: set targe"),
    "needs": ("stages.finetune.needs", ["pretrain"], "it must map arguments to stages"),
    "no stage": ("stages.pretrain", {"_target_": "train.objectives.CE"}, "which is no stage"),
    "no class": ("stages.pretrain", {"schedule": {}}, "stages.pretrain is not a setting"),
    "no mapping": ("stages.pretrain", "distill", "stages.pretrain is not a setting"),
    "no stages": ("stages", {}, "the recipe has no stages; choose one with recipe="),
    "zero": ("stages.finetune.schedule.tokens", 0, "tokens 0"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_recipe_is_one_sentence(name: str, composed, tmp_path: Path):
    path, value, said = BROKEN[name]
    with pytest.raises(ValueError, match=said):
        plan(change(composed, path, value), tmp_path)


def test_a_stage_name_is_a_folder_name(composed, tmp_path: Path):
    config = copy.deepcopy(composed)
    config["stages"]["../up"] = config["stages"].pop("publish")
    with pytest.raises(ValueError, match=r"a stage is '../up'"):
        plan(config, tmp_path)


def test_done_is_a_file_in_the_folder(tmp_path: Path):
    stage = Planned("x", {}, {}, "0", tmp_path)
    assert not stage.done
    (tmp_path / "DONE").touch()
    assert stage.done


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates by arithmetic alone, of a machine of known speed and enough room; Python's library,
    which takes long to hash, is not read."""
    monkeypatch.setattr("data.builtin.Builtin.fingerprint", lambda self: "0")
    for module in ("estimate", "passes"):
        monkeypatch.setattr(f"train.{module}.matrix_speed", lambda dtype: 1e11)
    monkeypatch.setattr("train.passes.memory_speed", lambda: 1e10)
    monkeypatch.setattr("train.passes.round_seconds", lambda *a: 0.01)
    monkeypatch.setattr("train.estimate.rehearse", lambda *a: None)
    monkeypatch.setattr("train.preflight.memory_free", lambda: 2**36)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_composes_binds_and_plans(
    recipe: str, request: pytest.FixtureRequest, tmp_path: Path, capsys, monkeypatch
):
    """Without a network; those that read the shared folder are skipped where there is none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = [f"recipe={recipe}", f"output_dir={tmp_path / 'out'}", "plan=true"]
    try:
        config = compose(*words)
    except OmegaConfBaseException as error:
        if "DRAFTSMITH_SHARED" in str(error):
            request.getfixturevalue("shared")  # skips
        raise
    unmeasured(monkeypatch)
    code, _ = run_recipe(recipe, config)
    said = capsys.readouterr()
    assert code == 0, said.err
    assert said.out.startswith(f"recipe {recipe}: ")
    own = {"shootout": ("bench_medusa", "shootout"), "language_matrix": ("bench_ko", "matrix")}
    own["ten_layers"] = ("export", "serve")
    for stage in own.get(recipe, ("bench", "publish")):
        assert f"  {stage}: to do, {tmp_path}/out/stages/{stage}-" in said.out
    assert list(tmp_path.iterdir()) == []


def left(stage: Planned) -> Planned:
    """Its folder as the command leaves it when it starts the stage."""
    stage.folder.mkdir(parents=True)
    inputs = {name: str(place) for name, place in stage.inputs.items()}
    note = {"name": stage.name, "fingerprint": stage.fingerprint, "config": stage.config}
    (stage.folder / "stage.json").write_text(json.dumps(note | {"inputs": inputs}))
    return stage


def test_a_new_folder_says_what_is_other_than_in_the_nearest_one(composed, tmp_path: Path):
    far = change(composed, "stages.pretrain.optim.lr", 0.5)
    far = change(far, "stages.pretrain.schedule.tokens", 4_096)
    near = change(composed, "stages.pretrain.drafter.layers", 3)
    for config in (far, near):
        stages = {s.name: s for s in plan(config, tmp_path)}
        left(stages["pretrain"])
        left(stages["finetune"])
    now = {s.name: s for s in plan(composed, tmp_path)}
    (line,) = changes(now["pretrain"])
    before = {s.name: s for s in plan(near, tmp_path)}
    assert line == f"other than {before['pretrain'].folder.name}: drafter.layers was 3, is 1"
    (line,) = changes(now["finetune"])
    assert "its drafter was pretrain-" in line
    assert f", is {now['pretrain'].folder.name}" in line
    assert changes(now["bench"]) == []
    assert changes(before["pretrain"]) == []  # it is there, and goes on


def test_a_key_that_changes_no_result_is_no_difference(composed, tmp_path: Path, monkeypatch):
    for stage in plan(composed, tmp_path)[:2]:
        left(stage)
    other = change(composed, "stages.pretrain.schedule.micro_batch", 3)
    other = change(other, "stages.pretrain.data.limit", 7)
    stage = next(s for s in plan(other, tmp_path) if s.name == "pretrain")
    assert changes(stage)[0].endswith(": data.limit was None, is 7")
    monkeypatch.setattr(planning, "_source", lambda file: "edited")
    stage = next(s for s in plan(composed, tmp_path) if s.name == "target")
    assert "its code, what its data or target hold" in changes(stage)[0]


def test_earlier_notes_that_cannot_be_read_are_passed_over(composed, tmp_path: Path):
    stage = next(s for s in plan(composed, tmp_path) if s.name == "pretrain")
    for number, text in enumerate(["", "[]", '{"config": {"_target_": "gone.away.Now"}}']):
        folder = tmp_path / "stages" / f"pretrain-{number}"
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text(text)
    assert changes(stage) == []


def test_a_plan_for_hardware_that_is_not_here(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    unmeasured(monkeypatch)
    words = ("target=qwen3_235b", "drafter=eagle3", "launch=deepspeed", "launch.ranks=64")
    config = compose("recipe=ko_drafter", *words, "stages.pretrain=null",
                     "stages.finetune.needs.drafter=null")  # fmt: skip
    gpu = (ROOT / "conf" / "hardware" / "h100.yaml").read_text("utf-8")
    config["hardware"] = yaml.safe_load(gpu)
    show("ko_drafter", config, plan(config, tmp_path), tmp_path)
    said = capsys.readouterr().out
    assert "target: Qwen/Qwen3-235B-A22B, 235,093,610,496 parameters" in said
    assert "finetune on 64 x H100 SXM 80GB, micro-batches of 1 x 2048 tokens" in said
    assert re.search(r"\| replicated \| 437\.9 GiB .* \| no \|", said)
    assert re.search(r"\| zero3 \| 13\.8 GiB .* \| yes \|", said)
    assert "would not start here" not in said  # it is asked about other machines
    assert list(tmp_path.iterdir()) == []
