"""Tokens and passwords: refused in a configuration, blotted out of whatever is printed."""

import os
import re
import sys
from pathlib import Path
from typing import Any, TextIO, cast

HIDDEN = "***"
# What is a token by its own looks, whatever its key is called.
LOOKS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}|\bwandb_v\d_\w{20,}|\bxox[abeprs]-[\w-]{10,}"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"
    r"|(?i:\bbearer\s+)[\w.~+/=-]{16,}"
    r"|(?<=://)[^/\s@'\"]+(?=@)"  # https://user:password@host
    r"|(?i:(?<=[?&]token=)|(?<=[?&]access_token=)|(?<=[?&]api_key=)|(?<=[?&]signature=))[^&\s'\"]+"
)
# Keys whose value is a secret; num_tokens, cls_token and the like are not among them.
KEYS = re.compile(
    r"(?i)(?:.*[_-])?(?:api[_-]?key|passwd|password|secret|secret[_-]?key|access[_-]?key|credentials?)"
    r"|(?:hf|hub|auth|access|api|use_auth|wandb|bearer|github)?[_-]?token"
)
NAMES = re.compile(r"(?i)(?:.*_)?(?:TOKEN|API_KEY|SECRET|PASSWORD|SECRET_ACCESS_KEY)")
SHORTEST = 8  # characters; a shorter value of the environment would blot out ordinary words


def refuse(value: Any, place: str) -> None:
    """Raises ValueError, without the value itself, for a setting in or below `place` that is a
    token or password (by its looks or its key), or holds a NUL, which no name can."""
    if isinstance(value, dict):
        for key, inner in value.items():
            where = redacted(f"{place}.{key}".lstrip("."))
            if KEYS.fullmatch(str(key)) and inner not in (None, ""):
                raise ValueError(sentence(where))
            refuse(inner, where)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            refuse(inner, f"{place}[{number}]")
    elif isinstance(value, str):
        if redacted(value) != value:
            raise ValueError(sentence(place))
        if "\0" in value:
            raise ValueError(f"{place} holds a NUL character, expected text without: correct it")


def refuse_word(word: str) -> None:
    """Raises ValueError, without the value, for a word of a command line that gives a secret."""
    key, _, value = word.partition("=")
    named = KEYS.fullmatch(key.rpartition(".")[2].lstrip("+~"))
    if LOOKS.search(word) or (named and value and not value.isdecimal()):
        raise ValueError(sentence(redacted(key)))


def refuse_file(path: Path, name: str) -> None:
    """Raises ValueError, without the line itself, for a text file, called `name`, that shows a
    secret."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if redacted(line) != line:
                raise ValueError(sentence(f"line {number} of {name}"))


def sentence(place: str) -> str:
    """What is said of a secret at this place."""
    return (
        f"{place} looks like a token or a password, expected none: configurations stand in files, "
        "logs and cards; put it in the environment (HF_TOKEN, WANDB_API_KEY) or log in "
        "(hf auth login), and change it if it was shown"
    )


def redacted(text: str) -> str:
    """The text with *** for whatever looks like a secret, and for the environment's own."""
    for name, value in os.environ.items():
        if len(value) >= SHORTEST and NAMES.fullmatch(name) and value in text:
            text = text.replace(value, HIDDEN)
    return LOOKS.sub(HIDDEN, text)


class Redacting:
    """A text stream that writes what it is given without secrets."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redacted(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard() -> None:
    """From now on this process prints, and its tracebacks show, no secrets."""
    sys.stdout = cast(TextIO, Redacting(sys.stdout))
    sys.stderr = cast(TextIO, Redacting(sys.stderr))
