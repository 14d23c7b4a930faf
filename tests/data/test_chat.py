"""Loss masks by prefix rendering, under real tokenizers and templates that misbehave."""

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from data.chat import (
    Unrenderable,
    prompt_ids,
    render,
    require_same_tokenizer,
    require_template,
    template_hash,
)
from data.documents import PIECE, Documents
from decoding.target import Shape
from drafters.lm import LM
from tests import tiny
from tests.toys import tiny_model

END = {"models/koen-17m": "<|end|>", "tokenizers/qwen2": "<|im_end|>"}

USER = {"role": "user", "content": "안녕하세요, 오늘 날씨는 어때요?"}
ANSWER = {"role": "assistant", "content": "맑고 따뜻합니다. It is 23 °C."}
MORE = {"role": "user", "content": "And tomorrow?\nIn one line."}
LAST = {"role": "assistant", "content": "비가 와요 🌧"}
SYSTEM = {"role": "system", "content": "짧게 대답해 주세요."}
TALKS = {
    "one turn": [USER, ANSWER],
    "two turns": [USER, ANSWER, MORE, LAST],
    "system": [SYSTEM, USER, ANSWER],
    "system, two turns": [SYSTEM, USER, ANSWER, MORE, LAST],
    "ends with the user": [USER, ANSWER, MORE],
}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# keeps only the last answer's whole text, as templates that strip earlier reasoning do
FORGETFUL = CHATML.replace(
    "m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '...')"
)
# an answer begins otherwise than the generation prompt promises
MISMATCHED = CHATML.replace(
    "m['role'] + '\n' + m['content']",
    "m['role'] + '\n' + ('<think></think>' if m['role'] == 'assistant' else '') + m['content']",
).replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")


def tokenizer_in(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=END)
def named(request: pytest.FixtureRequest, shared: Path) -> tuple[Any, str]:
    """A tokenizer and its end token."""
    return tokenizer_in(shared / request.param), END[request.param]


@pytest.fixture
def qwen(shared: Path) -> Any:
    return tokenizer_in(shared / "tokenizers/qwen2")


def spans(tokenizer: Any, ids: list[int], mask: list[bool]) -> list[str]:
    """Decoded supervised runs."""
    pairs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in run]) for marked, run in pairs if marked]


@pytest.mark.parametrize("name", TALKS)
def test_supervised_is_each_answer_and_its_end_token_and_nothing_else(named, name: str):
    tokenizer, end = named
    ids, mask = render(tokenizer, TALKS[name])
    answers = [m["content"] + end for m in TALKS[name] if m["role"] == "assistant"]
    assert spans(tokenizer, ids, mask) == answers


@pytest.mark.parametrize("name", TALKS)
def test_the_ids_are_those_of_the_rendered_conversation(named, name: str):
    tokenizer, _ = named
    ids, mask = render(tokenizer, TALKS[name])
    text = tokenizer.apply_chat_template(TALKS[name], tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(mask) == len(ids)


def test_what_a_template_writes_after_the_end_token_is_not_supervised(qwen):
    """ChatML puts a line break behind <|im_end|>; the target never writes it."""
    ids, mask = render(qwen, TALKS["two turns"])
    for i, token in enumerate(ids[:-1]):
        if token == qwen.eos_token_id and mask[i]:
            assert qwen.decode([ids[i + 1]]) == "\n"
            assert not mask[i + 1]
    assert sum(m and t == qwen.eos_token_id for t, m in zip(ids, mask, strict=True)) == 2


def test_an_answer_begins_where_the_prompt_to_the_target_ends(named):
    tokenizer, _ = named
    ids, mask = render(tokenizer, TALKS["system"])
    prompt = prompt_ids(tokenizer, TALKS["system"][:2])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


def test_one_beginning_token_only(named):
    """Templates write the bos themselves; the tokenizer must not add another."""
    tokenizer, _ = named
    for ids in (render(tokenizer, TALKS["one turn"])[0], prompt_ids(tokenizer, [USER])):
        assert ids.count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("template", [FORGETFUL, MISMATCHED], ids=["forgetful", "mismatched"])
def test_a_template_that_rewrites_history_is_refused(qwen, template: str):
    qwen.chat_template = template
    with pytest.raises(Unrenderable, match="rewrites earlier turns"):
        render(qwen, TALKS["two turns"])


def test_the_same_template_without_the_fault_is_rendered(qwen):
    """So that the refusal above is for the fault alone."""
    qwen.chat_template = CHATML
    ids, mask = render(qwen, TALKS["two turns"])
    assert len(spans(qwen, ids, mask)) == 2


def test_a_conversation_without_an_answer_is_refused(qwen):
    with pytest.raises(Unrenderable, match="0% of its tokens are supervised"):
        render(qwen, [SYSTEM, USER])


@pytest.mark.parametrize(
    "talk", [[], [ANSWER], [ANSWER, USER, LAST], [SYSTEM, ANSWER, USER, LAST]], ids=len
)
def test_a_conversation_that_begins_with_an_answer_is_refused(named, talk):
    """ShareGPT has many; they must not end a run."""
    with pytest.raises(Unrenderable, match="it begins with an answer"):
        render(named[0], talk)


def test_answers_that_follow_each_other_are_refused(qwen):
    with pytest.raises(Unrenderable, match="two answers follow each other"):
        render(qwen, [USER, ANSWER, LAST])
    ids, mask = render(qwen, [USER, MORE, ANSWER])  # a user may say two things
    assert spans(qwen, ids, mask) == [ANSWER["content"] + "<|im_end|>"]


def test_an_empty_answer_is_its_end_token_alone(qwen):
    """Which a target may say; a Gate leaves such rows out before."""
    ids, mask = render(qwen, [USER, {"role": "assistant", "content": ""}])
    assert spans(qwen, ids, mask) == ["<|im_end|>"]


def test_a_row_that_the_template_itself_refuses_is_dropped_like_others(qwen):
    qwen.chat_template = "{{ raise_exception('Roles must alternate') }}"
    with pytest.raises(Unrenderable, match="Roles must alternate"):
        render(qwen, TALKS["one turn"])
    with pytest.raises(Unrenderable, match=r"template refuses it .Roles must alternate"):
        prompt_ids(qwen, [USER])


def test_a_missing_template_is_one_sentence(qwen):
    require_template(qwen, "x")
    qwen.chat_template = None
    with pytest.raises(ValueError, match=r"of base-model has no chat template, .*use an instr"):
        require_template(qwen, "base-model")


def test_the_template_hash_changes_with_the_template(qwen):
    before = template_hash(qwen)
    assert len(before) == 12
    assert template_hash(qwen) == before
    qwen.chat_template += " "
    assert template_hash(qwen) != before


def test_too_many_unrenderable_conversations_stop_with_the_counts(qwen):
    """Above 5 % it is the template, not the rows."""
    good = [{"messages": TALKS["one turn"]}]
    bad = [{"messages": [USER]}]
    with pytest.raises(ValueError, match=r"2 of 12 rows of web cannot be rendered.*2 bec"):
        list(Documents(qwen, "web")(good * 10 + bad * 2, False))
    documents = Documents(qwen, "web")
    assert len(list(documents(good * 39 + bad, False))) == 39
    assert documents.dropped.total() == 1


def test_the_targets_own_answers_are_never_tokenised_again(qwen):
    """Ids that a tokenizer would never give stay as they are."""
    row = {"prompt": "q", "prompt_ids": [5, 6], "answer_ids": [7, 7, 8]}
    (document,) = Documents(qwen, "x")([row], False)
    assert document.ids == [5, 6, 7, 7, 8]
    assert document.mask == [False, False, True, True, True]


def test_text_is_all_supervised_between_its_marks(shared: Path):
    tokenizer = tokenizer_in(shared / "models/koen-17m")
    (document,) = Documents(tokenizer, "x")([{"text": "한국어 글입니다."}], False)
    assert document.ids[0] == tokenizer.bos_token_id
    assert document.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(document.ids[1:-1]) == "한국어 글입니다."
    assert all(document.mask)
    assert document.splittable


# ---- drafter and target: one tokenizer


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Any:
    return tiny.tokenizer(tiny.write_texts(tmp_path_factory.mktemp("ours")))


def swap(made: dict[str, Any]) -> None:
    vocabulary = made["model"]["vocab"]
    vocabulary["Ġ"], vocabulary["e"] = vocabulary["e"], vocabulary["Ġ"]


def add(made: dict[str, Any]) -> None:
    special = made["added_tokens"][-1] | {"id": 300, "content": "<|call|>"}
    made["added_tokens"].append(special)


def unlearn(made: dict[str, Any]) -> None:
    del made["model"]["merges"][0]


def lower(made: dict[str, Any]) -> None:
    made["normalizer"] = {"type": "Lowercase"}


OTHERS = {
    "same size, different ids": (
        swap,
        r"id \d+ is '(Ġ|e)' in it and '(Ġ|e)' in the target's; a dr",
    ),
    "added token": (add, r"id 300 is '<\|call\|>' in it and nothing in the target's \(301 tokens"),
    "another merge": (unlearn, r" is \[.* in it and \[.* in the target's; a drafter must share"),
    "another normalizer": (lower, r".The year 2,048: .* is \[.* in it and \[.* in the target's"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_drafter_with_another_tokenizer_is_refused_by_what_differs(case, ours, tmp_path):
    change, message = OTHERS[case]
    ours.save_pretrained(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    change(made)
    (tmp_path / "tokenizer.json").write_text(json.dumps(made), "utf-8")
    with pytest.raises(ValueError, match=r"the tokenizer of .* is not the target's: ") as error:
        require_same_tokenizer(ours, str(tmp_path))
    assert re.search(message, str(error.value))


def test_the_same_tokenizer_with_another_template_is_a_warning(ours, tmp_path, capsys):
    ours.save_pretrained(tmp_path)
    require_same_tokenizer(ours, str(tmp_path))
    assert capsys.readouterr().out == ""
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text("utf-8").replace("<|end|>", "<|end|>\n"), "utf-8")
    require_same_tokenizer(ours, str(tmp_path))
    said = capsys.readouterr().out
    assert "warning: the chat template of" in said
    assert f"is not the target's ({template_hash(ours)})" in said


def test_a_padded_vocabulary_is_named_by_both_sizes(tmp_path):
    tiny_model(vocab=64).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has 64 tokens and the target 72"):
        LM(Shape(72, 32, 2, 4, 4, 64, 512), checkpoint=str(tmp_path))


def test_text_of_any_length_is_tokenised_in_pieces(ours):
    """Cut at white space where there is some; nothing is lost."""
    text = "Der Hund trinkt Milch am Abend im Garten. " * 6_000
    (document,) = Documents(ours, "x")([{"text": text}], False)
    assert len(text) > 2 * PIECE
    assert ours.decode(document.ids[1:-1]) == text
    assert document.ids[1:-1] == ours(text, add_special_tokens=False)["input_ids"]
    (word,) = Documents(ours, "x")([{"text": "H" * (2 * PIECE + 5)}], False)
    assert ours.decode(word.ids[1:-1]) == "H" * (2 * PIECE + 5)


def test_text_of_one_token_is_counted_as_teaching_nothing(qwen):
    """Where a tokenizer adds neither beginning nor end, one token has nothing to predict it."""
    qwen.bos_token = qwen.eos_token = None
    with pytest.raises(ValueError, match=r"1 of 1 rows of x cannot .* fewer than two tokens"):
        list(Documents(qwen, "x")([{"text": "a"}], False))
