"""Examples of what a stage trains on, the supervised tokens in colour."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from data.documents import Documents
from data.rows import Row, Sample

SHOWN, COUNTED = 3, 500  # documents printed, and documents behind the printed shares
MOST = 160  # tokens printed of each
GREEN, GREY, PLAIN = "\033[32m", "\033[90m", "\033[0m"


def examples(rows: Iterable[Row | Sample], tokenizer: Any, name: str, colour: bool) -> str:
    """A few documents, the share of tokens supervised, and tokens per character.

    Without colour, supervised spans stand between ⟦ and ⟧.
    """
    documents = Documents(tokenizer, name)
    found = list(islice(documents(islice(rows, 10 * COUNTED), False), COUNTED))
    if not found:
        raise ValueError(f"{name} gave no document to look at")
    lines = [f"{name}:"]
    for document in found[:SHOWN]:
        pairs = list(zip(document.ids, document.mask, strict=True))
        lines.append("  " + _coloured(tokenizer, pairs[:MOST], colour))
        if len(pairs) > MOST:
            lines.append(f"  ... and {len(pairs) - MOST} more tokens")
    characters = sum(len(tokenizer.decode(d.ids, skip_special_tokens=True)) for d in found)
    tokens = sum(len(d.ids) for d in found)
    supervised = sum(sum(d.mask) for d in found)
    lines.append(
        f"  {len(found)} documents, {tokens:,} tokens, {supervised / tokens:.0%} supervised, "
        f"{tokens / max(1, characters):.2f} tokens per character"
    )
    return "\n".join(lines)


def _coloured(tokenizer: Any, pairs: list[tuple[int, bool]], colour: bool) -> str:
    """Runs of tokens alike decoded together, so that characters of several tokens stay whole."""
    text, marked = "", pairs[0][1]
    run: list[int] = []
    on, off = (GREEN, GREY) if colour else ("⟦", "")
    end = PLAIN if colour else "⟧"
    for token, supervised in [*pairs, (-1, not pairs[-1][1])]:
        if supervised != marked:
            said = tokenizer.decode(run)
            text += f"{on}{said}{end}" if marked else f"{off}{said}{PLAIN if colour else ''}"
            run, marked = [], supervised
        run.append(token)
    return text.replace("\n", "\n  ")
