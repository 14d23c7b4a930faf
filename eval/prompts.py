"""Prompts to measure on: rendered for the target, and none that the drafter was trained on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.chat import prompt_ids
from data.generate import read
from data.language import Gated
from data.rows import Message
from data.sources import Row, Source, heldout, prompt_key, prompt_of

SEARCHED = 20_000  # distinct prompts of a source among which a limit takes its sample


@dataclass(frozen=True)
class Prompt:
    """One prompt: its task's name, its text and its ids, ready to be answered; the conversation
    that it is made of, what the user says in later turns, and the JSON schema of its answer."""

    task: str
    text: str
    ids: list[int]
    messages: Sequence[Message] = ()
    later: Sequence[str] = ()
    schema: str | None = None


def collect(
    sources: dict[str, Source],
    tokenizer: Any,
    *,
    limit: int,
    most_tokens: int,
    heldout_only: bool,
    trained_on: Path | None,
) -> tuple[list[Prompt], str]:
    """Up to `limit` prompts of each task, and a sentence on what was left out.

    They are taken in the order of their hashes, since sources are often sorted by kind.

    heldout_only: take only the side of the split that no stage trains on (of sources that are not
    for evaluation alone). trained_on: the answers
    of a generate stage, whose prompts are left out.
    """
    used = {prompt_key(row["prompt"]) for row in read(trained_on)} if trained_on else set()
    prompts: list[Prompt] = []
    seen: set[str] = set()  # a prompt of two tasks belongs to the first
    leaked = long = 0
    for task, source in sources.items():
        taken = 0
        found = list(islice(_distinct(source, heldout_only, seen), SEARCHED))
        for row in sorted(found, key=lambda row: prompt_key(prompt_of(row))):
            if prompt_key(prompt_of(row)) in used:
                leaked += 1
                continue
            messages, later = _turns(row)
            ids = prompt_ids(tokenizer, messages)
            if len(ids) > most_tokens:
                long += 1
                continue
            text, schema = prompt_of(row), row.get("schema")
            prompts.append(Prompt(task, text, ids, tuple(messages), later, schema))
            taken += 1
            if taken == limit:
                break
    if not prompts:
        raise ValueError(
            f"no prompt is left to measure on: {leaked:,} were trained on, {long:,} are longer "
            f"than {most_tokens:,} tokens; give bench prompts of its own"
        )
    return prompts, (
        f"{len(prompts):,} prompts; {leaked:,} left out because the drafter was trained on them, "
        f"{long:,} because they are longer than {most_tokens:,} tokens"
    )


def _distinct(source: Source, heldout_only: bool, seen: set[str]) -> Iterator[Row]:
    for row in Gated(source, of="prompt"):
        if "messages" not in row:
            raise ValueError(f"{source.name} gives text, expected prompts: set its prompt")
        key = prompt_key(prompt_of(row))
        if key not in seen and (source.evaluation or heldout(prompt_of(row)) or not heldout_only):
            seen.add(key)
            yield row


def _turns(row: Row) -> tuple[list[Message], tuple[str, ...]]:
    """The messages up to and with the first user turn, and what the user says after it."""
    messages = row["messages"]
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    later = [m["content"] for m in messages[first + 1 :] if m["role"] == "user"]
    return list(messages[: first + 1]), tuple(later)


def with_later_turns(
    prompts: list[Prompt],
    tokenizer: Any,
    answer: Callable[[list[Prompt]], list[list[int]]],
    *,
    turns: int,
    most_tokens: int,
) -> list[Prompt]:
    """The prompts, and up to `turns` - 1 later turns of each as prompts of their own.

    What stands between is the target's own answer (`answer` gives its ids), the same for whatever
    decodes the next turn. A turn of more than `most_tokens` tokens ends its conversation.
    """
    found, newest = list(prompts), list(prompts)
    for _ in range(turns - 1):
        open_ = [prompt for prompt in newest if prompt.later]
        newest = []
        for prompt, ids in zip(open_, answer(open_) if open_ else [], strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            said: Message = {"role": "assistant", "content": text}
            asked: Message = {"role": "user", "content": prompt.later[0]}
            messages = (*prompt.messages, said, asked)
            text, ids = f"{prompt.text}\n{prompt.later[0]}", prompt_ids(tokenizer, list(messages))
            if len(ids) <= most_tokens:
                later = prompt.later[1:]
                newest.append(Prompt(prompt.task, text, ids, messages, later, prompt.schema))
        found += newest
    return found
