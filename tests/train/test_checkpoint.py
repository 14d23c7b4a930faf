"""A crash never costs the last good checkpoint, and a damaged one is never taken for good."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from train import checkpoint


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
    "other manifest": (lambda p: (p / "manifest.json").write_text("{}"), "is not readable"),
}


def truncate_half(file: Path) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_skipped_with_the_reason(name: str, tmp_path: Path):
    damage, why = DAMAGE[name]
    damage(saved(tmp_path, 4, 8)[-1])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    _, position, skipped = found
    assert position["step"] == 4
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000008: ")
    assert re.search(why, skipped[0])


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


def test_all_damaged_is_no_checkpoint(tmp_path: Path):
    for path in saved(tmp_path, 4, 8):
        flip(path / "state.safetensors")
    assert checkpoint.newest(tmp_path) is None


def test_saving_never_removes_what_it_saved(tmp_path: Path):
    """After falling back to step 2, damaged checkpoints of later steps are still there."""
    for path in saved(tmp_path, 6, 8):
        flip(path / "state.safetensors")
    saved(tmp_path, 2, 3)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 3


def test_a_new_one_that_does_not_verify_removes_nothing(tmp_path: Path, monkeypatch):
    """The disk may lie: after a save that reads back wrong, all earlier ones stay."""
    saved(tmp_path, 1, 2)
    write = checkpoint.save_file

    def damaged(tensors, file):
        write(tensors, file)
        monkeypatch.setattr(checkpoint, "_flush", lambda p: p == file and flip(file))

    monkeypatch.setattr(checkpoint, "save_file", damaged)
    saved(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 3
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert (found[1]["step"], len(found[2])) == (2, 1)


def test_a_checkpoint_holds_what_its_manifest_lists(tmp_path: Path):
    (path,) = saved(tmp_path, 5)
    manifest = json.loads((path / "manifest.json").read_text())["files"]
    assert {p.name for p in path.iterdir()} == {*manifest, "manifest.json"}
    assert manifest["state.safetensors"]["bytes"] == (path / "state.safetensors").stat().st_size


class Deadly:
    """Counts the calls of save that touch the disk, and kills the process at the chosen one."""

    def __init__(self, when: int) -> None:
        self.calls, self.when = 0, when

    def wrap(self, owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments, **named):
            self.calls += 1
            if self.calls == self.when:
                if name in ("save_file", "write_json"):  # dies inside the write
                    file = Path(arguments[1 if name == "save_file" else 0])
                    file.write_bytes(b"{")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(owner, name, call)

    def arm(self) -> None:
        for name in ("save_file", "write_json", "_flush", "sha256", "fault"):
            self.wrap(checkpoint, name)
        self.wrap(checkpoint.shutil, "rmtree")
        self.wrap(checkpoint.os, "replace")
        self.wrap(checkpoint.Path, "mkdir")


def killed(folder: Path, when: int) -> int | None:
    """Saves step 3 in a process that dies at call `when`; its number of calls if it lived."""
    out, into = os.pipe()
    child = os.fork()
    if not child:
        deadly = Deadly(when)
        deadly.arm()
        saved(folder, 3)
        os.write(into, str(deadly.calls).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as stream:
        calls = stream.read()
    assert os.waitpid(child, 0)[1] == (0 if calls else signal.SIGKILL)
    return int(calls) if calls else None


def test_a_kill_at_any_call_of_save_leaves_a_good_checkpoint(tmp_path: Path):
    """SIGKILL before, and inside, every call that touches the disk."""
    saved(tmp_path / "ready", 1, 2)

    def fresh(name: str) -> Path:
        shutil.copytree(tmp_path / "ready", tmp_path / name)
        return tmp_path / name

    calls = killed(fresh("whole"), 10**6)
    assert calls is not None
    assert calls > 12
    seen = set()
    for when in range(1, calls + 1):
        folder = fresh(f"at-{when}")
        assert killed(folder, when) is None
        found = checkpoint.newest(folder)
        assert found is not None, f"killed at call {when}"
        step = found[1]["step"]
        seen.add(step)
        assert torch.equal(found[0]["weight"], state(step)["weight"])
        saved(folder, 4)  # and going on works
        assert checkpoint.newest(folder)[1]["step"] == 4  # type: ignore[index]
    assert seen == {2, 3}
