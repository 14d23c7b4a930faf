"""Answers that must match a JSON schema: which schemas can be measured on, and how many match."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jsonschema import SchemaError
from jsonschema.validators import validator_for
from referencing.jsonschema import EMPTY_REGISTRY

from decoding.constraint import Grammars
from eval.ranks import Row


def refusal(schema: str, grammars: Grammars) -> str | None:
    """Why no answer can be made, or checked, by this schema (JSON text); None where both can."""
    try:
        grammars.json(schema)
        parsed = json.loads(schema)
        validator_for(parsed).check_schema(parsed)
        for pattern in _patterns(parsed):
            re.compile(pattern)
    except SchemaError as error:
        return f"{schema[:80]!r} is no JSON schema: {error.message[:200]}"
    except re.error as error:
        return f"{schema[:80]!r} has a pattern that Python does not read: {error}"
    except ValueError as error:
        return str(error)
    return None


def _patterns(schema: Any) -> Iterator[str]:
    """Every regular expression of a schema, and of what stands in it."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key == "pattern" and isinstance(value, str):
                yield value
            elif key == "patternProperties" and isinstance(value, Mapping):
                yield from value
            yield from _patterns(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _patterns(item)


def matches(text: str, schema: str) -> bool:
    """Whether the whole text is one JSON value and matches the schema. Nothing is downloaded."""
    parsed = json.loads(schema)
    validator = validator_for(parsed)(parsed, registry=EMPTY_REGISTRY)
    try:
        return bool(validator.is_valid(json.loads(text, parse_constant=_no_json)))
    except (ValueError, RecursionError, OverflowError):  # a schema that refers to itself; 1e400
        return False


def validity(
    runs: Iterable[Row], schemas: Sequence[str | None], tokenizer: Any, ends: frozenset[int]
) -> list[dict[str, Any]]:
    """For each arm and temperature, over the answers to prompts with a schema: how many there are
    (`answers`), how many ended before the limit (`ended`), and how many of these match (`valid`).

    runs: rows of runs.jsonl; schemas: of each prompt, None where it has none. Without a constraint
    the same count says what the target does alone.
    """
    counts: dict[tuple[str, float], dict[str, int]] = {}
    known: dict[tuple[int, tuple[int, ...]], bool] = {}  # repeats often say the same
    for run in runs:
        for index, ids in zip(run["prompts"], run["ids"], strict=True):
            schema = schemas[index]
            if schema is None:
                continue
            count = counts.setdefault(
                (run["arm"], run["temperature"]), {"answers": 0, "ended": 0, "valid": 0}
            )
            count["answers"] += 1
            if not ids or ids[-1] not in ends:
                continue
            said = (index, tuple(ids))
            if said not in known:
                text = tokenizer.decode(ids[:-1], skip_special_tokens=True)
                known[said] = matches(text, schema)
            count["ended"] += 1
            count["valid"] += known[said]
    return [{"arm": arm, "temperature": t, **count} for (arm, t), count in counts.items()]


def sentence(count: Mapping[str, Any]) -> str:
    """One entry of `validity` in words."""
    return (
        f"{count['arm']}, T={count['temperature']:g}: {count['valid']} of {count['answers']} "
        f"answers match their JSON schema, {count['answers'] - count['ended']} did not end"
    )


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
