"""What other processes do while a bench measures is seen, and told."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval import others
from eval.others import Others, mind, much, taken

BURN = "import time; print(flush=True); end = time.time() + 60\nwhile time.time() < end: pass"


def test_another_process_that_computes_is_seen_and_this_one_is_not():
    busy = subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        watch, end = Others(), time.perf_counter() + 1.0
        while time.perf_counter() < end:
            sum(range(1000))
        look = watch.since()
    finally:
        busy.kill()
        busy.wait()
    if look is None:
        pytest.skip("this system does not say what others do")
    seconds, used = look
    assert seconds == pytest.approx(1.0, abs=0.3)
    assert used / seconds > 0.3, "it had a core, or half of one that it shared with this loop"


def times(user: float, **more: float) -> Any:
    given = {"user": user, "idle": 100.0, "iowait": 3.0, "steal": 0.0} | more
    return SimpleNamespace(_asdict=lambda: given)


@pytest.fixture
def machine(monkeypatch) -> Any:
    """machine(looks, clock, own): what its counters say, each time that they are read."""

    def made(looks: list[Any], clock: list[float], own: list[float], cores: list[int]) -> None:
        turns, ticks, mine = iter(looks), iter(clock), iter(own)
        count = SimpleNamespace(cpu_times=lambda percpu: next(turns))
        times = SimpleNamespace(perf_counter=lambda: next(ticks), process_time=lambda: next(mine))
        monkeypatch.setattr(others, "psutil", count)
        monkeypatch.setattr(others, "cores", lambda: cores)
        monkeypatch.setattr(others, "time", times)

    return made


def test_idle_time_and_cores_of_others_do_not_count_and_stolen_time_does(machine):
    busy = times(6, steal=0.5, idle=200.0, iowait=9.0, guest=2.0)
    third = times(8, steal=0.5, idle=300.0, iowait=9.0, guest=2.0)
    looks = [[times(5), times(0)], [busy, times(40)], [third, times(90)]]
    machine(looks, [10.0, 14.0, 15.0], [2.0, 2.25, 3.0], [0])
    watch = Others()
    assert watch.since() == (4.0, 1.5 - 0.25)
    assert watch.since() == (1.0, 2.0 - 0.75), "since it was asked before"


def test_where_cores_are_hidden_nothing_is_said(machine):
    machine([[times(5)], [times(6)]], [10.0, 14.0], [2.0, 2.0], [0, 8])
    assert Others().since() is None


def test_with_a_share_of_the_cores_nothing_is_said(monkeypatch, tmp_path: Path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(others, "QUOTA", quota)
    assert others.cores() != []
    quota.write_text("max 100000\n")
    assert others.cores() != []
    quota.write_text("200000 100000\n")
    assert others.cores() == []
    assert Others().since() is None


@pytest.mark.parametrize(
    ("threads", "cores", "siblings", "found"),
    [(2, 2, 1, 0.6), (2, 64, 1, 0.0), (64, 2, 1, 0.6), (2, 4, 2, 0.6), (1, 2, 1, 0.0)],
)
def test_cores_that_were_free_are_nobodys_loss(threads, cores, siblings, found, monkeypatch):
    def count(logical: bool = True) -> int:
        return cores if logical else cores // siblings

    monkeypatch.setattr(others, "cores", lambda: list(range(cores)))
    monkeypatch.setattr(others, "psutil", SimpleNamespace(cpu_count=count))
    assert taken([(1.0, 0.2), None, (3.0, 2.2)], threads) == found


def test_a_moment_tells_nothing():
    assert taken([], 2) is None
    assert taken([(0.5, 0.4), (0.4, 0.4)], 2) is None


def test_little_is_not_told(monkeypatch):
    monkeypatch.setattr(others, "needed", lambda: 2)
    assert mind(None, "it is late") is None
    assert mind(0.1, "it is late") is None
    said = "Mind: other processes took 0.6 of this machine's cores meanwhile, so it is late."
    assert mind(0.6, "it is late") == said
    assert not much(0.6, threads=64)
    assert much(0.6, threads=2)
