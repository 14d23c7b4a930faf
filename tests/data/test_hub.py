"""Streaming from a Hub that fails, at any request and in any way: no row twice, none missing."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.hub_server import HEAD, Faults, serving
from tests.train.composing import ROOT

ROWS = [{"t": f"row {n}"} for n in range(30)]
# Reads the data sets that stdin names, one a line, and says what came; nothing ever waits.
READ = """
import sys, time, json
time.sleep = lambda seconds: None
from data.sources import Hub
for name in sys.stdin:
    try:
        source = Hub(path=name.strip(), revision=sys.argv[1], text="{t}")
        rows = [row["text"] for row in source.rows()]
        print(json.dumps(rows), flush=True)
    except Exception as error:
        print(json.dumps(f"{type(error).__name__}: {error}"), flush=True)
"""


class Reader:
    """A process that reads data sets of the server, told one by one."""

    def __init__(self, home: Path) -> None:
        self.faults, self.read = Faults(), 0
        sets = {f"a/b{n}": {"default": {"train": ROWS}} for n in range(200)}
        self.server = serving(sets, set(), self.faults)
        address, _ = self.server.__enter__()
        mine = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", READ, HEAD],
            env=os.environ | mine | {"HF_HOME": str(home)},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, first: int, times: int, how: str) -> Any:
        """What is read of a data set never read before, while these requests fail."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.faults.arm(first, times, how)
        self.process.stdin.write(f"a/b{self.read}\n")
        self.process.stdin.flush()
        self.read += 1
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.server.__exit__(None, None, None)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Any:
    made = Reader(tmp_path_factory.mktemp("hub"))
    yield made
    made.close()


DUE = [row["t"] for row in ROWS]


def test_a_request_that_fails_is_made_again(reader: Reader):
    """For every request, and for each way to fail."""
    assert reader(0, 0, "") == DUE
    requests = reader.faults.count
    assert requests > 3
    for number in range(requests):
        for how in ("error", "drop", "cut"):
            assert reader(number, 1, how) == DUE, f"request {number} of {requests}: {how}"


def test_a_hub_that_stays_away_is_named(reader: Reader):
    for first in (0, 3):
        said = reader(first, 10_000, "error")
        assert isinstance(said, str), said[:1]
        assert said.startswith(
            f"ConnectionError: data set a/b{reader.read - 1} train cannot be read"
        )
        assert "check the network, HF_ENDPOINT and your token" in said


def test_a_stream_goes_on_behind_the_last_row(monkeypatch):
    """Not from its beginning: rows of an hour ago are not asked for again."""
    import datasets

    from data import hub

    opened: list[Any] = []
    faults = [2, 5]  # the rows before which the network fails, once each

    class Rows:
        def __init__(self) -> None:
            self.at = 0
            opened.append(self)

        def load_state_dict(self, state: int) -> None:
            self.at = state

        def state_dict(self) -> int:
            return self.at

        def __iter__(self):
            while self.at < 9:
                if faults[:1] == [self.at]:
                    faults.pop(0)
                    raise OSError("reset by peer")
                self.at += 1
                yield {"t": self.at - 1}

    pauses: list[float] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Rows())
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    assert [r["t"] for r in hub.stream("a/b", None, "train", None, "x")] == list(range(9))
    assert len(opened) == 3
    assert pauses == [hub.PAUSE, hub.PAUSE], "a row that arrives makes the tries as many as before"


def test_what_datasets_or_the_disk_refuses_is_not_asked_again(monkeypatch):
    """Only what the network or the Hub's own side may do otherwise the next time."""
    import errno

    import datasets
    from datasets.exceptions import DataFilesNotFoundError

    from data import hub

    asked: list[Exception] = []
    monkeypatch.setattr(hub.time, "sleep", lambda seconds: None)
    for error, times in (
        (RuntimeError("dataset scripts are no longer supported"), 1),
        (DataFilesNotFoundError("no supported data files"), 1),
        (OSError(errno.ENOSPC, "no space left"), 1),
        (TimeoutError(errno.ETIMEDOUT, "timed out"), hub.TRIES),
        (FileNotFoundError("a connection that broke"), hub.TRIES),
    ):

        def load(*a: Any, error: Exception = error, **k: Any) -> Any:
            asked.append(error)
            raise error

        monkeypatch.setattr(datasets, "load_dataset", load)
        with pytest.raises((RuntimeError, ConnectionError, OSError)):
            list(hub.stream("a/b", None, "train", None, "x"))
        assert asked == [error] * times, error
        asked.clear()
