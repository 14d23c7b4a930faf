"""Which folders hold a drafter in a layout that engines read, and which engines those are."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from drafters.base import Trained, require_intact
from eval.engines.snippets import METHODS

OWN = {  # the layout that a family is saved in itself, and who reads it
    "lm": ("transformers", ("transformers", "vllm", "openvino", "sglang")),
    "medusa": ("vllm", ("vllm",)),
    "eagle": ("vllm", ("vllm", "sglang")),
    "eagle3": ("vllm", ("vllm", "openvino", "sglang")),
}
TARGET = "target"  # of an export: the target as the drafter changed it, a model and no drafter
KINDS = {"BF16": "bfloat16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Form:
    """A drafter in a layout: the folder, what vLLM calls the method, who is said to read it, and
    the dtype of its weights, to which our loop's drafter is rounded too."""

    family: str
    name: str
    folder: Path
    method: str
    engines: tuple[str, ...]
    dtype: str

    @property
    def layout(self) -> str:
        """As eval/engines/snippets.py calls it."""
        return f"{self.family}/{self.name}"


def forms(drafter: Path, trained: Trained, export: Path | None) -> tuple[list[Form], str]:
    """The layouts in which a drafter can be served: those of an export stage, or the one that it is
    saved in; and where there is none, why."""
    family = require_intact(drafter)["family"]
    told = json.loads((export / "export.json").read_text(encoding="utf-8")) if export else {}
    if trained.changes_target and TARGET not in told:
        return [], f"this {family} changes its target: merge target_adapter into it before serving"
    told.pop(TARGET, None)
    if export is not None and told:
        return [
            Form(
                family, name, export / name, entry.get("method") or METHODS[family],
                tuple(entry["engines"]), entry.get("dtype") or dtype_of(export / name),
            )
            for name, entry in told.items()
        ], ""  # fmt: skip
    if family not in OWN or export is not None:
        return [], f"no engine serves {family}: only draftsmith's own loop drafts with it"
    name, engines = OWN[family]
    return [Form(family, name, drafter, METHODS[family], engines, dtype_of(drafter))], ""


def dtype_of(folder: Path) -> str:
    """Of the weights in a folder, by their first matrix; float32 where it has no safetensors."""
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            kinds = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118
        for kind in kinds:
            if kind in KINDS:
                return KINDS[kind]
    return "float32"
