"""A layout's files: safetensors and JSON, read so that nothing is missing and nothing left over."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def save(folder: Path, layout: str, tensors: Mapping[str, Tensor], name: str = WEIGHTS) -> None:
    """Writes tensors with the layout's name in the file's header; none shares memory with another,
    which safetensors does not store."""
    own = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    save_file(own, folder / name, metadata={"format": "pt", "layout": layout})


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, by name. Raises ValueError where there is no
    such file, one is damaged or missing, or two hold the same name; a pickle is never opened."""
    found: dict[str, Tensor] = {}
    for file in _stored(folder):
        with _open(file) as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                if name in found:
                    raise ValueError(f"{folder} holds {name} twice; leave one file of weights")
                found[name] = stored.get_tensor(name)
    return found


def names(folder: Path) -> set[str]:
    """Names of those tensors, which are not read. Raises as `tensors` does."""
    found: set[str] = set()
    for file in _stored(folder):
        with _open(file) as stored:
            found |= set(stored.keys())
    return found


def _stored(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all that its index names."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        listed = set(_mapping(index).get("weight_map", {}).values())
        if absent := sorted(listed - {file.name for file in files}):
            raise ValueError(f"{index} names {absent[0]}, which is not there: get it again")
    if not files:
        pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
        held = f"; {pickles[0]} is a pickle, which can run code and is not read" if pickles else ""
        raise ValueError(f"{folder} has no .safetensors file{held}: get the weights as safetensors")
    return files


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, "pt") as stored:
            yield stored
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}): get it again") from None


def config(folder: Path) -> dict[str, Any]:
    """What config.json says. Raises ValueError if it is not there or no mapping."""
    return _mapping(folder / "config.json")


def _mapping(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is not there, expected the drafter's configuration") from None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{file} is damaged: expected a JSON object; get it again")
    return said


def fill(drafter: nn.Module, saved: Mapping[str, Tensor], folder: Path) -> None:
    """Loads the drafter's tensors, its parameters in the file's dtype. Raises ValueError where one
    is missing, unknown, or of another shape or kind."""
    mine = drafter.state_dict()
    wrong = [f"{key} is missing" for key in sorted(mine.keys() - saved.keys())]
    wrong += [f"{key} is unknown" for key in sorted(saved.keys() - mine.keys())]
    for key in sorted(mine.keys() & saved.keys()):
        if saved[key].shape != mine[key].shape:
            shapes = [list(t[key].shape) for t in (saved, mine)]
            wrong.append(f"{key} is {shapes[0]}, expected {shapes[1]}")
        elif saved[key].is_floating_point() != mine[key].is_floating_point():
            wrong.append(f"{key} is {saved[key].dtype}, expected {mine[key].dtype}")
    if wrong:
        more = f"; {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{folder} does not fit this drafter: {'; '.join(wrong[:4])}{more}")
    for key, parameter in drafter.named_parameters():
        parameter.data = parameter.data.to(saved[key].dtype)
    drafter.load_state_dict(dict(saved))


def groups(folder: Path) -> dict[str, int]:
    """Bytes by the first word of the tensors' names, of all safetensors files below the folder."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                words = [w for w in name.removeprefix("model.").split(".") if not w.isdigit()]
                held = stored.get_slice(name)
                size = torch.Size(held.get_shape()).numel() * _width(held.get_dtype())
                sizes[words[0]] = sizes.get(words[0], 0) + size
    return sizes


def _width(dtype: str) -> int:
    """Bytes of one number of a safetensors dtype: I64, BF16, BOOL, F8_E4M3, ..."""
    bits = re.match(r"[A-Z]+(\d+)", dtype)
    return int(bits[1]) // 8 if bits else 1
