"""`python -m train`: what it says, how fast it says it, and what it leaves behind (nothing)."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.builtin import Builtin
from tests.train.composing import ROOT, command, compose
from train.run import run_recipe

PROMPTLY = 4.0  # seconds; two are promised, and the machine may be busy
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
    begin = time.perf_counter()
    done = command(*arguments, cwd=tmp_path)
    seconds = time.perf_counter() - begin
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert seconds < PROMPTLY
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


@pytest.mark.parametrize("argument", ["--local_rank=0", "--local-rank=1", "-local_rank=3"])
def test_local_rank_is_not_hydras(argument: str):
    done = command(argument, "recipe=quickstrt")
    assert done.returncode == 2
    assert "there is no recipe 'quickstrt'" in done.stderr


LATER = {
    "no folder": ("target.path=/no/such/folder", "target.path '/no/such/folder' does not exist"),
    "zero tokens": ("stages.finetune.schedule.tokens=0", "tokens 0, batch_tokens"),
    "zero batch": ("stages.target.schedule.batch_tokens=0", "batch_tokens 0"),
    "temperatures": ("stages.bench.temperatures=[]", "bench needs temperatures"),
    "type": ("stages.finetune.optim.lr=abc", "stages.finetune.optim.lr is 'abc'; expected float"),
    "new key": ("+stages.bench.limt=3", "stages.bench.limt is not a setting; did you mean 'limit'"),
    "new stage": ("+stages.fintune.schedule.tokens=5", "stages.fintune is not a setting; did you"),
    "no mapping": ("stages.pretrain=5", "stages.pretrain is not a setting"),
    "launch": ("launch.ranks=0", "launch.ranks is 0"),
    "launcher": ("launch.how=slrum", "launch.how is 'slrum'"),
}


@pytest.mark.parametrize("name", LATER)
def test_a_mistake_is_found_before_anything_starts(name: str, tmp_path: Path, capsys, monkeypatch):
    """Although only a later stage would have met it; nothing is left."""
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    mistake, said = LATER[name]
    config = compose("recipe=quickstart", f"output_dir={tmp_path / 'out'}", mistake)
    assert run_recipe("quickstart", config) == (2, None)
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
    assert run_recipe("quickstart", config) == (0, None)
    shown = capsys.readouterr().out
    for stage in ("target", "pretrain", "generate", "finetune", "bench", "publish"):
        assert f"  {stage}: to do, {tmp_path}/out/stages/{stage}-" in shown
    for said in ("parameters", "tokens", "steps", "of memory a rank", "of disk", "roughly"):
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
    folders = [x.split(", ")[1] for x in done.stdout.splitlines() if ": to do, " in x]
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
    assert {p.name for p in (tmp_path / "out").rglob("*")} <= {"multirun.yaml"}


def test_a_mistake_in_a_sweep_is_found_before_the_first_job(tmp_path: Path):
    arguments = ["recipe=quickstart", "stages.finetune.optim.lrr=1e-4,3e-4"]
    done = command("--multirun", *arguments, f"output_dir={tmp_path}", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'lr'" in done.stderr


def test_the_configuration_can_be_printed():
    done = command("recipe=quickstart", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "_target_: train.distill.Distill" in done.stdout
