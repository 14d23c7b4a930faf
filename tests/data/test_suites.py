"""Suites: they compose into recipes, hold what their names promise, and say what is wrong."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data.sources import Hub, Local, Mix, Source
from tests.data.hub_server import HEAD, serving
from tests.train.composing import ROOT, compose
from train.__main__ import help_text
from train.compose import bind, build
from train.plan import plan

SUITES = sorted(path.stem for path in (ROOT / "conf/suite").glob("*.yaml"))
REMOTE = ("gsm8k", "human_eval", "json_schema_bench")  # these need nothing of shared/
PROMPTS = "stages.bench.prompts"
USER = (f"{PROMPTS}.user.files=[FILE]", f'{PROMPTS}.user.prompt="{{question}}"')
MT_BENCH = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip
SPEC_BENCH = ("mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag")
COUNTS = {
    "spec_bench": dict.fromkeys(SPEC_BENCH, 80),
    "mt_bench": dict.fromkeys(MT_BENCH, 10),
    "flores": {f"flores_{code}": 1_012 for code in ("de", "fr", "ru", "ja", "zh", "ko")},
    "tatoeba": {
        "tatoeba_de": 17_565,
        "tatoeba_fr": 12_681,
        "tatoeba_ru": 19_423,
        "tatoeba_zh": 10_386,
        "tatoeba_ja": 13_862,
        "tatoeba_ko": 2_400,
    },
    "multilingual": dict.fromkeys(("deen", "jaen", "zhen"), 80),
    "korean": {
        "korean_chatbot": 11_823,
        "korean_nli": 5_010,
        "korean_sts": 1_379,
        "korean_flores": 1_012,
        "korean_tatoeba": 2_400,
    },
}


def write(folder: Path, *lines: str | dict[str, Any]) -> str:
    raw = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "mine.jsonl").write_text("\n".join(raw) + "\n", encoding="utf-8")
    return str(folder / "mine.jsonl")


def prompts_of(recipe: str, *overrides: str) -> dict[str, Any]:
    prompts = compose(f"recipe={recipe}", *overrides)["stages"]["bench"]["prompts"]
    assert isinstance(prompts, dict)
    return prompts


def suite(name: str, *overrides: str) -> dict[str, Source]:
    """The suite's sources, without the recipe's own task."""
    prompts = prompts_of("quickstart", f"+suite@{PROMPTS}={name}", *overrides)
    del prompts["python"]
    return {task: build(source) for task, source in prompts.items() if source is not None}


def said(source: Source, count: int = 1) -> list[str]:
    return [row["messages"][0]["content"] for row in islice(source.rows(), count)]


def need(name: str, request: pytest.FixtureRequest) -> None:
    if name not in (*REMOTE, "user_jsonl"):
        request.getfixturevalue("shared")


def test_help_lists_the_suites():
    assert f"  suite          {', '.join(SUITES)}" in help_text()
    assert {*COUNTS, *REMOTE, "user_jsonl"} == set(SUITES)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_joins_the_tasks_of_a_recipe(name: str, tmp_path: Path, request):
    need(name, request)
    file = write(tmp_path, {"question": "Why?"})
    words = [word.replace("FILE", file) for word in USER] if name == "user_jsonl" else []
    prompts = prompts_of("quickstart", f"+suite@{PROMPTS}={name}", *words)
    bind(prompts, PROMPTS)
    made = build(prompts)
    assert prompts["python"]["_target_"] == "data.builtin.Builtin"
    assert len(made) > 1
    for task, source in made.items():
        if task not in ("python", "user"):
            assert source.licence, f"{name} does not say the licence of {task}"
            assert source.evaluation == (
                task not in ("korean_chatbot", "korean_tatoeba", "tatoeba_ko")
            )


@pytest.mark.parametrize("name", [name for name in SUITES if name != "user_jsonl"])
def test_every_suite_plans_in_ko_local(name: str, tmp_path: Path, shared: Path):
    config = compose("recipe=ko_local", f"+suite@{PROMPTS}={name}")
    del config["stages"]["pretrain"], config["stages"]["finetune"]["needs"]["drafter"]
    bench = next(stage for stage in plan(config, tmp_path) if stage.name == "bench")
    assert {"ko_nli", "ko_sts", *COUNTS.get(name, [])} <= set(bench.config["prompts"])


@pytest.fixture(scope="module")
def local(shared: Path) -> dict[str, Source]:
    """The tasks of all suites that read shared/, those of the Hub taken out."""
    offline = (f"{PROMPTS}.fren=null", f"{PROMPTS}.ruen=null")
    return suite(f"[{','.join(COUNTS)}]", *offline)


@pytest.mark.parametrize("name", COUNTS)
def test_local_suites_hold_what_they_promise(name: str, local: dict[str, Source]):
    for task, count in COUNTS[name].items():
        assert sum(1 for _ in local[task].rows()) == count, task


def test_prompts_are_worded_as_their_references_word_them(local: dict[str, Source]):
    begin = {
        "deen": "Translate German to English:Obama empfängt Netanyahu",
        "jaen": "Translate Japanese to English:また、",
        "translation": "Translate German to English: Pfandhäuser",
        "summarization": "Summarize: ",
        "flores_ru": "Translate Russian to English: ",
        "flores_ko": "Translate Korean to English: ",
        "tatoeba_zh": "Translate Chinese to English: ",
        "korean_chatbot": "12시 땡!",
    }
    for task, words in begin.items():
        assert said(local[task])[0].startswith(words), task
    assert said(local["flores_ko"], 9) == said(local["korean_flores"], 9)


def test_all_turns_are_kept(local: dict[str, Source]):
    for task in (*MT_BENCH, *SPEC_BENCH):
        turns = {len(row["messages"]) for row in local[task].rows()}
        assert turns == ({2} if task in ("mt_bench", *MT_BENCH) else {1}), task
    row = next(local["writing"].rows())
    assert row["messages"][1]["role"] == "user"
    assert row["messages"][1]["content"].startswith("Rewrite your previous response.")


def test_tasks_can_be_taken_out_and_suites_combined(shared: Path):
    both = prompts_of("ko_local", f"+suite@{PROMPTS}=[spec_bench,mt_bench]", f"{PROMPTS}.rag=null")
    assert {"ko_nli", "ko_sts", "qa", "math"} <= set(both)
    assert both["rag"] is None
    assert both["ko_chat"] is None  # the recipe's own null stays


# ---- the Hub's suites, against a server on localhost with rows of the same columns

SCHEMA = '{"type": "object"}'
WMT14, WMT16 = (
    "b199e406369ec1b7634206d3ded5ba45de2fe696",
    "41d8a4013aa1489f28fea60ec0932af246086482",
)
GSM8K = "740312add88f781978c0658806c59bc2815b9866"
HUMAN_EVAL = "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544"
FUNCTION = 'def f(x):\n    """Double."""\n'
SETS: dict[str, Any] = {
    "openai/gsm8k": {"main": {"test": [{"question": "How many?", "answer": "#### 2"}]}},
    "openai/openai_humaneval": {
        "openai_humaneval": {
            "test": [{"task_id": "HumanEval/0", "prompt": FUNCTION, "canonical_solution": "x"}]
        }
    },
    "epfl-dlab/JSONSchemaBench": {
        name: {"test": [{"json_schema": SCHEMA, "unique_id": name}]}
        for name in ("Github_easy", "Github_medium", "Github_hard")
    },
    "wmt/wmt14": {
        "fr-en": {"test": [{"translation": {"fr": f"Bonjour {i}", "en": "x"}} for i in range(90)]}
    },
    "wmt/wmt16": {
        "ru-en": {"test": [{"translation": {"ru": f"Привет {i}", "en": "x"}} for i in range(90)]}
    },
}
READ = """
import json, sys
from data.sources import Hub
for task, keys in json.load(sys.stdin).items():
    source = Hub(**keys)
    print(json.dumps([task, source.revisions(), list(source.rows())]))
bad = dict(path="openai/gsm8k", name="main", split="test", revision="1" * 40, prompt="{q}")
for keys in (bad, bad | {"path": "openai/none"}, bad | {"revision": None}):
    for read in (lambda s: s.revisions(), lambda s: list(s.rows())):
        try:
            print(json.dumps(read(Hub(**keys))))
        except Exception as error:
            print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.fixture(scope="module")
def read_from_hub(tmp_path_factory) -> tuple[dict, list, set]:
    """{task: (revisions, rows)}, answers to what is not there, and the revisions asked for."""
    place = ROOT / os.environ.get("DRAFTSMITH_SHARED", "../shared")
    names = [*REMOTE, *(["multilingual"] if place.is_dir() else [])]
    config = prompts_of("quickstart", f"+suite@{PROMPTS}=[{','.join(names)}]")
    hub = {k: v for k, v in config.items() if v["_target_"] == "data.sources.Hub"}
    asked = {k: {key: v[key] for key in v if key != "_target_"} for k, v in hub.items()}
    with serving(SETS, {GSM8K, HUMAN_EVAL, WMT14, WMT16}) as (address, revisions):
        mine = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", READ],
            input=json.dumps(asked),
            env=os.environ | mine | {"HF_HOME": str(tmp_path_factory.mktemp("hub"))},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {t: (r, rows) for t, r, rows in lines[: len(asked)]}, lines[len(asked) :], revisions


def test_what_the_hubs_suites_ask(read_from_hub):
    found = {task: rows[0] for task, (_, rows) in read_from_hub[0].items()}
    words = {task: row["messages"][0]["content"] for task, row in found.items()}
    assert words["gsm8k"] == "How many?"
    assert words["human_eval"] == "Complete the code I provided.\n" + FUNCTION.strip()
    assert words["json_hard"] == (
        "Generate a JSON object that matches the following JSON schema.\n\n"
        f"JSON schema: {SCHEMA}\n\nJSON object:"
    )
    assert found["json_easy"]["schema"] == SCHEMA
    assert "schema" not in found["gsm8k"]
    if "fren" in found:
        assert words["fren"] == "Translate French to English:Bonjour 0"
        assert words["ruen"] == "Translate Russian to English:Привет 0"
        assert [len(read_from_hub[0][task][1]) for task in ("fren", "ruen")] == [80, 80]


def test_pinned_sets_are_read_at_their_pin_and_others_say_what_was_read(read_from_hub):
    read, _, asked = read_from_hub
    pins = {"openai/openai_humaneval": HUMAN_EVAL, "wmt/wmt14": WMT14, "wmt/wmt16": WMT16}
    for name, revision in asked:
        if name in pins:
            assert revision == pins[name]
    assert read["gsm8k"][0] == {"openai/gsm8k main test": GSM8K}
    assert read["json_hard"][0] == {"epfl-dlab/JSONSchemaBench Github_hard test": HEAD}
    whose = {revision for name, revision in asked if name == "epfl-dlab/JSONSchemaBench"}
    assert whose == {"", HEAD}  # main is asked for once, to name its commit; then only that is read


def test_what_the_hub_does_not_have_is_a_sentence(read_from_hub):
    answers = read_from_hub[1]
    for answer in answers[:4]:  # a revision, then a data set, that is not there
        assert answer.startswith("ValueError: data set openai/")
        assert "correct path and revision" in answer
    assert answers[4] == {"openai/gsm8k main test": HEAD}
    assert "row 1: no column 'q'; the columns there are question, answer" in answers[5]


# ---- only, schema, evaluation


def test_only_takes_the_rows_of_given_values(tmp_path: Path):
    rows = [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    file = write(tmp_path, *({"k": k, "n": n, "t": f"{k}{n}"} for k, n in rows))

    def taken(limit: int | None = None, **only: list[str]) -> list[str]:
        source = Local(files=[file], text="{t}", only=only, limit=limit)
        return [row["text"] for row in source.rows()]

    assert taken(k=["a"]) == ["a1", "a2"]
    assert taken(k=["b", "a"], n=["2"]) == ["a2", "b2"]
    assert taken(limit=1, k=["b"]) == ["b1"]
    grouped = Local(files=[file], text="{t}", only={"n": ["2"]}, group="n")
    assert [row["text"] for row in grouped.rows()] == ["a2\nb2"]
    marks = {Local(files=[file], text="{t}", only={"k": [v]}).fingerprint() for v in "ab"}
    assert len(marks) == 2


def test_the_hub_counts_its_limit_after_only(monkeypatch):
    records = [{"k": k, "q": f"{k}{n}"} for n in range(3) for k in "ab"]
    monkeypatch.setattr("data.hub.stream", lambda *named: iter(records))
    assert said(Hub(path="a/b", prompt="{q}", only={"k": ["b"]}, limit=2), 9) == ["b0", "b1"]
    with pytest.raises(ValueError, match=r"a/b train: no row has 'c' in column 'k'"):
        list(Hub(path="a/b", prompt="{q}", only={"k": ["c"]}).rows())


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ({"k": ["a", "c"]}, r"no row has 'c' in column 'k'; the values there are a, b: name one"),
        ({"kk": ["a"]}, r"line 1: no column 'kk'; the columns there are k, t: name one of them"),
        ({"k": "a"}, r"only\.k is 'a', expected a list of values"),
        ({"k": []}, r"only\.k is \[\], expected a list of values"),
    ],
)
def test_a_wrong_only_says_what_there_is(tmp_path: Path, only: dict[str, Any], message: str):
    file = write(tmp_path, {"k": "b", "t": "1"}, {"k": "a", "t": "2"})
    with pytest.raises(ValueError, match=message):
        list(Local(files=[file], text="{t}", only=only).rows())


def test_values_of_only_may_be_in_different_files(tmp_path: Path):
    (tmp_path / "other").mkdir()
    files = [write(tmp_path, {"k": "a"}), write(tmp_path / "other", {"k": "b"})]
    assert len(list(Local(files=files, text="{k}", only={"k": ["a", "b"]}).rows())) == 2


def test_a_schema_is_kept_as_text(tmp_path: Path):
    given = {"type": "string", "title": "이름"}
    file = write(tmp_path, {"q": "?", "s": SCHEMA}, {"q": "?", "s": given}, {"q": "?", "s": "true"})
    source = Local(files=[file], prompt="{q}", schema="s")
    kept = [row["schema"] for row in source.rows()]
    assert kept[0] == SCHEMA
    assert [json.loads(text) for text in kept[1:]] == [given, True]
    assert "이름" in kept[1]
    assert source.fingerprint() != Local(files=[file], prompt="{q}").fingerprint()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"type": ', r"line 1: column 's' holds broken JSON, Expecting value at line 1"),
        ("[1]", r"line 1: column 's' holds '\[1\]' \(str\), expected a JSON schema"),
        (3, r"line 1: column 's' holds 3 \(int\), expected a JSON schema"),
        (None, r"line 1: column 's' holds None \(NoneType\), expected a JSON schema"),
    ],
)
def test_what_is_no_schema_is_refused(tmp_path: Path, value: Any, message: str):
    file = write(tmp_path, {"s": value, "q": "?"})
    with pytest.raises(ValueError, match=message):
        list(Local(files=[file], prompt="{q}", schema="s").rows())


def test_a_mix_is_for_evaluation_when_all_its_parts_are():
    one = Hub(path="a/b", prompt="{q}", evaluation=True)
    other = Hub(path="a/c", prompt="{q}")
    assert Mix(parts={"one": one}).evaluation
    assert not Mix(parts={"one": one, "other": other}).evaluation


# ---- a file of the user's own


def user(file: str, **settings: Any) -> Source:
    config = OmegaConf.load(ROOT / "conf/data/user_jsonl.yaml")
    made = OmegaConf.to_container(OmegaConf.merge(config, {"files": [file]}, settings))
    bind(made, "user")
    source = build(made)
    assert isinstance(source, Source)
    return source


def test_a_users_file_with_prompts_or_turns_or_schemas(tmp_path: Path):
    turns = {"question": "Why?", "turns": ["One", "Two"], "schema": {"type": "object"}, "kind": "a"}
    write(tmp_path, turns, turns | {"kind": "b"})
    file = (tmp_path / "mine.jsonl").rename(tmp_path / "mine.data")  # whatever it is called
    row, _ = user(str(file), prompt="Say: {question}", schema="schema").rows()
    assert row["messages"] == [{"role": "user", "content": "Say: Why?"}]
    assert json.loads(row["schema"]) == {"type": "object"}
    (row,) = user(str(file), messages="turns", only={"kind": ["b"]}).rows()
    assert [turn["content"] for turn in row["messages"]] == ["One", "Two"]


def test_what_is_wrong_with_a_users_file_is_found_by_the_plan(tmp_path: Path):
    def refused(file: str, **settings: Any) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            user(file, **settings).fingerprint()  # which a plan asks for
        return str(error.value)

    file, ask = write(tmp_path, {"frage": "Warum?", "kind": "a"}), {"prompt": "{question}"}
    there = "line 1: no column 'question'; the columns there are frage, kind: name one of them"
    assert there in refused(file, **ask)
    assert "column 'frage' holds 'Warum?' (str), expected a list" in refused(file, messages="frage")
    assert "nothing.jsonl does not exist" in refused(str(tmp_path / "nothing.jsonl"), **ask)
    assert "is a folder, expected a file" in refused(str(tmp_path), **ask)
    assert "none of text, prompt and messages given" in refused(file)
    with pytest.raises(
        OmegaConfBaseException, match=r"full_key: stages\.bench\.prompts\.user\.files"
    ):
        suite("user_jsonl")


@pytest.mark.parametrize("bad", ['{"question": ', "[1]", '{"question": 3}', '{"other": "x"}'])
def test_a_bad_line_of_a_users_file_is_refused_by_its_number(tmp_path: Path, bad: str):
    file = write(tmp_path, {"question": "fine"}, "", bad)
    rows = user(file, prompt="{question}").rows()
    assert next(rows)["messages"][0]["content"] == "fine"
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 3: "):
        next(rows)


def test_blank_lines_and_nulls_are_no_prompts(tmp_path: Path):
    file = write(tmp_path, "", {"question": "fine"}, {"question": None}, "")
    assert said(user(file, prompt="{question}"), 9) == [
        "fine",
        "",
    ]  # the gate drops and counts the empty one
