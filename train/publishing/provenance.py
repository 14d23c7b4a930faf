"""Where a published drafter comes from: the stages behind it, and a recipe that makes it again.

A stage left in its folder what made it: stage.json (configuration, fingerprint, inputs),
environment.json (versions, hardware, ranks), result.json (seconds) and DONE (hashes). Here they are
read, and places on this machine are taken out: a file below DRAFTSMITH_SHARED is written as
`${env:DRAFTSMITH_SHARED}/...`, any other by its name alone, and in the recipe as `???`, which its
reader has to give.
"""

import functools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from drafters.files import sha256
from train.compose import ENVIRONMENT, ROOMS, ROOT, build, classes
from train.plan import fingerprint, flat
from train.processes.worker import environment

Note = dict[str, Any]
SHARED = "${env:DRAFTSMITH_SHARED}"
GIVEN = "???"  # OmegaConf's word for a value that the reader has to give
SOURCES = ("data.sources.Local", "data.sources.Hub", "data.builtin.Builtin")
RECIPE = "recipe.yaml"  # as it is published; in recipes/ it is run as recipe=recipe


def trace(artifact: Path, found: dict[str, Path]) -> None:
    """Adds the folder of the stage that made this artifact, by the stage's name, after those of the
    stages that it was made from. Raises ValueError for a folder that no stage made, and for two
    stages of one name, which no recipe has."""
    folder = artifact.parent
    note = note_of(folder)
    for source in note["inputs"].values():
        trace(Path(source), found)
    if found.setdefault(note["name"], folder).name != folder.name:
        raise ValueError(
            f"the drafter and its report come from two stages called {note['name']} "
            f"({found[note['name']].name}, {folder.name}), expected those of one run: measure the "
            "drafter in the recipe that made it"
        )


def note_of(folder: Path) -> Note:
    """stage.json of a stage's folder."""
    file = folder / "stage.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is not the folder of a stage: it has no stage.json, from which the card "
            "says how the drafter was made; publish from the folder in which the recipe ran"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def provenance(stages: dict[str, Path], target: Note) -> Note:
    """What provenance.json says, JSON-able; `target`: {name, revision}.

    `same_code`: whether this commit gives the stage the fingerprint that it has, so that the recipe
    run here would find it done; null where its data are not here any more.
    """
    told = {name: _stage(stages, folder) for name, folder in stages.items()}
    seeds = {
        f"{name}.{key}": value
        for name, note in told.items()
        for key, value in _seeds(note["config"])
    }
    return {
        "draftsmith": commit(),
        "target": target,
        "recipe": RECIPE,
        "seeds": seeds,
        "seconds": sum(note["seconds"] or 0 for note in told.values()),
        "environment": environment(),
        "stages": told,
    }


def _stage(stages: dict[str, Path], folder: Path) -> Note:
    note = note_of(folder)
    made_from = {argument: Path(place).parent for argument, place in note["inputs"].items()}
    return {
        "fingerprint": note["fingerprint"],
        "needs": {argument: place.name for argument, place in made_from.items()},
        "same_code": _same_code(note, made_from),
        "seconds": _read(folder / "result.json").get("seconds"),
        "environment": _read(folder / "environment.json"),
        "parent": _read(folder / "artifact" / "parent.json") or None,  # of a drafter trained on
        "data": {_called(source): _data(source) for source in sources_in(note["config"])},
        "artifact": _seal(folder / "DONE"),
        "config": _moved(note["config"], lambda place: place.name),
    }


def _same_code(note: Note, made_from: dict[str, Path]) -> bool | None:
    try:
        marks = {argument: note_of(place)["fingerprint"] for argument, place in made_from.items()}
        return fingerprint(note["config"], marks) == note["fingerprint"]
    except (ValueError, OSError, TypeError):
        return None


def commit() -> Note:
    """{commit, dirty} of this repository; "unknown" where it is no checkout, or git is missing."""
    try:
        asked = [("rev-parse", "HEAD"), ("status", "--porcelain", "--", *ROOMS, "conf", "recipes")]
        told = [
            subprocess.run(
                ["git", "-C", str(ROOT), *words],
                capture_output=True, text=True, timeout=30, check=True,
            ).stdout.strip()
            for words in asked
        ]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {"commit": "unknown", "dirty": "unknown"}
    return {"commit": told[0], "dirty": bool(told[1])}


def recipe(stages: dict[str, Path], title: str) -> str:
    """A recipe of exactly these stages, as YAML: every setting is resolved, so that neither another
    default nor another part in conf/ changes what it makes. Like any recipe it names classes of
    this repository only, and cannot run code."""
    notes = {name: note_of(folder) for name, folder in stages.items()}
    names = {folder.name: name for name, folder in stages.items()}
    body = {
        name: _moved(note["config"], lambda _: GIVEN)
        | {"needs": {arg: names[Path(place).parent.name] for arg, place in note["inputs"].items()}}
        for name, note in notes.items()
    }
    targets = [part["target"] for part in body.values() if isinstance(part.get("target"), dict)]
    target = targets[-1]  # bench's, or that of the stage after it
    for part in body.values():
        if part.get("target") == target:
            part["target"] = "${target}"
    whole = {
        "defaults": [{"override /target": None}, "_self_"],
        "target": target,
        "stages": body,
    }
    text = yaml.safe_dump(whole, allow_unicode=True, sort_keys=False, width=100)
    return f"# {' '.join(title.split())}\n{text}"


def to_give(text: str) -> list[str]:
    """The words of a command that give what a recipe leaves out: `stages.x.data.files=...`."""
    parts = yaml.safe_load(text)["stages"]
    return [f"'{key}=...'" for key, value in flat(parts, "stages") if value == GIVEN]


def _seeds(config: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in flat(config) if key.rpartition(".")[2] == "seed")


def _moved(config: Any, elsewhere: Callable[[Path], str]) -> Any:
    """A configuration without this machine's places. A list that holds one which its reader has to
    give is left out whole."""
    if isinstance(config, dict):
        return {key: _moved(value, elsewhere) for key, value in config.items()}
    if isinstance(config, list):
        moved = [_moved(item, elsewhere) for item in config]
        return GIVEN if GIVEN in moved else moved
    if not isinstance(config, str):
        return config
    place = place_of(config)
    if place is None:
        return config.replace("${", "\\${")  # text, which is no reference to anything
    if place.is_relative_to(_shared()):
        return f"{SHARED}/{place.relative_to(_shared()).as_posix()}"
    return elsewhere(place)


def place_of(text: str) -> Path | None:
    """The path that a setting is, if it leads to a place of this machine: absolute below a folder
    that is here (`/no_think {question}` is a prompt), or out of the folder we are in."""
    if text.startswith(("~/", "../")):
        return Path(text).expanduser().resolve()
    if not text.startswith("/") or len(text) < 2:
        return None
    top = Path(*Path(text).parts[:2])
    return Path(text) if len(str(top)) < 256 and top.exists() else None


def _shared() -> Path:
    name = "DRAFTSMITH_SHARED"
    return (ROOT / os.environ.get(name, ENVIRONMENT[name])).resolve()


def sources_in(config: Any) -> list[Note]:
    """The configurations of sources in a stage's, those inside a Mix one by one."""
    return [body for _, body in classes(config) if body["_target_"] in SOURCES]


def _called(source: Note) -> str:
    """A source's name for a reader: its files, or where it stands on the Hub."""
    if "files" in source:
        return ", ".join(Path(file).name for file in source["files"])
    if "path" in source:
        return " ".join(p for p in (source["path"], source.get("name"), source.get("split")) if p)
    return f"Python's own {source['kind']} text"


def _data(source: Note) -> Note:
    """What identifies a source's rows: a hash of its contents and how they are read; of the Hub
    also the revision, null where none was pinned."""
    made = build(source)
    mark = _mark(json.dumps(source))
    known = {"sha256": mark, "language": made.language, "licence": made.licence}
    where = {"hub": source["path"], "revision": source.get("revision")} if "path" in source else {}
    return known | where


@functools.cache  # stages share sources, which can be large
def _mark(source: str) -> str | None:
    try:
        return str(build(json.loads(source)).fingerprint())
    except (ValueError, OSError):  # moved away since
        return None


def _read(file: Path) -> Note:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _seal(done: Path) -> str | None:
    """A hash over the hashes of all files that the stage left."""
    return sha256(done) if done.is_file() and done.stat().st_size else None
