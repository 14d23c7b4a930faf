"""Sweeps: presets and their values, the notes of jobs, what launchers and sweepers make of them."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import train.plan
import train.run
from data.builtin import Builtin
from decoding.target import Shape
from drafters.base import Blueprint, write_json
from drafters.lm import LM
from tests.test_pipeline import questions
from tests.train.composing import ROOT, command
from train import __main__ as command_line
from train import plugins, show, track
from train.axes import families, spaced, times
from train.candidates import count, empty
from train.compose import refuse_commands, resolvers
from train.grid import _named, axes_of, base_word, words_of
from train.launch import Launch
from train.passes import Estimate
from train.plan import Planned, plan
from train.processes import lock
from train.seal import seal
from train.sweep import Job, Sweep, folder_of, told

LR = "stages.finetune.optim.lr"
PRESETS = sorted(p.stem for p in (ROOT / "conf" / "sweep").glob("*.yaml"))
WITHOUT = [f"stages.{s}=null" for s in ("tune_tree", "bench", "export", "serve", "publish")]


def run_command(*words: str) -> int:
    """`python -m train ...` in this process; the exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train", *words])
        try:
            command_line.main()
        except SystemExit as left:
            return int(left.code or 0)
    return 0


class Stages:
    """Stages that only say that they ran. faults: learning rate -> what its finetune does."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.faults: dict[float, Callable[[Path], int]] = {}

    def run(self, folder: Path, parallel: bool, job: str | None = None) -> int:
        note = json.loads((folder / "stage.json").read_text("utf-8"))
        rate = note["config"].get("optim", {}).get("lr")
        self.ran.append(f"{note['name']} {rate}" if note["name"] == "finetune" else note["name"])
        if note["name"] == "finetune" and rate in self.faults:
            return self.faults[rate](folder)
        found = {"seconds": 1.0, "validation_tau": 1 + (rate or 0)}
        write_json(folder / "result.json", found)
        (folder / "artifact").mkdir(exist_ok=True)
        seal(folder)
        return 0


@pytest.fixture
def stages(monkeypatch, tmp_path: Path) -> Stages:
    made = Stages()
    monkeypatch.setattr(Launch, "run", lambda _, *given: made.run(*given))
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    monkeypatch.setattr(train.run, "preflight", lambda *_: [])
    for name in ("HYDRA_FULL_ERROR", "DRAFTSMITH_SWEEP", "DRAFTSMITH_RUN"):
        monkeypatch.setenv(name, "")  # so that what the command sets goes with the test
    monkeypatch.setattr(BasicSweeper, "validate_batch_is_legal", lambda *_: None)  # each composes
    monkeypatch.setattr(command_line, "refuse_commands", lambda _: None)
    monkeypatch.setattr("train.plan._source", cache(train.plan._source))
    monkeypatch.chdir(tmp_path)
    return made


def sweep(folder: Path, *words: str) -> int:
    """A sweep of quickstart without what measures."""
    mine = ["-m", "recipe=quickstart", "sweep.maximises=validation_tau", f"output_dir={folder}"]
    return run_command(*mine, *WITHOUT, *words)


def diverge(folder: Path) -> int:
    """What a finetune does that fails, and `pause` what one does that halving pauses."""
    write_json(folder / "failed.json", {"code": 3, "error": "the loss is no number. Lower it"})
    return 3


def pause(folder: Path) -> int:
    write_json(folder / "rungs.json", [[512, 1.25]])
    return 75


def notes(folder: Path) -> dict[str, dict[str, Any]]:
    """The learning rate of each job -> its note."""
    found = [json.loads(f.read_text("utf-8")) for f in folder.glob("sweeps/*/jobs/*.json")]
    return {note["overrides"][LR]: note for note in found}


def test_jobs_leave_notes_and_the_table_is_read_from_them(stages, tmp_path: Path, capsys):
    assert sweep(tmp_path, f"{LR}=0.1,0.3,0.2") == 0
    found = notes(tmp_path)
    assert {rate: note["value"] for rate, note in found.items()} == {
        "0.1": 1.1,
        "0.3": 1.3,
        "0.2": 1.2,
    }
    (folder,) = (tmp_path / "sweeps").iterdir()
    assert Sweep.read(folder).axes == (LR,)
    assert {s: Path(p).parent for s, p in found["0.1"]["stages"].items()} == dict.fromkeys(
        ("target", "pretrain", "generate", "finetune"), tmp_path / "stages"
    )
    table = capsys.readouterr().out.split("best first:\n")[1].splitlines()
    assert [line.split()[0] for line in table[:3]] == ["1.3", "1.2", "1.1"]
    assert table[3] == f"  next: python -m eval.sweep {os.path.relpath(folder)}"
    shared = ["target", "pretrain", "generate"]
    assert stages.ran == [*shared, *(f"finetune {rate}" for rate in (0.1, 0.3, 0.2))]
    assert not list(tmp_path.glob("quickstart*.json")), "a plain run's note is its own"


@pytest.mark.parametrize(
    "more", ["", "hydra/launcher=submitit_slurm", "hydra/sweeper=optuna hydra.sweeper.n_trials=9"]
)
def test_the_plan_of_a_sweep_has_what_its_runs_share_once(
    more: str, stages, tmp_path: Path, monkeypatch, capsys
):
    """Whatever launcher or sampler would run it, the plan is made here, and nothing is left."""
    monkeypatch.setattr(show, "BILL", show.Bill())
    asked: list[str] = []

    def price(stage: Planned, *_: Any, **__: Any) -> Estimate:
        asked.append(stage.name)
        return Estimate("", disk=2**30, seconds=(60.0, 60.0), measured=True)

    monkeypatch.setattr(show, "estimate", price)
    monkeypatch.setattr(show, "taken", lambda *_: 0.7)
    monkeypatch.setattr("eval.others.needed", lambda: 2)
    assert sweep(tmp_path / "out", f"{LR}=0.1,0.2,0.3", "plan=true", *more.split()) == 0
    said = capsys.readouterr().out
    runs = 1 if "optuna" in more else 3
    assert asked == ["target", "pretrain", "generate", *["finetune"] * runs]
    assert said.count("as in a run before") == 3 * (runs - 1)
    which = "of the trials, the first" if "optuna" in more else f"all {runs} runs to their end"
    total = f"{which}: {3 + runs} stages to do, about {3 + runs}.0 GiB of disk"
    assert f"{total} and about {3 + runs}.0 minutes" in said
    assert said.count("disk: ") == 1, "of all runs at once"
    assert said.count("took 0.7 of this machine's cores meanwhile, so measured times are") == runs
    assert stages.ran == []
    assert not (tmp_path / "out").exists()


def test_a_job_that_fails_does_not_lose_the_others(stages, tmp_path: Path, capsys):
    """Nor does a bad value, a bug, or a training that halving has paused."""

    stages.faults |= {0.2: diverge, 0.4: pause, 0.5: lambda folder: 1 // 0}
    assert sweep(tmp_path, f"{LR}=0.2,0.4,-1,0.5,0.3") == 3
    found = notes(tmp_path)
    codes = {rate: note["code"] for rate, note in found.items()}
    assert codes == {"0.2": 3, "0.4": None, "-1": 2, "0.5": 1, "0.3": 0}
    assert {rate: note["value"] for rate, note in found.items() if note["value"]} == {"0.3": 1.3}
    assert found["0.2"]["error"] == "the loss is no number"
    assert found["0.5"]["error"].startswith("ZeroDivisionError")
    assert "lr and clip must be above 0" in found["-1"]["error"]
    assert found["0.4"]["rungs"] == [[512, 1.25]]
    table, warned = capsys.readouterr()
    assert f"warning: {LR}=-1 cannot run, the other jobs will: " in warned
    assert warned.index("warning: ") < warned.index("run 0: "), "before anything is trained"
    assert f"-  {LR}=0.2: exit code 3: the loss is no number\n" in table
    assert f"-  {LR}=0.4: paused after 512 tokens (tau 1.250)\n" in table


def test_a_plan_names_a_job_that_cannot_run_and_plans_the_others(
    stages, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(show, "BILL", show.Bill())
    monkeypatch.setattr(show, "estimate", lambda *_, **__: Estimate("", seconds=(60.0, 60.0)))
    assert sweep(tmp_path / "out", f"{LR}=-1,0.1,abc", "plan=true") == 2
    said = capsys.readouterr()
    assert said.err.count("cannot run, the other jobs will") == 2
    assert f"warning: {LR}=abc cannot run" in said.err
    assert "all 1 runs to their end: 4 stages to do" in said.out


def test_what_cannot_be_halved_leaves_no_trace(stages, tmp_path: Path, capsys):
    words = (f"{LR}=0.1,0.2", "hydra/sweeper=halving", "stages.finetune.schedule.tokens=512")
    assert sweep(tmp_path / "out", *words) == 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


def test_a_sweep_of_which_no_job_can_run_is_refused(stages, tmp_path: Path, capsys):
    assert sweep(tmp_path / "out", f"{LR}=-1,-2") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: no job of this sweep can run; {LR}=-1: ")
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert stages.ran == []


@pytest.mark.parametrize("code", [130, pytest.param(143, marks=pytest.mark.soak)])
def test_who_stops_a_sweep_stops_it_and_goes_on_later(code: int, stages, tmp_path: Path, capsys):
    stages.faults[0.2] = lambda folder: code
    assert sweep(tmp_path, f"{LR}=0.2,0.3") == code
    found = notes(tmp_path)
    assert set(found) == {"0.2"}
    assert found["0.2"]["code"] is None
    table = capsys.readouterr().out
    assert f"-  {LR}=0.2: not at its end; the same command goes on" in table
    assert "0 of 2 jobs measured, 1 not begun" in table
    stages.faults.clear()
    before = len(stages.ran)
    assert sweep(tmp_path, f"{LR}=0.2,0.3") == 0
    assert stages.ran[before:] == ["finetune 0.2", "finetune 0.3"]
    assert "2 of 2 jobs measured" in capsys.readouterr().out
    assert {note["start"] for note in notes(tmp_path).values()} == {2}


def test_a_job_knows_its_axes_whatever_becomes_of_the_folders_note(stages, tmp_path: Path):
    """Another command may begin on the same folder meanwhile."""

    def replaced(folder: Path) -> int:
        (file,) = tmp_path.glob("sweeps/*/sweep.json")
        note = json.loads(file.read_text("utf-8"))
        write_json(file, note | {"axes": ["seed"], "maximises": "seconds", "start": 7})
        return 3

    stages.faults[0.1] = replaced
    assert sweep(tmp_path, f"{LR}=0.1,0.2") == 3
    found = notes(tmp_path)
    assert found["0.2"]["value"] == 1.2
    assert {note["start"] for note in found.values()} == {1}


# ---- notes of several starts


@pytest.fixture
def again(tmp_path: Path) -> Callable[..., Sweep]:
    """again(of, command): the start of a sweep that maximises `of`; its stage has both numbers."""
    (tmp_path / "stage").mkdir()
    write_json(tmp_path / "stage" / "result.json", {"tau_T0": 2, "speedup_T0": 1.5})
    runs = [{LR: "0.1"}, {LR: "0.2"}]

    def begin(of: str = "tau_T0", command: str = "first") -> Sweep:
        return Sweep(tmp_path / "sweep", "r", None, of, (LR,), command).begin(runs)

    return begin


def a_job(sweep: Sweep, rate: str = "0.1") -> Job:
    job = Job(sweep, [f"{LR}={rate}"], 0)
    job.planned([Planned("bench", {}, {}, "", sweep.folder.parent / "stage")])
    return job


def test_values_are_of_the_number_that_is_maximised_now(again):
    assert a_job(again()).end(0) == 2
    other = again("speedup_T0", "second")
    (file,) = other.folder.glob("jobs/*.json")
    for note in (*other.notes(), json.loads(file.read_text("utf-8"))):
        assert (note["value"], note["maximises"]) == (1.5, "speedup_T0")
    assert "sweep: 1 of 2 jobs measured, 1 not begun" in told(other)[0]
    last = again("speedup_T0", "first")
    assert (last.command, last.commands, last.start) == ("first", ("first", "second"), 3)
    assert Sweep.read(last.folder) == last
    assert last.begin([{LR: "0.3"}]).jobs == 2, "other values are added to what is there"
    (note,) = replace(last, maximises="tau_T0").notes()  # of a command that is still at work
    assert note["value"] == 2


def test_the_note_of_a_finished_job_stands_until_it_ends_again(again):
    a_job(again()).end(0)
    sweep = again()
    job = a_job(sweep)
    for end in (None, 75, 130):  # at work, paused by halving, stopped
        if end:
            job.end(end)
        (note,) = sweep.notes()
        assert (note["code"], note["value"], note["start"]) == (0, 2, 2)
    a_job(sweep).end(3)
    (note,) = sweep.notes()
    assert (note["code"], note["value"]) == (3, None)


def test_a_mistake_of_an_earlier_start_is_no_row(again):
    sweep = again()
    Job(sweep, [f"{LR}=-1"], 0).end(2)
    a_job(sweep, "0.2").end(2)  # it had stages: a check of one of them has failed
    assert len(sweep.notes()) == 2
    (note,) = again().notes()
    assert note["overrides"] == {LR: "0.2"}


def test_optuna_maximises_and_survives_jobs_that_fail(stages, tmp_path: Path, capsys):
    pytest.importorskip("optuna")
    sampled = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random"]
    sampled += [f"hydra.sweeper.{x}" for x in ("sampler.seed=1", "n_trials=3", "n_jobs=1")]
    stages.faults[0.2] = lambda folder: 3
    assert sweep(tmp_path, f"{LR}=0.1,0.2,0.4", *sampled) == 3
    assert set(notes(tmp_path)) == {"0.1", "0.2", "0.4"}
    (file,) = tmp_path.glob("sweeps/*/optimization_results.yaml")
    assert yaml.safe_load(file.read_text("utf-8"))["best_params"] == {LR: 0.4}


@pytest.mark.soak
def test_optuna_without_a_single_value_ends_without_a_traceback(stages, tmp_path: Path, capsys):
    pytest.importorskip("optuna")
    stages.faults = dict.fromkeys((0.1, 0.3), lambda folder: 3)
    assert sweep(tmp_path, f"{LR}=0.1,0.3", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=2") == 3
    assert "Traceback" not in capsys.readouterr().err


def test_notes_come_from_the_processes_of_joblib(tmp_path: Path):
    """What a job kept in its own memory would not be in the table. These find at once that they
    have no key."""
    pytest.importorskip("joblib")
    words = ["recipe=quickstart", f"output_dir={tmp_path / 'out'}", f"{LR}=0.1,0.2"]
    words += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "tracker=wandb"]
    words += ["tracker.mode=online", *WITHOUT]
    done = command("-m", *words, cwd=tmp_path, WANDB_API_KEY="", HOME=str(tmp_path))
    assert done.returncode == 2
    table = done.stdout.split("0 of 2 jobs measured\n")[1]
    assert table.count("exit code 2: tracker.mode is online and wandb has no key") == 2
    assert "Traceback" not in done.stderr


# ---- one stage, several jobs


HOLDS = """
import sys, time
from pathlib import Path
from train.processes.lock import Lock
Lock(Path(sys.argv[1]), sys.argv[2]).take()
print("", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("name", [".turn", ".lock"])
def test_a_job_waits_for_whoever_makes_its_stage(name: str, tmp_path: Path, monkeypatch, capsys):
    """Another job, or a command that is none; says for whom, and again; and goes on when that one
    has ended, however it did."""
    monkeypatch.setattr(lock, "LOOK", 0.05)
    monkeypatch.setattr(lock, "TELL", 0.2)
    words = [sys.executable, "-c", HOLDS, str(tmp_path), name]
    other = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    other.stdout.readline()
    job = Job(Sweep(tmp_path, "r", None, "x", (), ""), [], 7)
    told = list[str]()

    def tell(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            other.kill()
            other.wait()

    monkeypatch.setattr(job, "_tell", tell)
    with job.turn(tmp_path):
        assert other.poll() is not None
        assert (tmp_path / ".turn").stat().st_size > 0, "it is this job's turn now"
    assert told[0].startswith(f"process {other.pid} on ")
    assert "waiting" in told[0]
    assert len(told) >= 2


# ---- presets


def axes(*words: str) -> dict[str, list[str]]:
    overrides = command_line._overrides(list(words))
    base = [word for word in map(base_word, overrides) if word]
    return axes_of(overrides, command_line._composed(base, hydras=True))


@pytest.fixture
def known(monkeypatch) -> None:
    """Recipes and functions are known to Hydra, as in the command."""
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    resolvers()
    for name in ("quickstart", "ko_drafter"):
        node = OmegaConf.load(ROOT / "recipes" / f"{name}.yaml")
        ConfigStore.instance().store(name, node, group="recipe", package="_global_")


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_job_of_every_preset_has_a_plan(preset: str, whole: bool, tmp_path: Path):
    own = ["seed=0,1"] if preset == "light" else []
    ((key, values),) = axes("recipe=quickstart", f"sweep={preset}", *own).items()
    assert preset == "light" or len(set(values)) == len(values) >= 4
    fixed = ["recipe=quickstart", f"output_dir={tmp_path}", f"sweep={preset}"]
    for value in values if whole else values[-1:]:
        config = command_line._composed([*fixed, f"{key}={value}"])
        made = plan(cast(dict, OmegaConf.to_container(config, resolve=True)), tmp_path)
        assert {stage.name for stage in made} >= {"target", "generate", "finetune", "bench"}
        assert not {stage.name for stage in made} & {"publish", "export", "serve", "tune_tree"}


def test_values_follow_the_recipes_own():
    assert times(0.001, 0.25, 0.5, 1, 2, 4) == "0.00025,0.0005,0.001,0.002,0.004"
    tokens = [int(x) for x in spaced(250_000, 2_048, 1.6, 6).split(",")]
    assert tokens[-1] == 250_000
    assert math.log10(tokens[-1] / tokens[0]) >= 1.5
    steps = [math.log(b / a) for a, b in pairwise(tokens)]
    assert max(steps) < 1.01 * min(steps)
    assert spaced(4096, 2048, 1.6, 6).split(",")[0] == "2048", "a step at least"
    assert families("eagle", "drafters.eagle.Eagle", "lm", "eagle", "medusa") == "eagle,lm,medusa"
    assert families("lm_1x256", "drafters.lm.LM", "lm", "eagle") == "lm_1x256,eagle"


SHAPES = {  # vocabulary, width, layers of a target -> the sizes of its drafters
    "quickstart": Shape(256, 4, 4, 2048, 4, 704, 512, True),
    "8 B": Shape(4096, 32, 8, 151_936, 36, 12_288, 40_960, False),
}


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("target", SHAPES)
def test_sizes_are_apart_and_shapes_are_alike(target: str, monkeypatch):
    monkeypatch.setattr("train.axes._shape", lambda root: SHAPES[target])

    def parameters(**arguments: int) -> int:
        return count(empty(Blueprint(LM, arguments), SHAPES[target]))

    widths = [int(x) for x in axes("recipe=quickstart", "sweep=size")["drafter.width"]]
    sizes = [parameters(width=width) for width in widths]
    assert len(sizes) >= 4
    assert sizes[-1] / sizes[0] > 4
    words = ["recipe=quickstart", "sweep=shape", "drafter.width=512"]
    overrides = command_line._overrides(words)
    composed = command_line._composed(words, hydras=True)
    assert axes_of(overrides, composed) == {"drafter.layers": ["1", "2", "3", "4", "6", "8"]}
    budget = int(composed.hydra.sweeper.params["drafter.parameters"])
    depths = [parameters(layers=n, parameters=budget) for n in (1, 2, 3, 4, 6, 8)]
    assert parameters(width=512) * 0.8 < min(depths)
    assert max(depths) < 1.2 * min(depths)


@pytest.mark.usefixtures("known")
def test_a_target_on_the_hub_is_sized_as_configured(monkeypatch):
    monkeypatch.setattr("train.estimate.shape_of_target", lambda *_: pytest.fail("asked the Hub"))
    assert len(axes("recipe=ko_drafter", "sweep=size")["drafter.width"]) >= 4


@pytest.mark.usefixtures("known")
def test_the_users_axis_replaces_the_presets():
    own = ["recipe=quickstart", "sweep=lr"]
    assert axes(*own, f"{LR}=1e-4,3e-4") == {LR: ["0.0001", "0.0003"]}
    assert set(axes(*own, "seed=1,2")) == {LR, "seed"}


@pytest.mark.usefixtures("known")
def test_one_value_is_the_recipes_own_where_the_preset_starts_from_it():
    given = ["recipe=quickstart", "sweep=lr", f"{LR}=0.1", "seed=1"]
    found = axes(*given)
    assert found == {LR: ["0.025", "0.05", "0.1", "0.2", "0.4"]}
    words = words_of(command_line._overrides(given), found)
    assert words == [*given[:2], f"{LR}=0.025,0.05,0.1,0.2,0.4", "seed=1"]
    assert folder("sweep=lr", f"{LR}=0.1") == folder("sweep=lr") == "quickstart-lr"
    drafters = axes("recipe=quickstart", "sweep=family", "drafter=eagle")["drafter"]
    assert drafters[:3] == ["eagle", "lm", "medusa"]


def folder(*words: str) -> str:
    """The name of the folder of a sweep of quickstart."""
    overrides = command_line._overrides(["recipe=quickstart", *words])
    base = [word for word in map(base_word, overrides) if word]
    composed = command_line._composed(base, hydras=True)
    return _named(overrides, axes_of(overrides, composed), composed).folder.name


@pytest.mark.usefixtures("known")
def test_axes_that_are_not_the_presets_have_a_folder_of_their_own():
    light, lr = ("sweep=light", f"{LR}=1,2"), ("sweep=lr", f"{LR}=1,2")
    assert len({folder(*light), folder("sweep=light", "seed=1,2"), folder(*light, "seed=1,2")}) == 3
    assert folder(*light) == folder("sweep=light", f"{LR}=3,4"), "points are added"
    assert folder(*lr) == "quickstart-lr"
    assert folder(*lr, "seed=1,2").startswith("quickstart-lr-")


def test_folders_are_apart_where_results_can_be(tmp_path: Path):
    def name(preset: str | None, axes: list[str], *fixed: str) -> str:
        return folder_of(tmp_path, "ko", preset, axes, list(fixed)).name

    free = [
        "launch=deepspeed",
        "output_dir=x",
        "tracker=wandb",
        "hydra/launcher=joblib",
        "recipe=ko",
    ]
    assert name("lr", [], *free) == "ko-lr"
    assert len({name("lr", x, *y) for x in ([], ["seed"]) for y in ([], ["a=1"], ["a=2"])}) == 6
    assert len({name(None, [LR]), name(None, ["seed"]), name(None, [LR], "seed=2")}) == 3


# ---- sentences

WORDS = {
    "without -m": ("sweep=lr", "sweep=lr starts several runs: add -m (python -m train -m recipe="),
    "several presets": ("-m sweep=lr,size", "sweep is one for all runs: choose one"),
    "several folders": ("-m output_dir=a,b", "output_dir is one for all runs: choose one"),
    "secrets": ("-m seed=1,${oc.env:HF_TOKEN}", "refers to another setting; write the values"),
    "code": ("-m hydra.sweeper.custom_search_space=os.system", "custom_search_space cannot be set"),
    "shell": ("-m hydra.launcher.setup=[ls]", "hydra.launcher.setup cannot be set here"),
    "batch script": ("-m hydra.launcher.partition='a\nrm'", "is no plain word, expected a number"),
    "class": ("-m hydra.sweeper={_target_:os.system}", "names code; choose a plugin"),
    "folder": ("-m hydra.sweep.dir=/tmp", "hydra.sweep.dir cannot be set here"),
    "sweeper of one run": ("hydra/sweeper=halving", "this command runs one: add -m, or leave it"),
    "setting of one run": ("hydra.sweeper.eta=2", "this command runs one: add -m, or leave it out"),
    "plugin": ("-m hydra/launcher=ray", "hydra/launcher=ray is not known here, expected one of ba"),
    "package": (
        "-m hydra/launcher@hydra.callbacks=joblib",
        "would change settings of Hydra itself",
    ),
}


@pytest.mark.parametrize("case", WORDS)
def test_a_word_that_a_sweep_cannot_have_is_one_sentence(case: str, capsys):
    words, said = WORDS[case]
    multirun, word = words.startswith("-m "), words.removeprefix("-m ")
    (override,) = command_line._overrides([word])
    with pytest.raises(SystemExit):
        command_line._check_word(override, multirun)
    assert said in capsys.readouterr().err


MISTAKES = {
    "unknown preset": ("recipe=quickstart sweep=lrs", "there is no sweep 'lrs'; did you mean 'lr'"),
    "no finetune": (
        "recipe=shootout sweep=lr",
        "write the axis yourself, python -m train -m recipe=NAME stages.train_lm.optim.lr=1e-4",
    ),
    "no lm": ("recipe=quickstart sweep=size drafter=eagle", "this sweep sizes an lm and the recip"),
    "a later part": ("recipe=quickstart drafter=lm,egle", "no drafter 'egle'; did you mean 'eagle"),
    "name": ("recipe=quickstart sweep.name=../x seed=1,2", "sweep.name is '../x'"),
    "no axis": ("recipe=quickstart sweep=light seed=1", "nothing is swept: give a key several val"),
    "one value": (
        "recipe=quickstart sweep=draft_length stages.bench.draft_lengths=[3]",
        "stages.bench.draft_lengths=[3] replaces the axis of sweep=draft_length: give several val",
    ),
    "interval": (
        f"recipe=quickstart {LR}=interval(1e-4,1e-2)",
        "is an interval, and hydra/sweeper=basic takes values: add hydra/sweeper=optuna",
    ),
    "no value": ("recipe=quickstart sweep=lr stages.finetune.optim.lr=", "has no value: give one"),
    "empty": ("recipe=quickstart sweep=lr stages.finetune.optim.lr=[]", "has no value: give one"),
    "shown": (
        f"recipe=quickstart {LR}=1,2 --cfg job",
        "--cfg shows one configuration, and -m runs several: leave out one of the two",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_sweep_is_one_sentence(case: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "refuse_commands", lambda _: None)
    words, said = MISTAKES[case]
    assert run_command("-m", *words.split()) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_that_is_not_installed_is_named_with_its_command(capsys, monkeypatch):
    def absent(name: str) -> str:
        raise plugins.PackageNotFoundError(name)

    monkeypatch.setattr(plugins, "version", absent)
    (override,) = command_line._overrides(["hydra/launcher=joblib"])
    said = (
        "needs hydra-joblib-launcher, which is not installed: .venv/bin/pip install -c constraint"
    )
    assert said in str(plugins.refusal(override, multirun=True))


@pytest.mark.usefixtures("known")
def test_a_cluster_is_set_by_words():
    words = ["recipe=quickstart", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    words += ["hydra.launcher.gpus_per_node=1", "hydra.launcher.mem_gb=64"]
    for override in command_line._overrides(words):
        command_line._check_word(override, multirun=True)
    launcher = command_line._composed(words, hydras=True).hydra.launcher
    assert (launcher.partition, launcher.gpus_per_node, launcher.mem_gb) == ("gpu", 1, 64)


HOSTILE = {
    "callbacks": "# @package _global_\nhydra: {callbacks: {x: {_target_: os.system}}}\n",
    "beside": "# @package _global_\nhydra: {sweeper: {params: {a: '1,2'}}, callbacks: {}}\n",
    "target": "# @package _global_\nhydra: {sweeper: {_target_: os.system, params: {a: '1'}}}\n",
    "key": "# @package _global_\nhydra: {sweeper: {params: {+hydra.callbacks.x: '1,2'}}}\n",
    "package": "# @package _global_\nhydra: {sweeper: {params: {data@hydra.callbacks: evil}}}\n",
    "value": "# @package _global_\nhydra: {sweeper: {params: {a: {_target_: os.system}}}}\n",
    "header": "# @package hydra.callbacks\nx: {_target_: os.system}\n",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_preset_names_keys_to_sweep_and_nothing_else_of_hydras(case: str, tmp_path: Path):
    file = tmp_path / "sweep" / "evil.yaml"
    file.parent.mkdir()
    file.write_text(HOSTILE[case])
    with pytest.raises(ValueError, match=r"is not for a recipe or part"):
        refuse_commands(file)
    fine = "# @package _global_\nhydra: {sweeper: {params: {stages.a.b: '1,2', 'x@a.b': 'c,d'}}}\n"
    file.write_text(fine)
    refuse_commands(file)
    elsewhere = tmp_path / "evil.yaml"
    elsewhere.write_text(fine)
    with pytest.raises(ValueError, match="@package"):
        refuse_commands(elsewhere)


class Wandb:
    """Stands for the package: keeps the runs that were asked of it."""

    Settings = dict

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    def init(self, **given: Any) -> "Wandb":
        self.runs.append(given | {"numbers": {}})
        return self

    def log(self, values: dict[str, float], step: int | None) -> None:
        self.runs[-1]["numbers"] |= values

    def finish(self, exit_code: int) -> None:
        self.runs[-1]["code"] = exit_code


def test_wandb_tells_the_story_of_the_local_table(stages, tmp_path: Path, monkeypatch, capsys):
    """One group; a run for each job, of those that failed, paused or trained nothing anew too, with
    the number that the table ranks by."""

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    stages.faults |= {0.2: diverge, 0.4: pause}
    words = ("tracker=wandb", f"{LR}=0.1,0.2,0.3,0.4")
    assert sweep(tmp_path, *words) == 3
    (folder,) = (tmp_path / "sweeps").iterdir()
    runs = {run["config"]["overrides"][LR]: run for run in wandb.runs}
    assert {(run["group"], run["job_type"]) for run in wandb.runs} == {(folder.name, "outcome")}
    assert [run["name"] for run in wandb.runs] == [
        f"outcome {LR}={x}" for x in (0.1, 0.2, 0.3, 0.4)
    ]
    assert {x: run["code"] for x, run in runs.items()} == {"0.1": 0, "0.2": 3, "0.3": 0, "0.4": 0}
    table = capsys.readouterr().out.split("best first:\n")[1].splitlines()
    ranked = sorted(
        (run["numbers"]["validation_tau"], x)
        for x, run in runs.items()
        if "validation_tau" in run["numbers"]
    )
    assert [f"{value:9.4g}  {LR}={x}".split() for value, x in ranked[::-1]] == [
        line.split() for line in table[:2]
    ]
    assert runs["0.1"]["numbers"]["target/seconds"] == 1
    assert runs["0.2"]["config"]["error"] in table[2], "the sentence of the table"
    assert runs["0.4"]["numbers"]["rung/tau"] == 1.25
    assert runs["0.1"]["config"]["error"] is None, "so that an earlier one goes"
    assert runs["0.1"]["config"]["stages"].keys() >= {"target", "finetune"}
    assert str(tmp_path) not in str(runs["0.1"]["config"])
    first = [run["id"] for run in wandb.runs]
    assert sweep(tmp_path, *words) == 3
    assert [run["id"] for run in wandb.runs[4:]] == first, "and goes on with the same runs"


def test_wandb_has_the_numbers_of_a_plain_recipe_too(stages, tmp_path: Path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    words = ["recipe=quickstart", "tracker=wandb", f"output_dir={tmp_path}", f"{LR}=0.1", *WITHOUT]
    assert run_command(*words, "plan=true") == 0
    assert wandb.runs == []
    assert run_command(*words) == 0
    (run,) = wandb.runs
    assert (run["group"], run["name"]) == (None, "outcome quickstart")
    assert run["numbers"]["finetune/validation_tau"] == 1.1


def test_a_training_of_a_sweep_is_in_its_group(tmp_path: Path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    job = Job(Sweep(tmp_path / "ko-lr", "ko", "lr", "x", (LR,), ""), [f"{LR}=0.1", "seed=3"], 0)
    for name, value in job.environment().items():
        monkeypatch.setenv(name, value)
    track.Wandb().open(tmp_path, "finetune-01", {"name": "finetune"})
    (run,) = wandb.runs
    assert (run["group"], run["name"]) == ("ko-lr", f"finetune {LR}=0.1")
    assert (run["id"], run["job_type"]) == ("finetune-01", "finetune")


# ---- for real


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_two_jobs_at_once_make_their_common_stage_once(launcher: str, tmp_path: Path):
    rows = [json.dumps({"q": q, "a": a}) for q, a in questions()]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows) + "\n")
    source = f"{{_target_: data.sources.Local, files: [{tmp_path}/chat.jsonl], prompt: '{{q}}', "
    source += "answer: '{a}'}"
    words = ["recipe=quickstart", f"output_dir={tmp_path}/out", *WITHOUT, "drafter.width=64"]
    for stage in ("target", "pretrain"):
        words += [f"~stages.{stage}.data", f"+stages.{stage}.data={source}"]
        sizes = {"tokens": 4096, "batch_tokens": 512, "sequence_length": 64}
        words += [f"stages.{stage}.schedule.{key}={value}" for key, value in sizes.items()]
    target = {"layers": 1, "width": 64, "vocab_size": 320, "max_positions": 128}
    words += [f"stages.target.{key}={value}" for key, value in target.items()]
    words += ["stages.generate=null", "stages.finetune=null", "sweep.maximises=validation_loss"]
    words += [f"hydra/launcher={launcher}", "stages.pretrain.optim.lr=1e-3,1e-2"]
    done = command("-m", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 of 2 jobs measured" in done.stdout
    logs = [p.read_text("utf-8") for p in (tmp_path / "out").glob("sweeps/*/.submitit/*/*.out")]
    said = "".join([done.stdout, *logs])
    assert said.count("[1/2] target: done before") == 1
    assert "makes target-" in said
    assert "waiting (0 min)" in said
