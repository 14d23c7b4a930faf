"""Recipe -> stages in order, each with a fingerprint and a folder."""

import ast
import functools
import hashlib
import inspect
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from train.compose import bind, build, check_name, classes, find, inside, unknown

MOST = 6  # differences that are told


class Stage(Protocol):
    """Work that reads other stages' artifacts and leaves one of its own in out/artifact."""

    def run(self, out: Path, **inputs: Path) -> dict[str, float]: ...


@dataclass
class Planned:
    """A stage of a recipe: its resolved configuration and where it will be, or is."""

    name: str
    config: dict[str, Any]
    needs: dict[str, str]
    fingerprint: str
    folder: Path
    inputs: dict[str, Path] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").is_file()


def plan(config: dict[str, Any], root: Path) -> list[Planned]:
    """The recipe's stages in an order that respects `needs`. Raises ValueError on a bad recipe."""
    stages = _stages(config.get("stages") or {})
    needs = {name: _needs(name, stage) for name, stage in stages.items()}
    if config["target"].get("path"):
        _drop(needs, _of(stages, "train.base.BaseTarget"))
    planned: dict[str, Planned] = {}
    for name in _order(needs):
        body = {k: v for k, v in stages[name].items() if k != "needs"}
        check_name("a stage", name)
        bind(body, f"stages.{name}")
        _check_inputs(name, body, needs[name], config)
        made = build(body)  # its own checks, before anything starts
        if hasattr(made, "check"):
            made.check(needs[name])
        known = {argument: planned[source] for argument, source in needs[name].items()}
        mark = fingerprint(body, {a: p.fingerprint for a, p in known.items()})
        folder = inside(root, "stages", f"{name}-{mark}")
        inputs = {a: p.folder / "artifact" for a, p in known.items()}
        planned[name] = Planned(name, body, needs[name], mark, folder, inputs)
    return list(planned.values())


def fingerprint(config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Twelve hex digits of everything that can change a stage's result.

    Its configuration without what its classes call `free`, its inputs' fingerprints, the contents
    of the files it names, and the source (comments and docstrings aside) of its classes' modules;
    for a class with `on_device`, also what it is measured on.
    """
    sources, files = {}, {}
    for cls, body in classes(config):
        sources[cls.__module__] = _source(Path(inspect.getfile(cls)))
        if hasattr(cls, "fingerprint"):
            files[json.dumps(_kept(body), sort_keys=True)] = build(body).fingerprint()
        if getattr(cls, "on_device", False):
            sources["device"] = device()
            sources["parallel"] = str((config.get("target") or {}).get("parallel"))
    whole = {"config": _kept(config), "inputs": inputs, "sources": sources, "files": files}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:12]


def changes(stage: Planned) -> list[str]:
    """Why a stage to do is not one of the earlier folders of its name: which keys and inputs are
    other than in the one that is nearest. [] where there is none, or where this one was begun."""
    if (stage.folder / "stage.json").is_file():
        return []
    nearest: tuple[list[str], str] | None = None
    for file in sorted(stage.folder.parent.glob(f"{stage.name}-*/stage.json")):
        found = _differences(file, stage)
        if found is not None and (nearest is None or len(found) < len(nearest[0])):
            nearest = found, file.parent.name
    if nearest is None:
        return []
    said, more = nearest[0][:MOST], len(nearest[0]) - MOST
    if not said:
        said = ["its code, what its data or target hold, or what it is measured on"]
    return [f"other than {nearest[1]}: {'; '.join(said)}{f'; {more} more' if more > 0 else ''}"]


def _differences(file: Path, stage: Planned) -> list[str] | None:
    """Of an earlier stage.json; None for one that is not of this stage or cannot be read."""
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        before, now = dict(flat(_kept(note["config"]))), dict(flat(_kept(stage.config)))
        made_from = {name: Path(place).parent.name for name, place in note["inputs"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if note.get("name") != stage.name or before.get("_target_") != now["_target_"]:
        return None
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    found = [f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys]
    inputs = {name: place.parent.name for name, place in stage.inputs.items()}
    changed = [name for name in inputs if made_from.get(name) != inputs[name]]
    return found + [f"its {name} was {made_from.get(name)}, is {inputs[name]}" for name in changed]


def flat(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with the keys that lead to it."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    else:
        yield path, config


def device() -> str:
    """What a measurement depends on besides the code: the device's name and the thread count."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _kept(config: Any) -> Any:
    """The configuration without keys that cannot change a result."""
    if isinstance(config, list):
        return [_kept(item) for item in config]
    if not isinstance(config, dict):
        return config
    free: frozenset[str] = frozenset()
    if "_target_" in config:
        free = getattr(find(config["_target_"], "configuration"), "free", free)
    return {key: _kept(value) for key, value in config.items() if key not in free}


@functools.cache
def _source(file: Path) -> str:
    """Hash of a module's code; comments, docstrings and layout do not count."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        said = first.value if isinstance(first, ast.Expr) else None
        if isinstance(said, ast.Constant) and isinstance(said.value, str):
            said.value = ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _stages(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that are not null; one that only has settings was misspelt."""
    if not isinstance(given, dict):
        raise ValueError(f"stages is {given!r}; expected a mapping: set what is in it, stages.NAME")
    stages = {name: stage for name, stage in given.items() if stage is not None}
    whole = {n: dict(s) for n, s in stages.items() if isinstance(s, dict) and "_target_" in s}
    for name in stages:
        if name not in whole:
            raise ValueError(unknown(f"stages.{name}", name, whole))
    if not stages:
        raise ValueError("the recipe has no stages; choose one with recipe=..., see --help")
    return whole


def _of(stages: dict[str, dict[str, Any]], target: str) -> list[str]:
    return [name for name, stage in stages.items() if stage.get("_target_") == target]


def _drop(needs: dict[str, dict[str, str]], dead: list[str]) -> None:
    """Take stages out of the plan, and out of what the others need."""
    for name in dead:
        del needs[name]
    for mine in needs.values():
        for argument in [a for a, source in mine.items() if source in dead]:
            del mine[argument]


def _needs(name: str, stage: dict[str, Any]) -> dict[str, str]:
    needs = stage.get("needs") or {}
    if not isinstance(needs, dict):
        raise ValueError(f"stages.{name}.needs is {needs!r}; it must map arguments to stages")
    return {argument: source for argument, source in needs.items() if source is not None}


def _order(needs: dict[str, dict[str, str]]) -> list[str]:
    order: list[str] = []
    waiting = dict(needs)
    for name, sources in needs.items():
        for argument, source in sources.items():
            if source not in needs:
                raise ValueError(unknown(f"stages.{name}.needs.{argument}={source}", source, needs))
    while waiting:
        ready = [n for n, sources in waiting.items() if all(s in order for s in sources.values())]
        if not ready:
            raise ValueError(f"the stages {', '.join(waiting)} need each other in a circle")
        order.append(ready[0])
        del waiting[ready[0]]
    return order


def _check_inputs(
    name: str, body: dict[str, Any], needs: dict[str, str], config: dict[str, Any]
) -> None:
    """A stage's needs must be arguments of its `run`, and a target must come from somewhere."""
    cls = find(body["_target_"], f"stages.{name}")
    run = getattr(cls, "run", None)
    if run is None:
        raise ValueError(f"stages.{name}._target_ is {body['_target_']}, which is no stage")
    parameters = inspect.signature(run).parameters
    accepted = [p for p in parameters if p not in ("self", "out")]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for argument in needs:
        if argument not in accepted and not any_name:
            raise ValueError(unknown(f"stages.{name}.needs.{argument}", argument, accepted))
    for argument, parameter in parameters.items():
        required = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if required and argument not in needs:
            raise ValueError(f"stages.{name}.needs.{argument} is missing: name the stage")
    if "target" in accepted and "target" not in needs and not config["target"].get("path"):
        raise ValueError(
            f"stages.{name} has no target: set target.path to a folder or Hub id, or let a stage "
            "train one (needs: {target: target})"
        )
