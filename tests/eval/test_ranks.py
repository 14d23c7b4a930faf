"""Runs made on two ranks are those of one; a rank that fails says why."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from toys import tiny_target

from decoding import ranks as group
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.ranks import Ranks
from decoding.sampling import Sampling
from drafters.base import save
from drafters.lm import LM
from drafters.ngram import Ngram
from eval.ranks import KEYS, Rows, place_of, read
from tests import forked
from tests.tiny import write_chats, write_target, write_texts
from train.compose import bind, build
from train.launch import Launch
from train.processes import worker

ARMS = ["autoregressive", "ngram"]
CELLS = [(1, 1.0), (1, 0.0), (2, 0.0)]  # not in the order of their numbers
REPEATS = 2
PROMPTS = [[5, 6], [1, 2, 3, 1, 2], [9, 8, 9, 8, 9], [7], [3, 3, 3]]


def measure(folder: Path, ranks: Ranks, most: int = 10**9) -> list[dict[str, Any]]:
    """What a bench does, less its timing; `most`: runs after which it is cut short."""
    target = tiny_target()
    drafters = {"autoregressive": None, "ngram": Ngram(longest=2, draft_length=3)}
    with Rows(folder / "runs.jsonl", ranks, arms=ARMS, cells=CELLS) as made:
        for batch, temperature in CELLS:
            known = len(made.rows)  # as groups_of, which leaves out prompts by what all ranks found
            groups = [[n, (n + known) % len(PROMPTS)][:batch] for n in range(len(PROMPTS))]
            for repeat in range(REPEATS):
                for number, prompts in enumerate(groups):
                    for arm in ARMS:
                        place = (arm, temperature, batch, repeat, number)
                        if place in made or not ranks.has(number):
                            continue
                        if most == 0:
                            return made.rows
                        most -= 1
                        done = decode(
                            target,
                            drafters[arm],
                            [PROMPTS[n] for n in prompts],
                            sampling=Sampling(temperature=temperature, seed=repeat),
                            max_new_tokens=6,
                            requests=prompts if len(set(prompts)) > 1 else list(range(batch)),
                        )
                        ids = [answer.ids for answer in done.answers]
                        row = dict(zip(KEYS, place, strict=True)) | {"prompts": prompts, "ids": ids}
                        made.add(row)
            made.meet()
        return made.rows


def shares(folder: Path) -> None:
    """What each of two ranks does."""
    ranks = Ranks.here()
    for name in ("shared", "resumed"):
        rows = measure(folder / name, ranks)
        (folder / name / f"rank-{ranks.rank}.json").write_text(json.dumps(rows))
    ranks.barrier()


def failing(folder: Path) -> None:
    ranks = Ranks.here()

    def run(folder: Path) -> None:
        print("rank", ranks.rank, "is here", flush=True)
        ranks.barrier()
        if ranks.rank == 1:
            raise ValueError("limit is 0; it must be at least 1")
        ranks.barrier()

    worker._run = run
    forked.worker(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one rank, of two, and of two that went on with what one had left."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "shared", "resumed"):
        (folder / name).mkdir()
    measure(folder / "one", Ranks())
    measure(folder / "resumed", Ranks(), most=17)
    kept = folder / "resumed" / "runs.jsonl"
    kept.write_text(kept.read_text()[:-9])  # as a kill leaves it
    forked.run(shares, folder, folder=folder)
    return folder


def alone(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "one" / "runs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["shared", "resumed"])
def test_rows_of_two_ranks_are_those_of_one_in_its_order(place: Path, name: str):
    due = alone(place)
    assert len(due) == REPEATS * len(CELLS) * len(ARMS) * len(PROMPTS)
    assert len({str(row["ids"]) for row in due}) > len(PROMPTS)
    for rank in range(2):  # both have all of them: a later batch is made up by what all found
        assert json.loads((place / name / f"rank-{rank}.json").read_text()) == due


def test_each_rank_made_and_kept_the_groups_of_its_share(place: Path):
    for rank in range(2):
        lines = (place / "shared" / f"runs-{rank}.jsonl").read_text().splitlines()
        assert {json.loads(line)["group"] % 2 for line in lines} == {rank}


def test_what_an_earlier_start_kept_is_not_made_again(place: Path):
    folder = place / "resumed"
    kept = {place_of(json.loads(x)) for x in (folder / "runs.jsonl").read_text().splitlines()[:16]}
    new = [
        place_of(json.loads(line))
        for rank in range(2)
        for line in (folder / f"runs-{rank}.jsonl").read_text().splitlines()
        if line
    ]
    assert len(kept) == 16, "the last of 17 was cut short"
    assert len(new) == len(set(new)) == len(alone(place)) - 16
    assert not kept & set(new)


def test_one_rank_goes_on_with_what_two_have_left(place: Path, tmp_path: Path, monkeypatch):
    for rank in range(2):
        name = f"runs-{rank}.jsonl"
        (tmp_path / name).write_text((place / "shared" / name).read_text())
    monkeypatch.setattr(sys.modules[__name__], "decode", lambda *_, **__: pytest.fail("made again"))
    assert measure(tmp_path, Ranks()) == alone(place)


def test_a_line_cut_short_does_not_swallow_the_next(tmp_path: Path):
    kept = tmp_path / "runs.jsonl"
    row = dict(zip(KEYS, ("ngram", 0.0, 1, 0, 0), strict=True))
    kept.write_text(json.dumps(row | {"group": 1}) + "\n" + json.dumps(row)[:-4])
    with Rows(kept, Ranks(), arms=ARMS, cells=CELLS) as made:
        assert [r["group"] for r in made.rows] == [1]
        made.add(row)
        assert [r["group"] for r in read(kept)] == [1, 0], "on disk before the next run begins"
    assert [r["group"] for r in made.rows] == [0, 1]


def test_of_a_sharded_target_the_first_rank_writes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(group, "exchange", lambda said: [b"[]", said])
    second = Ranks(rank=1, world=2, together=True)
    with Rows(tmp_path / "runs.jsonl", second, arms=ARMS, cells=CELLS) as made:
        made.add(dict(zip(KEYS, ("ngram", 0.0, 1, 0, 0), strict=True)))
    assert list(tmp_path.iterdir()) == []
    assert second.has(0)
    assert second.has(1)


def test_a_rank_that_fails_ends_all_with_its_cause(tmp_path: Path):
    ended = forked.begin(failing, tmp_path, folder=tmp_path)
    assert ended.ends() == [2, 2]
    said = ended.said()
    note = json.loads((tmp_path / "failed.json").read_text())
    assert note == {"code": 2, "error": "limit is 0; it must be at least 1"}
    assert said.count("error: rank 1: limit is 0; it must be at least 1") == 1
    assert "another rank" not in said, "what follows from the cause is not told"
    assert said.count("is here") == 1, "rank 0 prints for all"


def left_alone() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("so it is")
    time.sleep(600)


def test_forked_ranks_do_not_outlive_the_one_that_failed(tmp_path: Path, monkeypatch):
    """What stands for a launcher in these tests, itself."""
    monkeypatch.setattr(forked, "LATER", 0.3)
    job = forked.begin(left_alone, folder=tmp_path)
    assert job.ends() == [-signal.SIGKILL, 1]
    assert "ValueError: so it is" in job.said()
    with pytest.raises(AssertionError, match="so it is"):
        forked.run(left_alone, folder=tmp_path)


def test_a_lost_rank_is_said_to_be_lost(monkeypatch):
    def broken(_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(group, "_all", broken)
    with pytest.raises(OSError, match="another rank of this job has ended"):
        Ranks(rank=0, world=2).barrier()


def test_ranks_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert Launch(how="deepspeed", ranks=3)._environment(True)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in Launch(how="deepspeed", ranks=3)._environment(False)
    assert "OMP_NUM_THREADS" not in Launch()._environment(True)


def test_a_bench_on_two_ranks_reports_the_runs_of_one(tmp_path: Path):
    """All but the seconds; a drafter that learns from earlier prompts too."""
    write_target(tmp_path / "target", write_texts(tmp_path), ends=20)
    spec = Pretrained(path=str(tmp_path / "target"), dtype="float32")
    ours = {"layers": 1, "width": 64}
    save(LM(spec.load().shape, **ours), tmp_path / "drafter", ours)
    spec.tokenizer().save_pretrained(tmp_path / "drafter")
    source = {"files": [write_chats(tmp_path)], "prompt": "{question}"}
    config = {
        "_target_": "eval.bench.Bench",
        "target": {"_target_": "decoding.pretrained.Pretrained", "path": spec.path},
        "prompts": {"chat": {"_target_": "data.sources.Local", **source}},
        "baselines": {"recycled": {"_target_": "drafters.token_recycling.TokenRecycling"}},
        **{"heldout_only": False, "limit": 5, "max_new_tokens": 8, "repeats": 2},
        **{"temperatures": [1.0, 0.0], "batch_sizes": [1, 2], "draft_lengths": [3]},
        **{"trial_prompts": 1, "control_prompts": 2, "dtype": "float32"},
    }
    folders = {name: tmp_path / name for name in ("one", "two")}
    for folder in folders.values():
        folder.mkdir()
        note = {"name": "bench", "config": config, "inputs": {"drafter": str(tmp_path / "drafter")}}
        (folder / "stage.json").write_text(json.dumps(note))
    bind(config, "stages.bench")
    build(config).run(folders["one"], drafter=tmp_path / "drafter")
    forked.run(forked.worker, folders["two"], folder=tmp_path)
    one, two = (
        [json.loads(x) for x in (f / "artifact" / "runs.jsonl").read_text().splitlines()]
        for f in folders.values()
    )
    timed = {key for key in one[0] if "seconds" in key} | {"others"}  # which one rank notes
    assert [{k: v for k, v in row.items() if k not in timed} for row in two] == [
        {k: v for k, v in row.items() if k not in timed} for row in one
    ]
    report = json.loads((folders["two"] / "artifact" / "report.json").read_text())
    assert report["conditions"]["ranks"] == 2
