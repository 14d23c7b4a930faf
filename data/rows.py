"""The form in which text travels, and templates that bring any record into it."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

FIELD = re.compile(r"\{([^{}\n]+)\}")  # {column}; never str.format, which reaches attributes
ROLES = ("system", "user", "assistant")
SHOWN = 16  # values of a column that a message lists
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's names for the two


class Message(TypedDict):
    role: str
    content: str


class Row(TypedDict, total=False):
    """Either `text`, or `messages` (the last one the user's: a prompt; or the assistant's)."""

    text: str
    messages: list[Message]
    id: str
    schema: str  # the JSON schema that an answer must match, as JSON text


class Sample(TypedDict):
    """One turn that the target answered, by its exact ids."""

    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int]


class Shape:
    """Brings a record (column -> value) into a Row, by one of three templates.

    text: a document, such as "{review}".
    prompt, and answer if there is one: one turn each, such as "Translate to English: {de}".
    messages: the name of a column that holds a list of {role, content} (or ShareGPT's {from,
    value}), or a list of strings: those are user turns, one message each.
    A null in a column of a template makes the whole text "", which a Gate counts as empty; what
    a template gives is stripped of white space at both ends.
    schema: the name of a column that holds the JSON schema of the answer; the Row keeps it.
    """

    def __init__(
        self,
        text: str | None,
        prompt: str | None,
        answer: str | None,
        messages: str | None,
        schema: str | None = None,
    ) -> None:
        given = {"text": text, "prompt": prompt, "messages": messages}
        _one_of({key: value for key, value in given.items() if value is not None})
        if answer is not None and prompt is None:
            raise ValueError("answer is given without prompt, expected both: set prompt too")
        for key, template in {"text": text, "prompt": prompt, "answer": answer}.items():
            if template is not None and not FIELD.search(template):
                raise ValueError(
                    f"{key} is {template!r} and names no column, expected a template: "
                    f"write {{column}}, for example '{{{template.strip() or 'review'}}}'"
                )
        self.text, self.prompt, self.answer, self.messages = text, prompt, answer, messages
        self.schema = schema

    def __call__(self, record: Mapping[str, Any], where: str) -> Row:
        """The Row; ValueError naming `where` for a missing column or one that is not text."""
        row = self._row(record, where)
        if isinstance(record.get("id"), str | int):
            row["id"] = str(record["id"])
        if self.schema is not None:
            row["schema"] = _schema(self.schema, record, where)
        return row

    def _row(self, record: Mapping[str, Any], where: str) -> Row:
        if self.text is not None:
            return {"text": fill(self.text, record, where)}
        if self.messages is not None:
            return {"messages": _turns(self.messages, record, where)}
        assert self.prompt is not None
        turns: list[Message] = [{"role": "user", "content": fill(self.prompt, record, where)}]
        if self.answer is not None:
            turns.append({"role": "assistant", "content": fill(self.answer, record, where)})
        return {"messages": turns}

    def key(self) -> tuple[str | None, ...]:
        """What a fingerprint needs to know of this shape."""
        return self.text, self.prompt, self.answer, self.messages, self.schema


class Only:
    """Which records are taken: those whose columns hold one of the values allowed there.

    allowed: column -> values, such as {category: [qa, rag]}; numbers are compared as text.
    """

    def __init__(self, allowed: Mapping[str, Sequence[str]]) -> None:
        for column, values in allowed.items():
            if isinstance(values, str) or not values:
                raise ValueError(
                    f"only.{column} is {values!r}, expected a list of values: write [qa, rag]"
                )
        self.allowed = {column: [str(v) for v in values] for column, values in allowed.items()}

    def takes(self, record: Mapping[str, Any], where: str, seen: dict[str, set[str]]) -> bool:
        """Whether the record is one of them; adds its values to `seen` (column -> values).

        Raises ValueError with the columns that are there when one is missing."""
        values = {column: str(value_of(record, column, where)) for column in self.allowed}
        for column, value in values.items():
            seen.setdefault(column, set()).add(value)
        return all(value in self.allowed[column] for column, value in values.items())

    def check(self, seen: dict[str, set[str]], name: str) -> None:
        """Raises ValueError for an allowed value that none of the source's records had."""
        for column, values in self.allowed.items():
            missing = [value for value in values if value not in seen.get(column, ())]
            if missing:
                there = sorted(seen.get(column, ()))
                shown = ", ".join(there[:SHOWN]) + (", ..." if len(there) > SHOWN else "")
                raise ValueError(
                    f"{name}: no row has {missing[0]!r} in column {column!r}; the values there "
                    f"are {shown}: name one of them"
                )


def fill(template: str, record: Mapping[str, Any], where: str) -> str:
    """The template with every {column} replaced; "" when one of the columns is null."""
    values = [_cell(record, column, where) for column in FIELD.findall(template)]
    texts = [value for value in values if value is not None]
    if len(texts) < len(values):
        return ""
    rest = iter(texts)
    return _whole(FIELD.sub(lambda _: next(rest), template)).strip()


def value_of(record: Mapping[str, Any], column: str, where: str) -> Any:
    """What the column holds; ValueError with the columns that are there when it is not one.

    "translation.de" is the key `de` of a column `translation` that holds a mapping.
    """
    outer, dot, inner = column.partition(".")
    if column not in record and dot and isinstance(record.get(outer), Mapping):
        return value_of(record[outer], inner, f"{where}, column {outer!r}")
    if column not in record:
        raise ValueError(
            f"{where}: no column {column!r}; the columns there are "
            f"{', '.join(map(str, record)) or 'none'}: name one of them"
        )
    return record[column]


def _cell(record: Mapping[str, Any], column: str, where: str) -> str | None:
    value = value_of(record, column, where)
    if value is None or isinstance(value, str):
        return value
    raise ValueError(
        f"{where}: column {column!r} holds {_kind(value)}, expected text: name another column"
        + (", or give it as messages" if isinstance(value, list) else "")
    )


def _turns(column: str, record: Mapping[str, Any], where: str) -> list[Message]:
    value = value_of(record, column, where)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(
            f"{where}: column {column!r} holds {_kind(value)}, expected a list of messages: "
            "name another column, or give it as text or prompt"
        )
    return [_turn(turn, column, where) for turn in value]


def _turn(turn: Any, column: str, where: str) -> Message:
    if isinstance(turn, str):
        return {"role": "user", "content": _whole(turn).strip()}
    if not isinstance(turn, Mapping):
        raise ValueError(
            f"{where}: column {column!r} holds a list of {_kind(turn)}, expected "
            "{role, content} or the user's turns as text: name another column"
        )
    said = turn if "role" in turn or "from" not in turn else _from_sharegpt(turn)
    role, content = said.get("role"), said.get("content")
    if role not in ROLES:
        raise ValueError(
            f"{where}: a message of column {column!r} has the role {role!r}, expected one of "
            f"{', '.join(ROLES)}: leave such conversations out"
        )
    if content is not None and not isinstance(content, str):
        raise ValueError(
            f"{where}: the content of a message of column {column!r} is {_kind(content)}, "
            "expected text: leave such conversations out"
        )
    return {"role": role, "content": _whole(content or "").strip()}


def _schema(column: str, record: Mapping[str, Any], where: str) -> str:
    """The column as JSON text; it may hold that text, or what it stands for."""
    value = value_of(record, column, where)
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: column {column!r} holds broken JSON, {error.msg} at line {error.lineno}: "
            "correct it, or name another column as schema"
        ) from None
    if not isinstance(parsed, Mapping | bool):  # true and false are schemas, too
        raise ValueError(
            f"{where}: column {column!r} holds {_kind(value)}, expected a JSON schema: "
            "name another column as schema"
        )
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _from_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    speaker = turn["from"]
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    return {"role": role, "content": turn.get("value")}


def _whole(text: str) -> str:
    """The text; halves of a character (an emoji cut by someone's JSON) become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:  # no tokenizer takes them, and one bad emoji must not stop a run
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _one_of(given: dict[str, str]) -> None:
    if len(given) == 1:
        return
    names = " and ".join(given) or "none of text, prompt and messages"
    raise ValueError(
        f"{names} given, expected exactly one of text, prompt and messages: "
        'for lines of plain text write text: "{text}", for chat a prompt (and an answer)'
    )


def _kind(value: Any) -> str:
    shown = repr(value)
    return f"{shown if len(shown) <= 40 else shown[:39] + '…'} ({type(value).__name__})"
