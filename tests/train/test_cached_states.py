"""A cache of the target's states: training on it gives what training on the target gives.

Shapes: B batch, T tokens, D target width.
"""

import json
import random
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from decoding.pretrained import Pretrained
from decoding.ranks import Ranks
from decoding.target import Shape
from tests.tiny import write_target, write_texts
from tests.train.composing import compose
from train import cache, recorded
from train.compose import bind, build
from train.plan import plan
from train.recorded import Kept, Recorded, require_sound, scaled

T, ROWS, STEPS = 32, 4, 6  # sequence length, sequences a step, steps
HEADS = {"draft_length": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "lm": {"_target_": "drafters.lm.LM", "layers": 1, "width": 64},
    "medusa": {"_target_": "drafters.medusa.Medusa", "heads": 2, "head": "shared", **HEADS},
    "clover2": {"_target_": "drafters.clover2.Clover2", "heads": 2, "layers": 1, **HEADS},
    "eagle3": {"_target_": "drafters.eagle3.Eagle3", "taps": [0, 1, 2], "steps": 2, **HEADS},
}
FREE = namedtuple("FREE", "total used free")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and answers of it."""
    folder = tmp_path_factory.mktemp("cache")
    write_target(folder / "target", write_texts(folder))
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


def target(place: Path) -> dict[str, Any]:
    path = str(place / "target")
    return {"_target_": "decoding.pretrained.Pretrained", "path": path, "dtype": "float32"}


def distill(place: Path, family: str, objective: str = "ForwardKL", **schedule: Any) -> Any:
    return {
        "_target_": "train.distill.Distill",
        "target": target(place),
        "drafter": FAMILIES[family],
        "objective": {"_target_": f"train.objectives.{objective}"},
        "validate_every": STEPS,
        "optim": {"_target_": "train.schedule.AdamW", "lr": 1e-3, "warmup": 0.2},
        "schedule": {
            "_target_": "train.schedule.Schedule",
            "tokens": STEPS * ROWS * T,
            "batch_tokens": ROWS * T,
            "sequence_length": T,
            "micro_batch": 4,
            "dtype": "float32",
            **schedule,
        },
    }


def caching(place: Path, family: str = "eagle3", **changes: Any) -> dict[str, Any]:
    made = {"_target_": "train.cache.CacheStates", "target": target(place)}
    made |= {"drafter": FAMILIES[family], "tokens": STEPS * ROWS * T, "sequence_length": T}
    return made | changes


def run(folder: Path, stage: dict[str, Any], **inputs: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    bind(stage, "stages.test")
    made = build(stage)
    made.check(inputs)
    return made.run(folder, **inputs)


def curve(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def caches(place: Path) -> dict[str, Path]:
    """Caches of everything that a family here can read, in both dtypes; their artifacts."""
    for dtype in ("float16", "float8"):
        run(place / dtype, caching(place, dtype=dtype, shard_mib=1), data=place / "answers")
    return {dtype: place / dtype / "artifact" for dtype in ("float16", "float8")}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_are_those_with_the_target_at_hand(
    place: Path, caches, family: str, tmp_path: Path, monkeypatch, capfd
):
    run(tmp_path / "online", distill(place, family), data=place / "answers")
    monkeypatch.setattr(Pretrained, "load", lambda *_, **__: pytest.fail("loaded the target"))
    for dtype, most in (("float16", 1e-3), ("float8", 1e-2)):
        run(tmp_path / dtype, distill(place, family), cache=caches[dtype])
        for key in ("loss", "validation_loss"):
            due = curve(tmp_path / "online", key)
            assert curve(tmp_path / dtype, key) == pytest.approx(due, rel=most)
    assert len(curve(tmp_path / "online")) == STEPS
    exact = [curve(tmp_path / name) for name in ("online", "float16", "float8")]
    assert len({tuple(each) for each in exact}) == 3, "they come from different states"
    assert "no decode-validation: a cache cannot decode" in capfd.readouterr().out


def test_the_likeliest_tokens_are_enough_for_an_lm(place: Path, tmp_path: Path, monkeypatch):
    """All of them give the law itself; a few give less. Not even the head is loaded."""
    run(tmp_path / "online", distill(place, "lm"), data=place / "answers")
    gaps = {}
    for k in (300, 20):
        stage = caching(place, "lm", keep="top_k", k=k)
        run(tmp_path / f"cache{k}", stage, data=place / "answers")
        with monkeypatch.context() as patch:
            for method in ("load", "borrow"):
                patch.setattr(Pretrained, method, lambda *_, **__: pytest.fail("loaded it"))
            run(tmp_path / f"{k}", distill(place, "lm"), cache=tmp_path / f"cache{k}" / "artifact")
        pairs = zip(curve(tmp_path / f"{k}"), curve(tmp_path / "online"), strict=True)
        gaps[k] = max(abs(a / b - 1) for a, b in pairs)
    assert gaps[300] < 1e-5
    assert 0.01 < gaps[20] < 0.5
    note = json.loads((tmp_path / "cache20" / "artifact" / "cache.json").read_text())
    assert not note["kept"]["everywhere"], "an lm reads the target before supervised tokens only"


def test_eagle3_reads_taps_and_takes_its_law_from_the_likeliest_tokens(
    place: Path, tmp_path: Path, capfd
):
    run(tmp_path / "online", distill(place, "eagle3"), data=place / "answers")
    run(tmp_path / "cache", caching(place, keep="top_k", k=300), data=place / "answers")
    run(tmp_path / "cached", distill(place, "eagle3"), cache=tmp_path / "cache" / "artifact")
    assert curve(tmp_path / "cached") == pytest.approx(curve(tmp_path / "online"), rel=1e-3)
    assert "the 300 likeliest tokens and 3 tapped" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"reads the target's last states; it holds laws"):
        run(tmp_path / "m", distill(place, "medusa"), cache=tmp_path / "cache" / "artifact")


def test_a_cache_says_its_size_before_it_is_made_and_has_it_then(
    place: Path, tmp_path: Path, capfd, monkeypatch
):
    found = run(tmp_path, caching(place, shard_mib=1), data=place / "answers")
    said = capfd.readouterr().out
    each = 4 * (64 * 2 + 4) + 4  # the last state and three taps, each with a scale; and the place
    assert f"{found['positions']:,} positions x {each} bytes" in said
    files = list((tmp_path / "artifact" / "states").glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert size == pytest.approx(found["cache_bytes"], rel=0.02)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: FREE(2**40, 0, 2**30))
    monkeypatch.setattr(Pretrained, "load", lambda *_, **__: pytest.fail("loaded the target"))
    with pytest.raises(OSError, match=r"the cache needs .* and 1.0 GiB to spare, and 1.0 GiB are"):
        run(tmp_path / "small", caching(place), data=place / "answers")


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each shard was written, and what is in it."""
    shards = (folder / "artifact" / "states").glob("*.safetensors")
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in shards}


def test_a_cache_goes_on_where_it_was_killed_and_mends_what_is_damaged(
    place: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(recorded, "rows_a_shard", lambda *_: 5)
    stage, data = caching(place), place / "answers"
    run(tmp_path / "straight", stage, data=data)
    whole = files(tmp_path / "straight")
    assert len(whole) > 4
    write, calls = cache.write, []

    def deadly(*given: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*given)

    monkeypatch.setattr(cache, "write", deadly)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stage, data=data)
    monkeypatch.setattr(cache, "write", write)
    before = files(tmp_path / "killed")
    assert len(before) == 3
    assert not (tmp_path / "killed" / "artifact" / "cache.json").exists()
    run(tmp_path / "killed", stage, data=data)
    after = files(tmp_path / "killed")
    assert {name: raw for name, (_, raw) in after.items()} == {
        n: raw for n, (_, raw) in whole.items()
    }
    assert all(after[name] == before[name] for name in before), "what was there is not made again"

    first = sorted(after)[0]
    damaged = tmp_path / "killed" / "artifact" / "states" / first
    raw = bytearray(damaged.read_bytes())
    raw[-1] ^= 1
    damaged.write_bytes(raw)
    with pytest.raises(OSError, match=f"the hash of {first} .*Delete it and .*DONE and run") as why:
        run(tmp_path / "trained", distill(place, "eagle3"), cache=tmp_path / "killed" / "artifact")
    assert "1 of" in str(why.value)
    damaged.unlink()
    run(tmp_path / "killed", stage, data=data)
    mended = files(tmp_path / "killed")
    assert mended[first][1] == whole[first][1]
    assert all(mended[name] == after[name] for name in after if name != first)
    damaged.write_bytes(raw[:-9])
    with pytest.raises(OSError, match="bytes, expected"):
        require_sound(tmp_path / "killed" / "artifact", Ranks())


def test_a_full_disk_leaves_no_half_file(place: Path, tmp_path: Path, monkeypatch):
    def full(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, caching(place), data=place / "answers")
    assert list((tmp_path / "artifact" / "states").iterdir()) == []


def test_a_cache_of_something_else_is_refused(place: Path, caches, tmp_path: Path):
    run(tmp_path / "lm", caching(place, "lm"), data=place / "answers")
    of_lm, of_eagle3 = tmp_path / "lm" / "artifact", caches["float16"]
    with pytest.raises(ValueError, match=r"reads the tapped layers \[0, 1, 2\]; it holds \[\]"):
        run(tmp_path / "a", distill(place, "eagle3"), cache=of_lm)
    with pytest.raises(ValueError, match="reads states of all tokens; it holds those before"):
        run(tmp_path / "b", distill(place, "medusa"), cache=of_lm)
    with pytest.raises(ValueError, match="the cache is of length 32 and training asks for 16"):
        run(tmp_path / "c", distill(place, "lm", sequence_length=16), cache=of_eagle3)
    other = shutil.copytree(place / "target", tmp_path / "target")
    (other / "more.txt").write_text("another model")
    stage = distill(place, "medusa")
    stage["target"] = stage["target"] | {"path": str(other)}
    with pytest.raises(ValueError, match=r"the cache is of target .* and training asks for"):
        run(tmp_path / "d", stage, cache=of_eagle3)
    stage = distill(place, "lm")
    stage["target"] = stage["target"] | {"path": str(other.rename(tmp_path / "another"))}
    with pytest.raises(ValueError, match=r"the cache is of target target and .* for another"):
        run(tmp_path / "g", stage, cache=of_lm)
    with pytest.raises(ValueError, match="reads nothing of the target"):
        run(tmp_path / "e", distill(place, "lm", "CE"), cache=of_eagle3)
    changing = distill(place, "medusa")
    changing["drafter"] = changing["drafter"] | {"target_lora": {"rank": 4, "alpha": 8}}
    with pytest.raises(ValueError, match="changes its target, which must be whole"):
        run(tmp_path / "f", changing, cache=of_eagle3)
    with pytest.raises(ValueError, match="more than a cache"):
        build(distill(place, "medusa")).check(["cache", "data"])


def test_a_sequence_is_known_by_its_tokens(place: Path, caches):
    folder = caches["float16"]
    pretrained = build(target(place))
    known = Recorded(
        folder, shape=pretrained.shape_of(), dtype=torch.float32, borrowed=pretrained.borrow()
    )
    whole = pretrained.load()
    batch = recorded.Packed(folder / "packed" / "train").batch([3, 0])
    for taps in ((), (2, 0)):
        found = known(batch.ids_BT, doc_BT=batch.doc_BT, taps=taps)
        due = whole(batch.ids_BT, doc_BT=batch.doc_BT, taps=taps)
        here = batch.doc_BT >= 0
        torch.testing.assert_close(
            found.hidden_BTD[here], due.hidden_BTD[here], rtol=1e-3, atol=1e-3
        )
        if taps:
            torch.testing.assert_close(
                found.taps_BTLD[here], due.taps_BTLD[here], rtol=1e-3, atol=1e-3
            )
    assert torch.equal(known.head_rows(batch.ids_BT), whole.head_rows(batch.ids_BT))
    other = batch.ids_BT.roll(1, dims=1)
    with pytest.raises(ValueError, match="a sequence is not in the cache"):
        known(other, doc_BT=batch.doc_BT)


def test_bfloat16_states_are_kept_exactly_in_float16():
    values = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[3] *= 1e20  # past the range of float16
    values[4] *= 1e-20
    kept, scale = scaled(values, "float16")
    assert torch.equal((kept.float() * scale[:, None]).bfloat16(), values)
    kept, scale = scaled(values, "float8")
    assert kept.dtype == torch.float8_e4m3fn
    due, got = values.double(), kept.double() * scale[:, None]
    gap = (got - due).norm(dim=1) / due.norm(dim=1)
    assert 0.005 < gap.max() < 0.05
    assert torch.equal(scaled(torch.zeros(2, 4), "float8")[0].float(), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("medusa", {"keep": "top_k"}, "Medusa reads the target's last states.* set keep=states"),
        ("lm", {"keep": "all"}, "cache.keep is 'all'"),
        ("lm", {"dtype": "int8"}, "cache.dtype 'int8'.* float16 or float8"),
        ("lm", {"tokens": 8}, "tokens at least one sequence"),
        ("lm", {"k": 0}, "k 0, .*each must be at least 1"),
    ],
)
def test_what_cannot_be_cached_is_refused(place: Path, family: str, changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        build(caching(place, family, **changes))


def test_data_from_nowhere_or_from_both_is_refused(place: Path):
    with pytest.raises(ValueError, match="it has neither"):
        build(caching(place)).check([])
    build(caching(place)).check(["data"])


def test_bytes_of_a_position_are_counted():
    """A last state and two taps of 4,096 in float16, or 64 tokens with their log-probabilities."""
    kept = Kept(4096, (2, 18), "states", 0, "float16", True)
    assert kept.bytes == 3 * (8192 + 4) + 4
    assert Kept(4096, (2, 18), "states", 0, "float8", True).bytes == 3 * (4096 + 4) + 4
    assert Kept(4096, (), "top_k", 64, "float16", False).bytes == 64 * 8 + 4


def test_shards_hold_what_their_note_says(caches):
    folder = caches["float8"]
    note = require_sound(folder, Ranks())
    for shard in note["shards"]:
        with safe_open(str(folder / "states" / shard["file"]), "pt") as opened:
            assert opened.get_tensor("last").dtype == torch.float8_e4m3fn
            assert len(opened.get_tensor("count")) == shard["rows"]
            assert int(opened.get_tensor("count").sum()) == shard["positions"]


def test_a_recipe_can_train_from_a_cache(tmp_path: Path):
    """One line puts the stage between the answers and the training on them."""
    words = ["recipe=quickstart", "drafter=medusa", "+stage@stages.cache=cache"]
    words += ["stages.cache.tokens=8192", "stages.cache.needs={target: target, data: generate}"]
    words += ["stages.finetune.needs.data=null", "stages.finetune.needs.cache=cache"]
    planned = {stage.name: stage for stage in plan(compose(*words), tmp_path)}
    made = build(planned["cache"].config)
    assert isinstance(made, cache.CacheStates)
    assert made.kept(Shape(8, 128, 4, 2, 2, 64, 64)).everywhere
    assert planned["finetune"].inputs["cache"] == planned["cache"].folder / "artifact"
    assert "data" not in planned["finetune"].inputs
