"""A real training is killed, cut off from power and damaged at random until time is up, and still
ends as the undisturbed one does, to the bit. `make soak`; DRAFTSMITH_SOAK_MINUTES bounds it.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.tiny import write_target, write_texts
from tests.train import cuts
from train import checkpoint

pytestmark = pytest.mark.soak
MINUTES = float(os.environ.get("DRAFTSMITH_SOAK_MINUTES", "10"))
T, ROWS, STEPS = 32, 4, 30  # sequence length, sequences a step, steps
DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "a flipped bit": lambda raw, rng: _flipped(raw, rng.randrange(len(raw) * 8)),
    "a truncated file": lambda raw, rng: raw[: rng.randrange(len(raw))],
    "an emptied file": lambda raw, rng: b"",
}
DEATHS = ("SIGKILL at a random moment", "SIGKILL at a random write", "power lost at a random write")
REFUSED = (2, 4)  # exit codes of a sentence


def _flipped(raw: bytes, bit: int) -> bytes:
    at = bit // 8
    return raw[:at] + bytes([raw[at] ^ (1 << bit % 8)]) + raw[at + 1 :]


def stage(place: Path) -> dict[str, Any]:
    source = {"_target_": "data.sources.Local", "files": [str(place / "text.jsonl")]}
    return {
        "_target_": "train.distill.Distill",
        "target": {
            "_target_": "decoding.pretrained.Pretrained",
            "path": str(place / "target"),
            "dtype": "float32",
        },
        "drafter": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
        "objective": {"_target_": "train.objectives.CE"},
        "optim": {"_target_": "train.schedule.AdamW", "lr": 3e-3, "warmup": 0.2, "clip": 0.5},
        "schedule": {
            "_target_": "train.schedule.Schedule",
            "tokens": STEPS * ROWS * T,
            "batch_tokens": ROWS * T,
            "sequence_length": T,
            "micro_batch": 2,
            "dtype": "float32",
        },
        "data": source | {"text": "{text}"},
    }


class Run:
    """One stage folder, and the worker that is started in it again and again."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.history = folder, list[str]()
        folder.mkdir()
        note = {"name": "soak", "fingerprint": "0", "config": config, "inputs": {}}
        (folder / "stage.json").write_text(json.dumps(note))

    def work(self) -> None:
        """The whole stage, as `python -m train.processes.worker` runs it; never returns."""
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from train.processes.worker import main

        os._exit(main([str(self.folder)]))

    def kill_after(self, seconds: float) -> int | None:
        """Starts the worker and kills it then; its exit code if it was quicker, else None."""
        child, end = cuts.forked(self.work), time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return None

    def kill_at(self, when: int, power: bool) -> int | None:
        """The same at its `when`-th call that changes a file of the folder."""
        begun = cuts.cut(self.work, self.folder, when, power)
        return None if len(begun) == when else 0

    @property
    def step(self) -> int:
        """Of the newest whole checkpoint; 0 without one."""
        found = checkpoint.newest(self.folder / "checkpoints")
        return int(found[1]["step"]) if found else 0

    def written(self) -> list[Path]:
        """What it has written and reads again, without the one line a step that is a log."""
        places = [self.folder / name for name in ("checkpoints", "best", "packed")]
        files = (p for place in places for p in place.rglob("*") if p.is_file())
        return sorted(p for p in files if p.stat().st_size)

    def losses(self) -> dict[int, float]:
        """Of each step that was logged, none of them twice."""
        rows = [json.loads(x) for x in (self.folder / "metrics.jsonl").read_text().splitlines()]
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        assert len(dict(losses)) == len(losses)
        return dict(losses)

    def result(self) -> tuple[bytes, dict[str, list]]:
        """The drafter's bytes and the last state."""
        last = self.folder / "checkpoints" / f"step-{STEPS:08d}"
        place = last if last.is_dir() else last.with_name(f"{last.name}.1")
        state = {k: v.tolist() for k, v in load_file(place / checkpoint.STATE).items()}
        drafter = (self.folder / "artifact" / "model.safetensors").read_bytes()
        return drafter, state


class Tally:
    """How often each fault was injected, how often the run survived it, and what was lost."""

    def __init__(self) -> None:
        self.times, self.survived, self.refused = Counter[str](), Counter[str](), Counter[str]()
        self.lost = Counter[str]()

    def table(self) -> str:
        head = f"{'fault':<32}{'times':>7}{'survived':>10}{'refused':>9}{'data lost':>11}"
        lines = [
            f"{name:<32}{n:>7}{self.survived[name]:>10}{self.refused[name]:>9}"
            f"{self.lost[name] or 'none':>11}"
            for name, n in self.times.items()
        ]
        return "\n".join([head, *lines])


def die(run: Run, rng: random.Random, seconds: float, calls: int, tally: Tally) -> bool:
    """Starts the run and ends it by one of DEATHS; True if it was done before. No checkpoint that
    was whole may be gone."""
    name, before = rng.choice(DEATHS), run.step
    if name == DEATHS[0]:
        code = run.kill_after(rng.uniform(0, seconds))
    else:
        code = run.kill_at(rng.randint(1, calls), power=name == DEATHS[2])
    if code is not None:
        assert code == 0, (run.folder / "log").read_text()[-3000:]
        return True
    tally.times[name] += 1
    run.history.append(f"{name}: step {before} -> {run.step}")
    tally.survived[name] += run.step >= before
    tally.lost[name] += run.step < before
    return False


def damage(run: Run, rng: random.Random, tally: Tally) -> None:
    """Harms a file at random. A start that refuses it with a sentence gets the file back."""
    files = run.written()
    if not files:
        return
    name, file = rng.choice(list(DAMAGE)), rng.choice(files)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[name](whole, rng))
    tally.times[name] += 1
    code = run.kill_after(float("inf"))
    said = (run.folder / "log").read_text()[-3000:]
    run.history.append(f"{name} in {file.relative_to(run.folder)}: exit code {code}")
    assert code == 0 or (code in REFUSED and "Traceback" not in said), said
    if code:
        tally.refused[name] += 1
        file.write_bytes(whole)
    tally.survived[name] += not code


def test_a_training_under_fire_ends_as_the_undisturbed_one(tmp_path: Path, capsys):
    import deepspeed  # noqa: F401  once, here, for all the forks
    import transformers  # noqa: F401

    write_target(tmp_path / "target", write_texts(tmp_path))
    config, rng, tally = stage(tmp_path), random.Random(0), Tally()
    straight = Run(tmp_path / "straight", config)
    begin = time.monotonic()
    assert straight.kill_after(float("inf")) == 0, (straight.folder / "log").read_text()[-3000:]
    seconds, expected = time.monotonic() - begin, straight.result()
    losses = straight.losses()
    assert len(losses) == STEPS
    (straight.folder / "artifact" / "model.safetensors").write_bytes(b"")
    assert straight.kill_after(float("inf")) == 0
    assert straight.result() == expected, "what is damaged is made again from the last checkpoint"
    traced = Run(tmp_path / "traced", config)
    calls = len(cuts.cut(traced.work, traced.folder, 10**9))
    ends, end = 0, begin + 60 * MINUTES
    while time.monotonic() < end:
        run = Run(tmp_path / f"run-{ends}", config)
        while not die(run, rng, seconds, calls, tally):
            if rng.random() < 0.25:
                damage(run, rng, tally)
        same = run.result() == expected
        assert same, "; ".join(run.history)
        # what power took from the log, which no step waits for, is not logged again
        assert run.losses().items() <= losses.items()
        ends += 1
        shutil.rmtree(run.folder)
    with capsys.disabled():
        print(f"\n{ends} trainings of {STEPS} steps ended as the undisturbed one, to the bit")
        print(tally.table())
    assert ends
    assert not any(tally.lost.values())
