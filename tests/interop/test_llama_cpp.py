"""An lm and its target become GGUF files, and llama.cpp drafts with them as our loop does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from drafters.base import write_json
from eval.controls import Failed
from eval.serve import Serve
from tests import tiny
from train.export import Export
from train.layouts import gguf


@pytest.fixture
def stage(serving: Callable[..., Serve], llama_cpp: Path) -> Serve:
    made = serving({"llama_cpp": str(llama_cpp)})
    made.engines.pop("transformers")
    return made


@pytest.fixture
def converter(llama_cpp: Path) -> Path:
    file = llama_cpp.parents[1] / "llama.cpp" / "convert_hf_to_gguf.py"
    if not file.is_file():
        pytest.skip(
            f"llama.cpp's converter is not at {file}; docs/engines.md says where it is from"
        )
    return file


def test_llama_cpp_says_what_our_loop_says(
    stage: Serve,
    converter: Path,
    llama_cpp: Path,
    trained: Callable[[str], Path],
    tmp_path: Path,
):
    made = Export(
        target=stage.target,
        format="gguf",
        gguf_converter=str(converter),
        gguf_python=str(llama_cpp),
    )
    made.run(tmp_path / "export", drafter=trained("lm"))
    told = json.loads((tmp_path / "export" / "artifact" / "export.json").read_text())
    assert list(told["gguf"]["files"]) == ["model.gguf"]
    assert "pre-tokenizer: gpt-2" in told["gguf"]["notes"][0]
    stage.check({})
    stage.run(tmp_path, drafter=trained("lm"), export=tmp_path / "export" / "artifact")
    (row,) = json.loads((tmp_path / "artifact" / "served.json").read_text())["rows"]
    assert [e["identical"] + e["near_ties"] for e in row["answers"].values()] == [6, 6]
    assert row["rounds"]["wrong"] == 0
    assert row["agrees"]
    assert row["tau"]["there"] > 1.2, "a drafter that guesses nothing tests nothing"
    assert row["snippet"]["executed"]
    assert "LlamaDraftModel" in row["snippet"]["code"]


def test_a_rotary_base_that_was_lost_is_found(
    stage: Serve,
    converter: Path,
    llama_cpp: Path,
    trained: Callable[[str], Path],
    tmp_path: Path,
):
    """It loads and answers right, and only accepts less."""
    Export(target=stage.target, format="transformers").run(tmp_path, drafter=trained("lm"))
    folder = tmp_path / "artifact" / "transformers"
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 3.0
    write_json(folder / "config.json", config)
    gguf.write(folder, tmp_path / "artifact" / "gguf", converter, llama_cpp)
    file = tmp_path / "artifact" / "export.json"
    (entry,) = json.loads(file.read_text()).values()
    write_json(file, {"gguf": entry | {"engines": ["llama_cpp"]}})
    with pytest.raises(Failed, match="not the drafter that was trained"):
        stage.run(tmp_path, drafter=trained("lm"), export=tmp_path / "artifact")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(tiny.write_target(tmp_path / "model", tiny.write_texts(tmp_path)))


def test_a_pre_tokenizer_is_named_where_it_is_certain(folder: Path):
    assert gguf.known(folder) == "gpt-2"
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,2}"}, "behavior": "Isolated"}
    for other in (told["pre_tokenizer"] | {"add_prefix_space": True}, split, None):
        write_json(file, told | {"pre_tokenizer": other})
        assert gguf.known(folder) is None


def test_an_unknown_pre_tokenizer_is_a_sentence(folder: Path, converter: Path, llama_cpp: Path):
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    told["pre_tokenizer"]["add_prefix_space"] = True
    write_json(file, told)
    with pytest.raises(
        ValueError, match=r"name the nearest of its own ways by stages\.export\.gguf_pre_tokenizer"
    ):
        gguf.write(folder, folder / "gguf", converter, llama_cpp)
    assert not (folder / "gguf" / "model.gguf").is_file()
    notes = gguf.write(folder, folder / "gguf", converter, llama_cpp, "llama-bpe")
    assert "pre-tokenizer: llama-bpe" in notes[0]


def test_what_is_not_there_is_a_sentence(folder: Path, tmp_path: Path):
    alone = tmp_path / "convert_hf_to_gguf.py"
    alone.write_text("raise SystemExit(3)")
    for converter in (None, tmp_path / "none.py", alone):
        with pytest.raises(ValueError, match="expected convert_hf_to_gguf"):
            gguf.write(folder, tmp_path / "out", converter)
    (tmp_path / "conversion").mkdir()
    (tmp_path / "conversion" / "base.py").write_text("class TextModel: ...")
    with pytest.raises(ValueError, match=r"gguf_python is .*, which does not run"):
        gguf.write(folder, tmp_path / "out", alone, tmp_path / "python")
    with pytest.raises(Failed, match=r"did not convert .*: it printed nothing"):
        gguf.write(folder, tmp_path / "out", alone)
    alone.write_text("import sys; open(sys.argv[3], 'wb').write(b'GGML')")
    with pytest.raises(Failed, match="left no GGUF file"):
        gguf.write(folder, tmp_path / "out", alone)
