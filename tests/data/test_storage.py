"""Storage that fails or hangs: a read is tried again, nothing is read twice, and the file named."""

import errno
import gzip
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data import storage
from data.sources import Local

OPEN = Path.open
ROWS = [{"text": f"row {n}"} for n in range(2_000)]


class Faulty:
    """Files whose reads fail as told: `faults` maps the number of a read, counted over all files,
    to an errno, or to None for one that hangs. `end` releases those."""

    def __init__(self, faults: dict[int, int | None]) -> None:
        self.faults, self.reads, self.end = faults, 0, threading.Event()

    def __call__(self, path: Path, mode: str = "r", **options: Any) -> Any:
        file = OPEN(path, mode, **options)
        if "buffering" in options:
            file = _Slow(file, self)
        return file

    def read(self) -> None:
        number, self.reads = self.reads, self.reads + 1
        fault = self.faults.get(number, 0)
        if fault is None:
            self.end.wait(30)
        elif fault:
            raise OSError(
                fault, "Input/output error" if fault == errno.EIO else "Stale file handle"
            )


class _Slow:
    def __init__(self, file: Any, faulty: Faulty) -> None:
        self._file, self._faulty = file, faulty

    def read(self, size: int) -> bytes:
        self._faulty.read()
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def faulty(monkeypatch) -> Iterator[Any]:
    """Makes the reads with these numbers fail; blocks are small, so that there are many."""
    made: list[Faulty] = []

    def inject(faults: dict[int, int | None]) -> Faulty:
        made.append(Faulty(faults))
        monkeypatch.setattr(Path, "open", lambda *a, **k: made[-1](*a, **k))
        return made[-1]

    monkeypatch.setattr(storage, "PAUSE", 0.0)
    monkeypatch.setattr(storage, "STALL", 0.5)
    monkeypatch.setattr(storage, "BLOCK", 4_096)
    yield inject
    for each in made:
        each.end.set()


def write(folder: Path, name: str) -> str:
    path = folder / name
    text = "".join(f'{{"text": "{row["text"]}"}}\n' for row in ROWS).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=500)
    else:
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_read_that_fails_is_tried_again_and_nothing_comes_twice(tmp_path, name, faulty):
    """Whichever read it is; three failures in a row are survived."""
    source = Local(files=[write(tmp_path, name)], text="{text}")
    whole = faulty({})
    assert list(source.rows()) == ROWS
    assert whole.reads > 2
    for number in range(whole.reads):
        faulty({number: errno.EIO})
        assert list(source.rows()) == ROWS
    faulty(dict.fromkeys((1, 2, 3), errno.ESTALE))
    assert list(source.rows()) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_storage_that_stays_broken_is_named(tmp_path, name, faulty):
    source = Local(files=[write(tmp_path, name)], text="{text}")
    broken = faulty(dict.fromkeys(range(1, 99), errno.EIO))
    with pytest.raises(
        OSError, match=rf"{name} cannot be read at byte [\d,]+ \(Input/output e"
    ) as e:
        list(source.rows())
    assert not isinstance(e.value, ValueError), "the environment's fault (exit code 4), not input"
    assert "tried 4 times): check the disk or the mount; the same command goes on" in str(e.value)
    assert broken.reads <= 2 * storage.TRIES + 1


def test_a_read_that_hangs_is_tried_again_on_the_file_opened_anew(tmp_path, faulty):
    source = Local(files=[write(tmp_path, "a.jsonl")], text="{text}")
    faulty({2: None})
    assert list(source.rows()) == ROWS
    faulty(dict.fromkeys(range(2, 99)))
    with pytest.raises(OSError, match=r"a\.jsonl .*\(no answer within 0\.5 s, tried 4 times\)"):
        list(source.rows())


def test_a_fingerprint_is_as_patient(tmp_path, faulty):
    source = Local(files=[write(tmp_path, "a.jsonl")], text="{text}")
    faulty({})
    mark = source.fingerprint()
    faulty({3: errno.EIO})
    assert source.fingerprint() == mark


def test_an_interrupt_reaches_who_waits(tmp_path):
    """The error of the work is the caller's, whatever it is."""
    with pytest.raises(KeyboardInterrupt):
        storage.within(5, lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert storage.within(5, lambda: 7) == 7
