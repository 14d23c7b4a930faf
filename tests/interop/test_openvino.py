"""OpenVINO GenAI serves what was trained: equal answers, and round for round the tokens that our
loop accepts; a tap that is one off is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from drafters.base import write_json
from eval.controls import Failed
from eval.serve import Serve
from train.export import Export
from train.layouts.eagle3_vllm import IDS


@pytest.fixture
def stage(serving: Callable[..., Serve], openvino: Path) -> Serve:
    made = serving({"openvino": str(openvino)})
    made.engines.pop("transformers")
    return made


@pytest.mark.parametrize(("family", "form"), [("lm", "transformers"), ("eagle3", "vllm")])
def test_openvino_says_what_our_loop_says(
    family: str, form: str, stage: Serve, trained: Callable[[str], Path], tmp_path: Path
):
    """Of EAGLE-3 also where the target has fewer layers than OpenVINO takes by itself."""
    Export(target=stage.target, format=form).run(tmp_path / "export", drafter=trained(family))
    stage.check({})
    stage.run(tmp_path, drafter=trained(family), export=tmp_path / "export" / "artifact")
    (row,) = json.loads((tmp_path / "artifact" / "served.json").read_text())["rows"]
    assert [e["identical"] + e["near_ties"] for e in row["answers"].values()] == [6, 6]
    assert row["rounds"]["wrong"] == 0
    assert row["agrees"]
    assert row["tau"]["there"] > 1.2, "a drafter that guesses nothing tests nothing"
    assert row["accepted_by_position"]["there"][1] > 0, "nor one that guesses one token"
    assert row["snippet"]["executed"]


@pytest.mark.parametrize("off", [-1, 2])
def test_taps_that_are_off_are_found(
    off: int, stage: Serve, trained: Callable[[str], Path], tmp_path: Path
):
    """One late, as OpenVINO's own default is, happens to change nothing for this small drafter."""
    Export(target=stage.target, format="vllm").run(tmp_path / "right", drafter=trained("eagle3"))
    wrong = shutil.copytree(tmp_path / "right" / "artifact", tmp_path / "wrong")
    file = wrong / "vllm" / "config.json"
    config = json.loads(file.read_text())
    write_json(file, config | {IDS: [k + off for k in config[IDS]]})
    stage.snippets = False
    with pytest.raises(Failed, match="not the drafter that was trained"):
        stage.run(tmp_path, drafter=trained("eagle3"), export=wrong)
