"""Configuration -> objects. The signature is the schema; a configuration is data and runs no code.

A mapping with `_target_` names a class of this repository's packages; its other keys are the
class's arguments. Everything is bound against signatures before anything is made.
"""

import difflib
import functools
import importlib
import inspect
import os
import re
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from data.secrets import refuse
from train import axes

ROOT = Path(__file__).resolve().parent.parent
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"
ROOMS = ("decoding", "drafters", "data", "eval", "train")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of what becomes a file's or folder's name
AXIS = re.compile(r"(?!hydra\b)[a-z_]\w*(\.\w+)*(@(?!hydra\b|_)\w+(\.\w+)*)?")
PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    list: "a list [a, b, ...]",
    Any: "anything",
}
ENVIRONMENT = {"DRAFTSMITH_SHARED": "../shared"}  # what a configuration may read, with defaults


def resolvers() -> None:
    """Leaves configurations `${env:NAME}`, for a short list of names, and what the presets of
    sweeps compute with (train/axes.py)."""
    OmegaConf.clear_resolvers()  # which leaves OmegaConf's own, oc.env among them
    for name in ("create", "decode", "deprecated", "dict.keys", "dict.values", "env", "select"):
        OmegaConf.clear_resolver(f"oc.{name}")
    OmegaConf.register_new_resolver("env", _environment)
    axes.register()


def _environment(name: str) -> str:
    if name not in ENVIRONMENT:
        raise ValueError(f"a configuration may read {list(ENVIRONMENT)} only, not {name!r}")
    value = os.environ.get(name, ENVIRONMENT[name])
    place = (ROOT / value).resolve()
    if not place.is_dir():
        raise ValueError(
            f"this recipe reads {place}, which is not there: set {name} to the folder of shared "
            "texts and models"
        )
    return str(place)


def check_name(what: str, name: Any) -> str:
    """The name, if a file or folder may be called so on any system; ValueError if not."""
    if isinstance(name, str) and NAME.fullmatch(name):
        return name
    odd = [c for c in str(name) if not re.match(r"[A-Za-z0-9._-]", c)]
    shown = str(name) if len(str(name)) <= 60 else f"{str(name)[:60]}..."
    hint = f" ({odd[0]!r} is {unicodedata.name(odd[0], 'a control character')})" if odd else ""
    raise ValueError(
        f"{what} is {shown!r}{hint}, expected 1 to 100 of the characters A-Z a-z 0-9 . _ -, the "
        "first a letter or digit: it names a file"
    )


def inside(root: Path, *parts: str) -> Path:
    """root/parts; ValueError where that, symbolic links followed, is not below root."""
    place = root.joinpath(*parts)
    real = place.resolve()
    if not real.is_relative_to(root.resolve()):
        raise ValueError(
            f"{place} leads to {real}, which is outside of {root}: remove the symbolic link, or "
            "set output_dir to the folder that is meant"
        )
    return place


def refuse_commands(file: Path) -> None:
    """Raises ValueError for a part or recipe that does more than name parts and settings: one that
    reaches Hydra's own settings, which can run code, or a file outside of conf/ and recipes/. A
    preset of conf/sweep/ may also name keys to sweep (hydra.sweeper.params), which are words like
    those of a command."""
    text = file.read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    header = re.search(r"^\s*#\s*@package\s+(\S*)", text, re.MULTILINE)
    preset = file.parent.name == "sweep" and header is not None and header[1] == "_global_"
    if preset and isinstance(config, dict) and _sweeps(config.get("hydra")):
        config = {key: value for key, value in config.items() if key != "hydra"}
    for name in [*(["@package"] if header and not preset else []), *_reaching(config)]:
        raise ValueError(
            f"{file.name}: {name!r} is not for a recipe or part, which names parts of conf/ and "
            "their settings only; Hydra's own settings could run code: remove it"
        )


def _sweeps(settings: Any) -> bool:
    """Whether these settings of Hydra's are keys to sweep and nothing else."""
    sweeper = settings.get("sweeper") if isinstance(settings, dict) and len(settings) == 1 else None
    params = sweeper.get("params") if isinstance(sweeper, dict) and len(sweeper) == 1 else None
    return isinstance(params, dict) and all(
        AXIS.fullmatch(str(key)) and isinstance(value, str) for key, value in params.items()
    )


def _reaching(config: Any) -> Iterator[str]:
    """The keys, groups and choices in a configuration that reach where they may not."""
    if isinstance(config, list):
        for item in config:
            yield from _reaching(item)
    if not isinstance(config, dict):
        return
    for key, value in config.items():
        if str(key) == "hydra" or str(key).startswith(("hydra.", "hydra/")):
            yield str(key)
        yield from _choices(value) if key == "defaults" else _reaching(value)


def _choices(defaults: Any) -> Iterator[str]:
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
        for key, chosen in pairs:
            group, _, package = str(key).removeprefix("override ").strip().partition("@")
            inner = re.fullmatch(r"/?[a-z_]*", group) and not group.strip("/").startswith("hydra")
            if not inner or not re.fullmatch(r"(?!hydra\b|_global_)[\w.]*", package):
                yield str(key)
            for name in chosen if isinstance(chosen, list) else [chosen]:
                if name not in (None, "_self_") and not NAME.fullmatch(str(name)):
                    yield str(name)


def find(name: Any, place: str) -> type:
    """The class that `_target_` names; it must be defined in this repository."""
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or parts[0] not in ROOMS or not all(p.isidentifier() for p in parts):
        raise ValueError(
            f"{place}._target_ is {name!r}; it must be room.module.Class with a room of "
            f"{', '.join(ROOMS)}"
        )
    if not ROOT.joinpath(*parts[:2]).with_suffix(".py").is_file():
        near = [f"{parts[0]}.{f.stem}" for f in sorted((ROOT / parts[0]).glob("*.py"))]
        raise ValueError(f"{place}._target_ is {name!r}; modules there: {', '.join(near)}")
    module = importlib.import_module(".".join(parts[:2]))
    found = vars(module).get(parts[2])
    if not isinstance(found, type) or found.__module__ != module.__name__:
        raise ValueError(f"{place}._target_ is {name!r}, which is no class defined in that module")
    return found


def bind(config: Any, place: str) -> None:
    """Checks a configuration, nested ones too, against the signatures of the classes it names.

    Raises ValueError naming the key, the nearest valid name and all valid names; for a token or a
    password, naming its place only.
    """
    refuse(config, place)
    _bind(config, place)


def _bind(config: Any, place: str) -> None:
    if isinstance(config, list):
        for i, item in enumerate(config):
            _bind(item, f"{place}[{i}]")
    if not isinstance(config, dict):
        return
    if "_target_" not in config:
        for key, value in config.items():
            _bind(value, f"{place}.{key}")
        return
    cls = find(config["_target_"], place)
    accepted = _arguments(cls)
    for key, value in config.items():
        if key != "_target_" and key not in accepted:
            raise ValueError(unknown(f"{place}.{key}", key, accepted))
        _bind(value, f"{place}.{key}")
    for key, parameter in accepted.items():
        if parameter.default is parameter.empty and key not in config:
            raise ValueError(
                f"{place}.{key} is missing: {cls.__name__} cannot do without it; add "
                f"+{place}.{key}=VALUE ({_name(_hints(cls).get(key, Any))})"
            )
        if key in config:
            _fits(config[key], _hints(cls).get(key, Any), f"{place}.{key}")


def build(config: Any) -> Any:
    """Makes the object that a bound configuration describes.

    A drafter family becomes a Blueprint: it waits for the shape of its target.
    """
    if isinstance(config, list):
        return [build(item) for item in config]
    if not isinstance(config, dict):
        return config
    values = {key: build(value) for key, value in config.items() if key != "_target_"}
    if "_target_" not in config:
        return values
    cls = find(config["_target_"], "configuration")
    if _waits(cls):
        from drafters.base import Blueprint

        return Blueprint(cls, values)
    return cls(**values)


def classes(config: Any, place: str = "configuration") -> Iterator[tuple[type, dict[str, Any]]]:
    """Every configured class in a configuration, with the mapping that configures it."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield find(config["_target_"], place), config
        for value in config.values():
            yield from classes(value, place)
    elif isinstance(config, list):
        for item in config:
            yield from classes(item, place)


def unknown(place: str, key: str, valid: Any) -> str:
    """The sentence for a key that is not there."""
    near = difflib.get_close_matches(key, list(valid), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{place} is not a setting{hint} Valid names: {', '.join(sorted(valid))}"


@functools.cache
def _arguments(cls: type) -> dict[str, inspect.Parameter]:
    """What a configuration may give: all but the target's shape, which the pipeline brings."""
    parameters = inspect.signature(cls).parameters
    return {k: p for k, p in parameters.items() if k != "shape" or not _waits(cls)}


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(inspect.getattr_static(cls, "__init__"))


def _waits(cls: type) -> bool:
    first = next(iter(inspect.signature(cls).parameters.values()), None)
    return first is not None and first.name == "shape" and first.kind is not first.KEYWORD_ONLY


def _fits(value: Any, hint: Any, place: str) -> None:
    """Refuses a value that is plainly not of the type that the argument is annotated with."""
    if not _matches(value, hint):
        raise ValueError(f"{place} is {_show(value)}; expected {_name(hint)}")


def _matches(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if isinstance(value, dict) and "_target_" in value:
        return _slot(find(value["_target_"], "configuration"), hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple, Sequence):
        kinds = [k for k in typing.get_args(hint) if k is not Ellipsis] or [Any]
        items = value if isinstance(value, list) else None
        return items is not None and all(any(_matches(v, k) for k in kinds) for v in items)
    if origin in (dict, Mapping):
        kind = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(_matches(v, kind) for v in value.values())
    if hint is None or hint is type(None):
        return value is None
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    return isinstance(value, hint) if hint in (str, bool, dict, list) else False


def _slot(cls: type, hint: Any) -> bool:
    from drafters.base import Blueprint, Trained

    if hint is Blueprint:
        return issubclass(cls, Trained)
    return isinstance(hint, type) and issubclass(cls, hint)


def _name(hint: Any) -> str:
    """What is expected, in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_name, inner))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin in (list, tuple, Sequence):
        return f"a list [a, b, ...], each {_name(inner[0])}" if inner else "a list [a, b, ...]"
    if origin in (dict, Mapping) or hint is dict:
        return "a mapping {name: value, ...}"
    if hint in PLAIN:
        return PLAIN[hint]
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    if name == "Blueprint":  # what a family becomes; nobody writes one
        return (
            "a drafter that learns: lm, medusa, hydra_heads, clover, eagle, ... (the others are "
            "measured as stages.bench.baselines)"
        )
    return f"a mapping with a _target_ of class {name}" if isinstance(hint, type) else name


def _show(value: Any) -> str:
    """As it is written in a command."""
    if isinstance(value, dict) and "_target_" in value:
        return str(value["_target_"])
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
