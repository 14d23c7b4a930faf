"""What other processes do while a bench measures is seen, and told."""

import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from eval import others
from eval.others import Others, mind, taken

BURN = "import time; print(flush=True); end = time.time() + 60\nwhile time.time() < end: pass"


def test_another_process_that_computes_is_seen_and_this_one_is_not():
    busy = subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        watch, end = Others(), time.perf_counter() + 1.0
        while time.perf_counter() < end:
            sum(range(1000))
        seconds, used = watch.since()
    finally:
        busy.kill()
        busy.wait()
    assert seconds == pytest.approx(1.0, abs=0.3)
    # it had a core, or half of one that it shared with this loop; own work would be counted on top
    assert 0.3 < used / seconds < len(others.cores()) + 0.2


def times(user: float, **more: float) -> Any:
    given = {"user": user, "idle": 100.0, "iowait": 3.0, "steal": 0.0} | more
    return SimpleNamespace(_asdict=lambda: given)


def test_idle_time_and_cores_of_others_do_not_count_and_stolen_time_does(monkeypatch):
    looks = iter([[times(5), times(0)], [times(6, steal=0.5, idle=200.0), times(40)]])
    clock = iter([10.0, 14.0])
    own = iter([2.0, 2.25])
    fake = SimpleNamespace(cpu_times=lambda percpu: next(looks))
    monkeypatch.setattr(others, "psutil", fake)
    monkeypatch.setattr(others, "cores", lambda: [0])
    mine = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: next(own))
    monkeypatch.setattr(others, "time", mine)
    assert Others().since() == (4.0, 1.5 - 0.25)


def test_cores_that_were_free_are_nobodys_loss():
    looks = [(1.0, 0.2), (3.0, 2.2)]
    assert taken(looks, threads=2, cores=2) == 0.6
    assert taken(looks, threads=2, cores=64) == 0.0
    assert taken(looks, threads=64, cores=2) == 0.6
    assert taken([], threads=2, cores=2) is None


def test_little_is_not_told():
    assert mind(None, "it is late") is None
    assert mind(0.1, "it is late") is None
    said = "Mind: other processes took 0.6 of this machine's cores meanwhile, so it is late."
    assert mind(0.6, "it is late") == said
