"""Successive halving: a paused training is the uninterrupted one, bit for bit; the right jobs go on
from each rung; and what is planned is what is trained."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tests.tiny import write_texts
from tests.train.composing import compose
from tests.train.looping import ROWS, STEPS, T, curve, family, loop_of, same, saved_steps, step_of
from train import checkpoint, halving
from train import plan as planning
from train.compose import CONF
from train.halving import Halving, Job, paused_stage, record, refuse_unequal, rungs, step_at
from train.plan import Planned, fingerprint, plan
from train.resume import Paused

BATCH = ROWS * T
TAUS = {2: 1.0, 3: 9.0, 4: 2.0, 5: 8.0, 6: 3.0, 8: 2.5}  # best where an extra look would find it


def run(out: Path, name: str = "lm", pause_at: int | None = None, **changes: Any) -> dict:
    loop = loop_of(out, **changes)

    def look(_: Any) -> tuple[dict[str, float], None]:
        return {"validation_tau": TAUS.get(loop.at.step, 1.0)}, None

    return loop.run(family(name), step_of(name), look, 2, pause_at)


def paused(out: Path, pause_at: int, name: str = "lm") -> str:
    with pytest.raises(Paused) as told:
        run(out, name, pause_at)
    return str(told.value)


# --- a training that pauses -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm", "eagle"])
def test_a_training_that_paused_twice_is_the_uninterrupted_one(name: str, tmp_path: Path):
    """Also the drafter that is saved: what a pause looks at besides is no candidate."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = run(whole, name)
    paused(parts, 3 * BATCH, name)
    paused(parts, 5 * BATCH - 1, name)
    found = run(parts, name)
    assert same(whole, parts)
    assert (found["artifact_step"], found["artifact_tau"]) == (6, 3.0)
    assert {k: expected[k] for k in ("steps", "artifact_step")} == {
        k: found[k] for k in ("steps", "artifact_step")
    }
    (a, *_), (b, *_) = (checkpoint.newest(out / "best") for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    for key in ("loss", "lr"):
        assert curve(parts, key) == curve(whole, key)
    assert rungs(parts) == {3 * BATCH: 9.0, 5 * BATCH: 8.0}


def test_a_pause_says_where_and_trains_no_more_when_asked_again(tmp_path: Path):
    said = paused(tmp_path, 4 * BATCH)
    assert said.startswith(f"paused after step 4 of {STEPS}, {4 * BATCH:,} tokens; the same")
    before = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / halving.RUNGS).unlink()  # as if it had ended between the checkpoint and the note
    paused(tmp_path, 4 * BATCH)
    assert rungs(tmp_path) == {4 * BATCH: 2.0}
    assert curve(tmp_path).keys() == {1, 2, 3, 4}
    assert (tmp_path / "metrics.jsonl").read_text().startswith(before)


def test_a_rung_that_is_behind_is_not_judged(tmp_path: Path):
    paused(tmp_path, 4 * BATCH)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert "after step 4" in paused(tmp_path, 3 * BATCH)
    assert rungs(tmp_path) == {4 * BATCH: 2.0}
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_pause_saves_where_no_checkpoint_is_due(tmp_path: Path):
    with pytest.raises(Paused):
        run(tmp_path, pause_at=3 * BATCH, tokens=40 * BATCH)
    assert saved_steps(tmp_path) == [3]


@pytest.mark.parametrize("pause_at", [STEPS * BATCH, STEPS * BATCH + 1])
def test_a_pause_at_the_end_is_none(pause_at: int, tmp_path: Path):
    assert run(tmp_path, pause_at=pause_at)["steps"] == STEPS
    assert rungs(tmp_path) == {}


def test_where_to_pause_is_no_part_of_the_fingerprint():
    stage = compose("recipe=quickstart")["stages"]["finetune"]
    body = {key: value for key, value in stage.items() if key != "needs"}
    marks = [fingerprint({**body, "pause_at": at}, {}) for at in (None, 3, 5)]
    assert len(set(marks)) == 1
    assert fingerprint({**body, "validate_every": 3}, {}) != marks[0]


# --- who goes on ----------------------------------------------------------------------------------

FULL = 900 * BATCH


class Bench:
    """Stands for launcher and jobs: job i decodes taus[i][rung] and is worth taus[i][-1] in the
    end; None: it fails there, with what its stage would leave."""

    def __init__(self, folder: Path, taus: list[list[float | None]], code: int = 3) -> None:
        self.jobs = [job_of(folder, i) for i in range(len(taus))]
        self.taus = {f"i={i}": row for i, row in enumerate(taus)}
        self.code, self.launched, self.trained = code, list[list[str]](), 0
        self.dies_after = 10**9

    def __call__(self, batch: list[list[str]]) -> list[float | None]:
        self.launched.append([words[0] for words in batch])
        return [self.work(words[0], words[1:]) for words in batch]

    def work(self, name: str, more: list[str]) -> float | None:
        if not self.dies_after:
            raise KeyboardInterrupt
        self.dies_after -= 1
        job = next(job for job in self.jobs if job.words == (name,))
        stage = job.training
        end = int(more[0].split("=")[1]) if more else FULL
        assert more in ([], [f"++stages.finetune.pause_at={end}"])
        tau = self.taus[name][len(rungs(stage.folder))]
        if tau is None:
            note = {"code": self.code, "error": "the loss is odd. Look at it"}
            (stage.folder / "failed.json").write_text(json.dumps(note))
            return None
        self.trained += step_at(end, BATCH) * BATCH - job.trained * BATCH
        saved = stage.folder / "checkpoints" / f"step-{step_at(end, BATCH):08d}"
        saved.mkdir(parents=True, exist_ok=True)
        (stage.folder / "seconds.json").write_text(str(float(end)))
        if more:
            record(stage.folder, step_at(end, BATCH) * BATCH, tau)
            return None
        (stage.folder / "DONE").touch()
        return tau

    def race(self, **settings: Any) -> Halving:
        return Halving(self.jobs, **{"eta": 3, "rungs": 3, "least": None, **settings})


def job_of(folder: Path, number: int, tokens: int = FULL, name: str = "finetune") -> Job:
    place = folder / f"{name}-{number}"
    place.mkdir(exist_ok=True)
    config = {
        "_target_": halving.DISTILL,
        "schedule": {"tokens": tokens, "batch_tokens": BATCH},
    }
    stage = Planned(name, config, {}, str(number), place)
    job = Job((f"i={number}",), f"i={number}", (stage,))
    job.__dict__["training"] = stage  # which is composed in the tests of paused_stage
    return job


NINE: list[list[float | None]] = [
    [1.1, 9.9], [1.2, 9.9], [1.9, 1.4, 1.0], [1.3, 9.9], [1.8, 1.6, 5.0],
    [1.4, 9.9], [1.7, 1.5, 9.0], [1.5, 9.9], [1.6, 9.9],
]  # fmt: skip


def test_the_best_third_goes_on_from_each_rung_and_the_last_to_the_end(tmp_path: Path, capsys):
    bench = Bench(tmp_path, NINE)
    race = bench.race()
    race.run(bench)
    every = [f"i={i}" for i in range(9)]
    assert bench.launched == [every, ["i=2", "i=4", "i=6"], ["i=4"]]
    assert bench.trained == race.cost() == BATCH * (9 * 100 + 3 * 200 + 600)
    said = capsys.readouterr().out
    assert f"{race.cost():,} tokens in all, {race.cost() / (9 * FULL):.0%} of the whole" in said
    shown = [line.split()[:3:2] for line in said.split("rung 2")[1].splitlines()[1:4]]
    assert shown == [["1.600", "on"], ["1.500", "here"], ["1.400", "here"]]
    assert "best: i=4 (5.000)" in said
    assert f"trained on {bench.trained:,} tokens in all its jobs; the whole grid" in said
    assert f"been {9 * FULL:,}. It took {6 * 100 * BATCH + 2 * 300 * BATCH + FULL:,} sec" in said
    assert f"would have taken about {9 * FULL:,}" in said


def test_of_equals_the_earlier_in_the_grid_goes_on(tmp_path: Path, capsys):
    bench = Bench(tmp_path, [[1.5, 1.0], [2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    bench.race(eta=2, rungs=2).run(bench)
    assert bench.launched[1] == ["i=1", "i=2"]
    assert "of those with equal tau, the earlier in the grid go on" in capsys.readouterr().out


def test_a_failed_job_ends_no_other_and_is_told(tmp_path: Path, capsys):
    bench = Bench(tmp_path, [[None], [1.2, 1.0], [1.5, 1.0], [1.3, 1.0]])
    bench.race(eta=2, rungs=2).run(bench)
    assert bench.launched[1] == ["i=2", "i=3"]
    assert "      -  failed     i=0: the loss is odd\n" in capsys.readouterr().out


def test_where_all_fail_nothing_goes_on(tmp_path: Path, capsys):
    bench = Bench(tmp_path, [[None]] * 4)
    bench.race().run(bench)
    assert len(bench.launched) == 1
    assert "no job has come to this rung" in capsys.readouterr().out


@pytest.mark.parametrize("code", [130, 143])
def test_a_job_that_was_told_to_stop_ends_the_sweep(code: int, tmp_path: Path):
    bench = Bench(tmp_path, [[1.0, 1.0], [None], [1.1, 1.0]], code)
    with pytest.raises(SystemExit) as ended:
        bench.race().run(bench)
    assert ended.value.code == code
    assert len(bench.launched) == 1


@pytest.mark.parametrize("after", [4, 10, 12])
def test_an_interrupted_sweep_goes_on_where_it_was(after: int, tmp_path: Path):
    """Amid the first rung, the second, and before the last job: nothing is trained twice."""
    bench = Bench(tmp_path, NINE)
    bench.dies_after = after
    with pytest.raises(KeyboardInterrupt):
        bench.race().run(bench)
    bench.dies_after, bench.launched = 10**9, []
    race = bench.race()
    race.run(bench)
    assert bench.trained == race.cost()
    assert sum(map(len, bench.launched)) == 9 + 3 + 1 - after
    assert bench.launched[-1] == ["i=4"]


def test_what_was_trained_beyond_a_rung_goes_on_and_takes_nobodys_place(tmp_path: Path, capsys):
    """Its tau is of more tokens than the others', so it is not compared."""
    bench = Bench(tmp_path, [[9.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    bench.work("i=0", [])
    bench.race(rungs=2).run(bench)
    assert bench.launched == [["i=1", "i=2", "i=3"], ["i=0", "i=3"]]
    assert "goes on    i=0: was trained beyond this rung before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("jobs", "settings", "counts", "pauses"),
    [
        (12, {}, [12, 4, 1], [100, 300]),
        (27, {}, [27, 9, 3], [100, 300]),
        (4, {}, [4, 1], [300]),  # compared as late as can be
        (2, {}, [2, 1], [300]),
        (9, {"rungs": 2}, [9, 3], [300]),
        (16, {"eta": 2, "rungs": 4}, [16, 8, 4, 2], [112.5, 225, 450]),
        (30, {"rungs": 9}, [30, 10, 3, 1], [100 / 3, 100, 300]),
        (30, {"least": 90 * BATCH}, [30, 10, 3], [100, 300]),
    ],
)
def test_rungs(jobs: int, settings: Any, counts: list[int], pauses: list[float], tmp_path: Path):
    race = Bench(tmp_path, [[1.0]] * jobs).race(**settings)
    assert race.counts == counts
    assert race.pauses == [-(-p // 1) * BATCH for p in pauses]  # whole steps


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one job": (lambda f: refuse_unequal([job_of(f, 0)]), "a sweep of one job cannot be halved"),
    "tokens": (
        lambda f: refuse_unequal([job_of(f, 0), job_of(f, 1, FULL // 2)]),
        "compares them at equal tokens of one stage: sweep that with hydra/sweeper=basic",
    ),
    "same drafter": (
        lambda f: refuse_unequal([job_of(f, 0), job_of(f, 0)]),
        "i=0 and i=0 train the same drafter",
    ),
    "too short": (
        lambda f: Halving([job_of(f, i, BATCH) for i in (0, 1)], eta=2, rungs=2, least=None),
        "the rungs fall on the steps 1, 1 of i=0, and must rise",
    ),
    "least of all": (lambda f: Bench(f, [[1.0]] * 9).race(least=FULL + 1), "must rise: lower"),
    "eta": (lambda f: Bench(f, [[1.0]] * 9).race(eta=1), "has eta 1, rungs 3, least None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_halved_is_refused(name: str, tmp_path: Path):
    act, said = REFUSED[name]
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        act(tmp_path)


# --- through Hydra --------------------------------------------------------------------------------

FT, LR = "finetune", "stages.finetune.optim.lr"


@pytest.fixture
def quick(monkeypatch):
    """Each file of code is hashed once, and not for each job."""
    monkeypatch.setattr(planning, "_source", functools.cache(planning._source))


def grid(folder: Path, *words: str) -> list[str]:
    """quickstart, halved, on a file of text: fingerprinting Python's library takes a while."""
    file = write_texts(folder)
    mine = ["recipe=quickstart", "hydra/sweeper=halving", f"output_dir={folder / 'out'}"]
    for slot in ("target.data", "pretrain.data", "generate.prompts", "bench.prompts.python"):
        named = "text" if slot.endswith("data") else "prompt"
        source = f"{{_target_: data.sources.Local, files: [{file}], {named}: '{{text}}'}}"
        mine += [f"~stages.{slot}", f"+stages.{slot}={source}"]
    return [*mine, "stages.serve=null", "stages.publish=null", "stages.export=null", *words]


def swept(folder: Path, *words: str) -> list[tuple[float, int | None]]:
    """The rate and the pause of each job that Hydra starts, in order; a job of rate x decodes
    1000 x."""
    seen = []

    def task(config: Any) -> float:
        plain: Any = OmegaConf.to_container(config, resolve=True)
        (stage,) = [s for s in plan(plain, folder / "out") if s.name == FT]
        rate, pause = stage.config["optim"]["lr"], stage.config["pause_at"]
        seen.append((rate, pause))
        batch = stage.config["schedule"]["batch_tokens"]
        stage.folder.mkdir(parents=True, exist_ok=True)
        record(stage.folder, step_at(pause or 0, batch) * batch, 1000 * rate)
        return rate

    compose("recipe=quickstart")  # stores the recipes
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        GlobalHydra.instance().hydra.multirun("config", task, grid(folder, *words))
    return seen


@pytest.mark.usefixtures("quick")
def test_hydra_launches_each_rung_with_its_pause_and_the_survivor_without(tmp_path: Path, capsys):
    """Of a preset, whose axis is not among the words of the command."""
    seen = swept(tmp_path, "sweep=lr")
    every = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert seen == [*((rate, 41 * 2048) for rate in every), (4e-3, None)]
    said = capsys.readouterr().out
    assert f"best: {LR}=0.004 (0.004)" in said
    tokens, full = 5 * 41 * 2048 + (122 - 41) * 2048, 122 * 2048
    assert f"{tokens:,} tokens in all, {tokens / 5 / full:.0%} of the whole grid" in said


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stages.finetune.schedule.tokens=30000,60000", "compares them at equal tokens"),
        ("stages.bench.limit=5,6", "train the same drafter"),
        ("objective@stages.finetune.objective=tv,ce", "no validation that decodes"),
    ],
)
def test_a_sweep_that_cannot_be_halved_is_one_sentence(word: str, said: str, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        swept(tmp_path, word)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert len(shown.err.splitlines()) == 1
    assert said in shown.err


@pytest.mark.usefixtures("quick")
def test_a_plan_of_a_sweep_says_what_halving_takes_and_trains_nothing(tmp_path: Path, capsys):
    assert len(swept(tmp_path, "plan=true", f"{LR}=1e-4,1e-3")) == 2
    said = capsys.readouterr().out
    assert "halving: 2 jobs" in said
    assert "rung 1 (" not in said
    assert not list(tmp_path.glob("sweeps/*/jobs/*"))


def test_the_training_that_is_paused_is_the_one_that_no_other_starts_from(tmp_path: Path):
    words = [word for word in grid(tmp_path) if not word.startswith("hydra")]
    stages = plan(compose(*words), tmp_path)
    assert paused_stage(stages).name == FT
    stages = [s for s in stages if s.name not in (FT, "pretrain")]
    with pytest.raises(ValueError, match="this recipe has none: leave out"):
        paused_stage(stages)
