"""Every file that a stage leaves is whole or not there; a damaged one is made again or refused."""

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data import generate
from data.generate import Generate
from data.sources import Local
from decoding.pretrained import Pretrained
from decoding.target import Shape
from drafters import base
from drafters.files import damage, digests, whole, write_json
from drafters.lm import LM
from drafters.medusa import Medusa
from tests.tiny import write_target, write_texts
from tests.train import cuts
from train.plan import Planned
from train.seal import CACHE, broken, reopen, seal

MARKER = "a pickle was run"
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda raw: raw[:-3] + bytes([raw[-3] ^ 4]) + raw[-2:],
    "truncated": lambda raw: raw[: len(raw) // 2],
    "two bytes short": lambda raw: raw[:-2],
    "zero length": lambda raw: b"",
}


def harm(file: Path, how: str) -> None:
    file.write_bytes(DAMAGE[how](file.read_bytes()))


# --- one file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [False, True])
def test_a_death_at_any_call_leaves_the_old_json_or_the_new(tmp_path: Path, power: bool):
    old, new = {"who": "old"}, {"who": "new", "more": "두 번째" * 50}
    read, calls = [], 10**6
    when = 0
    while when < calls:
        when += 1
        folder = tmp_path / str(when)
        folder.mkdir()
        write_json(folder / "note.json", old)
        begun = cuts.cut(lambda at=folder: write_json(at / "note.json", new), folder, when, power)
        calls = len(begun) if len(begun) < when else calls
        found = json.loads((folder / "note.json").read_text(encoding="utf-8"))
        assert found in (old, new)
        read.append(found["who"])
        write_json(folder / "note.json", new)
        assert [p.name for p in folder.iterdir()] == ["note.json"]
    assert read[0] == "old"
    assert read[-1] == "new"
    assert read == sorted(read, reverse=True)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path):
    file = tmp_path / "note.json"
    write_json(file, {"who": "old"})

    def work() -> list[str]:
        cuts.no_file_over(100)
        with pytest.raises(OSError, match="File too large"):
            write_json(file, ["x" * 50_000])
        return [p.name for p in tmp_path.iterdir()]

    assert cuts.told(work) == ["note.json"]
    with pytest.raises(ZeroDivisionError), whole(file) as stream:
        stream.write(str(1 / 0))
    with pytest.raises(TypeError):
        write_json(file, {"not": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["note.json"]
    assert json.loads(file.read_text()) == {"who": "old"}


@pytest.mark.parametrize("known", [None, {}, [], {"a": 3}, {"a": {"bytes": 1}}], ids=str)
def test_digests_that_are_damaged_themselves_fit_nothing(known: Any, tmp_path: Path):
    (tmp_path / "a").write_text("x")
    assert damage(tmp_path, digests(tmp_path, ["a"])) is None
    assert "not readable" in str(damage(tmp_path, known))


# --- shards of answers -------------------------------------------------------------------------

TARGET = SimpleNamespace(name="a target", revision="0")


def talk(number: int) -> generate._Talk:
    asked = generate._Talk({"messages": [{"role": "user", "content": "?"}]}, 0.0, number, 0)
    asked.turns.append({"role": "user", "content": f"질문 {number}"})
    asked.ids = [1, 2, number]
    asked.hear([7, 8, number], f"대답 {number}", None)
    return asked


def write_shard(folder: Path, number: int) -> Path:
    """Shard `number` with two answers, as the stage writes it; its counts."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Generate(
        target=Pretrained(path="none"),
        prompts=Local(files=["none"], prompt="{q}"),
        temperatures=[0.0],
    )
    note = folder / f"shard-{number:05d}{generate.NOTE}"
    stage._write(note, [talk(2 * number), talk(2 * number + 1)], TARGET, "t")  # type: ignore[arg-type]
    return note


def answers(folder: Path) -> list[list[int]]:
    return [sample["answer_ids"] for sample in generate.read(folder)]


@pytest.mark.parametrize("power", [False, True])
def test_a_death_at_any_call_leaves_a_whole_shard_or_one_to_make(tmp_path: Path, power: bool):
    states, when = [], 0
    while True:
        when += 1
        folder = tmp_path / str(when)
        first = write_shard(folder, 0)
        second = folder / f"shard-00001{generate.NOTE}"
        begun = cuts.cut(lambda at=folder: write_shard(at, 1), folder, when, power)
        if len(begun) < when:
            break
        assert generate._done(first)
        states.append(generate._done(second))
        if states[-1]:
            assert answers(folder) == [[7, 8, n] for n in range(4)]
        write_shard(folder, 1)
        assert generate._done(second)
        assert answers(folder) == [[7, 8, n] for n in range(4)]
        assert len(list(folder.iterdir())) == 4
    assert states == sorted(states)
    assert set(states) == {False, True}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("which", ["shard-00001.jsonl", "shard-00001.counts.json"])
def test_a_damaged_shard_is_made_again_and_refused_by_readers(how, which, tmp_path: Path, capsys):
    notes = [write_shard(tmp_path, 0), write_shard(tmp_path, 1)]
    assert [generate._done(note) for note in notes] == [True, True]
    assert capsys.readouterr().out == ""
    harm(tmp_path / which, how)
    assert [generate._done(note) for note in notes] == [True, False]
    assert "shard-00001.jsonl is made again: " in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"shard-00001.jsonl is damaged: .*makes that shard again"):
        answers(tmp_path)


def test_any_flipped_byte_of_a_shards_counts_is_met(tmp_path: Path):
    note = write_shard(tmp_path, 0)
    raw = note.read_bytes()
    said = json.loads(raw)
    for at in range(len(raw)):
        note.write_bytes(raw[:at] + bytes([raw[at] ^ (1 << at % 8)]) + raw[at + 1 :])
        assert not generate._done(note) or json.loads(note.read_bytes()) == said


def test_a_shard_without_counts_is_one_to_make_but_may_be_read(tmp_path: Path):
    note = write_shard(tmp_path, 0)
    note.unlink()
    assert not generate._done(note)
    assert len(answers(tmp_path)) == 2


# --- drafters ----------------------------------------------------------------------------------

SHAPE = Shape(
    vocab_size=300, hidden_size=64, layers=2, max_positions=256, heads=2, kv_heads=1, head_dim=32,
    intermediate_size=128,
)  # fmt: skip


def drafter(folder: Path, cls: type[base.Trained] = LM) -> Path:
    arguments = {"layers": 1, "width": 64} if cls is LM else {}
    torch.manual_seed(0)
    base.save(cls(SHAPE, **arguments), folder, arguments)
    return folder


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("cls", [LM, Medusa])
def test_damaged_weights_of_a_drafter_are_refused(how: str, cls, tmp_path: Path):
    folder = drafter(tmp_path, cls)
    base.load(folder, SHAPE)
    harm(folder / "model.safetensors", how)
    with pytest.raises(ValueError, match=r"drafter in .* is damaged: .*model.safetensors.*; copy"):
        base.load(folder, SHAPE)


@pytest.mark.parametrize("how", ["truncated", "zero length"])
def test_a_damaged_description_of_a_drafter_is_refused(how: str, tmp_path: Path):
    harm(drafter(tmp_path) / "drafter.json", how)
    with pytest.raises(ValueError, match=r"damaged: drafter.json is not readable"):
        base.load(tmp_path, SHAPE)


@pytest.mark.parametrize("family", ["heads", "files", "trees", "os", "../lm", "ngram"])
def test_what_is_no_trained_family_is_not_loaded(family: str, tmp_path: Path):
    write_json(tmp_path / "drafter.json", {"family": family, "arguments": {}})
    with pytest.raises(ValueError, match="which is not one of drafters/"):
        base.load(tmp_path, SHAPE)


def test_a_drafter_of_before_hashes_still_loads(tmp_path: Path):
    note = drafter(tmp_path) / "drafter.json"
    said = json.loads(note.read_text())
    del said["files"]
    write_json(note, said)
    assert isinstance(base.load(tmp_path, SHAPE), LM)


# --- pickles -----------------------------------------------------------------------------------


class Evil:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["EVIL_PLACE"]) / MARKER),)


def as_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Evil()))


def as_torch(file: Path) -> None:
    torch.save({"weight": Evil()}, file)


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the marker would be; a pickle that is read does leave it."""
    place = tmp_path / "evil"
    place.mkdir()
    monkeypatch.setenv("EVIL_PLACE", str(place))
    as_torch(tmp_path / "try")
    torch.load(tmp_path / "try", weights_only=False)
    (place / MARKER).rmdir()
    return place


WRITES = {"pickle": as_pickle, "torch": as_torch}
SLOTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.bin", "config.json")


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("slot", [*SLOTS, "drafter.json"])
@pytest.mark.parametrize("cls", [LM, Medusa])
def test_a_pickle_in_a_drafters_folder_is_never_run(slot, kind, cls, evil: Path, tmp_path: Path):
    """Also where drafter.json vouches for it, or has no hashes."""
    folder = drafter(tmp_path / "drafter", cls)
    note = folder / "drafter.json"
    said = json.loads(note.read_text())
    (folder / "model.safetensors").unlink()
    WRITES[kind](folder / slot)
    for files in ({}, {"files": digests(folder, [slot])}):
        if slot != "drafter.json":
            write_json(note, {k: v for k, v in said.items() if k != "files"} | files)
        with pytest.raises(Exception):  # noqa: B017, PT011
            base.load(folder, SHAPE)
        with pytest.raises(Exception):  # noqa: B017, PT011
            cls(SHAPE, **said["arguments"]).read(folder)
    assert list(evil.iterdir()) == []


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return Path(write_target(folder / "target", write_texts(folder)))


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("slot", [*SLOTS, "tokenizer.json", "generation_config.json"])
def test_a_pickle_in_a_targets_folder_is_never_run(slot, kind, target, evil, tmp_path: Path):
    folder = shutil.copytree(target, tmp_path / "target")
    (folder / "model.safetensors").unlink()
    WRITES[kind](folder / slot)
    for use in (Pretrained(path=str(folder)).load, Pretrained(path=str(folder)).tokenizer):
        with suppress(Exception):  # what is said of it is tested with the target
            use()
    assert list(evil.iterdir()) == []


# --- finished stages ---------------------------------------------------------------------------


def stages(root: Path) -> list[Planned]:
    """Three finished stages; each reads the artifact of the one before."""
    made: list[Planned] = []
    for name in ("first", "second", "third"):
        folder = root / f"{name}-0"
        inputs = {"data": made[-1].folder / "artifact"} if made else {}
        (folder / "artifact" / "deep").mkdir(parents=True)
        (folder / "artifact" / "deep" / "model.safetensors").write_bytes(os.urandom(1000))
        (folder / "artifact" / "tree.json").write_text('{"nodes": 3}\n')
        write_json(folder / "stage.json", {"name": name})
        write_json(folder / "result.json", {"tau": 2.5})
        seal(folder)
        made.append(Planned(name, {"_target_": "a.Stage"}, {}, "0", folder, inputs))
    return made


SEALED = ("artifact/deep/model.safetensors", "artifact/tree.json", "result.json", "stage.json")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*SEALED, "DONE"])
def test_a_stage_whose_files_are_damaged_is_not_done(name: str, how: str, tmp_path: Path, capsys):
    """Here the first, which the second is to read anew."""
    made = stages(tmp_path)
    (made[1].folder / "DONE").unlink()
    reopen(made)
    assert [s.done for s in made] == [True, False, True]
    harm(made[0].folder / name, how)
    reopen(made)
    assert [s.done for s in made] == [False, False, True]
    said = capsys.readouterr().out
    assert re.fullmatch(rf"first: .*({Path(name).name}|DONE).*; what is damaged .*\n", said)


def test_a_missing_file_and_one_that_was_never_there(tmp_path: Path):
    first, *_ = stages(tmp_path)
    (first.folder / "artifact" / "added.txt").write_text("a note of the user's")
    assert broken(first.folder) is None
    (first.folder / "artifact" / "tree.json").unlink()
    assert broken(first.folder) == "artifact/tree.json is missing"


def test_all_is_hashed_again_but_a_cache_that_no_stage_will_read(tmp_path: Path):
    made = stages(tmp_path)
    made[2].config["_target_"] = CACHE
    harm(made[2].folder / SEALED[0], "flipped")
    reopen(made)
    assert all(stage.done for stage in made), "terabytes are not read for nothing"
    harm(made[2].folder / "result.json", "truncated")
    reopen(made)
    assert not made[2].done, "its own notes are always looked at"
    harm(made[1].folder / SEALED[0], "flipped")
    reopen(made)
    assert not made[1].done


def test_a_loss_of_power_never_leaves_a_seal_on_less(tmp_path: Path):
    """An artifact that was written without flushing it is flushed before DONE."""

    def work(folder: Path) -> None:
        (folder / "artifact").mkdir()
        (folder / "artifact" / "model.safetensors").write_bytes(bytes(5000))
        (folder / "stage.json").write_text("{}")
        write_json(folder / "result.json", {})
        seal(folder)

    sealed, when = [], 0
    while True:
        when += 1
        folder = tmp_path / str(when)
        folder.mkdir()
        if len(cuts.cut(lambda at=folder: work(at), folder, when, power=True)) < when:
            break
        sealed.append((folder / "DONE").is_file())
        assert not sealed[-1] or broken(folder) is None
    assert set(sealed) == {False, True}
