"""Where the frozen target is in training: whole, or shared by two ranks.

Shapes: B batch, T tokens, D width.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from decoding.pretrained import Pretrained
from decoding.sharded import Gathered, agreed
from decoding.target import Shape, Target
from drafters.clover2 import Clover2
from eval.controls import Failed
from tests import forked
from tests.tiny import write_target, write_texts
from tests.toys import tiny_model
from train.compose import bind, build
from train.engine import join
from train.placement import checksum, placement, require_unchanged
from train.recorded import Kept

T, ROWS, STEPS = 32, 4, 4  # sequence length, sequences a step, steps
HEADS = {"draft_length": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "lm": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
    "medusa": {"_target_": "drafters.medusa.Medusa", "heads": 2, "head": "shared", **HEADS},
    "clover2": {"_target_": "drafters.clover2.Clover2", "heads": 2, "layers": 1, **HEADS},
    "eagle3": {"_target_": "drafters.eagle3.Eagle3", "taps": [0, 1, 2], "steps": 2, **HEADS},
}
PLACES = (None, "zero3")


def stage(place: Path, family: str, parallel: str | None) -> dict[str, Any]:
    path = str(place / "target")
    spec = {"_target_": "decoding.pretrained.Pretrained", "path": path, "dtype": "float32"}
    return {
        "_target_": "train.distill.Distill",
        "target": spec | {"parallel": parallel},
        "drafter": FAMILIES[family],
        "objective": {"_target_": "train.objectives.ForwardKL"},
        "validate_every": STEPS,
        "optim": {"_target_": "train.schedule.AdamW", "lr": 1e-3, "warmup": 0.2},
        "schedule": {
            "_target_": "train.schedule.Schedule",
            "tokens": STEPS * ROWS * T,
            "batch_tokens": ROWS * T,
            "sequence_length": T,
            "micro_batch": 1,
            "dtype": "float32",
        },
    }


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


# ---- what each of two ranks does


def held(target: Target) -> int:
    """Bytes of parameters that this process holds."""
    every = {id(p): p for p in target.parameters()}.values()
    own = [p.to_local() if hasattr(p, "to_local") else p for p in every]
    return sum(p.numel() * p.element_size() for p in own)


def parts(whole: Target, shared: Target, rank: int) -> dict[str, float]:
    """How far from the whole target's are the pieces that training reads; each rank has tokens of
    its own."""
    ids = torch.randint(0, 64, (2, 9 + rank), generator=torch.Generator().manual_seed(rank))
    doc = torch.tensor([[0] * 4 + [1] * (5 + rank)] * 2)
    a, b = (t(ids, doc_BT=doc, taps=(0, 1, 3)) for t in (whole, shared))
    pairs = {
        "states": (a.hidden_BTD, b.hidden_BTD),
        "taps": (a.taps_BTLD, b.taps_BTLD),
        "embed": (whole.embed(ids), shared.embed(ids)),
        "head_rows": (whole.head_rows(ids), shared.head_rows(ids)),
        "logits": (whole.logits(a.hidden_BTD), shared.logits(a.hidden_BTD)),
    }
    return {name: float((x - y).abs().max()) for name, (x, y) in pairs.items()}


def job(folder: Path) -> None:
    """Into rank-N.json what this rank found; trains every family with the target in both places."""
    rank, _ = join()
    spec = {"path": str(folder / "deep"), "dtype": "float32"}
    whole, shared = Pretrained(**spec).load(), Pretrained(**spec, parallel="zero3").load()
    assert isinstance(shared, Gathered)
    found: dict[str, Any] = {
        "held": [held(shared), held(whole)],
        "parts": parts(whole, shared, rank),
    }
    found["sums"] = [checksum(shared), checksum(shared), checksum(whole)]
    found["agreed"] = agreed(shared, rank)
    name, layer = next((n, p) for n, p in shared.named_parameters() if hasattr(p, "to_local"))
    if rank == 1:
        layer.to_local().view(-1)[0] += 1e-3
    found["changed"] = [checksum(shared), name]
    for family in FAMILIES:
        for parallel in PLACES:
            out = folder / f"{family}-{parallel}"
            out.mkdir(exist_ok=True)
            config = stage(folder, family, parallel)
            bind(config, "stages.test")
            made = build(config)
            made.check(["data"])
            made.run(out, data=folder / "answers")
    (folder / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two targets, and answers of the shallow one."""
    folder = tmp_path_factory.mktemp("placement")
    write_target(folder / "target", write_texts(folder), ends=40)  # answers of several lengths
    deep = tiny_model(vocab=65, width=32, layers=8, heads=4, tied=False, dtype=torch.float32)
    deep.save_pretrained(folder / "deep", max_shard_size="50KB")
    (folder / "answers").mkdir()
    rng = random.Random(0)
    rows = []
    for i in range(120):
        prompt = [1, *(rng.randint(6, 290) for _ in range(rng.randint(1, 12)))]
        answer = [*(rng.randint(6, 290) for _ in range(rng.randint(1, 9))), 5]
        samples = [{"prompt_ids": prompt, "answer_ids": answer}]
        rows.append(json.dumps({"prompt": f"question {i}", "samples": samples}))
    (folder / "answers" / "shard-00000.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def found(place: Path) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    forked.run(job, place, folder=place)
    return [json.loads((place / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_training_on_a_shared_target_gives_the_losses_of_a_whole_one(place, found, family: str):
    whole, shared = (place / f"{family}-{parallel}" for parallel in PLACES)
    for key in ("loss", "validation_loss"):
        assert curve(shared, key) == pytest.approx(curve(whole, key), rel=1e-6)
    assert curve(shared, "validation_tau") == curve(whole, "validation_tau") != []
    assert len(curve(whole)) == STEPS
    assert len(set(curve(whole))) == STEPS


def test_no_rank_holds_the_whole_target(found):
    for rank in found:
        shared, whole = rank["held"]
        assert shared < 0.6 * whole, "half of the layers, the embedding and the head"
    assert sum(rank["held"][0] for rank in found) >= whole


def test_what_training_reads_is_the_whole_targets(found):
    for rank in found:
        assert max(rank["parts"].values()) < 1e-5
        assert rank["parts"]["head_rows"] == rank["parts"]["embed"] == 0
    assert [rank["agreed"] for rank in found] == [0, 0]


def test_a_checksum_is_the_same_on_all_ranks_until_one_of_them_changes(found):
    first, second = found
    assert first["sums"] == second["sums"]
    assert first["sums"][0] == first["sums"][1]
    assert first["changed"] == second["changed"], "rank 0 hears of what changed on rank 1"
    assert first["changed"][0] != first["sums"][0]


# ---- on one rank


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_borrowed_is_the_targets_own(tmp_path: Path, tied: bool):
    """Without the layers; a head that starts from the target starts the same."""
    tiny_model(layers=4, tied=tied, dtype=torch.float32).save_pretrained(
        tmp_path, max_shard_size="20KB"
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    whole, borrowed = Pretrained(path=str(tmp_path), dtype="float32"), None
    borrowed, whole = whole.borrow(), whole.load()  # type: ignore[assignment]
    ids = torch.arange(12).view(2, 6)
    hidden = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(borrowed.embed(ids), whole.embed(ids))
    assert torch.equal(borrowed.head_rows(ids), whole.head_rows(ids))
    assert torch.equal(borrowed.logits(hidden), whole.logits(hidden))
    assert borrowed.revision == whole.revision
    assert borrowed.shape == whole.shape
    missing = [n for n, p in borrowed.named_parameters() if p.is_meta]
    assert len(missing) == 3 * len(list(whole.model.model.layers[0].parameters()))
    starts = []
    for target in (borrowed, whole):
        torch.manual_seed(0)
        drafter = Clover2(target.shape, heads=2, layers=1)
        drafter.initialise(target, lambda: torch.zeros(64))
        starts.append(drafter.state_dict())
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[1])
    with pytest.raises(AssertionError, match="only the embedding and the head"):
        borrowed(ids)


def test_a_target_that_changes_ends_training(place: Path, tmp_path: Path, monkeypatch):
    loaded: list[Target] = []
    load = Pretrained.load
    monkeypatch.setattr(
        Pretrained, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1]
    )
    made = build(stage(place, "medusa", None))
    from train.loop import Loop

    run = Loop.run

    def touching(self: Any, *given: Any) -> dict[str, float]:
        metrics = run(self, *given)
        weight = loaded[0].model.model.layers[1].mlp.up_proj.weight
        weight.data.view(torch.int32).view(-1)[7] ^= 1  # the last bit of one number
        return metrics

    monkeypatch.setattr(Loop, "run", touching)
    with pytest.raises(Failed, match=r"the target changed .*\(checksum [0-9a-f]{16} before, "):
        made.run(tmp_path, data=place / "answers")
    assert not (tmp_path / "artifact").exists()
    with pytest.raises(Failed):
        require_unchanged(loaded[0], "0" * 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_change_of_a_weight_changes_the_checksum(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr("train.placement.CHUNK", 100)
    target = Target(tiny_model(dtype=dtype), name="tiny")
    first = checksum(target)
    assert checksum(Target(tiny_model(dtype=dtype), name="other")) == first
    weight = target.model.model.layers[0].mlp.up_proj.weight.data
    seen = {first}
    swapped = [1, 0, *range(2, weight.shape[1])]
    changes: list[Any] = [lambda w: w.flip(0), lambda w: w[:, swapped], lambda w: -w]
    for change in [*changes, lambda w: w * 1.5]:
        before = weight.clone()
        weight.copy_(change(weight))
        seen.add(checksum(target))
        weight.copy_(before)
    assert len(seen) == 5
    layer = target.model.model.layers[0].mlp.up_proj
    layer.weight.data = weight.new_empty(0)  # a rank that has no part of it
    seen.add(checksum(target))
    layer.weight.data = weight
    assert len(seen) == 6
    assert checksum(target) == first


def test_tensor_parallel_is_for_decoding(place: Path):
    with pytest.raises(ValueError, match=r"for decoding: .* set target.parallel=zero3, or train"):
        build(stage(place, "medusa", "tensor")).check(["data"])
    config = stage(place, "lm", "tensor") | {"objective": {"_target_": "train.objectives.CE"}}
    build(config).check(["data"])  # reads no target
    config = stage(place, "medusa", "zero3")
    config["drafter"] = config["drafter"] | {"target_lora": {"rank": 4, "alpha": 8}}
    with pytest.raises(ValueError, match="changes its target, which must be whole"):
        build(config).check(["data"])
    with pytest.raises(ValueError, match=r"is zero3, which shards .* and this stage has one"):
        Pretrained(path=str(place / "target"), parallel="zero3").load()


def test_the_arithmetic_of_an_8b_target():
    """Qwen3-8B in bfloat16 on 8 ranks, by hand."""
    shape = Shape(151936, 4096, 36, 32, 8, 12288, 40960, head_dim=128)
    found = placement(shape, dtype="bfloat16", ranks=8, positions=10**7)
    layer = 2 * 4096 * 128 * (32 + 8) + 3 * 4096 * 12288 + 2 * 4096
    outside = 2 * 151936 * 4096 + 4096
    assert found.replicated == 2 * (36 * layer + outside)
    assert found.sharded == 2 * (36 * layer // 8 + layer + outside)
    assert found.borrowed == 2 * (outside + layer)
    assert found.cache == 10**7 * (2 * 4096 + 4 + 4)
    taps = Kept(4096, (2, 18, 33), "states", 0, "float8", True)
    less = placement(shape, dtype="bfloat16", ranks=1, positions=10**7, kept=taps)
    assert less.cache == 10**7 * (4 * (4096 + 4) + 4)
    assert less.sharded == less.replicated, "one rank holds everything"
    chosen, instead = found.lines("zero3", "bfloat16")
    assert chosen == "target in bfloat16: shared by 8 ranks, 4.3 GiB on each"
    assert "whole, 15.3 GiB of weights on each of 8 ranks (target.parallel=null)" in instead
    assert "cached, 76.4 GiB of disk for 10,000,000 positions in float16 and 2.7 GiB" in instead
