"""Conversations -> ids and the mask of supervised tokens, by prefix rendering."""

import hashlib
from itertools import pairwise
from typing import Any

from jinja2.exceptions import TemplateError

from data.rows import Message

PROBE = (
    "The year 2,048: it's  3.14 %!\n\n\tdef f(x): return x**2  # naïve Ärger\n한국어 문장을 "
    "나눕니다. 日本語の文、中文的句子。 Привет, мир! 👩‍👩‍👧 \u00e9 e\u0301 ﬁ ①"
)
SAMPLED = 200  # runs of eight tokens whose text is cut by both tokenizers, too


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


class Unrenderable(ValueError):
    """A conversation whose supervised spans cannot be told from the template."""


def require_same_tokenizer(tokenizer: Any, place: str) -> None:
    """A drafter that reads other ids than its target drafts nonsense; place: its folder or id.

    Raises ValueError naming the first token, or the first text, that differs. Another chat
    template is a warning: it changes no id, but the drafter learnt under it.
    """
    other = _tokenizer(place)
    difference = _other_ids(tokenizer.get_vocab(), other.get_vocab())
    difference = difference or _other_cut(tokenizer, other)
    if difference:
        raise ValueError(
            f"the tokenizer of {place} is not the target's: {difference}; a drafter must share the "
            "target's tokenizer"
        )
    if other.chat_template and other.chat_template != tokenizer.chat_template:
        print(
            f"warning: the chat template of {place} ({template_hash(other)}) is not the target's "
            f"({template_hash(tokenizer)}), so the drafter learnt on conversations that begin and "
            "end otherwise; it is used with the target's",
            flush=True,
        )


def _tokenizer(place: str) -> Any:
    """The tokenizer there; ValueError for one that needs code of its own, which is never run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise ValueError(
            f"the tokenizer of {place} needs code that comes with it, which draftsmith never runs; "
            "choose one that transformers itself knows"
        ) from None


def _other_ids(ours: dict[str, int], theirs: dict[str, int]) -> str | None:
    """Where two vocabularies differ first; None where they are equal."""
    if ours == theirs:
        return None
    at = min(i for _, i in set(theirs.items()) ^ set(ours.items()))
    mine = next((repr(t) for t, i in ours.items() if i == at), "nothing")
    its = next((repr(t) for t, i in theirs.items() if i == at), "nothing")
    sizes = f" ({len(theirs):,} tokens, the target {len(ours):,})"
    told = f"id {at} is {its} in it and {mine} in the target's"
    return told + (sizes if len(ours) != len(theirs) else "")


def _other_cut(ours: Any, theirs: Any) -> str | None:
    """Where two tokenizers of one vocabulary cut PROBE, or what a sample of their tokens says,
    otherwise; None where they do not. What they are made of may differ (a conversion's age)."""
    step = max(1, len(ours) // SAMPLED)
    own = [ours.decode(list(range(i, min(i + 8, len(ours))))) for i in range(0, len(ours), step)]
    for text in (PROBE, *own):
        its, mine = (t(text, add_special_tokens=False)["input_ids"] for t in (theirs, ours))
        if its != mine:
            return f"{text[:40]!r} is {its[:8]} in it and {mine[:8]} in the target's"
    return None


def prompt_ids(tokenizer: Any, messages: list[Message]) -> list[int]:
    """The conversation so far, ready for the target to answer; Unrenderable where the target's
    template refuses it."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise Unrenderable(f"the chat template refuses it ({error})") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Ids of a conversation and which of them the assistant wrote, end token included.

    The span of an answer is what the template adds to the conversation before it, rendered with
    the generation prompt. Where a template rewrites earlier turns, the prefix does not match and
    the row is refused (`Unrenderable`), as is one with nothing, or everything, supervised.
    """
    roles = [m["role"] for m in messages if m["role"] != "system"]
    if roles[:1] in ([], ["assistant"]):
        raise Unrenderable("it begins with an answer")
    if ("assistant", "assistant") in pairwise(roles):
        raise Unrenderable("two answers follow each other")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        spans = [_span(tokenizer, messages, i, text) for i in _answers(messages)]
    except TemplateError as error:
        raise Unrenderable(f"the chat template refuses it ({error})") from None
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
