"""Which layouts each family has, and which one a folder is in.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained
from drafters.eagle3 import Eagle3
from drafters.lm import LM
from drafters.medusa import Medusa
from train.layouts import (
    eagle3_vllm,
    eagle_vllm,
    files,
    medusa_original,
    medusa_vllm,
    speculators,
    transformers,
)
from train.layouts.given import Facts, Prompt


class Layout(Protocol):
    """A two-way mapping between a trained drafter and the files that an engine reads. METHOD: what
    vLLM calls such a drafter; ENGINES: who reads the layout."""

    @property
    def METHOD(self) -> str: ...

    @property
    def ENGINES(self) -> tuple[str, ...]: ...

    def fits(self, config: Mapping[str, Any], names: set[str]) -> bool:
        """Whether a folder with this config.json and tensors of these names is in this layout."""

    def write(self, drafter: Trained, folder: Path, facts: Facts) -> list[str]:
        """Writes the files; returns what whoever serves them must know."""

    def read(self, folder: Path, shape: Shape, target: Target | None = None) -> Trained:
        """The drafter, nothing missing and nothing left over; ValueError if it does not fit."""

    def logits(self, folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
        """What an engine computes of the files, [rows, V] for each of `depth` draft positions."""


LAYOUTS: dict[str, dict[str, Layout]] = {
    "lm": {"transformers": transformers},
    "medusa": {"vllm": medusa_vllm, "original": medusa_original},
    "eagle": {"vllm": eagle_vllm},
    "eagle3": {"vllm": eagle3_vllm, "speculators": speculators},
}
GGUF = "gguf"  # of an lm, made by llama.cpp's own converter from its transformers layout


def formats(family: str) -> list[str]:
    """The formats of a family. Raises ValueError for a family that no server reads."""
    if family not in LAYOUTS:
        have = "; ".join(f"{name}: {', '.join(formats(name))}" for name in LAYOUTS)
        raise ValueError(
            f"there is no format of the family {family} that a server reads, so it cannot be "
            f"exported; leave the stage out (stages.export=null), or train one of: {have}"
        )
    return [*LAYOUTS[family], *([GGUF] if family == "lm" else [])]


def detect(folder: Path) -> tuple[str, str]:
    """Family and format of a drafter's folder from elsewhere. Raises ValueError for an unknown one,
    or weights that are no safetensors."""
    config, names = files.config(folder), files.names(folder)
    for family, layouts in LAYOUTS.items():
        for form, layout in layouts.items():
            if layout.fits(config, names):
                return family, form
    known = "; ".join(f"{family}: {', '.join(layouts)}" for family, layouts in LAYOUTS.items())
    raise ValueError(
        f"{folder} is in no layout that draftsmith reads ({known}): architectures "
        f"{config.get('architectures')}, model_type {config.get('model_type')!r}"
    )


def arguments(drafter: Trained) -> dict[str, Any]:
    """What drafters.base.save must note of a drafter that a layout read, to load it again."""
    if isinstance(drafter, LM):
        return {"checkpoint": drafter.checkpoint}
    if isinstance(drafter, Medusa):
        head = "own" if drafter.lm_heads else "shared"
        return {"heads": len(drafter.blocks), "layers": len(drafter.blocks[0].layers), "head": head}
    if isinstance(drafter, Eagle3):
        rows = drafter.lm_head.out_features if drafter.d2t is not None else None
        return {"taps": list(drafter.taps), "vocabulary": rows}
    return {}
