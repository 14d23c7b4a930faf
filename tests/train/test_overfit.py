"""A drafter that knows its prompts by heart drafts them; with a fault planted anywhere on the way
it does not, and is told so.

Shapes: N predictions, T tokens.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.documents import is_validation
from data.generate import read
from data.sources import Local
from decoding.pretrained import Pretrained
from decoding.target import Target
from drafters.base import Batch, Blueprint, Trained, load
from drafters.heads import pair_mask
from eval.controls import Failed
from tests.tiny import write_chats, write_target, write_texts
from tests.train.composing import compose
from train import overfit, serveable
from train.compose import build
from train.objectives import CE
from train.overfit import (
    BAR,
    Overfit,
    Pair,
    Position,
    _common,
    _guesses,
    _rows,
    fault_of,
    measure,
)

FAMILIES = ("lm", "medusa", "hydra_heads", "clover", "clover2", "eagle", "eagle3", "medusa2")
QUICK = ("lm", "medusa", "eagle3")
SMALL: dict[str, dict[str, Any]] = {"lm": {"width": 64}, "eagle3": {"taps": [0, 1]}}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target with text of its own, and questions."""
    folder = tmp_path_factory.mktemp("overfit")
    write_target(folder / "target", write_texts(folder))
    write_chats(folder)
    return folder


def blueprint(family: str) -> Blueprint:
    config = compose("recipe=quickstart", f"drafter={family}")["drafter"]
    return build(config | SMALL.get(family, {}))


def stage(place: Path, family: str, **settings: Any) -> Overfit:
    """Small and quick: six answers of 24 tokens."""
    made = Overfit(
        target=Pretrained(path=str(place / "target")),
        drafter=blueprint(family),
        prompts=Local(files=[str(place / "chat.jsonl")], prompt="{question}"),
        **{"count": 6, "max_new_tokens": 24, "steps": 150, **settings},
    )
    return made


@pytest.fixture(scope="module")
def trained(place: Path) -> Callable[[str], tuple[Path, dict[str, float]]]:
    """A family's stage, run once, without engines: its folder and what it returned."""
    done: dict[str, tuple[Path, dict[str, float]]] = {}

    def run(family: str) -> tuple[Path, dict[str, float]]:
        if family not in done:
            steps = 150 if family in QUICK else 300  # as configured
            made, out = stage(place, family, steps=steps), place / family
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(serveable.Engines, "serve", lambda *a: {})
                done[family] = out, made.run(out)
        return done[family]

    return run


def known(out: Path) -> list[Pair]:
    """What a stage trained on."""
    return [(s["prompt_ids"], s["answer_ids"]) for s in read(out / "answers")]


def loaded(place: Path, out: Path) -> tuple[Target, Trained]:
    target = Pretrained(path=str(place / "target"), dtype="float32").load()
    return target, load(out / "training" / "artifact", target.shape)


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.soak) for f in FAMILIES]
)
def test_a_healthy_family_drafts_what_it_has_learnt(family: str, trained, place: Path):
    out, found = trained(family)
    rates = [found[f"acceptance_{k}"] for k in (1, 2, 3, 4)]
    assert min(rates) >= BAR + 0.05  # the bar lies well below
    assert 4.3 < found["tau"] <= 5
    told = json.loads((out / "artifact" / "overfit.json").read_text())
    assert [p["acceptance"] for p in told["positions"]] == rates
    assert all(p["drafted"] > 20 for p in told["positions"])
    assert not (out / "training" / "checkpoints").exists()


def spoilt(place: Path, out: Path, spoil: Callable[[Any], object]) -> list[Position]:
    """The positions of a trained drafter in which something has been changed since."""
    target, drafter = loaded(place, out)
    with torch.no_grad():
        spoil(drafter)
    return measure(target, drafter, known(out))[0]


def _other_taps(drafter: Any) -> None:
    drafter.taps = tuple(k + 1 for k in drafter.taps)


def _other_order(drafter: Any) -> None:
    for heads in (drafter.blocks, drafter.lm_heads):
        heads[1], heads[2] = heads[2], heads[1]


def _no_biases(drafter: Any) -> None:
    for name, parameter in drafter.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


FAULTS = {  # after training: the family, the fault, the first position that shows it
    "taps one layer off": ("eagle3", _other_taps, 1),
    "heads in another order": ("medusa", _other_order, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_drafter_that_is_read_otherwise_than_it_was_trained(fault: str, trained, place: Path):
    family, spoil, position = FAULTS[fault]
    found = spoilt(place, trained(family)[0], spoil)
    assert found[position - 1].rate < 0.6
    assert all(p.rate >= BAR for p in found[: position - 1])
    assert f"guesses at position {position} are accepted" in str(fault_of(found))
    assert fault_of(spoilt(place, trained(family)[0], lambda drafter: None)) is None


def test_what_it_does_not_see(trained, place: Path):
    """So that the docstring stays true: heads draft a few answers without their biases."""
    assert fault_of(spoilt(place, trained("medusa")[0], _no_biases)) is None


class Late(CE):
    """Labels one token late."""

    def per_token(self, log_q_CV, log_p_CV, labels_C):
        return super().per_token(log_q_CV, log_p_CV, torch.roll(labels_C, -1))


def _all_seen(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask among pairs that hides nothing of the document."""
    mask, positions_BT = pair_mask(batch)
    return mask | mask.transpose(-1, -2), positions_BT


IN_TRAINING = {
    "labels one late": ("medusa", "train.overfit.CE", Late, "it has not learnt them"),
    "a mask that sees ahead": (
        "eagle3", "drafters.eagle3.pair_mask", _all_seen, "does not draft as it was trained",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", IN_TRAINING)
def test_a_fault_in_training_fails_the_stage(fault: str, place: Path, tmp_path, monkeypatch):
    family, name, wrong, said = IN_TRAINING[fault]
    monkeypatch.setattr(name, wrong)
    with pytest.raises(Failed, match=said):
        stage(place, family).run(tmp_path)
    told = json.loads((tmp_path / "artifact" / "overfit.json").read_text())
    assert min(p["acceptance"] for p in told["positions"]) < 0.75  # the bar lies well above


def test_an_engine_that_accepts_less_fails_the_stage(place: Path, tmp_path, monkeypatch):
    """The drafter that has learnt is exported and asked for in the engines, with the same
    prompts."""
    asked, shape = [], Pretrained(path=str(place / "target")).shape_of()

    def fail(self: Any, out: Path, exported: Path, drafter: Path, target: Path | None) -> dict:
        asked.append((self.client.limit, self.client.max_new_tokens, load(drafter, shape).training))
        raise Failed("vllm accepts 1.2 tokens, here 4.8")

    monkeypatch.setattr(serveable.Engines, "serve", fail)
    with pytest.raises(Failed, match="vllm accepts"):
        stage(place, "lm").run(tmp_path)
    assert asked == [(6, 24, False)]


# ---- what is counted


def test_positions_are_judged_while_the_text_is_the_one_that_was_learnt():
    """Rounds that accept 2, 0, 4 of 4 guesses, in an answer of which 7 tokens are as learnt."""
    assert list(_guesses(7, [2, 0, 4], 4)) == [
        *[(0, True), (1, True), (2, False)],  # tokens 0, 1, 2: the fourth guess was never looked at
        *[(0, False)],  # token 3
        *[(0, True), (1, True), (2, True)],  # tokens 4, 5, 6; then the text parts
    ]
    assert _common([1, 2, 3], [1, 2, 4]) == 2
    assert _common([1, 2, 3], [1, 2, 3, 4]) == 3


def test_no_answer_is_kept_for_validation():
    """One row in a hundred would be, and would never be learnt."""
    rows = list(_rows([([1], [n]) for n in range(300)]))
    assert [row["samples"][0]["answer_ids"] for row in rows] == [[n] for n in range(300)]
    assert not any(is_validation({"prompt": r["prompt"]} | r["samples"][0]) for r in rows)
    assert any(
        is_validation({"prompt": f"overfit {n}"} | rows[0]["samples"][0]) for n in range(300)
    )


@pytest.mark.parametrize(
    ("positions", "said"),
    [
        ([(20, 20, 1.0)] * 4, None),
        ([(20, 18, 0.5)] * 4, None),  # what is drafted counts
        ([(20, 17, 0.99)], "85% of the drafter's guesses at position 1 .*labels shifted"),
        ([(20, 20, 1.0), (20, 3, 1.0)], "15% .* at position 2 .*the order of heads"),
        ([(20, 3, 0.2)], "training pass has 20% right: it has not learnt them.*overfit.steps"),
        ([(20, 20, 1.0), (0, 0, 1.0)], "position 2 are accepted .of 0"),
    ],
    ids=["full", "drafted", "first", "second", "not learnt", "never reached"],
)
def test_the_sentence_names_the_position_and_where_to_look(positions, said):
    fault = fault_of([Position(d, a, t) for d, a, t in positions])
    assert (fault is None) == (said is None)
    assert said is None or re.search(said, str(fault))


# ---- what is refused


def test_answers_that_repeat_themselves_show_nothing(place: Path, monkeypatch, tmp_path):
    monkeypatch.setattr(overfit, "is_repetitive", lambda ids: True)
    with pytest.raises(ValueError, match="6 of 6 answers of the target repeat themselves"):
        stage(place, "lm").run(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 5}, "max_new_tokens above 5"),
        ({"count": 1}, "count 1,.*count must be at least 2"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"engines": {"vlm": "x"}}, "there are clients for transformers, vllm"),
        ({"dtype": "float16"}, "float16"),
    ],
    ids=["tokens", "count", "lr", "engine", "dtype"],
)
def test_bad_settings_are_refused_before_anything_starts(place: Path, settings, said):
    with pytest.raises(ValueError, match=said):
        stage(place, "lm", **settings)


def test_a_sharded_target_is_refused(place: Path):
    made = stage(place, "lm")
    target = Pretrained(path=str(place / "target"), parallel="zero3")
    with pytest.raises(
        ValueError, match=r"holds the target on one device.*leave out preflight=overfit"
    ):
        Overfit(target=target, drafter=made.drafter, prompts=made.prompts)
