"""The parts of a published folder: the drafter as it was measured, its other formats, its logs."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding.pretrained import DTYPES
from drafters.base import NOTE, weights
from drafters.files import digests, write_json
from train.compose import check_name


def as_measured(folder: Path, conditions: dict[str, Any]) -> None:
    """Gives the files the dtype and the shape of draft that were measured.

    `generate(assistant_model=...)` reads the draft length from the drafter's own
    generation_config.json, our loader from drafter.json.
    """
    dtype = DTYPES[conditions["dtype"]]
    for file in folder.rglob("*.safetensors"):
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    _change(folder / "config.json", {"dtype": conditions["dtype"]})
    draft = conditions["draft"]
    _change(
        folder / "generation_config.json",
        {
            "num_assistant_tokens": draft.get("draft_length"),
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": draft["stop_below"],
        },
    )
    note = read(folder / NOTE)
    note["arguments"].pop("tree", None)
    note["arguments"] |= draft
    if note["arguments"].get("checkpoint"):  # its architecture is in config.json
        note["arguments"]["checkpoint"] = Path(note["arguments"]["checkpoint"]).name
    note["files"] = weights(folder)
    write_json(folder / NOTE, note)


def refuse_links(folder: Path) -> None:
    """Raises ValueError for a link in a folder to copy: it could lead anywhere."""
    for file in folder.rglob("*"):
        if file.is_symlink():
            raise ValueError(f"{file} is a symbolic link, expected a file: remove it")


def formats(export: Path, part: Path) -> dict[str, Any]:
    """Copies each exported format into a sub-folder of its name; one with the drafter's very
    tensors takes the place of the folder's own files, since it is what engines were proved to read.
    Returns format -> {place: the folder, "." for the root, engines, notes}."""
    there = {}
    for name, entry in read(export / "export.json").items():
        source = export / check_name("a format", name)
        refuse_links(source)
        place = "." if same_tensors(source, part) else name
        shutil.copytree(source, part / place, dirs_exist_ok=place == ".")
        told = {key: entry.get(key, []) for key in ("engines", "notes")}
        there[name] = {"place": place} | told
    note = read(part / NOTE)
    note["files"] = digests(part, note["files"])
    write_json(part / NOTE, note)
    return there


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two folders have the same files of weights, with equal tensors in them."""
    names = {file.name for file in a.glob("*.safetensors")}
    if not names or names != {file.name for file in b.glob("*.safetensors")}:
        return False
    for name in names:
        mine, theirs = load_file(a / name), load_file(b / name)
        if mine.keys() != theirs.keys():
            return False
        if not all(_equal(mine[key], theirs[key]) for key in mine):
            return False
    return True


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def served(serve: Path, part: Path) -> dict[str, Any]:
    """What the stage serve found in engines; served.json and its logs come along."""
    shutil.copy2(serve / "served.json", part / "served.json")
    for log in sorted(serve.rglob("*.log")):
        place = part / "logs" / log.name
        place.parent.mkdir(exist_ok=True)
        shutil.copy2(log, place)
    return read(serve / "served.json")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def _change(file: Path, settings: dict[str, Any]) -> None:
    if file.is_file():
        write_json(file, read(file) | settings)
