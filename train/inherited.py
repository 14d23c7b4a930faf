"""The weights of a drafter that is there already, for one that is to be trained on from it.

Shapes: V rows of the target's vocabulary.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.pretrained import no_foreign_code
from decoding.target import Shape
from drafters.base import Blueprint, Trained
from drafters.heads import Heads
from drafters.lm import LM
from train.compose import ROOT
from train.vocabulary import resized

Arguments = Mapping[str, Any]
LM_FILES = ("model.safetensors", "model.safetensors.index.json")
APART = {  # what the configurations of one architecture may differ in
    *("vocab_size", "max_position_embeddings", "dtype", "torch_dtype", "transformers_version"),
    *("_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("use_cache", "initializer_range", "attention_dropout", "pretraining_tp"),
}


def words(family: Any, arguments: Arguments, checkpoint: str) -> str:
    """What to add to a command to train such a drafter. Raises ValueError for what is no family;
    settings that are no plain numbers or names are left out, since a note may come from anywhere
    and this one is to be typed."""
    named = isinstance(family, str) and re.fullmatch(r"[a-z0-9_]+", family)
    if not named or not (ROOT / "conf" / "drafter" / f"{family}.yaml").is_file():
        raise ValueError("it names a family that is not one of drafters/: get it again")
    if family == "lm" and arguments.get("checkpoint"):
        return f"drafter=lm drafter.checkpoint={checkpoint}"
    said = [f"drafter={family}"]
    for key, value in arguments.items():
        text = json.dumps(value).translate({ord(c): None for c in '" '})
        plain = re.fullmatch(r"[a-z_]+", key) and re.fullmatch(r"[\w.,:{}\[\]-]+", text)
        if plain and value is not None and key not in Heads.free:
            word = f"drafter.{key}={text}"
            said.append(word if re.fullmatch(r"[\w.=-]+", word) else f"'{word}'")
    return " ".join(said)


def language_model(folder: Path, rows: int) -> Any:
    """The causal LM of a folder in fp32, its vocabulary of V rows. Raises ValueError if a tensor is
    missing, left over or of another shape, or it needs code of its own."""
    from transformers import AutoModelForCausalLM

    if not any((folder / name).is_file() for name in LM_FILES):
        raise ValueError(
            f"its weights are in no file that transformers reads, such as {LM_FILES[0]}"
        )
    with no_foreign_code(folder.name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True,
            trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    model, report = loaded
    wrong = sorted(str(key) for keys in report.values() for key in keys)
    if wrong:
        raise ValueError(
            f"its tensors are not those that its config.json asks for: {', '.join(wrong[:5])}"
        )
    if rows != model.config.vocab_size:
        kept = [resized(each.weight.detach(), rows) for each in _outer(model)]
        model.resize_token_embeddings(rows, mean_resizing=False)
        for each, weight in zip(_outer(model), kept, strict=True):
            each.weight.data.copy_(weight)
    return model


def take_language_model(module: LM, found: Any) -> None:
    """Fills a drafter with a causal LM. Raises ValueError where they are of two architectures, also
    where their tensors have the same shapes."""
    mine, its = module.model.config.to_dict(), found.config.to_dict()
    keys = sorted((mine.keys() | its.keys()) - APART)
    other = [
        f"{k} is {its.get(k)!r}, not {mine.get(k)!r}" for k in keys if mine.get(k) != its.get(k)
    ]
    if other:
        raise ValueError(f"it is of another architecture: {'; '.join(other[:3])}")
    _take(module.model, found.state_dict())


def take_heads(module: Heads, found: Mapping[str, Tensor], rows: int | None) -> None:
    """Fills a drafter with the tensors of another one of its family; those with a row for each of
    the drafter's `rows` tokens get V (None: all have). Raises ValueError where they do not fit."""
    mine = module.state_dict()
    fitted = {}
    for name, tensor in found.items():
        wanted = mine[name].shape if name in mine else tensor.shape
        each = rows is not None and len(tensor) == rows and wanted[:1] == (module.shape.vocab_size,)
        fitted[name] = resized(tensor, wanted[0]) if each else tensor
    _take(module, fitted)


def require_taps(module: Trained, drafter: Blueprint, shape: Shape, noted: Arguments) -> None:
    """Raises ValueError where the drafter to train reads other states of the target: no tensor's
    shape would show it."""
    if "taps" not in noted or "taps" not in drafter.arguments:
        return
    try:
        theirs = drafter.cls(shape, **(drafter.arguments | {"taps": noted["taps"]})).taps
    except (TypeError, ValueError):
        raise ValueError(
            f"the taps noted in it, {noted['taps']!r}, are none of this target"
        ) from None
    if theirs != module.taps:
        raise ValueError(
            f"it taps hidden_states {list(theirs)} of the target, and {list(module.taps)} are "
            "configured"
        )


def _outer(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _take(module: Any, found: Mapping[str, Tensor]) -> None:
    """Copies all tensors into the module, whose parameters keep their dtype."""
    mine = module.state_dict()
    wrong = [f"it has no {name}" for name in sorted(mine.keys() - found.keys())]
    wrong += [f"its {name} is unknown" for name in sorted(found.keys() - mine.keys())]
    for name in sorted(mine.keys() & found.keys()):
        its, expected = (" x ".join(map(str, t[name].shape)) for t in (found, mine))
        if its != expected:
            wrong.append(f"its {name} is {its}, expected {expected}")
    if wrong:
        more = f"; {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{'; '.join(wrong[:3])}{more}")
    module.load_state_dict(dict(found))
