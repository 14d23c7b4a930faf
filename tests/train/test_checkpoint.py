"""A crash never costs the last good checkpoint, and a damaged one is never taken for good."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoding.ranks import Ranks
from drafters.files import damage, digests, write_json
from tests.train import cuts
from train import checkpoint, resume
from train.processes import watch


def state(step: int) -> dict[str, torch.Tensor]:
    return {
        "weight": torch.full((3, 4), float(step)),
        "exp_avg/weight": torch.full((3, 4), step + 0.5),
    }


def saved(folder: Path, *steps: int) -> list[Path]:
    return [checkpoint.save(folder, step, state(step), {"seed": 7}) for step in steps]


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 0x10
    file.write_bytes(raw)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_what_is_saved_comes_back(tmp_path: Path):
    saved(tmp_path, 3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    tensors, position, skipped = found
    assert position == {"step": 3, "seed": 7}
    assert skipped == []
    assert tensors.keys() == state(3).keys()
    assert all(torch.equal(tensors[key], value) for key, value in state(3).items())


def test_nothing_there_is_no_checkpoint(tmp_path: Path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "not there") is None


def test_the_previous_one_stays_and_older_ones_go(tmp_path: Path):
    saved(tmp_path, 1, 2, 3, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_newest_is_by_number(tmp_path: Path):
    saved(tmp_path, 9, 10)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 10


DAMAGE = {
    "flipped weights": (lambda p: flip(p / "state.safetensors"), "the hash of state.safetensors"),
    "flipped position": (lambda p: flip(p / "position.json"), "the hash of position.json differs"),
    "truncated": (
        lambda p: truncate(p / "state.safetensors"),
        r"has \d+ bytes, expected",
    ),
    "empty": (lambda p: (p / "state.safetensors").write_bytes(b""), "has 0 bytes"),
    "no weights": (lambda p: (p / "state.safetensors").unlink(), "state.safetensors is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "it has no manifest.json"),
    "cut manifest": (lambda p: truncate_half(p / "manifest.json"), "manifest.json is not readable"),
    "empty manifest": (lambda p: (p / "manifest.json").write_bytes(b""), "is not readable"),
    "other manifest": (lambda p: (p / "manifest.json").write_text("{}"), "is not readable"),
    "list": (lambda p: write_json(p / "manifest.json", {"files": [1]}), "does not list state.safe"),
    "nothing listed": (lambda p: write_json(p / "manifest.json", {"files": {}}), "does not list"),
    "pickle": (lambda p: swap(p, evil()), "it is no checkpoint of ours"),
}


MARKER = "a pickle was run"


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["EVIL_PLACE"]) / MARKER),)


def evil() -> bytes:
    return pickle.dumps(Evil())


def swap(path: Path, raw: bytes) -> None:
    """Other bytes in place of the weights, and a manifest that fits them."""
    (path / "state.safetensors").write_bytes(raw)
    known = digests(path, ("state.safetensors", "position.json"))
    write_json(path / "manifest.json", {"files": known})


def truncate_half(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_skipped_with_the_reason(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("EVIL_PLACE", str(tmp_path))
    harm, why = DAMAGE[name]
    harm(saved(tmp_path, 4, 8)[-1])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    _, position, skipped = found
    assert position["step"] == 4
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000008: ")
    assert re.search(why, skipped[0])
    assert not (tmp_path / MARKER).exists()


def test_the_malicious_pickle_would_run_if_it_were_unpickled(tmp_path: Path, monkeypatch):
    """Else the tests that it did not run would say nothing."""
    monkeypatch.setenv("EVIL_PLACE", str(tmp_path))
    pickle.loads(evil())
    assert (tmp_path / MARKER).is_dir()


@pytest.mark.parametrize("name", ["state.safetensors", "position.json", "manifest.json"])
def test_any_flipped_byte_is_met_or_does_not_matter(name: str, tmp_path: Path):
    """One bit of each byte of each file in turn: never an error, never another state."""
    saved(tmp_path, 4, 8)
    file = tmp_path / "step-00000008" / name
    raw, met = file.read_bytes(), 0
    for at in range(len(raw)):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        found = checkpoint.newest(tmp_path)
        assert found is not None
        step = found[1]["step"]
        met += step == 4
        assert torch.equal(found[0]["weight"], state(step)["weight"])
        assert found[1] == {"step": step, "seed": 7}
    assert met == len(raw) if name != "manifest.json" else met > len(raw) // 2


def test_a_leftover_part_is_no_checkpoint_and_does_not_hinder_the_next(tmp_path: Path):
    saved(tmp_path, 4)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "step-00000008.part")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 4
    saved(tmp_path, 8)
    assert not (tmp_path / "step-00000008.part").exists()
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 8


def test_all_damaged_is_no_checkpoint_and_each_is_named(tmp_path: Path, capsys):
    for path in saved(tmp_path, 4, 8):
        flip(path / "state.safetensors")
    assert checkpoint.newest(tmp_path) is None
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [
        "skipped checkpoint step-00000008",
        "skipped checkpoint step-00000004",
    ]


def test_one_that_cannot_be_read_is_passed_over_but_never_takes_all_work(tmp_path, monkeypatch):
    """With none that verifies, work that may be whole is not begun anew."""
    saved(tmp_path, 4, 8)

    def failing(path: Path, known) -> str | None:
        if path.name == "step-00000008":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return damage(path, known)

    monkeypatch.setattr(checkpoint, "damage", failing)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 4
    assert found[2] == ["step-00000008: it cannot be read (Input/output error)"]
    flip(tmp_path / "step-00000004" / "state.safetensors")
    with pytest.raises(OSError, match=r"no checkpoint of .* can be used .*Input/output error"):
        checkpoint.newest(tmp_path)


def test_saving_never_removes_what_it_saved(tmp_path: Path):
    """After falling back to step 2, damaged checkpoints of later steps are still there."""
    for path in saved(tmp_path, 6, 8):
        flip(path / "state.safetensors")
    saved(tmp_path, 2, 3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3


def test_a_new_one_that_does_not_verify_removes_nothing(tmp_path: Path, monkeypatch, capsys):
    """The disk may lie: after a save that reads back wrong, all earlier ones stay."""
    saved(tmp_path, 1, 2)
    noted = checkpoint.digests

    def lying(folder: Path, names):
        found = noted(folder, names)
        flip(folder / "state.safetensors")
        return found

    monkeypatch.setattr(checkpoint, "digests", lying)
    saved(tmp_path, 3)
    assert "step-00000003 was written and does not verify, earlier" in capsys.readouterr().out
    assert len(list(tmp_path.iterdir())) == 3
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found[1]["step"], len(found[2])) == (2, 1)


def test_a_checkpoint_holds_what_its_manifest_lists(tmp_path: Path):
    (path,) = saved(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    assert {p.name for p in path.iterdir()} == {*manifest, "manifest.json"}
    assert manifest["state.safetensors"]["bytes"] == (path / "state.safetensors").stat().st_size


# --- deaths ------------------------------------------------------------------------------------


def deaths(tmp_path: Path, ready: Path, work: Callable[[Path], object]) -> list[tuple[str, int]]:
    """Kills the work at each of its calls that change files, without and with a loss of power;
    the call and the step that is read afterwards, after showing that the next save works."""
    found, when = [], 0
    while True:
        when += 1
        for power in (False, True):
            folder = shutil.copytree(ready, tmp_path / f"at-{when}-{power}")
            begun = cuts.cut(lambda at=folder: work(at), folder, when, power)
            if len(begun) < when:
                return found
            state_, position, skipped = checkpoint.newest(folder) or ({}, {}, [])
            assert position, f"nothing left after a death at call {when}, {begun[-1]}"
            assert skipped == []
            step = position["step"]
            assert torch.equal(state_["weight"], state(step)["weight"])
            found.append((begun[-1], step))
            checkpoint.save(folder, 9, state(9), {"seed": 7})
            assert checkpoint.newest(folder)[1]["step"] == 9  # type: ignore[index]
            left = [p.name for p in folder.iterdir()]
            assert len(left) == 2, "the dead one's leavings are gone"
            assert not [name for name in left if name.endswith(".part")]


def test_a_kill_or_loss_of_power_at_any_call_of_save_leaves_a_whole_one(tmp_path: Path):
    saved(tmp_path / "ready", 1, 2)
    found = deaths(tmp_path, tmp_path / "ready", lambda folder: saved(folder, 3))
    steps = [step for _, step in found]
    assert steps == sorted(steps), "first the old one, then the new"
    assert set(steps) == {2, 3}
    names = [name for name, step in found if step == 3]
    assert {"fsync", "unlink", "rmdir"} <= set(names), "between renaming and purging as well"
    assert len(found) > 40


def test_the_same_step_again_never_gives_up_the_first(tmp_path: Path):
    """The best weights, measured again at the step that they are of: one copy is kept."""
    checkpoint.save(tmp_path / "ready", 3, state(3), {"seed": 7}, keep=1)

    def again(folder: Path) -> None:
        checkpoint.save(folder, 3, state(3), {"seed": 7}, keep=1)
        assert [p.name for p in folder.iterdir()] == ["step-00000003.1"]

    found = deaths(tmp_path, tmp_path / "ready", again)
    assert {step for _, step in found} == {3}


# --- what stays --------------------------------------------------------------------------------


def test_one_kept_alone_takes_the_place_of_later_steps_too(tmp_path: Path):
    saved(tmp_path, 8)
    checkpoint.save(tmp_path, 4, state(4), {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_damaged_one_does_not_count_as_the_previous_one(tmp_path: Path):
    saved(tmp_path, 2, 4)
    flip(tmp_path / "step-00000004" / "state.safetensors")
    saved(tmp_path, 6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000006"]


def test_a_step_saved_again_beside_its_damaged_self_is_the_newer(tmp_path: Path):
    saved(tmp_path, 4, 6)
    flip(tmp_path / "step-00000006" / "state.safetensors")
    assert saved(tmp_path, 6)[0].name == "step-00000006.1"
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found[1]["step"], found[2]) == (6, [])


def test_nothing_of_others_is_removed_or_read(tmp_path: Path):
    """Folders, files and links whose names are near ours, and files put into our folders."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "state.safetensors").write_text("theirs")
    folder = tmp_path / "checkpoints"
    saved(folder, 1, 3)
    (folder / "step-00000001" / "notes.txt").write_text("theirs")
    (folder / "step-00000002").symlink_to(tmp_path / "elsewhere")
    for name in ("step-by-step", "step-00000003.bak", "step-12", "best", "step-00000003.part.d"):
        (folder / name).mkdir()
        (folder / name / "state.safetensors").write_text("theirs")
    (folder / "step-00000000").write_text("theirs")
    theirs = {
        p: p.read_text() for p in tmp_path.rglob("*") if p.is_file() and p.read_bytes() == b"theirs"
    }
    assert len(theirs) == 8
    saved(folder, 5, 7, 9)
    assert {p: p.read_text() for p in theirs} == theirs
    assert sorted(p.name for p in (folder / "step-00000001").iterdir()) == ["notes.txt"]
    assert (folder / "step-00000002").is_symlink()
    assert not (folder / "step-00000003").exists()
    found = checkpoint.newest(folder)
    assert found is not None
    assert (found[1]["step"], found[2]) == (9, [])


# --- full disks --------------------------------------------------------------------------------

KIB = 1024
SIZE = 100 * KIB


def large(step: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((SIZE // 4,), float(step))}


def kept(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_on_a_full_disk_older_ones_make_room_for_the_new(tmp_path: Path):
    def work() -> list:
        for step in (1, 2, 3):  # the third does not fit beside two
            checkpoint.save(tmp_path, step, large(step), {})
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert torch.equal(found[0]["weight"], large(3)["weight"])
        return kept(tmp_path)

    found = cuts.on_small_disk(tmp_path, int(2.6 * SIZE), work)
    assert found == ["step-00000002", "step-00000003"]


def test_where_that_is_not_enough_the_old_one_stays_and_the_sentence_says_so(tmp_path: Path):
    def work() -> list:
        checkpoint.save(tmp_path, 1, large(1), {})
        with pytest.raises(OSError, match="No space left") as caught:
            checkpoint.save(tmp_path, 2, large(2), {})
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert torch.equal(found[0]["weight"], large(1)["weight"])
        return [str(caught.value), kept(tmp_path)]

    said, left = cuts.on_small_disk(tmp_path, int(1.6 * SIZE), work)
    assert re.match(r"the checkpoint of step 2 \(0.1 MiB\) cannot be saved in .*: No space", said)
    assert "step-00000001 is kept; free some space there" in said
    assert left == ["step-00000001"]


def test_a_folder_that_became_read_only_costs_nothing_that_is_there(tmp_path: Path):
    def work() -> list:
        saved(tmp_path, 1, 2)
        cuts.mount(tmp_path, "", cuts.REMOUNT | cuts.READ_ONLY)
        with pytest.raises(OSError, match=r"step 3 .* cannot be saved .*Read-only file system"):
            saved(tmp_path, 3)
        with pytest.raises(OSError, match=r"cannot take the checkpoints.*Read-only file system"):
            checkpoint.reserve(tmp_path, KIB)
        return kept(tmp_path)

    found = cuts.on_small_disk(tmp_path, SIZE, work)
    assert found == ["step-00000001", "step-00000002"]


def test_a_write_that_fails_after_any_number_of_bytes_leaves_the_old_one(tmp_path: Path):
    """The limit of the system on the size of a file, which safetensors meets as we do."""
    saved(tmp_path, 1, 2)
    whole = max(p.stat().st_size for p in (tmp_path / "step-00000002").iterdir())

    def work(size: int) -> list:
        cuts.no_file_over(size)
        with pytest.raises(OSError, match=r"step 3 .* cannot be saved .*File too large"):
            saved(tmp_path, 3)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        return [found[1]["step"], kept(tmp_path)]

    for size in range(0, whole, 7):
        found = cuts.told(lambda size=size: work(size))
        assert found == [2, ["step-00000001", "step-00000002"]], f"limit {size}"


def test_room_for_two_is_reserved_before_training(tmp_path: Path):
    def work() -> list:
        checkpoint.reserve(tmp_path, SIZE)
        assert kept(tmp_path) == []
        with pytest.raises(OSError, match="cannot take the checkpoints") as caught:
            checkpoint.reserve(tmp_path, 2 * SIZE)
        checkpoint.save(tmp_path, 1, large(1), {})
        checkpoint.reserve(tmp_path, SIZE)  # beside the one that is there
        return [str(caught.value), kept(tmp_path)]

    said, left = cuts.on_small_disk(tmp_path, int(2.6 * SIZE), work)
    assert "two of 0.2 MiB are kept, so 0.4 MiB more are needed, and 0.3 MiB are free" in said
    assert left == ["step-00000001"]


def test_a_reservation_takes_real_blocks(tmp_path: Path, monkeypatch):
    """Free space that is announced and not given (a quota) is met too."""
    tell = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda p: tell(p)._replace(free=2**40))

    def work() -> str:
        with pytest.raises(OSError, match="cannot take the checkpoints") as caught:
            checkpoint.reserve(tmp_path, 2 * SIZE)
        return str(caught.value)

    assert "No space left on device" in cuts.on_small_disk(tmp_path, int(2.6 * SIZE), work)


@pytest.mark.parametrize("answers", [True, False])
def test_a_save_that_storage_holds_for_ever_ends_the_job(answers, tmp_path, monkeypatch, capfd):
    """And one that it holds for a while, longer than another piece of work may rest, does not."""
    folder = tmp_path / "checkpoints"
    saved(folder, 2)
    monkeypatch.setattr(checkpoint, "FLUSH", 2.0 if not answers else 30.0)
    monkeypatch.setattr(watch, "TURN", 0.2)
    flushed = os.fsync
    held = [3.0 if answers else 600.0]

    def fsync(file: int) -> None:
        time.sleep(held.pop() if held else 0)
        flushed(file)

    monkeypatch.setattr(os, "fsync", fsync)
    child = os.fork()
    if not child:
        signal.alarm(60)
        engine: Any = SimpleNamespace(state=lambda: state(3))
        watch.Watch(tmp_path, "", hang_seconds=1.0).begin()
        resume.save(folder, engine, Ranks(), resume.Position(step=3))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == (0 if answers else 4)
    said = capfd.readouterr().err
    assert ("hangs: its save of a checkpoint has stood still for" in said) != answers
    found = checkpoint.newest(folder)
    assert found is not None
    assert found[1]["step"] == (3 if answers else 2)


def test_a_larger_checkpoint_may_take_longer():
    small, large = ({"w": torch.zeros(n * 2**18)} for n in (1, 40))
    assert checkpoint.patience(large) - checkpoint.patience(small) == pytest.approx(3.9)
