"""Language and family are independent: every recipe takes every drafter."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf.errors import OmegaConfBaseException

from decoding.target import Shape
from tests.drafters.contract import FAMILIES, is_trained
from tests.train.composing import ROOT, compose
from train.compose import bind, build, find
from train.plan import Planned, plan

RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*.yaml"))
DRAFTERS = sorted(p.stem for p in (ROOT / "conf" / "drafter").glob("*.yaml"))
TRAINED = [name for name in DRAFTERS if name not in FAMILIES or is_trained(name)]
SEVERAL = ("shootout", "language_matrix")  # drafters in one recipe
OWN_SETTINGS = ("ko_eagle3", "ko_medusa", "ko_medusa2")  # of their own family, which no other has
SMALL = {"eagle3": {"vocabulary": None}}
SHAPE = Shape(512, 128, 12, 2, 2, 256, 4096)


@pytest.fixture(autouse=True)
def _no_hashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fingerprints read whole data sets, which says nothing about composition."""
    monkeypatch.setattr("train.plan.fingerprint", lambda config, inputs: "0" * 12)


def planned(*overrides: str) -> list[Planned]:
    try:
        config = compose(*overrides)
    except OmegaConfBaseException as error:
        if "DRAFTSMITH_SHARED" in str(error):
            pytest.skip("DRAFTSMITH_SHARED names no folder of shared texts and models")
        raise
    return plan(config, Path("nowhere"))


def drafters(stages: list[Planned]) -> list[dict[str, Any]]:
    return [s.config["drafter"] for s in stages if s.config["_target_"] == "train.distill.Distill"]


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r not in SEVERAL])
def test_every_recipe_takes_every_family(recipe: str):
    """Composed, bound and planned; every family grows the tree that is tuned for it."""
    for name in TRAINED:
        if name == "vicuna_68m" or (recipe in OWN_SETTINGS and recipe != f"ko_{name}"):
            continue
        more = []
        if name == "medusa2":  # text must not change the target
            made = {stage.name for stage in planned(f"recipe={recipe}")}
            if "finetune" not in made:
                continue
            if "pretrain" in made:
                more = ["stages.pretrain=null", "stages.finetune.needs.drafter=null"]
        stages = planned(f"recipe={recipe}", f"drafter={name}", *more)
        tuned = [s for s in stages if s.config["_target_"] == "eval.tune_tree.TuneTree"]
        benches = [s for s in stages if s.name == "bench"]
        assert len(benches) == (recipe != "ten_layers"), "that one asks other engines alone"
        assert all(("tree" in bench.needs) == bool(tuned) for bench in benches)
        for config in drafters(stages):
            bind(config, name)
            family = find(config["_target_"], name)
            assert isinstance(build(config | SMALL.get(name, {}))(SHAPE), family)
            assert "tree" in family.free


def test_the_shootout_has_every_family():
    """A new family that is left out of the comparison is noticed."""
    stages = planned("recipe=shootout")
    used = {find(c["_target_"], "drafter").__module__ for c in drafters(stages)}
    families = {f"drafters.{n}" for n in TRAINED if (ROOT / "drafters" / f"{n}.py").is_file()}
    assert used == families
    assert len({s.needs["data"] for s in stages if s.name.startswith("train_")}) == 1
    budgets = {
        (c["schedule"]["tokens"], c["schedule"]["batch_tokens"])
        for c in (s.config for s in stages if s.name.startswith("train_"))
    }
    assert len(budgets) == 1
