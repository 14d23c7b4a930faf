"""vLLM serves what was trained: equal answers, and round for round the tokens that our loop
accepts; a layout that is a little wrong is found."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LENGTH, TOKENS
from safetensors.torch import load_file, save_file

from decoding.pretrained import Pretrained
from drafters.base import write_json
from eval import agreement
from eval.agreement import Question
from eval.clients import Asked, ask
from eval.controls import Failed
from eval.serve import Serve
from train.export import Export

FORMATS = {
    "lm": ["transformers"],
    "medusa": ["vllm", "original"],
    "medusa2": ["vllm", "original"],  # with the target that it changes
    "eagle": ["vllm"],
    "eagle3": ["vllm", "speculators"],
}


@pytest.fixture(scope="module")
def exported(
    spec: Pretrained, trained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """An export stage's artifact of each family, made once."""
    done: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in done:
            out = tmp_path_factory.mktemp(f"export-{family}")
            Export(target=spec).run(out, drafter=trained(family))
            done[family] = out / "artifact"
        return done[family]

    return make


@pytest.mark.parametrize("family", FORMATS)
def test_vllm_says_what_our_loop_says(
    family: str,
    vllm: Path,
    tmp_path: Path,
    trained: Callable[[str], Path],
    exported: Callable[[str], Path],
    serving: Callable[..., Serve],
):
    """In every format, and the code that the card shows runs."""
    stage = serving({"vllm": str(vllm)})
    stage.engines.pop("transformers")
    stage.check({})
    stage.run(tmp_path, drafter=trained(family), export=exported(family))
    served = json.loads((tmp_path / "artifact" / "served.json").read_text())
    assert [row["format"] for row in served["rows"]] == FORMATS[family]
    for row in served["rows"]:
        assert [e["identical"] + e["near_ties"] for e in row["answers"].values()] == [6, 6]
        assert row["rounds"]["wrong"] == 0
        assert row["agrees"]
        assert row["tau"]["there"] > 1.2, "a drafter that guesses nothing tests nothing"
        assert row["accepted_by_position"]["there"][1] > 0, "nor one that guesses one token"
        assert row["snippet"]["executed"]


def settings(**changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text()) | changes
        write_json(file, {key: value for key, value in config.items() if value is not None})

    return plant


def swapped(folder: Path) -> None:
    """The first two heads in the other's place."""
    tensors, other = load_file(folder / "model.safetensors"), {"0": "1", "1": "0"}
    names = {name: name.split(".") for name in tensors}
    new = {n: ".".join([p[0], other.get(p[1], p[1]), *p[2:]]) for n, p in names.items()}
    moved = {new[name]: tensor for name, tensor in tensors.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})


FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "biases dropped": ("medusa", settings(medusa_fc_bias=None)),
    "heads swapped": ("medusa", swapped),
    "taps one early": ("eagle3", settings(eagle_aux_hidden_state_layer_ids=[1, 3, 4])),
    "residual of the norm": ("eagle3", settings(norm_before_residual=True)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_with_its_numbers(
    fault: str,
    vllm: Path,
    tmp_path: Path,
    trained: Callable[[str], Path],
    exported: Callable[[str], Path],
    serving: Callable[..., Serve],
):
    """vLLM itself says nothing of any of them, and its answers stay right."""
    family, plant = FAULTS[fault]
    export = tmp_path / "export"
    shutil.copytree(exported(family) / "vllm", export / "vllm")
    told = json.loads((exported(family) / "export.json").read_text())
    write_json(export / "export.json", {"vllm": told["vllm"]})
    plant(export / "vllm")
    stage = serving({"vllm": str(vllm)}, snippets=False)
    said = rf"vllm\S* \S+ with {family}/vllm: \d\.\d+ tokens per target call there, \d\.\d+ \["
    with pytest.raises(Failed, match=said):
        stage.run(tmp_path / "out", drafter=trained(family), export=export)
    served = json.loads((tmp_path / "out" / "artifact" / "served.json").read_text())
    (row,) = served["rows"]
    assert row["loaded"]
    assert row["rounds"]["wrong"] > 0
    assert all(e["wrong"] == 0 for e in row["answers"].values())


def test_prompt_lookup_leaves_the_answers_alone(
    vllm: Path, tmp_path: Path, spec: Pretrained, serving: Callable[..., Serve]
):
    prompts, _ = serving()._asked(200, None, None)
    question = Question.of(spec.load(), prompts, TOKENS, LENGTH)
    lengths = [len(ids) for ids in question.plain]
    asked = Asked(Path(str(spec.path)), prompts, lengths, LENGTH, "float32")
    served = ask("vllm", vllm, asked, drafter=None, method="ngram", log=tmp_path / "log")
    found = agreement.equality(question, served, lambda: spec.load(dtype="float64"))
    assert all(e["wrong"] == 0 for e in found.values())
    assert served.drafts > 0
