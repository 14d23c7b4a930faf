"""What a stage was said to take, beside what it took.

Shapes: B batch, T tokens, V vocabulary.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.pack import Packed
from decoding.target import Shape
from drafters.base import Batch
from eval.cost import SIZES
from tests.tiny import write_target, write_texts
from tests.train.composing import LAUNCHED, ROOT
from train import estimate as estimating
from train import probe as probing
from train.compose import build
from train.estimate import disk, estimate, learner_of, rehearse, shape_of_target, training
from train.packing import VALIDATION_SEQUENCES
from train.passes import packed_bytes
from train.plan import Planned
from train.probe import Live, Measured, longest, measure, probe, random_batch, require, stand_in
from train.scale import target_flops
from train.schedule import Schedule

T, ROWS, STEPS = 64, 8, 6


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("estimate")
    write_target(folder / "target", write_texts(folder, rows=2000), dtype="bfloat16")
    return folder


def stage(place: Path, name: str = "test", **schedule: Any) -> Planned:
    """A distill stage as a recipe has it."""
    config = {
        "_target_": "train.distill.Distill",
        "target": {"_target_": "decoding.pretrained.Pretrained", "path": str(place / "target")},
        "drafter": {"_target_": "drafters.medusa.Medusa", "heads": 2},
        "objective": {"_target_": "train.objectives.ForwardKL"},
        "optim": {"_target_": "train.schedule.AdamW"},
        "data": {
            "_target_": "data.sources.Local",
            "files": [str(place / "text.jsonl")],
            "text": "{text}",
        },
        "schedule": {
            "_target_": "train.schedule.Schedule",
            "tokens": STEPS * ROWS * T,
            "batch_tokens": ROWS * T,
            "sequence_length": T,
            "micro_batch": 4,
            **schedule,
        },
    }
    return Planned(name, config, {}, "0", place / name)


def shape_of(planned: Planned) -> Any:
    found = shape_of_target(planned.config["target"], [planned])
    assert found is not None
    return found


def tensor_bytes(file: Path) -> int:
    """Of all tensors of a safetensors file: what follows its header."""
    with file.open("rb") as stream:
        return file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")


@pytest.fixture(scope="module")
def ran(place: Path) -> tuple[Planned, dict[str, float]]:
    """The stage in a process of its own, as the command starts it."""
    planned = stage(place)
    planned.folder.mkdir()
    note = {"name": "test", "fingerprint": "0", "config": planned.config, "inputs": {}}
    (planned.folder / "stage.json").write_text(json.dumps(note))
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-m", "train.processes.worker", str(planned.folder)],
        cwd=ROOT,
        env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return planned, json.loads((planned.folder / "result.json").read_text("utf-8"))


def test_disk_is_what_was_said(ran: tuple[Planned, dict[str, float]]):
    planned, _ = ran
    said = estimate(planned, shape_of(planned), rehearsed=False)
    files = list(planned.folder.rglob("*.safetensors"))
    packed = [file for file in files if "packed" in file.parts]
    state = [file for file in files if "checkpoints" in file.parts]
    assert (len(state), len(files) - len(packed) - len(state)) == (2, 1)
    assert said.aside == tensor_bytes(state[0])
    found = [len(Packed(planned.folder / "packed" / part)) for part in ("train", "validation")]
    assert packed_bytes(sum(found), T) == sum(map(tensor_bytes, packed))
    planned_for = STEPS * ROWS + VALIDATION_SEQUENCES
    assert STEPS * ROWS <= sum(found) <= planned_for  # a document more or less, few held out
    unused = packed_bytes(planned_for, T) - packed_bytes(sum(found), T)
    assert said.disk == sum(map(tensor_bytes, files)) + unused


def test_memory_is_what_was_said_within_a_fifth(ran: tuple[Planned, dict[str, float]]):
    planned, result = ran
    said = estimate(planned, shape_of(planned))
    assert said.measured
    assert said.memory == pytest.approx(result["peak_memory_mib"] * 2**20, rel=0.2)
    assert said.seconds is not None
    assert 0.05 < said.seconds[0] / result["seconds"] < 20  # of a machine that does other things


def test_live_counts_each_byte_once_and_only_while_it_lives():
    known = torch.zeros(500)
    with Live([known]) as live:
        a = torch.zeros(1000)
        _view = a[10:].view(-1, 10)
        b = a * 2
        assert (live.now, live.most) == (8000, 8000)
        del a, _view
        assert live.now == 4000
        known.add_(1)
        c = known + 1
        assert live.now == 6000
        del b, c
    assert (live.now, live.most) == (0, 8000)


class Toy(nn.Module):
    """Reads ids and keeps one activation of 4 x 256 values a token."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 256)
        self.up, self.down = nn.Linear(256, 1024), nn.Linear(1024, vocabulary)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        hidden_BTH = self.dropout(torch.relu(self.up(self.embed(batch.ids_BT))))
        logits_BTV = self.down(hidden_BTH)[:, :-1].float()
        return F.cross_entropy(logits_BTV.flatten(0, 1), batch.ids_BT[:, 1:].flatten()), {}


def step(module: Any, batch: Batch) -> Any:
    return module(batch)


@pytest.mark.parametrize("training_before", [True, False])
def test_measuring_leaves_no_trace(training_before: bool):
    module = Toy(50).train(training_before)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = [parameter.data_ptr() for parameter in module.parameters()]
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    found = measure(module, step, random_batch(2, 16, 50), "bfloat16")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert module.training is training_before
    assert [parameter.data_ptr() for parameter in module.parameters()] == tensors
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name])
    assert all(parameter.grad is None for parameter in module.parameters())
    assert found.peak > 2 * sum(p.numel() for p in module.parameters())  # the gradients alone
    assert min(found.seconds, found.update) > 0


def test_a_failed_step_leaves_the_module_as_it_was():
    module = Toy(50)
    with pytest.raises(IndexError):
        measure(module, step, random_batch(2, 16, 60), "bfloat16")
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_the_peak_grows_with_the_batch_as_its_activations_do():
    module = Toy(50)
    small, large = (measure(module, step, random_batch(n, 64, 50), "float32").peak for n in (4, 16))
    kept = 12 * 64 * 1024 * 4  # one activation in fp32
    assert 2 * kept < large - small < 6 * kept


def test_every_token_of_the_longest_batch_is_supervised():
    ids_BT = torch.ones(2, 5).long()
    batch = longest(Batch(ids_BT, torch.zeros(2, 5).bool(), torch.zeros(2, 5).long()))
    assert batch.mask_BT.tolist() == [[False, True, True, True, True]] * 2


PLAN = Schedule(tokens=4096, batch_tokens=1024, sequence_length=64, micro_batch=4)


def test_what_does_not_fit_is_refused_with_the_key_to_lower():
    require(1000, 500, 3000, 2, PLAN)
    with pytest.raises(
        OSError, match=r"micro_batch 4 x sequence_length 64 .* lower schedule.micro_"
    ):
        require(2**30, 2**31, 2**32, 2, PLAN)
    with pytest.raises(OSError, match=r"each of 3 rank\(s\) here .* raise deepspeed\.zero_stage"):
        require(2**31, 0, 2**32, 3, PLAN)


def test_a_probe_says_memory_and_time_or_refuses(monkeypatch: pytest.MonkeyPatch):
    module, batch = Toy(50), random_batch(4, 64, 50)
    line = probe(module, step, batch, PLAN, 1)
    assert "a micro-batch of 256 tokens" in line
    assert "a step of 1,024 tokens" in line
    assert "minutes for 4 without validation" in line

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(
        OSError, match=r"for activations and logits\), .* lower schedule\.micro_bat"
    ):
        probe(module, out_of_memory, batch, PLAN, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(probing, "memory_free", lambda: 1000)
    monkeypatch.setattr(probing, "measure", lambda *a, **k: pytest.fail("it cannot fit"))
    with pytest.raises(OSError, match=r"0 MiB are free; raise deepspeed\.zero_stage"):
        probe(module, step, batch, PLAN, 1)


def test_a_step_has_as_many_micro_batches_as_its_ranks_leave():
    found = Measured(peak=0, seconds=2.0, update=1.0)
    assert found.step_seconds(PLAN, 1) == 4 * 2.0 + 1.0
    assert found.step_seconds(PLAN, 2) == 2 * 2.0 + 1.0


def test_arithmetic_stands_in_where_nothing_is_measured(place: Path):
    planned = stage(place)
    shape = shape_of(planned)
    learner = learner_of(planned, build(planned.config), shape, 1)
    assert learner is not None
    found = rehearse(build(planned.config), learner, shape)
    assert found is not None
    reckoned, measured = training(learner, shape), training(learner, shape, 1, found)
    assert reckoned.memory == pytest.approx(measured.memory, rel=0.3)
    assert reckoned.disk == measured.disk == disk(learner)
    assert (reckoned.measured, measured.measured) == (False, True)


def test_stages_with_the_same_steps_are_measured_once(place: Path, monkeypatch: pytest.MonkeyPatch):
    """A learning rate or more tokens change no step; a drafter, a loss and a micro-batch do."""
    measured: list[Any] = []
    monkeypatch.setattr(estimating, "MEASURED", {})
    monkeypatch.setattr(estimating, "rehearse", lambda *given: measured.append(given))
    plain = stage(place)

    def priced(**changes: Any) -> int:
        planned = replace(plain, config=plain.config | changes)
        estimate(planned, shape_of(plain))
        return len(measured)

    schedule = plain.config["schedule"]
    assert priced() == priced(optim={"_target_": "train.schedule.AdamW", "lr": 0.1}) == 1
    assert priced(schedule=schedule | {"tokens": 9 * schedule["tokens"]}) == 1
    assert priced(drafter=plain.config["drafter"] | {"heads": 3}) == 2
    assert priced(objective={"_target_": "train.objectives.ReverseKL"}) == 3
    assert priced(schedule=schedule | {"micro_batch": 1}) == 4


def test_a_large_target_is_not_made(place: Path, monkeypatch: pytest.MonkeyPatch):
    planned = stage(place)
    made, shape = build(planned.config), shape_of(planned)
    learner = learner_of(planned, made, shape, 1)
    assert learner is not None
    monkeypatch.setattr(estimating, "stand_in", lambda *a: pytest.fail("it was made"))
    monkeypatch.setattr(estimating, "memory_free", lambda: 10_000)
    assert rehearse(made, learner, shape) is None
    monkeypatch.setattr(estimating, "REHEARSED", 10)
    assert rehearse(made, learner, shape) is None


def test_a_sharded_target_and_a_cache_weigh_less(place: Path):
    planned = stage(place, batch_tokens=16 * T, tokens=16 * T)
    shape = shape_of(planned)
    whole = learner_of(planned, build(planned.config), shape, 2)
    planned.config["target"]["parallel"] = "zero3"
    shared = learner_of(planned, build(planned.config), shape, 2)
    planned.config["target"]["parallel"] = None
    planned.needs["cache"] = "cache"
    cached = learner_of(planned, build(planned.config), shape, 2)
    assert whole is not None
    assert shared is not None
    assert cached is not None
    assert whole.weights == 2 * shape.parameters()
    assert cached.weights < shared.weights <= whole.weights
    assert (whole.passes, shared.passes, cached.passes) == (1, 1, 0)


def test_a_stand_in_has_the_shape_of_the_target(place: Path):
    shape = shape_of(stage(place))
    target = stand_in(shape)
    assert sum(p.numel() for p in target.parameters()) == shape.parameters()
    assert target.shape.kv_heads == shape.kv_heads


def test_a_hub_target_that_is_shared_by_the_ranks_is_divided(monkeypatch: pytest.MonkeyPatch):
    shape = Shape(96, 32, 3, 4, 4, 64, 128)
    config = {
        "_target_": "data.generate.Generate",
        "target": {"_target_": "decoding.pretrained.Pretrained", "path": "a/b"},
        "prompts": {"_target_": "data.sources.Local", "files": ["x.jsonl"], "prompt": "{x}"},
        "temperatures": [0.0],
        "limit": 100,
    }
    monkeypatch.setattr("train.passes.BASE", 0)
    monkeypatch.setattr("train.passes.round_cost", lambda *a, **k: 1.0)
    monkeypatch.setattr("train.passes.neighbours", lambda ranks: 1)  # each on a machine of its own

    def said(parallel: str | None, ranks: int) -> Any:
        config["target"]["parallel"] = parallel  # type: ignore[index]
        return estimate(Planned("generate", config, {}, "0", Path("x")), shape, ranks)

    one, shares, parts = said(None, 1), said(None, 4), said("tensor", 4)
    assert one.floor == shares.floor == 2 * shape.parameters() == 4 * parts.floor
    least, most = one.seconds
    assert least < most / 7
    assert shares.seconds[1] - 5 == pytest.approx((most - 5) / 4)  # 5 s before any work
    assert parts.seconds[1] == most
    assert one.tokens == 100 * 512


KOEN = Shape(8192, 384, 8, 6, 6, 1024, 1024)  # koen-17m's


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that take as long as those of koen-17m took in the run below."""
    milliseconds = {1: 5.2, 6: 5.6, 8: 5.75, 64: 10.1}

    def known(shape: Shape, rows: int, tokens: int = 1, *, rehearsed: bool) -> float:
        return milliseconds[tokens] / 1000

    monkeypatch.setattr("train.tuning.round_cost", known)
    monkeypatch.setattr("train.tuning.matrix_speed", lambda dtype: 1e11)


TARGET = {"_target_": "decoding.pretrained.Pretrained", "path": "a/b"}


def test_the_search_for_layers_takes_what_is_said(plain):
    """A real one of 40 trials on two cores: 26.2 seconds, 5.2 ms a token without drafts."""
    config = {"_target_": "eval.skip_layers.SkipLayers", "target": TARGET, "trials": 40}
    said = estimate(Planned("skip_layers", config, {}, "0", Path("x")), KOEN)
    assert said.seconds is not None
    assert said.seconds[0] < 26.2 < said.seconds[1] < 10 * 26.2
    assert "at most 13,312 tokens" in said.what  # (40 + 3 x 4) x 8 prompts x 32
    assert said.memory is not None
    assert said.memory > said.floor > 2 * KOEN.parameters()
    assert estimate(Planned("skip_layers", config, {}, "0", Path("x")), None).seconds is None


def test_tuning_a_tree_takes_what_is_said(plain):
    config = {"_target_": "eval.tune_tree.TuneTree", "target": TARGET}
    said = estimate(Planned("tune_tree", config, {}, "0", Path("x")), KOEN)
    assert said.seconds is not None
    # 26 turns of passes over 1 to 64 tokens and of each dtype's check, 5 s before any work
    turns = 26 * sum(5.2 + 0.4 * min(m - 1, 5) / 5 + 4.5 * max(m - 6, 0) / 58 for m in SIZES)
    least = 5 + (turns + 2 * 26 * 5.6) / 1000
    reading = 400 * 512 * target_flops(KOEN, 512) / (1e11 * 0.35)
    assert said.seconds == (
        pytest.approx(least + reading / 8),
        pytest.approx(least + 90 * 0.0052 + reading),
    )
    assert said.memory is not None
    assert said.memory - said.floor > 4 * KOEN.parameters(), "both dtypes are held at once"
    config["nodes"] = 4
    fewer = estimate(Planned("tune_tree", config, {}, "0", Path("x")), KOEN)
    assert fewer.seconds[0] < said.seconds[0]
