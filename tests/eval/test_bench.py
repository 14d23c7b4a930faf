"""Bench with a drafter that changes its target, and with a lossy arm: both say what they are."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.sources import Local
from decoding.adapter import Adapted
from decoding.pretrained import Pretrained
from decoding.verify import Typical
from drafters.base import Batch, save
from drafters.medusa import Medusa
from eval import arms, bench
from tests.tiny import write_chats, write_target, write_texts
from train.objectives import CE

ARGUMENTS = {"heads": 3, "target_lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, chats, and a drafter that has pulled the target away from what it was."""
    folder = tmp_path_factory.mktemp("bench")
    write_target(folder / "target", write_texts(folder), ends=20)
    write_chats(folder)
    spec = Pretrained(path=str(folder / "target"), dtype="float32")
    target = spec.load()
    torch.manual_seed(0)
    drafter = Medusa(target.shape, **ARGUMENTS)
    drafter.initialise(target, lambda: torch.empty(0))
    ids_BT = torch.randint(6, 290, (8, 16))
    batch = Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT))
    learning = drafter.learning(target)
    optimiser = torch.optim.AdamW(drafter.parameters(), lr=2e-2)
    for _ in range(5):
        optimiser.zero_grad()
        drafter(batch, learning, CE())[0].backward()
        optimiser.step()
    save(drafter, folder / "drafter", ARGUMENTS)
    spec.tokenizer().save_pretrained(folder / "drafter")
    return folder


def measured(place: Path, out: Path, **more: Any) -> dict[str, Any]:
    stage = bench.Bench(
        target=Pretrained(path=str(place / "target")),
        prompts={"chat": Local(files=[str(place / "chat.jsonl")], prompt="{question}")},
        **{"heldout_only": False, "limit": 4, "max_new_tokens": 12, "repeats": 1},
        **{"temperatures": [0.0, 1.0], "batch_sizes": [1], "draft_lengths": [3]},
        **{"trial_prompts": 1, "control_prompts": 2, "dtype": "float32"},
        **more,
    )
    out.mkdir()
    stage.run(out, drafter=place / "drafter")
    return json.loads((out / "artifact" / "report.json").read_text())


def test_a_changed_target_is_said_to_be_one(place: Path, tmp_path: Path, monkeypatch):
    decoded = []
    true = arms.decode

    def noting(model, drafter, *rest, **options):
        decoded.append((type(drafter).__name__, isinstance(model, Adapted)))
        return true(model, drafter, *rest, **options)

    monkeypatch.setattr(arms, "decode", noting)
    others = SimpleNamespace(since=lambda: (2.0, 3.0))  # one and a half cores
    monkeypatch.setattr("eval.runs.Others", lambda: others)
    monkeypatch.setattr("eval.others.cores", list)
    report = measured(place, tmp_path / "out")
    # the baseline is the original; the drafter decodes with the target that it was trained for
    assert set(decoded) == {("NoneType", False), ("Medusa", True)}
    assert report["passed"], report["controls"]
    assert report["conditions"]["other_work"] == 1.5
    change = report["conditions"]["target_change"]
    assert change["perplexity"]["adapted"] > change["perplexity"]["original"]
    assert report["conditions"]["rule"].endswith("(lossless): for the changed target, not for the "
                                                 "original")  # fmt: skip
    text = (tmp_path / "out" / "artifact" / "report.md").read_text()
    assert "Mind: the target was changed" in text


def test_a_lossy_arm_says_so_wherever_it_stands(place: Path, tmp_path: Path):
    report = measured(place, tmp_path / "out", typical=Typical())
    found = {row["arm"] for row in report["table"]}
    assert found == {"autoregressive", "drafter", arms.LOSSY}
    assert "LOSSY" in arms.LOSSY
    assert all(arms.LOSSY in entry["against"] for entry in report["headline"])
