"""`python -m train`: what it says, how fast it says it, and what it leaves behind (nothing)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.builtin import Builtin
from decoding.target import Shape
from eval import cost, rounds
from tests.toys import tiny_model
from tests.train.composing import LAUNCHED, ROOT, command, compose
from train.__main__ import main
from train.advise import run_advice
from train.candidates import blueprints_of
from train.mistakes import quoted
from train.run import run_recipe
from train.task import _check_budget

PROMPTLY = 4.0  # seconds of a processor; two are promised
RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))

MISTAKES = {
    "recipe": (
        ["recipe=quickstrt"],
        "no recipe 'quickstrt'; did you mean 'quickstart'? There are:",
    ),
    "no recipe": (["plan=true"], "no recipe was chosen: add recipe=NAME, one of"),
    "group": (["recipe=quickstart", "drafter=lmm"], "no drafter 'lmm'; did you mean 'lm'?"),
    "key": (
        ["recipe=quickstart", "stages.pretrain.schedule.tokns=3"],
        "stages.pretrain.schedule.tokns is not a setting; did you mean 'tokens'? Valid names:",
    ),
    "stage": (
        ["recipe=quickstart", "stages.pretrian.schedule.tokens=3"],
        "stages.pretrian is not a setting; did you mean 'pretrain'? Valid names: bench",
    ),
    "part": (
        ["recipe=quickstart", "suite@stages.bench.prompts=flores"],
        "suite@stages.bench.prompts is not in this recipe: correct it, or add it as +suite@stages",
    ),
    "top": (["recipe=quickstart", "outputdir=x"], "did you mean 'output_dir'? Valid names:"),
    "no value": (["recipe=quickstart", "plan"], "write key=value"),
    "objective": (
        ["recipe=quickstart", "objective@stages.pretrain.objective=forward_tv"],
        "forward_kl",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_with_the_valid_names_at_once(name: str, tmp_path: Path):
    arguments, said = MISTAKES[name]
    before = os.times()
    done = command(*arguments, cwd=tmp_path)
    spent = sum(os.times()[2:4]) - sum(before[2:4])  # of children: the machine may be busy
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert spent < PROMPTLY
    assert list(tmp_path.iterdir()) == []


def test_composing_and_its_mistakes_need_no_torch():
    """Which is why they take a fraction of a second."""
    code = (
        "import sys; sys.argv = ['train', 'recipe=quickstart', 'stages.bench.limt=3']\n"
        "import train.__main__ as m\n"
        "try: m.main()\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "2 False"
    assert "did you mean 'limit'" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], [], ["-h", "recipe=quickstart"]], ids=str)
def test_help_lists_every_recipe_with_its_line(arguments: list[str]):
    done = command(*arguments)
    assert done.returncode == 0
    assert done.stderr == ""
    for recipe in RECIPES:
        line = (ROOT / "recipes" / f"{recipe}.yaml").read_text("utf-8").splitlines()[0]
        (shown,) = [x for x in done.stdout.splitlines() if x.split()[:1] == [recipe]]
        assert shown.split(maxsplit=1)[1] == line.removeprefix("# ")
    assert "forward_kl" in done.stdout


@pytest.mark.parametrize("given", ["--local_rank=0", "--local-rank 1", "-local_rank 3"])
def test_local_rank_is_not_hydras(given: str, monkeypatch, capsys):
    words = [*given.split(), "recipe=quickstrt"]
    assert refused(words, monkeypatch, capsys).startswith("there is no recipe 'quickstrt'")


def test_a_number_behind_another_word_is_not_local_ranks(monkeypatch, capsys):
    words = ["--local_rank=3", "4", "recipe=quickstart"]
    assert refused(words, monkeypatch, capsys).startswith("4 cannot be read as a setting")


def refused(words: list[str], monkeypatch, capsys) -> str:
    """The one sentence with which the command ends, run in this process."""
    monkeypatch.setattr(sys, "argv", ["train", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) == 1
    return said.err.removeprefix("error: ").rstrip()


PRETRAIN, BENCH = "stages.pretrain", "stages.bench"
MEANINGLESS = {
    "missing": (f"{PRETRAIN}.schedule.tokens=???", "add stages.pretrain.schedule.tokens=VALUE"),
    "missing part": (
        "stages.generate.prompts=???",
        "+data@stages.generate.prompts=NAME, one of bu",
    ),
    "missing elsewhere": ("seed=???", "seed has no value, and there is no default: add seed=VALUE"),
    "no such key": ("output_dir=${nope}", "output_dir refers to ${nope}, which is not in this rec"),
    "taken away": ("~seed", "stages.target.schedule.seed refers to ${seed}, which is not"),
    "no such function": (
        "output_dir=${nope:1}",
        "output_dir calls a function, expected a value, $",
    ),
    "function": (
        "output_dir=${env:}",
        "output_dir calls a function, expected a value, ${KEY} or $",
    ),
    "environment": ("output_dir=${env:HOME}", "a configuration may read ['DRAFTSMITH_SHARED'] onl"),
    "half": ("output_dir='${seed'", "output_dir is '${seed', which cannot be read: a reference is"),
    "circle": ("output_dir=${output_dir}", "output_dir refers to itself: write a value"),
    "list": (f"{PRETRAIN}.optim=[1,2]", "optim=[1,2] is no mapping, expected one: set what is in"),
    "mapping": (
        f"{BENCH}.temperatures={{a:1}}",
        "is no list, expected one: write stages.bench.temp",
    ),
    "inside": (f"{PRETRAIN}.optim.lr.x=5", "stages.pretrain.optim.lr is 0.002 and holds no others"),
    "no part": (
        "launch=null",
        "launch=null names no part; leave it out, or choose one of deepspeed",
    ),
    "number": (
        "drafter=5",
        "drafter=5 names no part; leave it out, or choose one of clover, clover2",
    ),
    "parts": ("drafter=[lm,eagle]", "drafter=[lm,eagle] names several, expected one of clover"),
    "not there": ("~stages.finetune.nope", "stages.finetune.nope is not a setting. Valid names: _"),
    "there": ("+seed=3", "seed is in this recipe already: write seed=VALUE, without the +"),
    "sweep": (
        f"{PRETRAIN}.optim.lr=1,2",
        "gives several values: add --multirun, or write a list, ",
    ),
    "budget": ("budget.minutes=5", "budget is for what advise=true proposes and changes no"),
    "braces": (
        "output_dir=a}b",
        "output_dir=a}b cannot be read as a setting; write key=value, and",
    ),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_a_value_without_a_meaning_is_one_sentence_of_ours(name: str, monkeypatch, capsys):
    """Which key, what it is, what was expected, what to type; nothing of Hydra's or OmegaConf's."""
    word, said = MEANINGLESS[name]
    shown = refused(["recipe=quickstart", "plan=true", word], monkeypatch, capsys)
    assert said in shown
    assert not re.search(r"hydra\.|omegaconf|full_key|object_type|Config\b|Error", shown, re.I)


BUDGETS: dict[str, tuple[Any, str]] = {
    "two": ({"tokens": 5, "minutes": 5}, "give one of both"),
    "word": ({"tokens": "many", "minutes": None}, "budget.tokens is 'many'; it must be a number"),
    "nothing": ({"tokens": None, "minutes": 0}, "budget.minutes is 0; it must be a number above 0"),
    "unknown": ({"token": 5}, "budget.token is not a setting; did you mean 'tokens'"),
    "mapping": (5, "budget is 5; expected a mapping"),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_a_budget_that_pays_nothing_is_found_before_anything_is_timed(case: str):
    budget, said = BUDGETS[case]
    with pytest.raises(ValueError, match=said):
        _check_budget(budget, advise=True)


C = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_words_of_all_alphabets_are_read_under_any_locale(tmp_path: Path):
    done = command("recipe=quickstart", f"output_dir={tmp_path}/한국어 日本", "--cfg", "job", **C)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())  # YAML folds long lines
    assert f" output_dir: {tmp_path}/한국어 日本 " in said


def test_whoever_forbids_utf8_is_obeyed_and_it_starts_once():
    words = [sys.executable, "-X", "utf8=0", "-m", "train", "recipe=quickstrt"]
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    done = subprocess.run(words, cwd=ROOT, env=clean | C, capture_output=True, timeout=60)
    assert b"did you mean 'quickstart'" in done.stderr


QUOTED = {
    "output_dir=/tmp/한국어": 'output_dir="/tmp/한국어"',
    "+stages.x.y=가,b": '+stages.x.y="가","b"',
    "output_dir=/tmp/plain": "output_dir=/tmp/plain",
    "output_dir='/tmp/한국어'": "output_dir='/tmp/한국어'",
    "a=[가,나]": "a=[가,나]",
    "a=${가}": "a=${가}",
    "--한국어": "--한국어",
}


@pytest.mark.parametrize("word", QUOTED)
def test_other_alphabets_are_put_in_quotes_where_it_is_plain_what_is_meant(word: str):
    assert quoted(word) == QUOTED[word]


LATER = {
    "no folder": ("target.path=/no/such/folder", "target.path '/no/such/folder' does not exist"),
    "zero tokens": ("stages.finetune.schedule.tokens=0", "tokens 0, batch_tokens"),
    "zero batch": ("stages.target.schedule.batch_tokens=0", "batch_tokens 0"),
    "temperatures": ("stages.bench.temperatures=[]", "bench needs temperatures"),
    "type": (
        "stages.finetune.optim.lr=abc",
        "stages.finetune.optim.lr is 'abc'; expected a number",
    ),
    "literal": ("launch.how=slrum", "launch.how is 'slrum'; expected one of inline, deepspeed, to"),
    "null": ("stages.finetune.schedule.tokens=null", "tokens is null; expected a whole number"),
    "no number": (
        "stages.bench.temperatures=0",
        "is 0; expected a list [a, b, ...], each a number",
    ),
    "stages": ("stages=5", "stages is 5; expected a mapping: set what is in it"),
    "taken": (
        "~stages.finetune.schedule.tokens",
        "add +stages.finetune.schedule.tokens=VALUE (a wh",
    ),
    "new key": ("+stages.bench.limt=3", "stages.bench.limt is not a setting; did you mean 'limit'"),
    "new stage": ("+stages.fintune.schedule.tokens=5", "stages.fintune is not a setting; did you"),
    "no mapping": ("stages.pretrain=5", "stages.pretrain is not a setting"),
    "launch": ("launch.ranks=0", "launch.ranks is 0"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_mistake_is_found_before_anything_starts(name: str, tmp_path: Path, capsys, monkeypatch):
    """Although only a later stage would have met it; nothing is left."""
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    mistake, said = LATER[name]
    config = compose("recipe=quickstart", f"output_dir={tmp_path / 'out'}", mistake)
    assert run_recipe("quickstart", config) == (2, {})
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert list(tmp_path.iterdir()) == []


def test_near_names_of_a_target_that_is_not_there(tmp_path: Path, capsys):
    for name in ("koen-17m", "koen-18m", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    config = compose("recipe=quickstart", f"target.path={tmp_path}/models/koen17m", "plan=true")
    assert run_recipe("quickstart", config)[0] == 2
    assert f"in {tmp_path}/models there are koen-17m, koen-18m" in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_to(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    (tmp_path / "file").write_text("")
    config = compose("recipe=quickstart", f"output_dir={tmp_path / 'file' / 'below'}")
    assert run_recipe("quickstart", config)[0] == 2
    said = "cannot be written to (Not a directory); set output_dir="
    assert said in capsys.readouterr().err


def test_a_plan_shows_everything_and_starts_nothing(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    config = compose("recipe=quickstart", "plan=true", f"output_dir={tmp_path / 'out'}")
    assert run_recipe("quickstart", config) == (0, {})
    shown = capsys.readouterr().out
    for stage in ("target", "pretrain", "generate", "finetune", "bench", "publish"):
        assert f"  {stage}: to do, {tmp_path}/out/stages/{stage}-" in shown
    said_of_stages = ("parameters", "tokens", "steps", "of memory a rank", "of disk", "minutes")
    for said in (*said_of_stages, "as long as answers are"):
        assert said in shown
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_shares_what_the_swept_key_cannot_change(tmp_path: Path):
    """Two learning rates of the second training: one target, one pretraining, two finetunes."""
    done = command(
        "--multirun",
        "recipe=quickstart",
        "plan=true",
        f"output_dir={tmp_path / 'out'}",
        "stages.finetune.optim.lr=1e-4,3e-4",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said = [x for x in done.stdout.splitlines() if re.match("  [a-z_]+: (to do|as in a run)", x)]
    folders = [line.split(", ")[1] for line in said]
    count = {s: sum(f"/{s}-" in f for f in folders) for s in ("target", "pretrain", "generate")}
    assert count == {"target": 2, "pretrain": 2, "generate": 2}
    for stage, different in {
        "target": 1,
        "pretrain": 1,
        "generate": 1,
        "finetune": 2,
        "bench": 2,
    }.items():
        assert len({f for f in folders if f"/{stage}-" in f}) == different
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_a_sweep_is_found_before_the_first_job(tmp_path: Path):
    arguments = ["recipe=quickstart", "stages.finetune.optim.lrr=1e-4,3e-4"]
    done = command("--multirun", *arguments, f"output_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'lr'" in done.stderr


def test_the_configuration_can_be_printed():
    done = command("recipe=quickstart", "--cfg", "job", "seed=7")  # words stand anywhere
    assert done.returncode == 0, done.stderr
    assert "seed: 7\n" in done.stdout
    assert "_target_: train.distill.Distill" in done.stdout


@pytest.fixture
def advising(tmp_path: Path, monkeypatch) -> list[str]:
    """The words of a command that advises on a tiny target, with as few turns as there can be."""
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    monkeypatch.setattr(rounds, "TURNS", (1, 1))
    monkeypatch.setattr("train.advise.taken", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    model = tiny_model(vocab=300, width=128, layers=6, heads=2, max_positions=256, spread=0.02)
    model.to(torch.float32).save_pretrained("target")
    place = [f"target.path={tmp_path / 'target'}", f"output_dir={tmp_path / 'out'}"]
    return ["recipe=quickstart", "advise=true", *place]


def test_advice_is_measured_once_and_starts_nothing(advising, tmp_path: Path, capsys, monkeypatch):
    """Through the command: the table, the verdict, one file of costs a dtype, and no stage."""
    monkeypatch.setattr(sys, "argv", ["train", *advising])
    main()
    shown = capsys.readouterr().out
    for said in (
        "What a call of the target costs, by the tokens that it verifies:",
        "a drafter that costs nothing",
        "lm 1x256",  # more than half of the target, but the recipe's own
        "by batch, at acceptance 0.60:",
        "Left out (more than half of the target's parameters): lm 1x512, ",
        "Left out (the target has 6 layers, and the taps 2, n // 2 and n - 3 are distinct",
        "- Of the draft heads ",
        "Depth against width:",
    ):
        assert said in shown
    (mine,) = [x for x in shown.splitlines() if x.endswith("<- the recipe's")]
    assert mine.split()[:2] == ["lm", "1x256"]
    for family in ("medusa ", "medusa2 ", "clover ", "eagle "):
        assert f"\n  {family}" in shown
    made = sorted(p.name.split("-")[0] for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert made == ["advice", "costs", "costs"]
    advice = json.loads(next((tmp_path / "out" / "costs").glob("advice-quickstart-*")).read_text())
    assert advice["verify_ms"].keys() == {str(m) for m in cost.SIZES}

    def refused(*_: object) -> None:
        raise AssertionError("it was measured before")

    monkeypatch.setattr(cost, "in_turn", refused)
    main()
    assert capsys.readouterr().out == shown


def test_advice_knows_what_bench_measured(advising, tmp_path: Path, capsys):
    """Of this target; a report on another one, or one whose controls failed, says nothing."""
    artifact = tmp_path / "bench" / "artifact"
    artifact.mkdir(parents=True)
    cell = {"arm": "drafter", "batch": 1, "temperature": 0.0, "n": 3, "tau": {"value": 1.9}}
    cell |= {"acceptance": [{"reached": 50, "accepted": 31}], "speedup": {"value": 1.3}}
    said = {"target": "target", "drafter": "lm", "parameters_drafter": 880_384}
    report = {"passed": True, "table": [cell], "conditions": said | {"draft_shape": "chain of 3"}}
    (tmp_path / "out").mkdir()
    folders = {"finetune": str(tmp_path), "bench": str(tmp_path / "bench")}
    (tmp_path / "out" / "quickstart.json").write_text(json.dumps(folders))

    def advice(**changes: object) -> str:
        (artifact / "report.json").write_text(json.dumps(report | changes))
        assert run_advice("quickstart", compose(*advising)) == (0, {})
        return capsys.readouterr().out

    shown = advice()
    assert "- Your drafter (lm, 880,384 parameters, chain of 3) accepted 0.62 of the to" in shown
    (mine,) = [x for x in shown.splitlines() if x.endswith("<- the recipe's, measured")]
    assert mine.split()[1] == "1x256"
    assert "by batch, at acceptance 0.62:" in shown
    assert "No drafter of this recipe was measured yet" in advice(passed=False)
    other = report["conditions"] | {"target": "another"}
    assert "No drafter of this recipe was measured yet" in advice(conditions=other)


OWN = {
    "medusa2": ("medusa2", {"target_lora": {"rank": 32, "alpha": 16}}),
    "lm_2x1024": ("lm 2x1024", {"layers": 2, "width": 1024}),
    "lm": ("lm 1x384", {"layers": 1, "width": None}),
    "medusa drafter.heads=2": ("medusa, as configured", {"heads": 2}),
    "ngram": ("", None),
}


@pytest.mark.parametrize("words", OWN)
def test_the_recipes_own_drafter_is_among_those_that_are_compared(words: str):
    """Under one name, beside all families of heads and small models of its size."""
    shape = Shape(4096, 384, 8, 6, 6, 1024, 512)
    config = compose("recipe=quickstart", *f"drafter={words}".split())
    name, found = blueprints_of(config, [], shape)
    due, arguments = OWN[words]
    assert name == due
    assert {"clover", "clover2", "eagle", "eagle3", "hydra_heads", "medusa", "medusa2"} <= set(
        found
    )
    assert arguments is None or arguments.items() <= found[name].arguments.items()
    if words == "lm":  # 3.3 M; two layers of 320 have 3.9, of 256 2.7
        assert {"lm 1x384", "lm 2x320", "lm 4x192", "lm 4x768"} <= set(found)


NO_ADVICE = {
    "untrained": ([], "the recipe's target is not trained yet, so nothing can be measured: run"),
    "remote": (["target.path=nobody/nothing"], "nobody/nothing is not on this machine, and advice"),
}


@pytest.mark.parametrize("what", NO_ADVICE)
def test_advice_needs_a_target_at_hand(what: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    words, said = NO_ADVICE[what]
    config = compose("recipe=quickstart", "advise=true", f"output_dir={tmp_path / 'out'}", *words)
    assert run_advice("quickstart", config) == (2, {})
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
