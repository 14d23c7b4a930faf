"""preflight=serve: engines are given the untrained drafter before anything is trained."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.sources import Local
from decoding.pretrained import Pretrained
from drafters.base import load
from eval import agreement, serve
from eval.agreement import Question
from eval.clients import Asked, Served
from eval.controls import Failed
from tests.tiny import write_chats, write_target, write_texts
from tests.train.composing import command, compose
from train import serveable
from train.compose import build
from train.layouts.table import formats
from train.plan import plan
from train.serveable import Serveable

SMALL: dict[str, dict[str, Any]] = {"lm": {"width": 64}, "eagle3": {"taps": [0, 1]}}
METHODS = {"lm": "draft_model", "medusa": "medusa", "eagle": "eagle", "eagle3": "eagle3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target with text of its own, and questions."""
    folder = tmp_path_factory.mktemp("serveable")
    write_target(folder / "target", write_texts(folder))
    write_chats(folder)
    return folder


def stage(place: Path, family: str, engines: dict[str, str | None], **settings: Any) -> Serveable:
    drafter = compose("recipe=quickstart", f"drafter={family}")["drafter"]
    return Serveable(
        target=Pretrained(path=str(place / "target"), dtype="float32"),
        drafter=build(drafter | SMALL.get(family, {})),
        prompts=Local(files=[str(place / "chat.jsonl")], prompt="{question}"),
        engines=engines,
        **{"limit": 3, "max_new_tokens": 8, **settings},
    )


class Engine:
    """Stands for all engines: decodes as our loop does with the drafter in `untrained`, and notes
    what it was asked. spoil: changes its answer."""

    def __init__(self, untrained: Path) -> None:
        self.untrained, self.asked = untrained, list[tuple[str, str, str]]()

    def __call__(self, engine: str, python: Path, asked: Asked, **more: Any) -> Served:
        self.asked.append((engine, more["drafter"].name, more["method"]))
        assert any(more["drafter"].iterdir())
        more["log"].write_text("loaded\n")
        target = Pretrained(path=str(asked.target), dtype=asked.dtype).load()
        question = Question.of(target, asked.prompts, max(asked.lengths), asked.draft_length)
        assert [len(ids) for ids in question.plain] == asked.lengths
        drafter = load(self.untrained, target.shape)
        drafter.draft_length = asked.draft_length  # type: ignore[assignment]
        rows = agreement.here(question, drafter, drafts_first=True, cuts_last=True)
        drafts, *accepted = (sum(column) for column in zip(*rows, strict=True))
        ids = question.plain
        return Served(
            engine, "0", ids, ids, drafts, sum(accepted), accepted, 1.0, rows, cuts_last=True
        )


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """vLLM and the others are installed in this Python, it seems."""
    made = Engine(tmp_path / "untrained")
    monkeypatch.setattr(serve, "ask", made)
    for module in (serve, serveable):
        monkeypatch.setattr(module, "installed", lambda engine, python: f"{engine} 0")
    return made


HERE: dict[str, str | None] = {"vllm": sys.executable}


@pytest.mark.parametrize("family", METHODS)
def test_each_format_is_given_to_each_engine_that_is_here(family, place, engine, tmp_path, capsys):
    made = stage(place, family, HERE)
    made.check({})
    found = made.run(tmp_path)
    exported = json.loads((tmp_path / "export" / "artifact" / "export.json").read_text())
    assert set(exported) == set(formats(family)) - {"gguf"}
    both = {"transformers", "vllm"}
    due = {
        (name, form, METHODS[family])
        for form, entry in exported.items()
        for name in both & set(entry["engines"])
    }
    assert set(engine.asked) == due
    assert ("vllm", "vllm" if family != "lm" else "transformers", METHODS[family]) in due
    assert set(found) == {f"tau_{name}_{form}" for name, form, _ in due}
    assert all(1 <= tau < 5 for tau in found.values())
    told = json.loads((tmp_path / "artifact" / "served.json").read_text())
    assert told["passed"]
    assert {row["engine"] for row in told["not_run"]} >= {"sglang"} & {
        name for entry in exported.values() for name in entry["engines"]
    }


def test_the_weights_are_those_that_training_starts_from(place, tmp_path):
    made = stage(place, "medusa", {})
    made._untrained(tmp_path, None)
    target = made.target.load()
    ours = load(tmp_path, target.shape)
    head_VD = target.head_rows(torch.arange(target.shape.vocab_size))
    assert all(torch.equal(head.weight, head_VD) for head in ours.lm_heads)  # type: ignore
    lm = stage(place, "lm", {}, seed=3)
    lm._untrained(tmp_path / "lm", None)
    torch.manual_seed(3)  # as train/distill.py
    due = lm.drafter(target.shape).state_dict()
    state = load(tmp_path / "lm", target.shape).state_dict()
    assert all(torch.equal(state[key], value) for key, value in due.items())


def test_an_engine_that_refuses_the_files_stops_everything(place, engine, tmp_path, monkeypatch):
    def refuse(*a: Any, **k: Any) -> Served:
        raise Failed("vllm did not answer: KeyError: 'blocks.0.weight'")

    monkeypatch.setattr(serve, "ask", refuse)
    with pytest.raises(Failed, match=r"vllm.*KeyError: 'blocks\.0\.weight'"):
        stage(place, "medusa", HERE).run(tmp_path)


def test_an_engine_that_answers_otherwise_stops_everything(place, engine, tmp_path, monkeypatch):
    def other(*a: Any, **k: Any) -> Served:
        served = engine(*a, **k)
        served.ids[0][0] += 1 if served.ids[0][0] < 200 else -1
        return served

    monkeypatch.setattr(serve, "ask", other)
    with pytest.raises(Failed, match="vllm"):
        stage(place, "medusa", HERE).run(tmp_path)


def test_without_an_engine_the_files_are_only_read_back_and_it_says_so(
    place, engine, tmp_path, capsys
):
    assert stage(place, "eagle", {}).run(tmp_path) == {}
    assert engine.asked == []
    said = capsys.readouterr().out
    assert "logits equal" in said
    assert "vllm" in said
    told = json.loads((tmp_path / "artifact" / "served.json").read_text())
    assert "vllm" in {row["engine"] for row in told["not_run"]}


@pytest.mark.parametrize("family", ["hydra_heads", "clover", "clover2"])
def test_a_family_that_no_engine_reads_is_refused_before_anything(family, place):
    said = rf"none reads the family {family}; leave it out, or train one of lm,"
    with pytest.raises(ValueError, match=said):
        stage(place, family, {})


def test_a_wrong_format_and_a_wrong_python_are_refused_before_anything(place, tmp_path):
    with pytest.raises(ValueError, match="the formats of the family medusa are: vllm, original"):
        stage(place, "medusa", {}, format="gguf")
    with pytest.raises(ValueError, match="does not run"):
        stage(place, "medusa", {"vllm": str(tmp_path / "python")}).check({})
    with pytest.raises(ValueError, match="there are clients for transformers, vllm"):
        stage(place, "medusa", {"vlm": sys.executable})


def test_another_version_of_an_engine_is_another_folder(place, engine, monkeypatch):
    marks = []
    for version in ("1", "1", "2"):
        monkeypatch.setattr(serveable, "installed", lambda engine, python, v=version: v)
        marks.append(stage(place, "lm", HERE).fingerprint())
    assert marks[0] == marks[1] != marks[2]


# ---- what users type

CASES = {  # words, and what then stands before `pretrain`
    "": ["target"],
    "preflight=serve": ["preflight_serve"],
    "preflight=overfit": ["preflight_overfit"],
    "preflight=[overfit,serve]": ["preflight_serve", "preflight_overfit"],
    "preflight=serve preflight.serve.needs.target=target": ["target", "preflight_serve"],
}


def on_a_small_file(config: Any, place: Path) -> Any:
    """A configuration whose text is not Python's own library, which takes long to hash."""
    if isinstance(config, list):
        return [on_a_small_file(item, place) for item in config]
    if not isinstance(config, dict):
        return config
    if config.get("_target_") == "data.builtin.Builtin":
        kind = {"prompt": "{question}", "answer": "{answer}"}
        return {"_target_": "data.sources.Local", "files": [str(place / "chat.jsonl")]} | kind
    return {key: on_a_small_file(value, place) for key, value in config.items()}


@pytest.mark.parametrize("words", CASES)
def test_preflight_stands_before_what_is_trained(words, place, tmp_path):
    there = [] if "target" in CASES[words] else [f"target.path={place / 'target'}"]
    config = on_a_small_file(compose("recipe=quickstart", *words.split(), *there), place)
    stages = [stage.name for stage in plan(config, tmp_path)]
    assert stages[: stages.index("pretrain")] == CASES[words]
    assert list(tmp_path.iterdir()) == []


def test_settings_and_engines_are_given_once(place):
    words = ["preflight=[serve,overfit]", "engines.vllm=/x/python", "preflight.overfit.count=5"]
    config = compose("recipe=quickstart", f"target.path={place / 'target'}", *words)
    serving, overfit = config["stages"]["preflight_serve"], config["stages"]["preflight_overfit"]
    assert serving["engines"]["vllm"] == overfit["engines"]["vllm"] == "/x/python"
    assert overfit["count"] == 5
    assert compose("recipe=quickstart")["stages"]["preflight_serve"] is None


def test_a_misspelt_preflight_is_one_sentence_with_the_right_names(tmp_path):
    done = command("recipe=quickstart", "preflight=server", "plan=true", cwd=tmp_path)
    assert done.returncode == 2
    said = "there is no preflight 'server'; did you mean 'serve'? There are: overfit, serve"
    assert said in done.stderr
