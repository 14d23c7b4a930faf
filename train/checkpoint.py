"""Checkpoints that a crash cannot half-write and any number of ranks can read.

A checkpoint is a folder: state.safetensors (weights and optimiser, fp32), position.json and, last,
manifest.json with sizes and hashes. It is written beside its name and renamed into place.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.base import write_json


def save(folder: Path, step: int, state: dict[str, Tensor], position: dict[str, Any]) -> Path:
    """Writes checkpoint `step` under `folder`, verifies it, then removes older ones but one."""
    final, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(state, part / "state.safetensors")
    write_json(part / "position.json", {"step": step, **position})
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in part.iterdir()}
    for name in files:
        _flush(part / name)
    write_json(part / "manifest.json", {"files": files})
    _flush(part / "manifest.json")
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    _flush(folder)
    if fault(final) is None:
        for old in [p for p in _steps(folder) if p.name < final.name][:-1]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def newest(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest checkpoint that verifies: its state, its position and which were skipped, why."""
    skipped: list[str] = []
    for path in reversed(_steps(folder)):
        why = fault(path)
        if why is None:
            position = json.loads((path / "position.json").read_text(encoding="utf-8"))
            return load_file(path / "state.safetensors"), position, skipped
        skipped.append(f"{path.name}: {why}")
    return None


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    manifest = path / "manifest.json"
    if not manifest.is_file():
        return "it has no manifest.json"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return "its manifest.json is not readable"
    for name, known in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, expected {known['bytes']}"
        if sha256(file) != known["sha256"]:
            return f"the hash of {name} differs from the manifest's"
    return None


def sha256(file: Path) -> str:
    """Hex digest of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _steps(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".part")


def _flush(path: Path) -> None:
    """Makes a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
