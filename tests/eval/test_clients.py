"""Other engines as clients: what an engine does wrong is said in a sentence, what it prints holds
no secret and no place of this machine, and our loop is compared with it round for round."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from toys import sharpen, tiny_model

from data.builtin import Builtin
from data.sources import Local
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import load, save
from drafters.hydra_heads import HydraHeads
from drafters.lm import LM
from eval import agreement, clients
from eval.agreement import Question
from eval.clients import Asked, Served, ask, installed
from eval.controls import Failed
from eval.engines.snippets import named, snippet
from eval.forms import forms
from eval.serve import Serve
from tests import tiny

PYTHON = Path(sys.executable)
ANSWER: dict[str, Any] = {
    "engine": "vllm", "version": "fake 1", "ids": [[1, 2]], "plain_ids": [[1, 2]], "drafts": 1,
    "accepted_total": 1, "accepted": [1, 0], "seconds": 0.1, "by_prompt": [[1, 1, 0]],
}  # fmt: skip
COPIES = "import json, sys; from pathlib import Path; "
GIVES = COPIES + "Path(sys.argv[2]).write_text(Path(__file__).with_name('answer.json').read_text())"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks a made-up engine, whose script is this, for two tokens."""
    monkeypatch.setattr(clients, "SIDES", tmp_path)

    def asked(script: str, answer: Any = ANSWER, **more: Any) -> Served:
        (tmp_path / "vllm_side.py").write_text(script)
        (tmp_path / "answer.json").write_text(json.dumps(answer))
        settings = {"drafter": tmp_path / "drafter", "log": tmp_path / "logs" / "engine.log"}
        question = Asked(tmp_path, [[5, 6]], [2], 2, "float32")
        return ask("vllm", PYTHON, question, method="draft_model", **(settings | more))

    return asked


def test_the_question_reaches_the_engine_and_its_answer_comes_back(engine: Any, tmp_path: Path):
    script = GIVES + "; print(Path(sys.argv[1]).read_text())"
    served = engine(script)
    assert served == Served(**ANSWER)
    assert served.tau == 2
    log = (tmp_path / "logs" / "engine.log").read_text()
    asked = json.loads(log)
    assert (asked["prompts"], asked["lengths"]) == ([[5, 6]], [2])
    assert (asked["method"], asked["draft_length"], asked["dtype"]) == ("draft_model", 2, "float32")
    assert (asked["target"], asked["drafter"]) == ("target", "drafter")  # without their places
    assert str(tmp_path) not in log


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("raise SystemExit('no tensor fc.weight')", r"no tensor fc\.weight \(exit code 1"),
        ("print('nothing to say')", r"nothing to say \(exit code 0"),
        ("import os; os.abort()", r"printed nothing \(exit code -6"),
    ],
    ids=["refuses", "silent", "dies"],
)  # fmt: skip
def test_an_engine_that_does_not_answer_fails_with_its_last_line(
    script: str, said: str, engine: Any
):
    with pytest.raises(Failed, match=rf"vllm did not answer with method draft_model: .*{said}"):
        engine(script)


WRONG: dict[str, dict[str, Any]] = {
    "another number of prompts": {"ids": [[1, 2], [3, 4]]},
    "positions do not add up": {"accepted": [1, 1]},
    "more than was drafted": {"accepted_total": 3, "accepted": [2, 1]},
    "prompts do not add up": {"by_prompt": [[2, 1, 0]]},
    "nothing of the kind": {"drafts": None},
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_that_cannot_be_is_refused(what: str, engine: Any):
    with pytest.raises(Failed, match="the answer of vllm does not fit the question"):
        engine(GIVES, ANSWER | WRONG[what])


def test_tokens_reach_neither_the_engine_nor_its_log(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 34)
    monkeypatch.setenv("MINE_API_KEY", "canary-of-another-kind")
    script = (
        GIVES
        + "; import os; print(dict(os.environ)); print('canary-of-another-kind', 'hf_'+'q'*34)"
    )
    engine(script)
    log = (tmp_path / "logs" / "engine.log").read_text()
    assert "HF_TOKEN" not in log
    assert "MINE_API_KEY" not in log
    assert "q" * 34 not in log
    assert "canary" not in log
    assert "*** ***" in log
    assert "'HF_HUB_OFFLINE': '1'" in log


def test_a_hung_engine_is_ended_with_all_that_it_started(engine: Any, tmp_path: Path):
    script = (
        "import subprocess, sys, time; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        "print(child.pid, flush=True); time.sleep(600)"
    )
    begin = time.monotonic()
    with pytest.raises(Failed, match="it was ended after 3 seconds"):
        engine(script, limit=3.0)
    assert time.monotonic() - begin < 60
    child = int((tmp_path / "logs" / "engine.log").read_text())
    for _ in range(100):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the engine's child lives on")


def test_what_is_not_there_is_found_before_anything_starts(tmp_path: Path):
    assert str(installed("transformers", PYTHON)).startswith("transformers 5.")
    assert installed("llama_cpp", PYTHON) is None
    with pytest.raises(ValueError, match="named as the Python that has vllm, and it does not run"):
        installed("vllm", tmp_path / "python")
    with pytest.raises(ValueError, match="there is no client for 'trt'"):
        ask(
            "trt", PYTHON, Asked(tmp_path, [[1]], [1], 1, "float32"), drafter=None,
            method="ngram", log=tmp_path / "log",
        )  # fmt: skip


@pytest.mark.parametrize("lengths", [[], [0], [1, 1]], ids=["none", "zero", "too many"])
def test_each_prompt_has_a_length_of_its_own(lengths: list[int], tmp_path: Path):
    with pytest.raises(ValueError, match="a length of at least 1 for each"):
        ask(
            "vllm", PYTHON, Asked(tmp_path, [[1]], lengths, 1, "float32"), drafter=None,
            method="ngram", log=tmp_path / "log",
        )  # fmt: skip


# --- round for round -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model(vocab=24, seed=1, dtype=torch.float32), name="tiny")


@pytest.fixture(scope="module")
def drafter(target: Target) -> LM:
    """The target with a little noise: some of its guesses are right, and some are not."""
    model = tiny_model(vocab=24, seed=1, dtype=torch.float32)
    torch.manual_seed(6)
    for parameter in model.parameters():
        parameter.data += 0.15 * parameter.data.std() * torch.randn_like(parameter)
    return LM.around(model, draft_length=3)


@pytest.fixture(scope="module")
def question(target: Target) -> Question:
    """Some answers end early, one with its first token."""
    prompts = [[i, (5 * i) % 24, 7] for i in range(8)]
    whole = Question.of(target, prompts, 14, 3)
    ends = [whole.plain[6][0]]
    target.model.generation_config.eos_token_id = ends
    made = Question.of(target, prompts, 14, 3)
    lengths = [len(ids) for ids in made.plain]
    assert min(lengths) == 1
    assert max(lengths) == 14
    assert len(set(lengths)) > 2
    return made


def simulated(
    question: Question, drafter: LM, *, drafts_first: bool, cuts_last: bool, late: int = 0
) -> Served:
    """An engine in plain words: nothing of it is our loop's. late: it drafts as if the last tokens
    were not there yet."""

    def next_of(model: Any, ids: list[int]) -> int:
        with torch.inference_mode():
            return int(model(torch.tensor([ids])).logits[0, -1].argmax())

    ids, rows = [], []
    for prompt, plain in zip(question.prompts, question.plain, strict=True):
        answer = [] if drafts_first else [next_of(question.target.model, prompt)]
        row = [0] * (1 + question.draft_length)
        while len(answer) < len(plain):
            left, run = len(plain) - len(answer), 0
            length = min(question.draft_length, left - 1) if cuts_last else question.draft_length
            text = prompt + answer
            draft: list[int] = []
            for _ in range(length):
                draft.append(next_of(drafter.model, text[: len(text) - late] + draft))
            while run < length and next_of(question.target.model, text + draft[:run]) == draft[run]:
                run += 1
            answer += [*draft[:run], next_of(question.target.model, text + draft[:run])]
            row = [row[0] + 1, *(n + (run > k) for k, n in enumerate(row[1:]))]
        ids.append(answer[: len(plain)])
        rows.append(row)
    accepted = [sum(column) for column in zip(*rows, strict=True)]
    return Served(
        "plain words", "0", ids, question.plain, accepted[0], sum(accepted[1:]), accepted[1:], 0.0,
        rows, drafts_first, cuts_last,
    )  # fmt: skip


def again(question: Question, drafter: LM, served: Served) -> Any:
    """Our rows of some prompts in fp64."""
    exact = replace(question, target=Target(_double(question.target.model), name="tiny"))
    finer = LM.around(_double(drafter.model), draft_length=3)
    return lambda numbers: agreement.here(
        exact, finer, drafts_first=served.drafts_first, cuts_last=served.cuts_last, only=numbers
    )


def _double(model: Any) -> Any:
    twin = tiny_model(vocab=24, dtype=torch.float64)
    twin.load_state_dict(model.state_dict())
    return twin


@pytest.mark.parametrize("cuts_last", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("drafts_first", [False, True], ids=["second", "first"])
def test_our_loop_counts_as_an_engine_counts(
    drafts_first: bool, cuts_last: bool, question: Question, drafter: LM
):
    served = simulated(question, drafter, drafts_first=drafts_first, cuts_last=cuts_last)
    rows = agreement.here(question, drafter, drafts_first=drafts_first, cuts_last=cuts_last)
    assert rows == served.by_prompt
    assert 0.1 < served.accepted_total / served.drafts < 2.9, "all or nothing would test nothing"
    other = agreement.here(question, drafter, drafts_first=not drafts_first, cuts_last=cuts_last)
    assert other != rows
    found = agreement.compared(question, served, rows, again(question, drafter, served))
    assert found["agrees"]
    assert found["rounds"] == {"n": 8, "identical": 8, "near_ties": 0, "wrong": 0}
    assert found["tau"]["here"]["value"] == pytest.approx(served.tau)
    here = [e["value"] for e in found["accepted_by_position"]["here"]]
    assert here == pytest.approx(found["accepted_by_position"]["there"])


@pytest.mark.parametrize("cuts_last", [False, True], ids=["whole", "cut"])
def test_tau_is_that_of_a_loop_that_stops_at_ends(cuts_last: bool, question: Question, drafter: LM):
    """As bench counts: tokens of the answers over rounds, whatever an engine drafts beyond."""
    served = simulated(question, drafter, drafts_first=True, cuts_last=cuts_last)
    done = decode(
        question.target, drafter, question.prompts, sampling=Sampling(), max_new_tokens=14
    )
    assert [answer.ids for answer in done.answers] == question.plain
    assert any(answer.ended for answer in done.answers)
    due = done.tokens / sum(len(answer.accepted) for answer in done.answers)
    rows = agreement.here(question, drafter, drafts_first=True, cuts_last=cuts_last)
    found = agreement.compared(question, served, rows, lambda _: [])
    assert served.tau == pytest.approx(due)
    assert found["tau"]["here"]["value"] == pytest.approx(due)


def test_rounds_that_differ_are_wrong_though_tau_is_within_the_interval(
    question: Question, drafter: LM
):
    """What a dropped bias or a shifted tap of a weak drafter looks like."""
    served = simulated(question, drafter, drafts_first=False, cuts_last=False)
    assert served.by_prompt is not None
    rows = [list(row) for row in served.by_prompt]
    two = [n for n, row in enumerate(rows) if row[0] > 1 and row[1]][:2]
    for n, step in zip(two, (1, -1), strict=True):
        rows[n][0] += step
    changed = replace(served, by_prompt=rows)
    due = agreement.here(question, drafter, drafts_first=False, cuts_last=False)
    found = agreement.compared(question, changed, due, again(question, drafter, served))
    low, high = found["tau"]["here"]["low"], found["tau"]["here"]["high"]
    assert low <= changed.tau <= high
    assert found["rounds"]["wrong"] == 2
    assert not found["agrees"]
    excused = agreement.compared(question, changed, due, lambda some: [[0]] * len(some))
    assert excused["rounds"]["near_ties"] == 2  # there our own loop parts from itself
    assert excused["agrees"]
    untold = agreement.compared(question, replace(changed, by_prompt=None), due, lambda _: [])
    assert untold["rounds"] is None
    assert untold["agrees"]


def test_a_drafter_one_token_late_leaves_the_interval(question: Question, drafter: LM):
    late = replace(
        simulated(question, drafter, drafts_first=True, cuts_last=False, late=1), by_prompt=None
    )
    due = agreement.here(question, drafter, drafts_first=True, cuts_last=False)
    found = agreement.compared(question, late, due, lambda _: [])
    assert not found["agrees"]
    row = found | {"version": "engine 1", "family": "lm", "format": "transformers", "loaded": True,
                   "answers": {}, "snippet": None}  # fmt: skip
    (fault,) = agreement.faults(row)
    assert fault.startswith(f"engine 1 with lm/transformers: {late.tau:.3f} tokens per target call")
    assert "one off" in fault


def test_answers_must_be_the_targets_own(question: Question, drafter: LM):
    served = simulated(question, drafter, drafts_first=True, cuts_last=False)
    exact = Target(_double(question.target.model), name="tiny")
    found = agreement.equality(question, served, lambda: exact)
    assert found["drafting"]["identical"] == found["plain"]["identical"] == 8
    ids = [list(answer) for answer in served.ids]
    ids[3][5] = (ids[3][5] + 1) % 24
    ids[6] = ids[6][:-1]  # an answer that ended early
    found = agreement.equality(question, replace(served, ids=ids), lambda: exact)
    assert found["drafting"] == {
        "n": 8, "identical": 6, "near_ties": 0, "wrong": 2,
        "first": f"token 6 is {ids[3][5]}, expected {served.ids[3][5]}",
    }  # fmt: skip


# --- the stage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, chats, and drafters of two families."""
    folder = tmp_path_factory.mktemp("serve")
    path = tiny.write_target(folder / "target", tiny.write_texts(folder))
    tiny.write_chats(folder)
    spec = Pretrained(path=path)
    for cls, arguments in ((LM, {"width": 64}), (HydraHeads, {"heads": 2})):
        torch.manual_seed(2)
        drafter = sharpen(cls(spec.shape_of(), **arguments), 1.5)
        name = cls.__module__.removeprefix("drafters.")
        save(drafter, folder / name, arguments)  # type: ignore[arg-type]
    return folder


def stage(place: Path, **more: Any) -> Serve:
    settings: dict[str, Any] = {"limit": 3, "max_new_tokens": 6, "heldout_only": False} | more
    chats = Local(files=[str(place / "chat.jsonl")], prompt="{question}")
    target = Pretrained(path=str(place / "target"))
    return Serve(target=target, prompts={"chat": chats}, **settings)


def test_an_engine_that_does_not_load_fails_the_stage_and_is_in_the_matrix(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sides = tmp_path / "sides"
    sides.mkdir()
    (sides / "vllm_side.py").write_text("raise SystemExit('Unrecognized model')")
    monkeypatch.setattr(clients, "SIDES", sides)
    made = stage(place, engines={"vllm": sys.executable, "openvino": None})
    made.engines.pop("transformers")
    with pytest.raises(Failed, match=r"with lm/transformers: vllm did not answer.*Unrecognized"):
        made.run(tmp_path / "out", drafter=place / "lm")
    served = json.loads((tmp_path / "out" / "artifact" / "served.json").read_text())
    (row,) = served["rows"]
    assert not row["loaded"]
    assert "Unrecognized model" in (tmp_path / "out" / "artifact" / row["log"]).read_text()
    assert [e["engine"] for e in served["not_run"]] == ["transformers", "openvino", "sglang"]
    told = capsys.readouterr().out
    assert "starting it takes a while" in told
    assert "not loaded" in told


def test_a_family_that_no_engine_serves_is_said_to_be_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert stage(place).run(tmp_path, drafter=place / "hydra_heads") == {}
    assert "no engine serves hydra_heads" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"limit": 1}, "limit must be at least 2|limit and max_new_tokens must be at least 2"),
        ({"dtype": "int4"}, "serve.dtype is 'int4'"),
        ({"engines": {"trt": "python"}}, "serve.engines names trt; there are clients for"),
        ({"prompts": {"chat": None}}, "serve has no prompts"),
    ],
    ids=["limit", "dtype", "engine", "prompts"],
)
def test_bad_settings_are_refused_at_once(settings: dict[str, Any], said: str):
    good: dict[str, Any] = {"target": Pretrained(), "prompts": {"chat": Builtin(kind="text")}}
    with pytest.raises(ValueError, match=said):
        Serve(**(good | settings))


def test_a_python_without_its_engine_is_found_at_plan_time(place: Path):
    with pytest.raises(ValueError, match=r"engines.llama_cpp is .* has none of the packages"):
        stage(place, engines={"llama_cpp": sys.executable}).check({})
    with pytest.raises(ValueError, match="does not run"):
        stage(place, engines={"vllm": str(place / "python")}).check({})
    stage(place, engines={"vllm": None}).check({})


def test_the_formats_of_an_export_and_who_reads_them(place: Path, tmp_path: Path):
    shape = Pretrained(path=str(place / "target")).shape_of()
    trained = load(place / "lm", shape)
    (tmp_path / "gguf").mkdir()
    entries = {"gguf": {"engines": ["llama_cpp"], "method": None}}
    (tmp_path / "export.json").write_text(json.dumps(entries))
    (form,), nobody = forms(place / "lm", trained, tmp_path)
    assert (form.layout, form.method, form.engines) == ("lm/gguf", "draft_model", ("llama_cpp",))
    assert (form.dtype, nobody) == ("float32", "")


def test_snippets_are_python_for_every_layout_that_an_engine_serves():
    for engine, layout in (
        ("transformers", "lm/transformers"), ("vllm", "lm/transformers"), ("vllm", "medusa/vllm"),
        ("vllm", "medusa/original"), ("vllm", "eagle/vllm"), ("vllm", "eagle3/speculators"),
        ("sglang", "eagle3/vllm"), ("llama_cpp", "lm/gguf"), ("speculators", "eagle3/speculators"),
        ("openvino", "eagle3/vllm"), ("openvino", "lm/transformers"),
    ):  # fmt: skip
        for place in ("me/drafter", "me/drafter/part", os.sep + "folder"):
            code = named(snippet(engine, layout, 4), "you/target", place)
            compile(code, "snippet", "exec")
            assert ("you/target" in code) == (engine != "llama_cpp")  # which reads target.gguf
            assert "TARGET" not in code
            assert "DRAFTER" not in code
            assert ('snapshot_download("me/drafter"' in code) == (place == "me/drafter/part")
    assert '"method": "medusa"' in snippet("vllm", "medusa/original", 4)
    for engine, layout in (
        ("transformers", "medusa/vllm"), ("sglang", "medusa/vllm"), ("llama_cpp", "lm/vllm"),
        ("speculators", "eagle3/vllm"), ("x", "y"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="there is no snippet for"):
            snippet(engine, layout, 4)
