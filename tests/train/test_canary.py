"""Secrets on the way to a served drafter: in the environment, in words of the command, in rows of
data, in what an engine prints. They stand in nothing that is printed, and in no file."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import train.__main__ as command_line
from data import secrets
from eval import clients
from eval.controls import Failed
from tests.tiny import write_chats, write_target, write_texts
from tests.train.composing import ROOT, compose
from tests.train.test_hostile import CANARIES, KEY, TOKEN, everything, note
from train.processes import worker

# An engine that tells all that it is told, and more, as it dies.
ENGINE = f"""
import os, sys
from pathlib import Path
print("environment", dict(os.environ), "Authorization: Bearer {TOKEN}", flush=True)
print(Path(sys.argv[1]).read_text(), file=sys.stderr)
raise RuntimeError("401 for https://user:{KEY}@hub/model?token={KEY}, token {TOKEN}")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target, questions with a token in each, and an engine that talks."""
    folder = tmp_path_factory.mktemp("canary")
    write_target(folder / "target", write_texts(folder), ends=120)
    file = Path(write_chats(folder, rows=60))
    file.write_text(file.read_text().replace("? ", f"? My token is {TOKEN}. "))
    (folder / "sides").mkdir()
    for engine in ("vllm", "transformers"):
        (folder / "sides" / f"{engine}_side.py").write_text(ENGINE)
    return folder


def stages(place: Path) -> dict[str, dict[str, Any]]:
    """Configurations of the stages that come before training, as a recipe has them."""
    chat = str(place / "chat.jsonl")
    source = {"_target_": "data.sources.Local", "files": [chat], "prompt": "{question}"}
    words = ["preflight=[serve,overfit]", f"target.path={place / 'target'}", "drafter.width=64"]
    config = compose("recipe=quickstart", *words, f"engines.vllm={sys.executable}")["stages"]
    small = {"prompts": source, "needs": {}}
    medusa = {"_target_": "drafters.medusa.Medusa"}  # which our own transformers does not serve
    quick = {"drafter": medusa, "engines": {}, "steps": 150, "count": 6, "max_new_tokens": 24}
    return {
        "serve": config["preflight_serve"] | small,
        "overfit": config["preflight_overfit"] | small | quick,
        "generate": config["generate"] | small | {"limit": 8, "max_new_tokens": 12},
    }


def begun(folder: Path, config: dict[str, Any]) -> Path:
    return note(folder, {key: value for key, value in config.items() if key != "needs"})


@pytest.fixture
def guarded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that the worker has guarded, with secrets around it and vLLM in it, it seems."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(clients, "SIDES", place / "sides")
    monkeypatch.setitem(clients.PACKAGES, "vllm", ("torch",))
    monkeypatch.setattr(sys, "stdout", secrets.Redacting(sys.stdout))
    monkeypatch.setattr(sys, "stderr", secrets.Redacting(sys.stderr))


def test_what_an_engine_prints_is_kept_without_secrets(place, guarded, tmp_path, capfd):
    folder = begun(tmp_path / "serve", stages(place)["serve"])
    with pytest.raises(Failed) as error:
        worker._run(folder)
    print(error.value)
    shown = capfd.readouterr()
    (log,) = folder.rglob("vllm-*.log")
    assert "RuntimeError: 401 for https://***@hub/model?token=*** token ***" in log.read_text()
    assert '"prompts"' in log.read_text()  # the engine has seen its request
    assert not any(name in log.read_text() for name in CANARIES)  # and no secret's name
    assert "vllm did not answer" in shown.out
    assert "c4nary" not in shown.out + shown.err
    assert b"c4nary" not in everything(tmp_path)


def test_tokens_in_rows_leave_the_overfit_check_as_numbers(place, guarded, tmp_path, capfd):
    config = stages(place)["overfit"] | {"steps": 4}
    folder = begun(tmp_path / "overfit", config)
    with pytest.raises(Failed, match="it has not learnt them"):
        worker._run(folder)
    shown = capfd.readouterr()
    assert "c4nary" not in shown.out + shown.err
    assert b"c4nary" not in everything(tmp_path)
    assert (folder / "answers" / "shard-00000.jsonl").is_file()


WORDS = [
    f"preflight.serve.engines.vllm=/x/{TOKEN}/python",
    f"engines.vllm=https://user:{KEY}@example.org/python",
    f"+preflight.overfit.hub_token={KEY}",
    f"data@preflight.overfit.prompts={TOKEN}",
    f"preflight={TOKEN}",
    f"+stages.publish.token={KEY}",
    f"stages.publish.repository={TOKEN}",
]


@pytest.mark.parametrize("word", WORDS, ids=range(len(WORDS)))
def test_a_setting_that_is_a_secret_is_not_repeated(word, tmp_path, monkeypatch, capsys):
    words = ["recipe=quickstart", "preflight=[serve,overfit]", word]
    monkeypatch.setattr(sys, "argv", ["train", *words])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command_line.main()
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert "looks like a token or a password" in shown.err
    assert "c4nary" not in shown.err + shown.out
    assert list(tmp_path.iterdir()) == []


WORKERS = """
import os, sys
from pathlib import Path
from data import secrets
from eval import clients
from train.processes import worker
secrets.guard()
clients.SIDES = Path(sys.argv[1])
clients.PACKAGES["vllm"] = ("torch",)
codes = []
for folder in sys.argv[2:]:
    if not (child := os.fork()):
        os._exit(worker.main([folder]))
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(codes, flush=True)
"""


@pytest.mark.soak
def test_canaries_are_nowhere_after_whole_stages(place, tmp_path):
    """As their workers run them: the engine fails (3), the overfit check and generate pass. The
    answers of generate are data: its shards alone keep the questions as they were asked."""
    folders = [begun(tmp_path / name, config) for name, config in stages(place).items()]
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, str(place / "sides"), *map(str, folders)],
        cwd=ROOT,
        env=os.environ | CANARIES,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.stdout.splitlines()[-1] == "[3, 0, 0]", done.stdout[-3000:] + done.stderr[-3000:]
    assert "c4nary" not in done.stdout + done.stderr
    shards = list((tmp_path / "generate").rglob("shard-*.jsonl"))
    assert all(TOKEN in shard.read_text() for shard in shards)
    for shard in shards:
        shard.unlink()
    assert b"c4nary" not in everything(tmp_path)
