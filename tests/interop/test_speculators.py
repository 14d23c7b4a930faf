"""The library speculators reads what we write in its format and guesses what our loop guesses; what
it writes is read here."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding.pretrained import Pretrained
from drafters.base import load, write_json
from eval.controls import Failed
from eval.serve import Serve
from train.export import Export
from train.layouts import speculators as layout

SAVE = """
import sys
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
config = Eagle3SpeculatorConfig.from_pretrained(sys.argv[1])
config.speculators_config.verifier.name_or_path = sys.argv[2]
Eagle3DraftModel.from_pretrained(sys.argv[1], config=config).save_pretrained(sys.argv[3])
"""


@pytest.fixture(scope="module")
def exported(
    spec: Pretrained, trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("export")
    Export(target=spec, format="speculators").run(out, drafter=trained("eagle3"))
    return out / "artifact"


@pytest.fixture
def stage(serving: Callable[..., Serve], speculators: Path) -> Serve:
    made = serving({"speculators": str(speculators)})
    made.engines.pop("transformers")
    return made


def test_it_guesses_what_our_loop_guesses(
    stage: Serve, trained: Callable[[str], Path], exported: Path, tmp_path: Path
):
    stage.check({})
    stage.run(tmp_path, drafter=trained("eagle3"), export=exported)
    (row,) = json.loads((tmp_path / "artifact" / "served.json").read_text())["rows"]
    assert row["rounds"]["wrong"] == 0
    assert row["agrees"]
    assert row["tau"]["there"] > 1.2, "a drafter that guesses nothing tests nothing"
    assert row["accepted_by_position"]["there"][1] > 0, "nor one that guesses one token"
    assert row["snippet"]["executed"]


def taps_one_on(config: dict[str, Any]) -> None:
    config[layout.IDS] = [k + 1 for k in config[layout.IDS]]


def normed_residual(config: dict[str, Any]) -> None:
    config["norm_before_residual"] = True


@pytest.mark.parametrize("plant", [taps_one_on, normed_residual], ids=lambda f: f.__name__)
def test_a_setting_that_is_a_little_wrong_is_found(
    plant: Callable[[dict[str, Any]], None],
    stage: Serve,
    trained: Callable[[str], Path],
    exported: Path,
    tmp_path: Path,
):
    wrong = shutil.copytree(exported, tmp_path / "wrong")
    file = wrong / "speculators" / "config.json"
    config = json.loads(file.read_text())
    plant(config)
    write_json(file, config)
    with pytest.raises(Failed, match="not the drafter that was trained"):
        stage.run(tmp_path, drafter=trained("eagle3"), export=wrong)


def test_a_renamed_tensor_is_found(
    stage: Serve, trained: Callable[[str], Path], exported: Path, tmp_path: Path
):
    """speculators itself passes over a name that it does not know."""
    wrong = shutil.copytree(exported, tmp_path / "wrong")
    file = wrong / "speculators" / "model.safetensors"
    saved = load_file(file)
    saved["midlayer.hidden_norm.weight"] = saved.pop("layers.0.hidden_norm.weight")
    save_file(saved, file, metadata={"format": "pt"})
    with pytest.raises(Failed, match="hidden_norm"):
        stage.run(tmp_path, drafter=trained("eagle3"), export=wrong)


def test_what_it_saves_is_read_here(
    spec: Pretrained,
    speculators: Path,
    trained: Callable[[str], Path],
    exported: Path,
    tmp_path: Path,
):
    """Its own config.json and names, the same drafter; with a residual that is normed first it is
    another drafter, and refused."""
    words = [exported / "speculators", spec.path, tmp_path / "theirs"]
    subprocess.run([speculators, "-c", SAVE, *words], check=True, capture_output=True)
    target = spec.load()
    mine = load(trained("eagle3"), target.shape)
    theirs = layout.read(tmp_path / "theirs", target.shape, target)
    assert theirs.taps == mine.taps
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    file = tmp_path / "theirs" / "config.json"
    write_json(file, json.loads(file.read_text()) | {"norm_before_residual": True})
    with pytest.raises(ValueError, match="norm_before_residual"):
        layout.read(tmp_path / "theirs", target.shape, target)
