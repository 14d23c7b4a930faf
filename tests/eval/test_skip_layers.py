"""The search for layers to skip: it finds what is there, says what it cost, and whether it pays."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import tiny_model

from data.sources import prompt_key
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.layer_skip import LayerSkip
from eval.skip_layers import Mask, SkipLayers, Sums, layers_of, mask_of, search


def planted(layers: int, seed: int) -> Mask:
    rng = random.Random(seed)
    return tuple(rng.random() < 0.4 for _ in range(2 * layers))


def likeness(mask: Mask, best: Mask, valley: float = 0.0) -> float:
    """How many entries are right; less a valley where all but one are."""
    wrong = sum(a != b for a, b in zip(mask, best, strict=True))
    return float(len(best) - wrong) - (valley if wrong == 1 else 0.0)


@pytest.mark.parametrize(
    ("layers", "trials", "valley"), [(6, 250, 1.5), (8, 200, 0.0), (24, 900, 0.0)]
)
def test_the_planted_mask_is_found(layers, trials, valley):
    """Out of 2^12 to 2^48; across a valley it takes a change of two entries."""
    for seed in range(3):
        best = planted(layers, seed)
        asked: list[Mask] = []

        def objective(mask: Mask, best: Mask = best, asked: list[Mask] = asked) -> float:
            asked.append(mask)
            return likeness(mask, best, valley)

        tried = search(objective, layers, trials, seed)
        assert max(tried, key=lambda mask: tried[mask]) == best
        assert len(asked) == len(set(asked)) == len(tried) == trials
        assert not any(mask == (False,) * (2 * layers) for mask in asked)
        usual = layers_of(asked[0])
        assert usual["attention"] == usual["mlp"] == list(range(1, layers - 1, 2))


def test_few_layers_are_tried_whole_and_the_seed_decides_the_rest():
    assert len(search(lambda mask: 0.0, 2, 200)) == 15
    assert list(search(sum, 6, 40, seed=1)) == list(search(sum, 6, 40, seed=1))
    assert list(search(sum, 6, 40, seed=1)) != list(search(sum, 6, 40, seed=2))


def test_masks_and_layers_are_the_same_thing():
    mask = (False, True, False, True, True, False)
    assert layers_of(mask) == {"attention": [1], "mlp": [0, 1]}
    assert mask_of(layers_of(mask), 3) == mask


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of three layers and the answers of a generate stage: 9 prompts, one twice."""
    folder = tmp_path_factory.mktemp("skip")
    tiny_model(layers=3, seed=6, tied=False, dtype=torch.float32).save_pretrained(folder / "target")
    (folder / "data").mkdir()
    answered = [{"prompt_ids": [k + 1, k + 2, 3], "answer_ids": [4, 5]} for k in range(9)]
    rows = [{"prompt": f"prompt {k}", "samples": [s]} for k, s in enumerate(answered)]
    text = "".join(json.dumps(row) + "\n" for row in [*rows, rows[2]])
    (folder / "data" / "shard-00000.jsonl").write_text(text)
    return folder


def stage(place: Path, cls: type[SkipLayers] = SkipLayers, **more: Any) -> SkipLayers:
    target = Pretrained(path=str(place / "target"), dtype="float32")
    return cls(target=target, **{"trials": 30, "prompts": 4, "max_new_tokens": 12, **more})


BEST = mask_of({"attention": [0, 2], "mlp": [1]}, 3)


class Faked(SkipLayers):
    """Seconds by likeness to a planted mask; a note of who was asked what."""

    plain = 10.0

    def measure(self, model: Any, mask: Mask | None, prompts: list[list[int]]) -> Sums:
        self.__dict__.setdefault("asked", []).append((mask, [ids[0] for ids in prompts]))
        pace = self.plain if mask is None else 5 + likeness(mask, BEST)
        tokens = 30.0 * len(prompts)
        sums = {"tokens": tokens, "seconds": tokens / pace, "rounds": 10.0, "draft_steps": 25.0}
        return sums | {"accepted": 20.0, "cut": 5.0, "draft_seconds": 1.0, "verify_seconds": 1.0}


@pytest.mark.parametrize(("plain", "pays"), [(10.0, True), (22.0, False)])
def test_what_is_found_and_what_it_cost(place, tmp_path, capsys, plain, pays):
    """The best mask, on prompts that it was not searched on; a slow one is said to be slow."""
    made = stage(place, Faked)
    made.plain = plain  # type: ignore[attr-defined]
    metrics = made.run(tmp_path, data=place / "data")
    note = json.loads((tmp_path / "artifact" / "layers.json").read_text())
    assert (note["attention"], note["mlp"]) == ([0, 2], [1])
    assert note["tokens_per_second"] == pytest.approx(11)
    assert note["plain_tokens_per_second"] == pytest.approx(plain)
    assert note["speedup"] == metrics["speedup"] == pytest.approx(11 / plain)
    assert note["alpha"] == 20 / 25
    assert note["cost"] == (1.0 / 25) / (1.0 / 10)
    assert note["search"]["trials"] == 30
    assert note["search"]["prompts"] == note["prompts"] == 4
    assert note["search"]["tokens"] == 30 * 4 * 30
    asked = made.asked  # type: ignore[attr-defined]
    searching = {first for mask, firsts in asked[1:31] for first in firsts}
    comparing = [(mask, firsts) for mask, firsts in asked[31:]]
    fresh = {first for _, firsts in comparing for first in firsts}
    by_hash = sorted(range(9), key=lambda k: prompt_key(f"prompt {k}"))
    assert searching == {k + 1 for k in by_hash[:4]}
    assert fresh == {k + 1 for k in by_hash[4:8]}
    assert [mask is None for mask, _ in comparing] == [True, False, False, False] * 12  # in turn
    said = capsys.readouterr().out
    assert ("No mask that was tried beats plain decoding" in said) != pays
    assert f"{11 / plain:.2f}x as fast as plain decoding on 4 prompts that it was not" in said
    assert "30 masks on 4 prompts, 3,600 tokens" in said


def test_a_search_that_was_stopped_goes_on(place, tmp_path):
    """Masks that were measured are not measured again, and the outcome is the same."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = stage(place, Faked)
    whole.run(tmp_path / "whole", data=place / "data")
    file = tmp_path / "stopped" / "trials.jsonl"
    lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 30
    file.write_text("".join(lines[:17]))
    again = stage(place, Faked)
    again.run(tmp_path / "stopped", data=place / "data")
    once, later = (len(made.asked) for made in (whole, again))  # type: ignore[attr-defined]
    assert once - later == 17
    notes = [tmp_path / name / "artifact" / "layers.json" for name in ("whole", "stopped")]
    assert notes[0].read_text() == notes[1].read_text()
    assert file.read_text() == "".join(lines)


def test_a_real_search_ends_in_a_drafter(place, tmp_path):
    """Measured on this machine, whatever it is worth there."""
    metrics = stage(place, trials=5, prompts=2, repeats=1).run(tmp_path, data=place / "data")
    assert 0 <= metrics["alpha"] <= 1
    assert 1 <= metrics["tau"] <= 9
    assert min(metrics["speedup"], metrics["cost"]) > 0
    note = json.loads((tmp_path / "artifact" / "layers.json").read_text())
    assert note["search"]["tokens"] == 5 * 2 * 12
    target = Pretrained(path=str(place / "target"), dtype="float32").load()
    drafter = LayerSkip.found(tmp_path / "artifact")
    assert drafter.attention == note["attention"]
    options: dict[str, Any] = {"sampling": Sampling(), "max_new_tokens": 12}
    plain, ours = (decode(target, d, [[3, 4, 5]], **options).answers for d in (None, drafter))
    assert ours[0].ids == plain[0].ids


def test_sums_are_those_of_the_rounds(place):
    """With nothing skipped every draft is accepted: the counts are known."""
    target = Pretrained(path=str(place / "target"), dtype="float32").load()
    made = stage(place, draft_length=3, threshold=0.0)
    sums = made.measure(target, (False,) * 6, [[3, 4, 5], [9, 8]])
    assert {k: sums[k] for k in ("tokens", "rounds", "draft_steps", "accepted", "cut")} == {
        "tokens": 24, "rounds": 6, "draft_steps": 18, "accepted": 18, "cut": 0,
    }  # fmt: skip
    assert 0 < sums["draft_seconds"] + sums["verify_seconds"] < sums["seconds"]
    assert made.measure(target, None, [[3, 4, 5]])["rounds"] == 12


def test_bad_input_is_refused(place, tmp_path):
    with pytest.raises(ValueError, match="trials 0"):
        stage(place, trials=0)
    with pytest.raises(ValueError, match="threshold is 2"):
        stage(place, threshold=2.0)
    (tmp_path / "data").mkdir()
    text = (place / "data" / "shard-00000.jsonl").read_text().splitlines()[0]
    (tmp_path / "data" / "shard-00000.jsonl").write_text(text)
    with pytest.raises(ValueError, match="has 1 different prompts"):
        stage(place).run(tmp_path, data=tmp_path / "data")
