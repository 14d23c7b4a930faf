"""The training loop: one rank or two, straight or resumed, against a plain loop by hand.

Shapes: B batch, T tokens.
"""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.documents import is_validation
from data.pack import Packed
from data.sources import heldout
from decoding.pretrained import Pretrained
from eval.controls import Failed
from tests import forked
from tests.tiny import write_chats, write_target, write_texts
from tests.train import ranks
from train import distill, loop
from train.compose import bind, build
from train.schedule import AdamW, Schedule

T, ROWS, STEPS = 32, 4, 10  # sequence length, sequences a step, steps


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text, chats, a target and answers of it with uneven numbers of supervised tokens."""
    folder = tmp_path_factory.mktemp("distill")
    write_target(folder / "target", write_texts(folder))
    write_chats(folder)
    (folder / "answers").mkdir()
    rng = random.Random(0)
    rows = []
    for i in range(200):
        prompt = [1, *(rng.randint(6, 290) for _ in range(rng.randint(1, 20)))]
        answer = [*(rng.randint(6, 290) for _ in range(rng.randint(1, 9))), 5]
        samples = [{"prompt_ids": prompt, "answer_ids": answer}]
        rows.append(json.dumps({"prompt": f"question {i}", "samples": samples}))
    (folder / "answers" / "shard-00000.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def config(place: Path, objective: str = "CE", **schedule: Any) -> dict[str, Any]:
    return {
        "_target_": "train.distill.Distill",
        "target": {
            "_target_": "decoding.pretrained.Pretrained",
            "path": str(place / "target"),
            "dtype": "float32",
        },
        "drafter": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
        "objective": {"_target_": f"train.objectives.{objective}"},
        "optim": {"_target_": "train.schedule.AdamW", "lr": 3e-3, "warmup": 0.2, "clip": 0.5},
        "schedule": {
            "_target_": "train.schedule.Schedule",
            "tokens": STEPS * ROWS * T,
            "batch_tokens": ROWS * T,
            "sequence_length": T,
            "micro_batch": 2,
            "dtype": "float32",
            **schedule,
        },
    }


def note(folder: Path, stage: dict[str, Any], **inputs: Path) -> Path:
    """The folder as the command leaves it for its worker."""
    folder.mkdir(parents=True, exist_ok=True)
    inputs_ = {name: str(path) for name, path in inputs.items()}
    text = json.dumps({"name": "test", "fingerprint": "0", "config": stage, "inputs": inputs_})
    (folder / "stage.json").write_text(text)
    return folder


def run(folder: Path, stage: dict[str, Any], **inputs: Path) -> dict[str, float]:
    """The stage in this process."""
    folder.mkdir(parents=True, exist_ok=True)
    bind(stage, "stages.test")
    return build(stage).run(folder, **inputs)


def text(place: Path, **stage: Any) -> dict[str, Any]:
    """With running text for data."""
    files = [str(place / "text.jsonl")]
    source = {"_target_": "data.sources.Local", "files": files, "text": "{text}"}
    return config(place, **stage) | {"data": source}


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line[key] for line in lines if key in line}
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    return [by_step[step] for step in sorted(by_step)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "artifact" / "model.safetensors")


OBJECTIVES = ("CE", "ForwardKL", "LambdaHybrid")


@pytest.fixture(scope="module")
def one(place: Path) -> dict[str, Path]:
    """Runs on one rank, straight through."""
    folders = {name: place / f"one-{name}" for name in OBJECTIVES}
    for name, folder in folders.items():
        run(folder, config(place, name), data=place / "answers")
    return folders


@pytest.fixture(scope="module")
def killed(place: Path) -> Path:
    """A run that a SIGKILL ended in step 8; its last checkpoint is of step 6."""
    folder = note(place / "killed", config(place, "ForwardKL"), data=place / "answers")
    died = forked.begin(ranks.stages, [folder], 8, folder=place, ranks=1)
    assert died.ends() == [-signal.SIGKILL], died.said()
    assert not (folder / "artifact").exists()
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]
    return folder


@pytest.fixture(scope="module")
def two(place: Path, killed: Path) -> dict[str, Path]:
    """The same runs on two ranks, and the killed one gone on with there."""
    folders = {
        name: note(place / f"two-{name}", config(place, name), data=place / "answers")
        for name in OBJECTIVES
    }
    folders["resumed"] = shutil.copytree(killed, place / "two-resumed")
    forked.run(ranks.stages, list(folders.values()), folder=place)
    return folders


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_ranks_give_the_curve_and_weights_of_one(name: str, one, two):
    assert curve(two[name]) == pytest.approx(curve(one[name]), rel=1e-5)
    assert len(curve(one[name])) == STEPS
    norm = [curve(folders[name], "gradient_norm") for folders in (one, two)]
    assert norm[1] == pytest.approx(norm[0], rel=1e-4)
    a, b = weights(one[name]), weights(two[name])
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-5) for key in a)


def test_objectives_have_different_curves(one):
    """Else the equalities above would say nothing."""
    assert len({round(curve(folder)[-1], 4) for folder in one.values()}) == len(one)


def test_killed_and_resumed_equals_straight_to_the_bit(place: Path, one, killed: Path, capfd):
    folder = shutil.copytree(killed, place / "resumed")
    run(folder, config(place, "ForwardKL"), data=place / "answers")
    assert "resumed after step 6 of 10" in capfd.readouterr().out
    straight, resumed = weights(one["ForwardKL"]), weights(folder)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert curve(folder) == curve(one["ForwardKL"])
    last = "checkpoints/step-00000010/state.safetensors"
    a, b = (load_file(f / last) for f in (one["ForwardKL"], folder))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_on_two_ranks_continues_the_curve_of_one(one, two):
    assert curve(two["resumed"]) == pytest.approx(curve(one["ForwardKL"]), rel=1e-5)
    a, b = weights(one["ForwardKL"]), weights(two["resumed"])
    assert all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-5) for key in a)


def test_a_resumed_run_writes_every_step_once(two):
    rows = [json.loads(x) for x in (two["resumed"] / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_a_damaged_checkpoint_is_passed_over_and_named(place: Path, one, killed: Path, capfd):
    folder = shutil.copytree(killed, place / "damaged")
    file = folder / "checkpoints" / "step-00000006" / "state.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    run(folder, config(place, "ForwardKL"), data=place / "answers")
    said = capfd.readouterr().out
    assert "skipped checkpoint step-00000006: the hash of state.safetensors differs" in said
    assert "resumed after step 4 of 10" in said
    straight = weights(one["ForwardKL"])
    assert all(torch.equal(straight[key], value) for key, value in weights(folder).items())


@pytest.mark.parametrize("name", ["CE", "ForwardKL", "LambdaHybrid"])
@pytest.mark.parametrize("micro", [1, 4])
def test_the_micro_batch_changes_nothing(place: Path, one, name: str, micro: int, tmp_path: Path):
    run(tmp_path, config(place, name, micro_batch=micro), data=place / "answers")
    assert curve(tmp_path) == pytest.approx(curve(one[name]), rel=1e-5)


def test_zero_stage_2_changes_nothing(place: Path, one, tmp_path: Path):
    run(tmp_path, config(place, "ForwardKL", zero_stage=2), data=place / "answers")
    assert curve(tmp_path) == pytest.approx(curve(one["ForwardKL"]), rel=1e-5)


def test_the_loop_is_that_of_a_plain_torch_program(place: Path, one):
    """Weights after ten steps by hand: the mean loss over the supervised tokens of a step, clipped,
    AdamW with decay on matrices only, warm-up and cosine."""
    made = build(config(place))
    torch.manual_seed(0)
    model = made.drafter(made.target.shape_of()).model
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    packed = Packed(one["CE"] / "packed" / "train")
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(packed) >= STEPS * ROWS, "the loop went round more than once"
    losses = []
    for step in range(STEPS):
        batch = packed.batch(order[step * ROWS : (step + 1) * ROWS])
        same = batch.doc_BT[:, :, None] == batch.doc_BT[:, None, :]
        mask = (same & torch.ones(T, T, dtype=torch.bool).tril())[:, None]
        start = torch.stack([(d[:, None] == d[None]).float().argmax(1) for d in batch.doc_BT])
        positions = torch.arange(T) - start
        logits = model(batch.ids_BT, attention_mask=mask, position_ids=positions).logits
        labels = batch.ids_BT.masked_fill(~batch.mask_BT, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = made.optim.rate(step, STEPS)
        optimizer.step()
        losses.append(loss.item())
    assert curve(one["CE"]) == pytest.approx(losses, rel=1e-5)
    got = weights(one["CE"])
    for name, value in model.named_parameters():
        due = value.detach()
        torch.testing.assert_close(got[name], due, rtol=1e-4, atol=1e-4)
        # AdamW makes a gradient of rounding errors as long as any: a weight in thousands may differ
        assert torch.isclose(got[name], due, rtol=1e-4, atol=1e-5).float().mean() > 0.999


def test_the_rate_warms_up_and_ends_at_its_floor():
    optim = AdamW(lr=1.0, warmup=0.2, floor=0.1)
    rates = [optim.rate(step, 100) for step in range(100)]
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.15])
    assert rates[19] == pytest.approx(1.0)
    assert max(rates) == pytest.approx(1.0)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert AdamW(lr=1.0, warmup=0.0).rate(0, 1) == 1.0


def test_bf16_trains_and_leaves_rotary_frequencies_alone(place: Path, tmp_path: Path, monkeypatch):
    """A frequency rounded to bf16 is another position code."""
    seen = []
    finish = loop.Engine.finish

    def look(self):
        module = self.engine.module
        kinds = {p.dtype for p in module.parameters()}
        seen.append((kinds, {n: b.clone() for n, b in module.named_buffers()}))
        finish(self)

    monkeypatch.setattr(loop.Engine, "finish", look)
    stage = text(place, tokens=30 * ROWS * T, dtype="bfloat16")
    run(tmp_path, stage)
    ((kinds, buffers),) = seen
    assert kinds == {torch.bfloat16}
    made = build(stage)
    fresh = dict(made.drafter(made.target.shape_of()).named_buffers())
    assert any("inv_freq" in name for name in buffers)
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, fresh[name])
    losses = curve(tmp_path)
    assert losses[-1] < 0.8 * losses[0]
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_the_target_is_never_changed_nor_saved(place: Path, tmp_path: Path, monkeypatch):
    loaded = []
    load = Pretrained.load
    monkeypatch.setattr(
        Pretrained, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    run(tmp_path, config(place, "ForwardKL"), data=place / "answers")
    (target,) = loaded
    before = load_file(place / "target" / "model.safetensors")
    for name, parameter in target.model.named_parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
        assert name not in before or torch.equal(parameter, before[name])
    state = load_file(tmp_path / "checkpoints" / "step-00000010" / "state.safetensors")
    drafter = weights(tmp_path)
    count = sum(value.numel() for value in drafter.values())
    assert sum(value.numel() for value in state.values()) == 3 * count
    assert {name.split("/")[0] for name in state if "/" in name} == {"exp_avg", "exp_avg_sq"}


def test_next_token_training_needs_no_pass_of_the_target(place: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(Pretrained, "load", lambda *a, **k: pytest.fail("loaded the target"))
    run(tmp_path, text(place, tokens=ROWS * T))


def test_every_trainable_parameter_moves_and_the_loss_falls(place: Path, tmp_path: Path):
    found = run(tmp_path, text(place, tokens=60 * ROWS * T))
    losses = curve(tmp_path)
    assert losses[-1] < 0.7 * losses[0]
    assert found["steps"] == 60
    assert found["tokens_per_second"] > 0
    assert found["validation_loss"] < losses[0]
    made = build(text(place))
    torch.manual_seed(0)
    start = made.drafter(made.target.shape_of()).model.state_dict()
    assert all(not torch.equal(start[k], value) for k, value in weights(tmp_path).items())


def words(packed: Packed, tokenizer: Any) -> set[str]:
    """Every document that was packed whole, decoded."""
    found = set()
    whole = packed.batch(list(range(len(packed))))
    for ids, doc in zip(whole.ids_BT, whole.doc_BT, strict=True):
        for number in set(doc.tolist()) - {-1}:
            found.add(tokenizer.decode(ids[doc == number], skip_special_tokens=True))
    return found


def test_validation_rows_are_never_trained_on_and_heldout_prompts_are_nowhere(
    place: Path, tmp_path: Path
):
    file = [write_chats(tmp_path, rows=1500)]
    source = {"_target_": "data.sources.Local", "files": file, "prompt": "{question}"}
    stage = config(place, tokens=10**6, batch_tokens=10 * 128, sequence_length=128) | {
        "data": source | {"answer": "{answer}"}
    }
    made = build(stage)
    tokenizer = made.target.tokenizer()
    rows, name = distill.rows_of(made.data, None)
    distill.prepare(tmp_path, rows, distill.Documents(tokenizer, name), made.schedule)
    asked = [json.loads(x) for x in Path(file[0]).read_text().splitlines()]

    def kind(talk: dict) -> str:
        if heldout(talk["question"]):
            return "heldout"
        row: Any = {"messages": [{"role": "user", "content": talk["question"]}]}
        return "validation" if is_validation(row) else "train"

    sides: dict[str, set[str]] = {"heldout": set(), "validation": set(), "train": set()}
    for talk in asked:
        sides[kind(talk)].add(talk["question"] + talk["answer"])
    assert min(map(len, sides.values())) > 1
    assert words(Packed(tmp_path / "packed" / "train"), tokenizer) == sides["train"]
    assert words(Packed(tmp_path / "packed" / "validation"), tokenizer) == sides["validation"]


def test_a_drafter_larger_than_its_target_is_warned_of(place: Path, tmp_path: Path, capfd):
    stage = text(place, tokens=ROWS * T)
    stage["drafter"]["layers"] = 4
    run(tmp_path / "large", stage)
    assert "warning: the drafter has" in capfd.readouterr().out
    run(tmp_path / "small", text(place, tokens=ROWS * T))
    assert "warning" not in capfd.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(
    place: Path, tmp_path: Path
):
    stage = text(place)
    made = build(stage)
    real = made.objective.per_token
    calls = []

    def poisoned(log_q, log_p, labels):
        calls.append(1)
        return real(log_q, log_p, labels) * (float("nan") if len(calls) > 9 else 1.0)

    made.objective.per_token = poisoned
    said = r"step \d+ is not finite.* and 3 steps before it were skip"
    with pytest.raises(Failed, match=said):
        made.run(tmp_path)
    for file in (tmp_path / "checkpoints").glob("*/state.safetensors"):
        assert all(value.isfinite().all() for value in load_file(file).values())
    assert not (tmp_path / "artifact").exists()


def test_a_long_source_is_counted_and_checked_though_it_is_not_read_to_its_end(
    place: Path, tmp_path: Path, capfd
):
    """The counts of the gate are printed, and too many unrenderable rows are an error."""
    run(tmp_path / "text", text(place, tokens=2 * ROWS * T))
    assert "text.jsonl: kept" in capfd.readouterr().out
    file = tmp_path / "half.jsonl"
    user, answer = ({"role": r, "content": "Milch und Katze"} for r in ("user", "assistant"))
    talks = [{"messages": [user, answer] if i % 2 else [answer, user]} for i in range(400)]
    for i, talk in enumerate(talks):
        talk["messages"] = [m | {"content": f"{m['content']} {i}"} for m in talk["messages"]]
    file.write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    source = {"_target_": "data.sources.Local", "files": [str(file)], "messages": "messages"}
    with pytest.raises(ValueError, match="cannot be rendered with a loss mask"):
        run(tmp_path / "chat", config(place, tokens=2 * ROWS * T) | {"data": source})


def test_a_start_from_another_stage_is_its_weights(place: Path, one, tmp_path: Path):
    parent = one["CE"] / "artifact"

    def started(stage: dict[str, Any]) -> Any:
        made = build(stage)
        module = made._drafter(made.target.shape_of())
        made._start_from(parent, module, made.target.tokenizer())
        return module

    got = dict(started(config(place)).model.named_parameters())
    assert all(torch.equal(got[name], value) for name, value in weights(one["CE"]).items())
    stage = config(place)
    stage["drafter"]["width"] = 128
    with pytest.raises((ValueError, RuntimeError)):
        started(stage)


def test_validation_decodes_where_a_target_is_at_hand(one):
    def taus(name: str) -> dict[int, float]:
        lines = map(json.loads, (one[name] / "metrics.jsonl").read_text().splitlines())
        return {x["step"]: x["validation_tau"] for x in lines if "validation_tau" in x}

    assert max(taus("ForwardKL")) == STEPS
    assert min(taus("ForwardKL").values()) >= 1
    assert taus("CE") == {}


def test_lora_moves_low_rank_matrices_and_is_merged(place: Path, one, tmp_path: Path):
    stage = config(place)
    stage["drafter"]["lora"] = {"rank": 4, "alpha": 8}
    run(tmp_path, stage, drafter=one["CE"] / "artifact", data=place / "answers")
    before, after = weights(one["CE"]), weights(tmp_path)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if name.endswith("proj.weight"):
            assert 1 <= torch.linalg.matrix_rank(weight - before[name], rtol=1e-4) <= 4
        else:
            assert torch.equal(weight, before[name]), name


def test_lora_on_nothing_is_refused(place: Path):
    stage = config(place)
    stage["drafter"]["lora"] = {"rank": 4, "alpha": 8}
    with pytest.raises(ValueError, match="adds to a model that is there already"):
        build(stage).check(["data"])
    build(stage).check(["data", "drafter"])
    build(text(place) | {"drafter": stage["drafter"]}).check([])  # pretraining makes the model
    stage["drafter"]["lora"] = {"rank": 4}
    with pytest.raises(ValueError, match=r"drafter.lora is .*expected"):
        build(stage)._drafter(build(stage).target.shape_of())


def test_a_target_is_not_changed_by_text(place: Path):
    stage = text(place)
    stage["drafter"] = {
        "_target_": "drafters.medusa.Medusa",
        "target_lora": {"rank": 4, "alpha": 8},
    }
    with pytest.raises(ValueError, match="learns from the target's own answers only"):
        build(stage).check([])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"tokens": 0}, "tokens 0, .*each must be at least 1"),
        ({"batch_tokens": 0}, "batch_tokens 0"),
        ({"micro_batch": 0}, "micro_batch 0"),
        ({"sequence_length": 0}, "sequence_length 0"),
        ({"dtype": "float16"}, "schedule.dtype is 'float16'; it must be bfloat16 or float32"),
        ({"batch_tokens": 100}, "batch_tokens 100 must be a multiple of sequence_length 32"),
        ({"tokens": 100}, "at most tokens 100; otherwise there is not one whole step"),
    ],
    ids=str,
)
def test_schedules_that_cannot_be_are_refused(changed: dict, said: str):
    good = {"tokens": 1280, "batch_tokens": 128, "sequence_length": 32}
    assert Schedule(**good).steps == 10
    with pytest.raises(ValueError, match=said):
        Schedule(**good | changed)


def test_micro_batches_divide_a_ranks_share():
    plan = Schedule(tokens=4096, batch_tokens=12 * 32, sequence_length=32, micro_batch=5)
    assert [plan.micro(world) for world in (1, 2, 3, 4, 12)] == [4, 3, 4, 3, 1]
    with pytest.raises(ValueError, match="a step of 12 sequences cannot be shared by 5 ranks"):
        plan.micro(5)


def test_data_from_nowhere_or_from_both_is_refused(place: Path):
    with pytest.raises(ValueError, match="it has neither"):
        build(config(place)).check([])
    with pytest.raises(ValueError, match="it has both"):
        build(text(place)).check(["data"])
