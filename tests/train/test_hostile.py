"""What is hostile: configurations that would run code, models with code of their own, secrets in
the wrong place, names that lead elsewhere. And many processes that start at once."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train.__main__ as command_line
from data import secrets
from data.chat import require_same_tokenizer
from decoding.pretrained import Pretrained
from decoding.target import Shape
from drafters.base import load
from drafters.lm import LM
from tests.tiny import write_chats, write_target, write_texts
from tests.train.composing import LAUNCHED, ROOT, command
from train.compose import build, check_name, inside, refuse_commands
from train.plan import fingerprint, plan
from train.processes import worker


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, chats and a tiny target."""
    folder = tmp_path_factory.mktemp("hostile")
    write_target(folder / "target", write_texts(folder), ends=120)
    write_chats(folder, rows=300)
    return folder


def distill(place: Path, files: list[str]) -> dict[str, Any]:
    """A stage's configuration that trains an lm on these texts."""
    sizes = {"tokens": 2048, "batch_tokens": 256, "sequence_length": 64, "dtype": "float32"}
    return {
        "_target_": "train.distill.Distill",
        "target": {
            "_target_": "decoding.pretrained.Pretrained",
            "path": str(place / "target"),
            "dtype": "float32",
        },
        "drafter": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
        "objective": {"_target_": "train.objectives.ForwardKL"},
        "optim": {"_target_": "train.schedule.AdamW", "lr": 1e-3},
        "schedule": {"_target_": "train.schedule.Schedule", **sizes},
        "data": {"_target_": "data.sources.Local", "files": files, "text": "{text}"},
    }


def note(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stage.json").write_text(
        json.dumps({"name": "x", "fingerprint": "0", "config": config, "inputs": {}})
    )
    return folder


@pytest.fixture
def alone(monkeypatch) -> None:
    """This process is no rank of a launcher."""
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


# ---- F12: a later row is found before a model is loaded


LATER = {
    "broken JSON": ('{"text": ', r"late\.jsonl, line 61: broken JSON"),
    "another column": ('{"body": "x"}', r"late\.jsonl, line 61: no column 'text'; .* are body"),
    "mixed types": ('{"text": 7}', r"late\.jsonl, line 61: column 'text' holds 7 \(int\)"),
    "NUL": ("\0\0\0", r"late\.jsonl, line 61: a NUL byte"),
    "EUC-KR": ("한국어 문장입니다", r"is not UTF-8 at line 61; it reads as cp949/EUC-KR"),
}


@pytest.mark.parametrize("case", LATER)
def test_a_bad_row_is_found_before_a_model_is_loaded(case, place, tmp_path, monkeypatch):
    monkeypatch.setattr(Pretrained, "load", lambda *a, **k: pytest.fail("loaded the target"))
    bad, message = LATER[case]
    text = (place / "text.jsonl").read_bytes()
    lines = text.splitlines(keepends=True)[:60]
    encoding = "euc-kr" if case == "EUC-KR" else "utf-8"
    (tmp_path / "late.jsonl").write_bytes(b"".join([*lines, bad.encode(encoding), b"\n"]))
    stage = build(distill(place, [str(tmp_path / "late.jsonl")]))
    with pytest.raises(ValueError, match=message):
        stage.run(tmp_path)
    assert not (tmp_path / "packed").exists()


def test_prompts_without_answers_supervise_nothing_and_are_refused(place, tmp_path):
    config = distill(place, [])
    config["data"] = {
        "_target_": "data.sources.Local",
        "files": [str(place / "chat.jsonl")],
        "prompt": "{question}",
    }
    with pytest.raises(ValueError, match=r"cannot be rendered .* 0% of its tokens are supervised"):
        build(config).run(tmp_path)


# ---- F15: many processes at once on one folder; no stale cache

STARTS = """
import os, sys
from train.processes import worker
import data.generate, decoding.loop, transformers
for folder, count in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    go_read, go_write = os.pipe()
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(go_write)
                os.read(go_read, 1)  # all are let go by the closing of the other end
                sys.stdout = sys.stderr = open(os.devnull, "w")
                code = worker.main([folder])
            finally:
                os._exit(code)
        children.append(child)
    os.close(go_read)
    os.close(go_write)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


def start_at_once(place: Path, starts: dict[Path, int]) -> list[list[int]]:
    """Exit codes of as many processes as are named, which begin a generate stage in one folder
    together; folder after folder."""
    config = {
        "_target_": "data.generate.Generate",
        "target": {
            "_target_": "decoding.pretrained.Pretrained",
            "path": str(place / "target"),
            "dtype": "float32",
        },
        "prompts": {
            "_target_": "data.sources.Local",
            "files": [str(place / "chat.jsonl")],
            "prompt": "{question}",
        },
        **{"temperatures": [0.0, 1.0], "limit": 12, "max_new_tokens": 12, "shard_size": 4},
    }
    words = [str(x) for folder, n in starts.items() for x in (note(folder, config), n)]
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-c", STARTS, *words],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def artifact(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "artifact").iterdir())}


@pytest.mark.parametrize(
    "times", [pytest.param(1, id="once"), pytest.param(50, id="50", marks=pytest.mark.soak)]
)
def test_eight_processes_that_start_at_once_make_one_data_set(times, place, tmp_path):
    """One works; the others end with a sentence, or find it done. None spoils what is there."""
    together = [tmp_path / str(n) for n in range(times)]
    first, *others = start_at_once(place, {tmp_path / "alone": 1} | dict.fromkeys(together, 8))
    assert first == [0]
    assert len(others) == times
    for folder, codes in zip(together, others, strict=True):
        assert codes.count(0) >= 1
        assert set(codes) <= {0, 2}
        assert artifact(folder) == artifact(tmp_path / "alone")


CHANGES: dict[str, Any] = {
    "data.text": "{text}!",
    "data.language": "de",
    "data.limit": 100,
    "data.encoding": "cp1252",
    "data.format": "jsonl",
    "data.only": {"text": ["a"]},
    "data.licence": "CC0",
    "schedule.sequence_length": 32,
    "schedule.tokens": 4096,
    "schedule.seed": 1,
    "target.chat_template": "{{ messages }}",
    "target.thinking": True,
    "target.revision": "x",
}


def test_one_changed_key_is_another_folder(place):
    """Whatever could change the packed data; and the same configuration is the same folder."""
    whole = distill(place, [str(place / "text.jsonl")])
    marks = [fingerprint(whole, {})]
    assert fingerprint(copy.deepcopy(whole), {}) == marks[0]
    for path, value in CHANGES.items():
        part, key = path.split(".")
        changed = copy.deepcopy(whole)
        changed[part][key] = value
        if path == "data.only":
            del changed[part][key]
            changed[part]["files"] = [str(place / "chat.jsonl")]
            changed[part]["text"] = "{question}"
        marks.append(fingerprint(changed, {}))
    assert len(set(marks)) == len(marks)


def test_changed_text_and_a_changed_tokenizer_are_another_folder(place, tmp_path):
    shutil.copytree(place, tmp_path / "copy")
    there = tmp_path / "copy"

    def mark() -> str:
        config = distill(place, [str(there / "text.jsonl")])
        config["target"]["path"] = str(there / "target")
        return fingerprint(config, {})

    marks = [mark()]
    with (there / "text.jsonl").open("a") as file:
        file.write('{"text": "one more"}\n')
    marks.append(mark())
    for name in ("chat_template.jinja", "tokenizer.json", "config.json"):
        file = there / "target" / name
        file.write_text(file.read_text("utf-8") + " ", "utf-8")
        marks.append(mark())
    assert len(set(marks)) == 5


# ---- F19: code that comes with a model

CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): model_type = "evil"
class Model(LlamaForCausalLM): config_class = Config
class Words(PreTrainedTokenizerFast): pass
"""
USES = {
    "the target's shape": lambda p: Pretrained(path=p).shape_of(),
    "the target's tokenizer": lambda p: Pretrained(path=p).tokenizer(),
    "the target": lambda p: Pretrained(path=p, dtype="float32").load(),
    "a drafter's tokenizer": lambda p: require_same_tokenizer(None, p),
    "a drafter's checkpoint": lambda p: LM(SHAPE, checkpoint=p),
}
SHAPE = Shape(300, 64, 2, 2, 1, 128, 256)


@pytest.mark.parametrize("use", USES)
def test_code_of_a_model_never_runs(use, place, tmp_path, monkeypatch):
    """Not even when somebody at the keyboard would say yes; and the sentence is no invitation."""
    marker, repo = tmp_path / "marker", tmp_path / "evil"
    shutil.copytree(place / "target", repo)
    (repo / "modeling_evil.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((repo / "config.json").read_text())
    maps = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model"}
    config["auto_map"] = {auto: f"modeling_evil.{name}" for auto, name in maps.items()}
    (repo / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    words = json.loads((repo / "tokenizer_config.json").read_text())
    words |= {
        "tokenizer_class": "Words",
        "auto_map": {"AutoTokenizer": ["modeling_evil.Words"] * 2},
    }
    (repo / "tokenizer_config.json").write_text(json.dumps(words))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="code") as error:
        USES[use](str(repo))
    assert "trust_remote_code=True" not in str(error.value)
    assert not marker.exists()


# ---- F20: configurations that would run code


@pytest.mark.parametrize(
    "bad",
    [
        {"_target_": "os.system", "command": "touch MARKER"},
        {"_target_": "train.compose.os.system", "command": "touch MARKER"},
        {"_target_": "data.files.subprocess"},
        {"_target_": "train.objectives.CE", "_args_": ["x"]},
        {"_target_": "train.objectives.CE", "_partial_": True},
    ],
    ids=str,
)
def test_a_stage_that_was_changed_on_disk_is_refused(bad, place, tmp_path, alone):
    """stage.json is data, too: the worker checks it as the plan did."""
    marker = tmp_path / "marker"
    config = distill(place, [str(place / "text.jsonl")])
    config["objective"] = json.loads(json.dumps(bad).replace("MARKER", str(marker)))
    folder = note(tmp_path / "stage", config)
    with pytest.raises(ValueError, match=r"stages\.x\.objective\.(_target_|_args_|_partial_) is "):
        worker._run(folder)
    assert not marker.exists()


@pytest.mark.parametrize("family", ["os", "../evil", "__init__", "base", "lm.os", "data.files", ""])
def test_a_drafters_own_note_names_no_code(family, tmp_path):
    """drafter.json may come from the Hub."""
    (tmp_path / "drafter.json").write_text(json.dumps({"family": family, "arguments": {}}))
    with pytest.raises(ValueError, match=r"names the family|not enough values|too many values"):
        load(tmp_path, SHAPE)


def test_a_downloaded_drafters_configuration_is_data(place, tmp_path):
    marker = tmp_path / "marker"
    evil = {"_target_": "os.system", "command": f"touch {marker}"}
    shutil.copytree(place / "target", tmp_path / "drafter")
    file = tmp_path / "drafter" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": evil} | evil))
    with pytest.raises(Exception, match=r"."):
        LM(SHAPE, checkpoint=str(tmp_path / "drafter"))
    assert not marker.exists()


EVIL = "{_target_: subprocess.run, args: [touch, MARKER]}"
HYDRAS = {  # (file, content, words): each ran MARKER through Hydra's own callbacks or logging
    "key": ("recipes/evil.yaml", f"# Evil.\nhydra: {{callbacks: {{x: {EVIL}}}}}\n", []),
    "escaped key": ("recipes/evil.yaml", f'"\\x68ydra": {{callbacks: {{x: {EVIL}}}}}\n', []),
    "package of a choice": (
        "recipes/evil.yaml",
        "defaults:\n  - quickstart\n  - /data@hydra.callbacks.x: evil\n  - _self_\n",
        [],
    ),
    "group": ("recipes/evil.yaml", "defaults: [{/hydra/callbacks: evil}]\n", []),
    "override": ("recipes/evil.yaml", "defaults: [{override /hydra/job_logging: evil}]\n", []),
    "outside": ("recipes/evil.yaml", "defaults: [{/data@stages.x: ../../evil}]\n", []),
    "interpolated": ("recipes/evil.yaml", "defaults: [{/data@stages.x: '${target.path}'}]\n", []),
    "header": ("conf/data/other.yaml", f"# @package hydra.callbacks.x\n{EVIL}\n", []),
    "header of all": ("conf/data/other.yaml", f"# @package _global_\nhydra: {EVIL}\n", []),
    "package of a word": ("conf/data/fine.yaml", "a: 1\n", ["+data@hydra.callbacks.x=evil"]),
    "package of all": ("conf/data/fine.yaml", "a: 1\n", ["+data@_global_=evil"]),
    "word": ("conf/data/fine.yaml", "a: 1\n", [f"+hydra.callbacks.x={EVIL}"]),
    "launcher": ("conf/data/fine.yaml", "a: 1\n", ["hydra.launcher._target_=os.system"]),
    "recipe elsewhere": ("conf/data/fine.yaml", "a: 1\n", ["recipe=../../../evil"]),
    "part elsewhere": ("conf/data/fine.yaml", "a: 1\n", ["drafter=../../evil"]),
    "parts elsewhere": ("conf/data/fine.yaml", "a: 1\n", ["suite@stages.bench.prompts=[a,../x]"]),
    "folder": ("conf/data/fine.yaml", "a: 1\n", ["--config-dir", "elsewhere"]),
    "pickle": ("conf/data/fine.yaml", "a: 1\n", ["--experimental-rerun", "job.pickle"]),
    "resolver": ("conf/data/fine.yaml", "a: 1\n", ["output_dir=${oc.env:HF_TOKEN}"]),
    "decoder": ("conf/data/fine.yaml", "a: 1\n", ["output_dir=${oc.decode:'x'}"]),
    "unknown resolver": ("conf/data/fine.yaml", "a: 1\n", ["output_dir=${run:x}"]),
}


@pytest.mark.parametrize("case", HYDRAS)
def test_nothing_reaches_hydras_own_settings(case, tmp_path, monkeypatch, capsys):
    """Which are instantiated by Hydra itself, without our check; exit code 2 and nothing runs."""
    file, content, words = HYDRAS[case]
    marker = tmp_path / "marker"
    for folder in ("conf", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "conf/data/evil.yaml").write_text(EVIL.replace("MARKER", str(marker)) + "\n")
    (tmp_path / file).write_text(content.replace("MARKER", str(marker)))
    recipe = "evil" if file.startswith("recipes") else "quickstart"
    monkeypatch.setattr(command_line, "CONF", tmp_path / "conf")
    monkeypatch.setattr(command_line, "RECIPES", tmp_path / "recipes")
    words = [word.replace("MARKER", str(marker)) for word in words]
    monkeypatch.setattr(sys, "argv", ["train", f"recipe={recipe}", "plan=true", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert "Traceback" not in shown.err + shown.out
    assert not marker.exists()


def test_our_own_recipes_and_parts_are_innocent():
    for file in (*ROOT.glob("recipes/*.yaml"), *ROOT.glob("conf/*/*.yaml")):
        refuse_commands(file)


# ---- F21: secrets

TOKEN = "hf_" + "c4nary" * 6
KEY = "c4nary" + "0123456789" * 3
SECRETS = {
    "Hugging Face": TOKEN,
    "GitHub": "ghp_" + "a1B2" * 9,
    "OpenAI": "sk-proj-" + "a1B2" * 6,
    "AWS": "AKIA" + "A1B2C3D4E5F6G7H8",
    "address": "https://user:geheim@example.org/x",
    "token in an address": "https://token@example.org/x",
    "query": "https://example.org/x?token=geheimgeheim",
    "header": "Bearer abcdefghijklmnopqrstuvwxyz",
}
INNOCENT = {
    "num_tokens": 5,
    "cls_token": "[CLS]",
    "eos_token": "<|end|>",
    "batch_tokens": 8192,
    "pad_token_id": 0,
    "tokenizer_rows": 4000,
    "revision": "5bd0f46" + "0" * 33,
    "path": "hf_internal/tiny-random",
    "text": "Write to me@example.org about https://example.org/a?b=c",
    "files": ["/data/sk-learn/a.jsonl"],
    "hub_token": None,
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_token_in_a_configuration_is_refused_and_not_repeated(case):
    for config in ({"a": [{"path": SECRETS[case]}]}, {"a": {SECRETS[case]: {"hub_token": "x"}}}):
        with pytest.raises(ValueError, match=r"looks like a token or a password, expected no") as e:
            secrets.refuse(config, "stages.x")
        assert not re.search("geheim|c4nary|a1B2|A1B2|abcdefgh", str(e.value))
    assert "geheim" not in secrets.redacted(f"cannot reach {SECRETS[case]} now")
    assert SECRETS[case] not in secrets.redacted(f"cannot reach {SECRETS[case]} now")


@pytest.mark.parametrize("key", ["token", "hf_token", "api_key", "wandb_api_key", "password"])
def test_a_secret_is_known_by_its_key_too(key):
    with pytest.raises(ValueError, match=rf"stages\.x\.{key} looks like a token"):
        secrets.refuse({key: "short"}, "stages.x")


def test_tokens_of_text_are_no_secrets():
    secrets.refuse(INNOCENT, "stages.x")
    assert secrets.redacted(json.dumps(INNOCENT)) == json.dumps(INNOCENT)


def everything(folder: Path) -> bytes:
    return b"\0".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())


CANARIES = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "MY_SECRET": "c4nary-of-mine"}
WORDS = [
    f"stages.finetune.init={TOKEN}",
    f"+stages.finetune.{TOKEN}=1",
    f"+stages.bench.hub_token={KEY}",
    f"target.path=https://user:{KEY}@example.org/model",
    f"output_dir=/tmp/{TOKEN}",
    f"recipe={TOKEN}",
    f"nonsense{TOKEN}",
]


@pytest.mark.parametrize("word", WORDS, ids=range(len(WORDS)))
def test_a_word_with_a_secret_is_not_repeated(word, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train", "recipe=quickstart", word])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert "looks like a token or a password" in shown.err
    assert "c4nary" not in shown.err + shown.out


@pytest.mark.soak
def test_canaries_are_nowhere_after_a_run_and_after_a_failed_one(place, tmp_path, alone):
    """Standard output and error, and every file of the stage's folder."""
    good = note(tmp_path / "good", distill(place, [str(place / "text.jsonl")]))
    bad = note(tmp_path / "bad", distill(place, [str(place / "text.jsonl")]))
    remote = {"_target_": "data.sources.Hub", "path": "a/b", "text": "{t}"}
    told = json.loads((bad / "stage.json").read_text())
    told["config"]["data"] = remote
    (bad / "stage.json").write_text(json.dumps(told))
    script = (
        "import os, sys\nfrom data import hub, secrets\nfrom train.processes import worker\n"
        "secrets.guard()\nhub.PAUSE = 0.0\ncodes = []\n"
        "for folder in sys.argv[1:]:\n"
        "    if not (child := os.fork()): os._exit(worker.main([folder]))\n"
        "    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "print(codes, flush=True)\n"
        "raise RuntimeError(os.environ['HF_TOKEN'] + os.environ['MY_SECRET'])"
    )
    there = {"HF_ENDPOINT": f"http://user:{KEY}@127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(good), str(bad)],
        cwd=ROOT,
        env=os.environ | CANARIES | there | {"HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.stdout.splitlines()[-1] == "[0, 4]", done.stderr
    assert "data set a/b train cannot be read from the Hub" in done.stderr
    assert "RuntimeError: ******" in done.stderr
    assert "c4nary" not in done.stdout + done.stderr
    assert b"c4nary" not in everything(tmp_path)


# ---- F22: names

NAMES = {
    "../x": "'.' is FULL STOP|expected 1 to 100",
    "/etc/passwd": r"\('/' is SOLIDUS\)",
    "a/b": r"\('/' is SOLIDUS\)",
    "a\\b": r"REVERSE SOLIDUS",
    "a\0b": r"is a control character",
    "fіnetune": r"\('і' is CYRILLIC SMALL LETTER BYELORUSSIAN-UKRAINIAN I\)",
    "ﬁnetune": r"LATIN SMALL LIGATURE FI",
    "a\u202eb": r"RIGHT-TO-LEFT OVERRIDE",
    "x" * 101: r"x\.\.\.', expected 1 to 100 of the characters",
    ".": "expected 1 to 100",
    "..": "expected 1 to 100",
    ".hidden": "the first a letter or digit",
    "-rf": "the first a letter or digit",
    "": "expected 1 to 100",
    "a b": r"\(' ' is SPACE\)",
    "a\n": r"is a control character",
}


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=NAMES[name]):
        check_name("recipe", name)
    config = {"target": {"path": "a/b"}, "stages": {name: {"_target_": "train.publish.Publish"}}}
    with pytest.raises(ValueError, match=r"stage|expected 1 to 100"):
        plan(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_fine():
    for name in ("ko_drafter", "ko_drafter-12", "a", "0.5", "x" * 100):
        assert check_name("recipe", name) == name
    with pytest.raises(ValueError, match="recipe is"):
        check_name("recipe", ["quickstart", "de_en"])


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    root = tmp_path / "outputs"
    (root / "stages").mkdir(parents=True)
    (root / "stages" / "out").symlink_to(tmp_path)
    (root / "stages" / "in").symlink_to(root)
    assert inside(root, "stages", "in", "x") == root / "stages/in/x"
    for parts in (("stages", "out"), ("stages", "out", "x"), ("..", "x"), ("/etc",)):
        with pytest.raises(ValueError, match=r"leads to .*, which is outside of .*: remove the sy"):
            inside(root, *parts)


def test_a_nul_in_any_setting_is_refused():
    with pytest.raises(ValueError, match=r"^stages\.x\.files\[0\] holds a NUL character"):
        secrets.refuse({"files": ["a\0b"]}, "stages.x")


def test_recipes_outside_the_folder_are_not_read(tmp_path):
    """Neither by the command itself, whatever stands there."""
    (tmp_path / "evil.yaml").write_text("defaults: [quickstart]\n")
    done = command(f"recipe=../../..{tmp_path}/evil", "plan=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "leads out of conf/recipe, expected a name of a file there" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.yaml"]
