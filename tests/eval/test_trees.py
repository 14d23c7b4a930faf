"""The tree that is chosen: hit rates counted by hand, costs made up, and the table of families."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from decoding.target import Shape
from drafters.base import Batch
from drafters.lm import LM
from drafters.medusa import Medusa
from drafters.trees import Chain, Dynamic, Static
from eval.cost import level_milliseconds
from eval.shapes import Shape as DraftShape
from eval.shapes import shapes_of
from eval.shootout import Shootout
from eval.tune_tree import _ranks, fastest
from tests.drafters.contract import TRAINED, build, packed, teacher_forced
from tests.toys import tiny_target

RATE = {(0,): 0.6, (1,): 0.2, (0, 0): 0.4, (2,): 0.1, (0, 1): 0.1, (0, 0, 0): 0.3}
FLAT = {1: 1.0, 64: 1.0}


@pytest.mark.parametrize("family", ["eagle", "lm"])
def test_ranks_are_those_of_teacher_forcing(family: str):
    """Each level's rank is counted for the token that head guesses, in the document alone."""
    target = tiny_target(vocab=40, seed=0, tied=False)
    drafter = build(family, target.shape, steps=3).double().eval()
    batch = packed(40)
    ranks_BTK = _ranks(drafter, batch, target, 3)
    checked = 0
    for b in range(2):
        for doc in (d for d in batch.doc_BT[b].unique_consecutive().tolist() if d >= 0):
            places = (batch.doc_BT[b] == doc).nonzero()[:, 0].tolist()
            laws = teacher_forced(drafter, batch.ids_BT[b, places].tolist(), target)
            for (i, place), k in itertools.product(enumerate(places), range(3)):
                label = i + 2 + k
                if label >= len(places) or place >= ranks_BTK.shape[1]:
                    continue
                logits = laws[0 if family == "lm" else k][label]
                token = batch.ids_BT[b, places[label]]
                due = int((logits > logits[token]).sum())
                if not batch.mask_BT[b, places[label]]:
                    due = -1
                assert int(ranks_BTK[b, place, k]) == due
                checked += due >= 0
    assert checked > 20


def test_free_verification_takes_all_and_costs_stop_it():
    """With nothing to pay every place helps; when each verified token costs, few do; when a level
    costs too much, the tree is flat."""
    everything, speed = fastest(RATE, FLAT, 0.0, FLAT | {1: 0.0, 64: 0.0})
    assert set(everything) == set(RATE)
    assert speed == pytest.approx(1 + sum(RATE.values()))
    steep = {m: 1.0 + 0.3 * (m - 1) for m in (1, 2, 64)}
    few, _ = fastest(RATE, steep, 0.0, {1: 0.0, 64: 0.0})
    assert set(few) == {(0,), (0, 0)}
    flat, _ = fastest(RATE, FLAT, 0.0, {1: 5.0, 64: 5.0})
    assert set(flat) == {(0,), (1,), (2,)}


def test_the_choice_is_the_best_of_all_trees():
    """Brute force over every set of places that is closed under parents."""
    verify = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.9}
    level = {1: 0.2, 2: 0.25, 64: 0.3}
    _, speed = fastest(RATE, verify, 0.3, level)
    best = 0.0
    for n in range(1, len(RATE) + 1):
        for tree in itertools.combinations(RATE, n):
            if all(p[:-1] in tree for p in tree if len(p) > 1):
                depth = max(map(len, tree))
                inner = [len({p[:-1] for p in tree if len(p) == d}) for d in range(2, depth + 1)]
                drafting = 0.3 + sum(0.2 if w == 1 else 0.25 for w in inner)
                cost = {2: 1.1, 3: 1.15, 4: 1.2, 5: 1.375, 6: 1.55, 7: 1.725}[n + 1]
                best = max(best, (1 + sum(RATE[p] for p in tree)) / (cost + drafting))
    assert speed == pytest.approx(best)


def test_what_a_drafter_can_draft(tmp_path: Path):
    """Chains no longer than there are heads, and trees never deeper."""
    shape = Shape(40, 32, 8, 4, 4, 64, 128)
    (tmp_path / "tree.json").write_text('{"kind": "static", "paths": [[0], [1], [0, 0]]}')
    trees = [{"kind": "dynamic", "top_k": 2, "depth": d, "nodes": 3} for d in (2, 9)]
    medusa = Medusa(shape, heads=3)
    found = [str(s) for s in shapes_of(medusa, [2, 3, 5, 7], trees, tmp_path)]
    assert found == [
        "chain of 2",
        "chain of 3",
        "tuned static tree of 3 nodes, 2 deep",
        "dynamic tree of 3 nodes, 2 deep (top_k 2)",
    ]
    found = [str(s) for s in shapes_of(LM(shape, width=64), [2, 5], trees, tmp_path)]
    assert found == [
        "chain of 2",
        "chain of 5",
        "tuned static tree of 3 nodes, 2 deep",
        "dynamic tree of 3 nodes, 2 deep (top_k 2)",
        "dynamic tree of 3 nodes, 9 deep (top_k 2)",
    ]
    chosen = shapes_of(medusa, [2], trees, tmp_path)
    chosen[1].give(medusa)
    assert isinstance(medusa.tree, Static)
    chosen[2].give(medusa)
    assert isinstance(medusa.tree, Dynamic)
    DraftShape(length=2).give(medusa)
    assert medusa.tree is None
    assert Chain(medusa.draft_length).depth == 2


def report(folder: Path, name: str, speed: float) -> Path:
    """A bench stage's artifact and the training stage that it points to, with what is read."""
    train, bench = folder / f"train-{name}", folder / f"bench-{name}"
    (bench / "artifact").mkdir(parents=True)
    train.mkdir()
    estimate = {"value": speed, "low": speed - 0.1, "high": speed + 0.1, "n": 9}
    cell = {"arm": "drafter", "batch": 1, "temperature": 0.0}
    cell["acceptance"] = [{"conditional": {"value": 0.5}}, {"conditional": {"value": None}}]
    whole = {
        "passed": name != "broken",
        "headline": [{"temperature": 0.0, "speedup": estimate, "tau": estimate, "n": 9}],
        "table": [cell],
        "conditions": {"draft_shape": "chain of 2", "parameters_drafter": 1234},
    }
    if name == "slow":
        whole["conditions"]["target_change"] = {"said": "it was changed"}
    (bench / "artifact" / "report.json").write_text(json.dumps(whole))
    note = {"inputs": {"drafter": str(train / "artifact")}}
    (bench / "stage.json").write_text(json.dumps(note))
    config = {"schedule": {"tokens": 5000}, "optim": {"lr": 0.1}}
    before = folder / "pretrain"
    before.mkdir(exist_ok=True)
    (before / "stage.json").write_text(
        json.dumps({"config": {"schedule": {"tokens": 2000}}, "inputs": {}})
    )
    inputs = {"drafter": str(before / "artifact")}
    (train / "stage.json").write_text(json.dumps({"config": config, "inputs": inputs}))
    (train / "result.json").write_text('{"tokens_per_second": 77.0, "peak_memory_mib": 99.0}')
    return bench / "artifact"


def test_the_shootout_puts_the_fastest_first_and_shows_a_failed_control(tmp_path: Path):
    reports = {
        n: report(tmp_path, n, s) for n, s in {"slow": 1.1, "fast": 2.1, "broken": 9}.items()
    }
    metrics = Shootout().run(tmp_path / "out", **reports)
    lines = (tmp_path / "out" / "artifact" / "shootout.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "broken (a control FAILED)",
        "fast",
        "slow (target CHANGED)",
    ]
    assert "0.50 -" in lines[3]
    assert "99 MiB" in lines[3]
    assert "| 7,000 |" in lines[3]  # with what it was pretrained on
    assert metrics["speedup_fast"] == 2.1
    assert (tmp_path / "out" / "artifact" / "shootout.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="needs the bench stage of each family"):
        Shootout().run(tmp_path)


def test_padding_is_no_hit():
    """A tuned tree counts answers only: nothing in the prompt, nothing behind the end."""
    target = tiny_target(vocab=40, seed=0, tied=False)
    ids = torch.arange(1, 13)[None]
    mask, doc = torch.zeros_like(ids).bool(), torch.zeros_like(ids)
    mask[0, 5:9], doc[0, 9:] = True, -1
    ranks = _ranks(Medusa(target.shape, heads=2).double(), Batch(ids, mask, doc), target, 2)
    assert (ranks[0, :, 0] >= 0).nonzero()[:, 0].tolist() == [3, 4, 5, 6]
    assert (ranks[0, :, 1] >= 0).nonzero()[:, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("family", TRAINED)
def test_every_family_can_be_timed(family: str):
    """Level by level, by parameters that want gradients, as the stage loads them."""
    target = tiny_target()
    drafter: Any = build(family, target.shape).double()
    drafter.tree = Static([[0], [1], [2], [0, 0]])
    first, level = level_milliseconds(target, drafter, [1, 3], context=8, repeats=2)
    assert first > 0
    assert set(level) == {1, 3}
    assert min(level.values()) > 0
