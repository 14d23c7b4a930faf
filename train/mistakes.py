"""Mistakes in a command, each told in one sentence: which key, what it is, what was expected, what
to type. Nothing here needs torch, so that they are told at once."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

import hydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, errors

from train.compose import CONF, ENVIRONMENT, RECIPES, unknown

OTHER = re.compile(r"([~+]*[\w@/.:-]+)=([^'\"\[\]{}()\\=]*[^\x00-\x7f][^'\"\[\]{}()\\=]*)")


def quoted(word: str) -> str:
    """The word with its value in quotes, if it has letters that Hydra's grammar does not know."""
    found = OTHER.fullmatch(word)
    if not found:
        return word
    values = ",".join(f'"{value}"' for value in found[2].split(","))  # of a sweep, each
    return f"{found[1]}={values}"


def unreadable(word: str) -> str:
    """Of a word that is no override."""
    return (
        f"{word} cannot be read as a setting; write key=value, and a value with braces, quotes or "
        "other alphabets in two pairs of quotes: 'key=\"value\"'"
    )


def no_choice(override: Override) -> str | None:
    """What is wrong with a word that chooses a part or recipe by something that is no name."""
    group = str(override.key_or_group)
    if group != "recipe" and not (CONF / group).is_dir():
        return None
    names, value = ", ".join(options(group)), override.value()
    if isinstance(value, list) and group not in ("suite", "preflight"):  # which add up
        return f"{override.input_line} names several, expected one of {names}"
    if override.is_delete() or override.is_sweep_override() or isinstance(value, str | list):
        return None
    return f"{override.input_line} names no part; leave it out, or choose one of {names}"


def several(override: Override) -> str:
    """What is wrong with several values outside of a sweep."""
    word, key = override.input_line, override.get_key_element()
    return f"{word} gives several values: add --multirun, or write a list, {key}=[a,b]"


def options(group: str) -> list[str]:
    """The parts of a group, or the recipes."""
    return sorted(p.stem for p in (RECIPES if group == "recipe" else CONF / group).glob("*.yaml"))


def explain(error: Exception, words: list[str]) -> str:
    """An error of composing these words, or of resolving what they gave."""
    text = str(error)
    missing = re.search(r"Could not (?:find|load) '(\w+)/([^']+)'", text)
    if missing:
        group, name = missing.groups()
        near = difflib.get_close_matches(name, options(group), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"there is no {group} {name!r}{hint} There are: {', '.join(options(group))}"
    struck = re.search(r"Could not override '([^']+)'", text)
    if struck and "@" in struck.group(1):
        return (
            f"{struck.group(1)} is not in this recipe: correct it, or add it as +{struck.group(1)}"
        )
    struck = struck or re.search(r"Could not delete from config\. '([^']+)' does not exist", text)
    if struck:
        return _unknown_key(struck.group(1), words) or _one_line(text)
    twice = re.search(r"Could not append to config\. An item is already at '([^']+)'", text)
    if twice:
        return f"{twice[1]} is in this recipe already: write {twice[1]}=VALUE, without the +"
    for cause in _causes(error):
        if isinstance(cause, errors.OmegaConfBaseException) and cause.full_key:
            return _of_value(cause, words) or _one_line(text)
    return _one_line(text)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_value(error: errors.OmegaConfBaseException, words: list[str]) -> str | None:
    """Of a value that has no meaning where it stands; None for an error that nobody has met."""
    key, said = str(error.full_key), str(error.msg).splitlines()[0]
    name = re.search(
        r"Missing mandatory value: (\S+)|Interpolation (?:key|type) '?([^']+?)'?(?: not found)?$",
        said,
    )
    if isinstance(error, errors.MissingMandatoryValue):
        return f"{key} has no value, and there is no default: {_ask(key)}"
    if isinstance(error, errors.InterpolationToMissingValueError) and name:
        return f"{key} is what {name[1]} is, and that has no value: {_ask(name[1])}"
    if isinstance(error, errors.InterpolationKeyError) and name:
        return f"{key} refers to ${{{name[2]}}}, which is not in this recipe: write a value"
    if isinstance(error, errors.UnsupportedInterpolationType):
        return _of_function(key)
    if isinstance(error, errors.GrammarParseError):
        return f"{key} is {error.value!r}, which cannot be read: a reference is written ${{KEY}}"
    if "Recursive" in said:
        return f"{key} refers to itself: write a value"
    if "raised while resolving" in said:
        ours = re.match(r"ValueError raised while resolving interpolation: (.*)", said)
        return ours[1] if ours else _of_function(key)
    if "Cannot merge" in said:
        given = next((w for w in words if w.lstrip("+").startswith(f"{key}=")), key)
        if error.object_type is list:
            return f"{given} is no list, expected one: write {key}=[a,b]"
        return f"{given} is no mapping, expected one: set what is in it, {key}.NAME=VALUE"
    return None


def _of_function(key: str) -> str:
    names = " or ".join(f"${{env:{name}}}" for name in ENVIRONMENT)
    return f"{key} calls a function, expected a value, ${{KEY}} or {names}: write one of these"


def _ask(key: str) -> str:
    last = key.rpartition(".")[2]
    if last in ("data", "prompts"):
        return f"choose it with +data@{key}=NAME, one of {', '.join(options('data'))}"
    return f"add {key}=VALUE"


def _unknown_key(key: str, words: list[str]) -> str | None:
    """Of a key that the configuration does not have."""
    good = [w for w in words if "." not in w.split("=")[0] and w.split("=")[0].lstrip("+~/") != key]
    node: Any = hydra.compose("config", good)
    parts = key.split(".")
    for i, part in enumerate(parts):
        if not isinstance(node, DictConfig):
            return f"{key} is not a setting: {'.'.join(parts[:i])} is {node!r} and holds no others"
        if part not in node:
            return unknown(".".join(parts[: i + 1]), part, [str(k) for k in node])
        node = OmegaConf.select(node, part)
    return None


def _one_line(text: str) -> str:
    return "; ".join([line.strip() for line in text.splitlines() if line.strip()][:3])
