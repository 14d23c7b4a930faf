"""Composes recipes as the command does, in this process, and runs the command, in another."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from train.__main__ import CONF, RECIPES
from train.compose import resolvers

ROOT = Path(__file__).parents[2]
STAGES = (  # of quickstart, in their order
    *("target", "pretrain", "generate", "finetune"),
    *("tune_tree", "bench", "export", "serve", "publish"),
)
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def compose(*overrides: str) -> dict[str, Any]:
    """The whole configuration, resolved."""
    resolvers()
    store = ConfigStore.instance()
    for name, recipe in _recipes(RECIPES).items():
        store.store(name, recipe, group="recipe", package="_global_")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", list(overrides))
    plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return plain


@functools.cache
def _recipes(folder: Path) -> dict[str, Any]:
    """By name; reading all of them takes as long as composing one."""
    return {path.stem: OmegaConf.load(path) for path in sorted(folder.glob("*.yaml"))}


def command(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """`python -m train ...` with its output."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    mine = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "train", *arguments],
        cwd=cwd,
        env=clean | mine | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
