"""A configuration is data: it names classes of this repository, fits them, and runs nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tests.train.composing import command, compose
from train.compose import ENVIRONMENT, bind, build, find, resolvers

FOREIGN = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "builtins.exec",
    "pathlib.Path",
    "torch.load",
    "hydra.utils.instantiate",
    "train.compose.ROOT",  # not a class
    "train.compose.find",  # a function
    "train.launch.subprocess.Popen",  # through a module's own imports
    "train.launch.subprocess",
    "train.launch.Path",  # defined elsewhere, imported there
    "decoding.pretrained.Path",
    "decoding.target.nn.Module",
    "data.sources.hashlib",
    "data.sources.Row",  # a class of ours, but of another module
    "train.distill.Loss",
    "train.launch.Launch.run",  # a method
    "train.launch.Launch.__init__.__globals__",
    "train.__init__.Launch",
    "tests.tiny.sentence",
    "benchmarks.x.Y",
    "train.launch",
    "train..Launch",
    ".train.launch.Launch",
    "train.launch.Launch\n",
    "train/launch.Launch.x",
    "train.os.Path",
    "",
    None,
    5,
    ["train.launch.Launch"],
]

SCHEDULE = {
    "_target_": "train.schedule.Schedule",
    "tokens": 1024,
    "batch_tokens": 128,
    "sequence_length": 32,
}


def distill() -> dict[str, Any]:
    """A stage's configuration with slots of every kind."""
    return {
        "_target_": "train.distill.Distill",
        "target": {"_target_": "decoding.pretrained.Pretrained", "path": "owner/name"},
        "drafter": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
        "objective": {"_target_": "train.objectives.CE"},
        "optim": {"_target_": "train.schedule.AdamW", "lr": 1e-3, "betas": [0.9, 0.95]},
        "schedule": dict(SCHEDULE),
        "data": {
            "_target_": "data.sources.Mix",
            "parts": {
                "a": {"_target_": "data.sources.Local", "files": ["x.txt"], "text": "{text}"},
            },
        },
    }


def put(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(config)
    node = changed
    *parents, last = path.split(".")
    for part in parents:
        node = node[part]
    node[last] = value
    return changed


def test_the_example_binds_and_builds():
    bind(distill(), "stages.x")
    made = build(distill())
    assert type(made).__name__ == "Distill"
    assert made.schedule.steps == 8
    assert made.drafter.arguments == {"layers": 1, "width": 64}


@pytest.mark.parametrize("name", FOREIGN, ids=repr)
@pytest.mark.parametrize("path", ["", "objective", "data.parts.a"])
def test_a_foreign_target_is_refused_at_any_depth(name: Any, path: str):
    config = put(distill(), f"{path}._target_".lstrip("."), name)
    for use in (lambda: bind(config, "stages.x"), lambda: build(config)):
        with pytest.raises(ValueError, match="_target_"):
            use()


def test_nothing_runs_of_what_is_refused(tmp_path: Path):
    """Not even when the arguments would fit."""
    marker = tmp_path / "marker"
    evil: dict[str, Any] = {"_target_": "os.system", "command": f"touch {marker}"}
    popen = {"_target_": "train.launch.subprocess.Popen", "args": ["touch", str(marker)]}
    write = {"_target_": "pathlib.Path.touch", "self": str(marker)}
    for bad in (evil, popen, write, {"_target_": "builtins.exec", "_args_": ["x"]}):
        for path in ("data", "tracker", "objective", "schedule", "data.parts.a"):
            with pytest.raises(ValueError, match="_target_"):
                bind(put(distill(), path, bad), "stages.x")
            with pytest.raises(ValueError, match="_target_"):
                build(put(distill(), path, bad))
    assert not marker.exists()


def test_an_override_cannot_name_foreign_code_either(tmp_path: Path):
    marker = tmp_path / "marker"
    done = command(
        "recipe=quickstart",
        "stages.finetune.objective._target_=os.system",
        f"+stages.finetune.objective.command='touch {marker}'",
        f"output_dir={tmp_path / 'out'}",
    )
    assert done.returncode == 2
    said = "stages.finetune.objective._target_ is 'os.system'; it must be room.module.Class"
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["_partial_", "_args_", "_convert_", "_recursive_", "_call_"])
def test_hydras_own_switches_are_no_settings(key: str):
    with pytest.raises(ValueError, match=f"stages.x.objective.{key} is not a setting"):
        bind(put(distill(), f"objective.{key}", True), "stages.x")


@pytest.mark.parametrize(
    "text",
    [
        "${oc.env:HOME}",
        "${oc.env:NO_SUCH_THING,fallback}",
        "${oc.decode:1}",
        "${oc.create:{a:1}}",
        "${env:HOME}",
        "${env:PATH}",
        "${env:WANDB_API_KEY}",
        "${eval:1}",
    ],
)
def test_configurations_read_no_environment(text: str):
    resolvers()
    with pytest.raises(OmegaConfBaseException):
        OmegaConf.to_container(OmegaConf.create({"a": text}), resolve=True)
    with pytest.raises(OmegaConfBaseException):
        compose("recipe=quickstart", f"output_dir='{text}'")


def test_the_one_name_that_may_be_read(monkeypatch, tmp_path: Path):
    resolvers()
    config = OmegaConf.create({"a": "${env:DRAFTSMITH_SHARED}/x"})
    monkeypatch.setenv("DRAFTSMITH_SHARED", str(tmp_path))
    assert config.a == f"{tmp_path}/x"
    monkeypatch.setenv("DRAFTSMITH_SHARED", str(tmp_path / "not there"))
    with pytest.raises(OmegaConfBaseException, match=r"not there, .* set DRAFTSMITH_SHARED to"):
        config.a  # noqa: B018
    assert list(ENVIRONMENT) == ["DRAFTSMITH_SHARED"]


def test_its_default_is_beside_the_repository(monkeypatch, shared: Path):
    monkeypatch.delenv("DRAFTSMITH_SHARED", raising=False)
    beside = Path(__file__).parents[3] / "shared"
    if not beside.is_dir():
        pytest.skip(f"{beside} is not there")
    resolvers()
    assert Path(OmegaConf.create({"a": "${env:DRAFTSMITH_SHARED}"}).a) == beside.resolve()


UNKNOWN = {
    "schedule.tokns": "did you mean 'tokens'.*Valid names: batch_tokens, compile, dtype",
    "objective.beta": r"objective.beta is not a setting\. Valid names: $",
    "drafter.shape": "Valid names: checkpoint, draft_length, layers",
    "learning_rate": "Valid names: data, drafter, init",
    "data.parts.a.file": "did you mean 'files'",
}


@pytest.mark.parametrize("path", UNKNOWN)
def test_an_unknown_key_lists_the_valid_names(path: str):
    with pytest.raises(ValueError, match=UNKNOWN[path]) as error:
        bind(put(distill(), path, 1), "stages.x")
    assert f"stages.x.{path} is not a setting" in str(error.value)


WRONG = {
    "schedule.tokens": ("many", "schedule.tokens is 'many'; expected a whole number"),
    "schedule.seed": (True, "schedule.seed is true; expected a whole number"),
    "schedule.micro_batch": (1.5, "schedule.micro_batch is 1.5; expected a whole number"),
    "schedule.dtype": (16, "schedule.dtype is 16; expected a text"),
    "optim.lr": ("1e-3x", "optim.lr is '1e-3x'; expected a number"),
    "optim.betas": (0.9, "optim.betas is 0.9; expected a list \[a, b, ...\], each a number"),
    "optim.betas.0": ("x", None),
    "objective": ("ce", "objective is 'ce'; expected a mapping with a _target_ of class Loss"),
    "schedule": (None, "schedule is null; expected a mapping with a _target_ of class Schedule"),
    "target": (
        {"_target_": "train.objectives.CE"},
        "CE; expected a mapping with a _target_ of class Pretrained",
    ),
    "drafter": (
        {"_target_": "drafters.ngram.Ngram"},
        "is drafters.ngram.Ngram; expected a drafter that learns",
    ),
    "data": (
        {"_target_": "train.objectives.TV"},
        "expected a mapping with a _target_ of class Source or null",
    ),
    "data.parts": ([1], r"parts is \[1\]; expected a mapping {name: value, ...}"),
    "data.parts.a": (7, "expected a mapping"),
    "data.parts.a.files": ([3], r"files is \[3\]; expected a list \[a, b, ...\], each a text"),
    "drafter.width": ("64", r"width is '64'; expected a whole number or null"),
    "drafter.sample": (1, "sample is 1; expected true or false"),
}


@pytest.mark.parametrize("path", WRONG)
def test_a_value_of_the_wrong_type_is_named(path: str):
    value, said = WRONG[path]
    config = distill()
    if path == "optim.betas.0":
        config["optim"]["betas"], said = ["x", 0.9], r"betas is \['x', 0.9\]; expected a list"
    else:
        config = put(config, path, value)
    assert said is not None
    with pytest.raises(ValueError, match=said):
        bind(config, "stages.x")


def test_what_is_missing_is_named():
    config = distill()
    del config["schedule"]["tokens"]
    with pytest.raises(
        ValueError, match=r"stages.x.schedule.tokens is missing: Schedule cannot .*\(a whole number"
    ):
        bind(config, "stages.x")


def test_null_is_what_an_optional_slot_takes():
    bind(put(distill(), "data.parts.b", None), "stages.x")
    bind(put(distill(), "init", None), "stages.x")
    bind(put(distill(), "optim.lr", 1), "stages.x")  # an int is a float


def test_find_gives_the_class_itself():
    from train.launch import Launch

    assert find("train.launch.Launch", "x") is Launch


def test_a_misspelt_module_lists_those_there():
    with pytest.raises(ValueError, match=r"modules there: drafters.base, .*drafters.lm"):
        find("drafters.medusaa.Medusa", "drafter")
