"""Telemetry: every line is in metrics.jsonl, and no remote tracker ends or slows a run."""

import errno
import json
import math
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.looping import STEPS, counting, curve, family, lines, loop_of, same, step_of
from train import track
from train.track import Jsonl, Tracker, Wandb, outcome


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch):
    monkeypatch.setattr(track, "PATIENCE", 0.2)


@pytest.fixture
def never() -> Iterator[threading.Event]:
    """What a hung tracker waits for; it comes when the test is over."""
    event = threading.Event()
    yield event
    event.set()


class Remote(Jsonl):
    """Does `what` at `where` (open, log or finish): raises it, or waits for it."""

    def __init__(self, where: str = "", what: Any = None) -> None:
        self.where, self.what = where, what
        self.got: list[tuple[int | None, dict[str, float]]] = []
        self.finished = False
        self.opened: tuple[Path, str, dict[str, Any]] | None = None
        self.code: int | None = None

    def _at(self, place: str) -> None:
        if place != self.where:
            return
        if isinstance(self.what, Exception):
            raise self.what
        self.what.wait()

    def open(self, folder: Path, run: str, config: dict[str, Any]) -> Any:
        self._at("open")
        self.opened = (folder, run, config)
        return self

    def log(self, values: dict[str, float], step: int | None) -> None:
        if len(self.got) == 3:
            self._at("log")
        self.got.append((step, values))

    def finish(self, exit_code: int) -> None:
        self._at("finish")
        self.finished, self.code = True, exit_code


def logged(folder: Path, remote: Jsonl, count: int = 9) -> list[dict[str, Any]]:
    tracker = Tracker(folder, 0, remote)
    for step in range(1, count + 1):
        tracker.log(step, {"loss": 1.0 / step})
    tracker.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_remote_tracker_gets_every_line_and_is_finished(tmp_path: Path, capfd):
    remote = Remote()
    written = logged(tmp_path, remote)
    assert [row["step"] for row in written] == list(range(1, 10))
    assert remote.got == [(row["step"], {"loss": row["loss"]}) for row in written]
    assert remote.finished
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_a_warning(where: str, tmp_path: Path, capfd):
    written = logged(tmp_path, Remote(where, ConnectionError("no\nroute")))
    assert len(written) == 9
    said = capfd.readouterr().err
    expected = "warning: remote stopped (ConnectionError: no route); metrics.jsonl has every line\n"
    assert said == expected


@pytest.mark.parametrize("where", ["open", "log", "finish"])
def test_a_tracker_that_hangs_is_left_behind(where: str, never, tmp_path: Path, capfd):
    assert len(logged(tmp_path, Remote(where, never))) == 9
    left = {"open": 9, "log": 5, "finish": 0}[where]
    said = capfd.readouterr().err
    assert f"warning: remote has not taken about {left} lines within 0 s of the end" in said, said


def test_lines_do_not_pile_up_behind_a_tracker_that_hangs(
    never, tmp_path: Path, capfd, monkeypatch
):
    monkeypatch.setattr(track, "WAITING", 4)
    assert len(logged(tmp_path, Remote("open", never), count=50)) == 50
    assert "has not taken about" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["", "open", "log", "finish"])
def test_a_run_is_the_same_whatever_its_tracker_does(where: str, tmp_path: Path, tmp_path_factory):
    plain = tmp_path_factory.getbasetemp() / "plain"
    if not plain.is_dir():
        plain.mkdir()
        loop_of(plain).run(family("lm"), step_of("lm"))
    remote = Remote(where, ConnectionError("no route"))
    loop_of(tmp_path, remote).run(family("lm"), step_of("lm"))
    assert same(plain, tmp_path)
    assert curve(plain) == curve(tmp_path)
    if not where:
        steps = [step for step, _ in remote.got]
        assert steps == sorted(steps)
        assert steps[-1] == STEPS
        assert all(type(v) is float for _, values in remote.got for v in values.values())


def test_a_stopped_run_lets_go_of_its_tracker(tmp_path: Path):
    def act(call: int, _: Any) -> None:
        if call == 5:
            raise RuntimeError("broken")

    remote = Remote()
    with pytest.raises(RuntimeError):
        loop_of(tmp_path, remote).run(family("lm"), counting(act)(step_of("lm")))
    assert remote.finished
    assert len(remote.got) == len(lines(tmp_path)) > 0


def test_values_are_numbers_and_finite(tmp_path: Path):
    tracker = Tracker(tmp_path)
    values = {"a": torch.tensor(2.0), "b": float("nan"), "c": float("inf"), "d": 1}
    tracker.log(1, values, rows=[4, 2])  # type: ignore[arg-type]
    (row,) = lines(tmp_path)
    assert {k: v for k, v in row.items() if k != "time"} == {
        "step": 1, "a": 2.0, "d": 1.0, "sequences": [4, 2],
    }  # fmt: skip


def test_other_ranks_write_nothing(tmp_path: Path):
    remote = Remote()
    tracker = Tracker(tmp_path, 1, remote)
    tracker.log(1, {"loss": 1.0})
    tracker.rewind(0)
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    assert not remote.finished


class Full:
    """A file on a disk that has room for seven characters more."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stream.close()

    def write(self, text: str) -> None:
        self.stream.write(text[:7])
        self.stream.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_lines_and_leaves_none_cut(tmp_path: Path, capfd, monkeypatch):
    tracker = Tracker(tmp_path)
    tracker.log(1, {"loss": 1.0})
    real = Path.open
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, *a, **k: Full(real(self, *a, **k)))
        tracker.log(2, {"loss": 1.0})
    tracker.log(3, {"loss": 1.0})
    assert [row["step"] for row in lines(tmp_path)] == [1, 3]
    said = capfd.readouterr().err
    assert said == "warning: metrics.jsonl was not written: No space left on device\n"


def test_a_resumed_run_forgets_what_it_writes_again(tmp_path: Path):
    tracker = Tracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    with tracker.file.open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed here
    tracker.rewind(2)
    tracker.log(3, {"loss": 2.0})
    assert [(row["step"], row["loss"]) for row in lines(tmp_path)] == [(1, 1), (2, 1), (3, 2)]


def test_wandb_goes_on_with_the_same_run(tmp_path: Path, monkeypatch):
    """The id is the folder's name, which a resumed run shares; without a key it stays offline."""
    asked: list[dict[str, Any]] = []
    fake = types.SimpleNamespace(
        init=lambda **given: asked.append(given) or Remote(), Settings=lambda **given: given
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = tmp_path / "finetune-0123456789ab"
    folder.mkdir()
    (folder / "stage.json").write_text('{"name": "finetune"}')
    for _ in range(2):
        logged(folder, Wandb(), count=1)
    assert [given["id"] for given in asked] == [folder.name] * 2
    assert {given["job_type"] for given in asked} == {"finetune"}
    assert all(given["resume"] == "allow" and given["mode"] == "offline" for given in asked)
    assert asked[0]["config"] == {"name": "finetune"}


def test_what_a_recipe_has_come_to_is_a_run_of_its_own(tmp_path: Path, capfd):
    remote = Remote()
    outcome(remote, tmp_path, "ko-lr-01", {"stages": {}}, {"tau_T0": 2.0, "b": math.inf}, 3)
    assert remote.opened == (tmp_path, "ko-lr-01", {"name": "outcome", "stages": {}})
    assert remote.got == [(None, {"tau_T0": 2.0})], "as a summary, of no step"
    assert remote.code == 3, "which wandb shows as failed"
    outcome(Remote("open", ConnectionError("no route")), tmp_path, "x", {}, {}, 0)
    assert "no route); the files are whole" in capfd.readouterr().err
    outcome(Jsonl(), tmp_path, "x", {}, {}, 0)
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_not_there_is_a_warning(tmp_path: Path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # type: ignore[arg-type]
    assert len(logged(tmp_path, Wandb())) == 9
    assert "warning: wandb stopped (ModuleNotFoundError" in capfd.readouterr().err
