"""Conversations -> ids and the mask of supervised tokens, by prefix rendering."""

import hashlib
from typing import Any

from jinja2.exceptions import TemplateError

from data.rows import Message


def template_hash(tokenizer: Any) -> str:
    """Twelve hex digits that change when the chat template does."""
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:12]


def require_template(tokenizer: Any, name: str) -> None:
    """A target without a chat template cannot be asked anything."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {name} has no chat template, so conversations cannot be rendered; "
            "use an instruction-tuned target or add chat_template.jinja to its folder"
        )


def require_same_tokenizer(tokenizer: Any, place: str) -> None:
    """A drafter that reads other ids than its target drafts nonsense; place: its folder or id."""
    from transformers import AutoTokenizer

    ours, theirs = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(place).get_vocab()
    if ours == theirs:
        return
    token, theirs_id = min(set(theirs.items()) ^ set(ours.items()), key=lambda item: item[1])
    other = next((t for t, i in ours.items() if i == theirs_id and t != token), "nothing")
    raise ValueError(
        f"the tokenizer of {place} is not the target's: id {theirs_id} is {token!r} in one and "
        f"{other!r} in the other; a drafter must share the target's tokenizer"
    )


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The conversation so far, ready for the target to answer."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class Unrenderable(ValueError):
    """A conversation whose supervised spans cannot be told from the template."""


def render(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and which of them the assistant wrote, end token included.

    The span of an answer is what the template adds to the conversation before it, rendered with
    the generation prompt. Where a template rewrites earlier turns, the prefix does not match and
    the row is refused (`Unrenderable`), as is one with nothing, or everything, supervised.
    """
    if not messages or messages[0]["role"] == "assistant":
        raise Unrenderable("it begins with an answer")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = [_span(tokenizer, messages, i, text) for i in _answers(messages)]
    except TemplateError as error:
        raise Unrenderable(f"its chat template refuses it ({error})") from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    mask = [any(begin <= a and b <= end for begin, end in spans) for a, b in offsets]
    mask = _end_at_eos(ids, mask, tokenizer.eos_token_id)
    share = sum(mask) / max(1, len(mask))
    if not 0 < share < 1:
        raise Unrenderable(f"{share:.0%} of its tokens are supervised")
    return ids, mask


def _answers(messages: list[Message]) -> list[int]:
    return [i for i, m in enumerate(messages) if m["role"] == "assistant"]


def _span(tokenizer: Any, messages: list[Message], i: int, text: str) -> tuple[int, int]:
    before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
    through = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
    if not (through.startswith(before) and text.startswith(through)):
        raise Unrenderable("its chat template rewrites earlier turns")
    return len(before), len(through)


def _end_at_eos(ids: list[int], mask: list[bool], eos: int | None) -> list[bool]:
    """Unmarks what a template puts after an answer's end token: the target never writes that."""
    result, open_span = [], True
    for token, marked in zip(ids, mask, strict=True):
        if not marked:
            open_span = True
        result.append(marked and open_span)
        if marked and token == eos:
            open_span = False
    return result
