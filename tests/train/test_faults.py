"""Faults of one rank are met by all; other numbers of ranks go on with the same run; what may be
changed between two starts of a run, and what may not."""

import copy
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.documents import Documents
from tests import forked
from tests.tiny import tokenizer, write_texts
from tests.train import looping_ranks
from tests.train.looping import (
    STEPS,
    curve,
    lines,
    loop_of,
    packed,
    saved_steps,
    state,
    trained,
)
from tests.train.test_training_loop import told_at
from train import packing, plan
from train.guard import ECHO, STOP, Preempted
from train.schedule import Schedule


def seen_by_ranks(folder: Path) -> list[Any]:
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the packed data of every run, and one that went straight through on one rank."""
    folder = tmp_path_factory.mktemp("faults")
    for name in ("poison-0", "poison-1", "elastic", "validating", "without", "memory"):
        (folder / name).mkdir()
        packed(folder / name)
    trained(folder / "straight", every=2)
    return folder


@pytest.fixture(scope="module")
def two(place: Path) -> Iterator[forked.Forked]:
    """Two ranks, which have done the first half of their job and wait to be told to go on."""
    job = forked.begin(looping_ranks.main, place, folder=place)
    try:
        while job.running and not (place / "begun").exists():
            time.sleep(0.1)
        assert job.running, job.said()[-3000:]
        yield job
    finally:
        job.kill()


@pytest.fixture(scope="module")
def begun(place: Path, two) -> list[Any]:
    return seen_by_ranks(place)


@pytest.fixture(scope="module")
def finished(place: Path, two, begun) -> list[Any]:
    """One rank goes on where two were stopped, and two where it is: 2, 1, 2."""
    with pytest.raises(Preempted, match="after step 5"):
        trained(place / "elastic", "lm", told_at(2), every=2, micro_batch=4, zero_stage=0)
    (place / "go on").touch()
    two.ends()
    return seen_by_ranks(place)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_both(rank: int, place: Path, begun):
    out = place / f"poison-{rank}"
    assert [seen[f"poisoned on {rank}"]["at"] for seen in begun] == [[STEPS, STEPS - 1, STEPS]] * 2
    mine, others = (seen["weights"][rank * STEPS :][:STEPS] for seen in begun)
    assert mine == others
    assert mine[2] == mine[3]
    assert len(set(mine)) == STEPS - 1
    (skipped,) = [line for line in lines(out) if "skipped" in line]
    assert skipped["sequences"] == [loop_of(out).order(2)[rank]]
    assert all(t.isfinite().all() for t in state(out)[0].values())


def test_a_stop_that_one_rank_hears_stops_both_amid_the_step(place: Path, begun):
    assert [seen["told"]["at"] for seen in begun] == [[3, 3, 2]] * 2
    assert all("stopped and saved after step 3 of 8" in seen["told"]["stopped"] for seen in begun)


def test_a_stop_that_one_rank_hears_amid_a_validation_stops_both(place: Path, begun):
    assert [seen["told in validation"]["at"] for seen in begun] == [[2, 2, 0]] * 2
    assert saved_steps(place / "validating")[-1] == 2


def test_two_ranks_one_rank_two_ranks_is_the_run_of_one(place: Path, finished):
    """With micro-batches of 1, 4 and 1 and ZeRO 2, 0 and 3; where rank 1 saw no checkpoint."""
    assert [one["resumed"]["at"] for one in finished] == [[STEPS, STEPS, STEPS]] * 2
    assert curve(place / "elastic") == pytest.approx(curve(place / "straight"), rel=1e-6)
    assert not (place / "without" / "checkpoints").exists()
    (a, _), (b, _) = state(place / "straight"), state(place / "elastic")
    gaps = {name: float((a[name] - b[name]).abs().max() / a[name].abs().max()) for name in a}
    assert max(gaps.values()) < 1e-3, gaps


def test_full_memory_on_one_rank_ends_both(place: Path, two, finished):
    """The other one neither goes on alone nor tries again with less."""
    assert two.ends() == [4, 4]
    name, said = finished[1]["memory"]
    assert name == "MemoryError"
    assert said.startswith("memory ran out in step 2, in a micro-batch of 1 sequences")
    assert max(curve(place / "memory")) == 1


# --- one rank -------------------------------------------------------------------------------------


def test_a_second_signal_ends_the_process_whatever_it_is_at():
    child = os.fork()
    if not child:
        with STOP.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.1 * ECHO)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_a_stop_amid_packing_leaves_nothing_half_packed(tmp_path: Path):
    """Nothing listens yet: the process ends at once, and packing begins again."""
    file = write_texts(tmp_path)
    made = tokenizer(file)
    schedule = Schedule(tokens=64 * 32, batch_tokens=128, sequence_length=32)
    rows = [{"text": json.loads(line)["text"]} for line in Path(file).read_text().splitlines()]

    def packs(out: Path, stop: int = 0) -> None:
        def read() -> Any:
            for number, row in enumerate(rows, 1):
                if number == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield row

        packing.prepare(out, read(), Documents(made, "text"), schedule)

    child = os.fork()
    if not child:
        packs(tmp_path / "stopped", 60)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM
    assert not (tmp_path / "stopped" / "packed").exists()
    for name in ("stopped", "whole"):
        packs(tmp_path / name)
    parts = [sorted((tmp_path / name / "packed").rglob("*.*")) for name in ("stopped", "whole")]
    assert [p.name for p in parts[0]] == [p.name for p in parts[1]]
    files = [[p.read_bytes() for p in some if p.is_file()] for some in parts]
    assert files[0] == files[1]


# --- another configuration ------------------------------------------------------------------------

STAGE: dict[str, Any] = {
    "_target_": "train.distill.Distill",
    "target": {"_target_": "decoding.pretrained.Pretrained", "path": "target"},
    "drafter": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
    "objective": {"_target_": "train.objectives.CE"},
    "optim": {"_target_": "train.schedule.AdamW", "lr": 3e-3, "clip": 0.5},
    "schedule": {
        "_target_": "train.schedule.Schedule",
        "tokens": 4096, "batch_tokens": 256, "sequence_length": 32,
    },
    "tracker": {"_target_": "train.track.Jsonl"},
}  # fmt: skip
SAME_RUN = [
    ("schedule.micro_batch", 2),
    ("schedule.zero_stage", 3),
    ("tracker._target_", "train.track.Wandb"),
    ("drafter.draft_length", 3),
]
ANOTHER_RUN = [
    ("schedule.tokens", 8192),  # the horizon of the rate
    ("schedule.batch_tokens", 512),
    ("schedule.sequence_length", 64),
    ("schedule.dtype", "float32"),
    ("schedule.seed", 1),
    ("optim.lr", 1e-3),
    ("optim.clip", 1.0),
    ("drafter.width", 128),
    ("objective._target_", "train.objectives.ForwardKL"),
    ("target.path", "other"),
]


def marked(changes: list[tuple[str, Any]]) -> str:
    stage = copy.deepcopy(STAGE)
    for key, value in changes:
        part, name = key.split(".")
        stage[part][name] = value
    return plan.fingerprint(stage, {})


@pytest.mark.parametrize(("key", "value"), SAME_RUN)
def test_what_cannot_change_a_result_goes_on_with_the_run(key: str, value: Any):
    assert marked([(key, value)]) == marked([])


@pytest.mark.parametrize(("key", "value"), ANOTHER_RUN)
def test_what_can_is_another_run_in_a_folder_of_its_own(key: str, value: Any):
    """So that no run goes on with another rate, clip or order of its data than it began with."""
    assert marked([(key, value)]) != marked([])


def test_a_run_goes_on_with_another_micro_batch_and_stage(place: Path, tmp_path: Path):
    with pytest.raises(Preempted):
        trained(tmp_path, "lm", told_at(9), every=2)
    trained(tmp_path, every=2, micro_batch=1, zero_stage=2)
    assert curve(tmp_path) == pytest.approx(curve(place / "straight"), rel=1e-6)
