"""transformers' own assisted generation says what our loop says, and the stage `serve` with it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from decoding.pretrained import Pretrained
from drafters.base import write_json
from eval.controls import Failed
from eval.serve import Serve
from train.export import Export


def exported(family: str, spec: Pretrained, drafter: Path, out: Path) -> Path:
    Export(target=spec).run(out, drafter=drafter)
    return out / "artifact"


def test_assisted_generation_accepts_what_our_loop_accepts(
    tmp_path: Path,
    spec: Pretrained,
    trained: Callable[[str], Path],
    serving: Callable[..., Serve],
    capsys: pytest.CaptureFixture[str],
):
    """With the published generation_config; and the code that the card shows runs."""
    drafter = trained("lm")
    export = exported("lm", spec, drafter, tmp_path / "export")
    # the exported length is the family's own, 5; asked for 3, transformers would draft otherwise
    stage = serving(draft_length=5)
    found = stage.run(tmp_path / "out", drafter=drafter, export=export)
    served = json.loads((tmp_path / "out" / "artifact" / "served.json").read_text())
    (row,) = served["rows"]
    assert row["loaded"]
    assert row["agrees"]
    assert served["passed"]
    assert [e["identical"] for e in row["answers"].values()] == [6, 6]
    assert row["rounds"] == {"n": 6, "identical": 6, "near_ties": 0, "wrong": 0}
    assert row["tau"]["there"] == pytest.approx(row["tau"]["here"]["value"])
    assert found["tau_transformers_transformers"] > 1.3, "a drafter that guesses nothing tests none"
    log = (tmp_path / "out" / "artifact" / row["snippet"]["log"]).read_text()
    assert row["snippet"]["executed"]
    assert "assistant_model=drafter" in log
    assert "TARGET" in log
    assert str(spec.path) not in log
    assert {e["engine"] for e in served["not_run"]} == {"vllm", "openvino", "sglang"}
    assert "was not run in vllm: not installed here" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["length", pytest.param("weights", marks=pytest.mark.soak)])
def test_what_is_published_otherwise_than_trained_fails(
    fault: str,
    tmp_path: Path,
    spec: Pretrained,
    trained: Callable[[str], Path],
    serving: Callable[..., Serve],
):
    drafter = trained("lm")
    export = exported("lm", spec, drafter, tmp_path / "export")
    folder, said = export / "transformers", "generation_config.json says num_assistant_tokens 20"
    if fault == "length":
        file = folder / "generation_config.json"
        write_json(file, json.loads(file.read_text()) | {"num_assistant_tokens": 20})
    else:
        tensors = load_file(folder / "model.safetensors")
        (name,) = [n for n in tensors if n.endswith("down_proj.weight")]
        tensors[name] = -tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        said = r"transformers \S+ with lm/transformers: \d\.\d+ tokens per target call there, \d"
    with pytest.raises(Failed, match=said):
        serving(draft_length=5, snippets=False).run(
            tmp_path / "out", drafter=drafter, export=export
        )
    written = json.loads((tmp_path / "out" / "artifact" / "served.json").read_text())
    assert not written["passed"]
