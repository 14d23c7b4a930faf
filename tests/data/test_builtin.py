"""The standard library as text and as conversations."""

import pytest

from data.builtin import Builtin
from data.sources import prompt_key, prompt_of


@pytest.fixture(scope="module")
def whole():
    return {kind: list(Builtin(kind=kind).rows()) for kind in ("text", "chat")}


def test_chat(whole):
    rows = whole["chat"]
    assert len(rows) > 3_000
    assert len({prompt_key(prompt_of(row)) for row in rows}) == len(rows)
    answers = [row["messages"][1]["content"] for row in rows]
    assert len(set(answers)) == len(answers)
    assert all(answer.strip() and len(answer) < 4_000 for answer in answers)
    shapes = ("Write the Python function", "Write the Python method", "What does", "Explain")
    for shape in (*shapes, "Complete this Python", "What is the Python module"):
        assert sum(prompt_of(row).startswith(shape) for row in rows) > 20


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_order_is_fixed_and_a_limit_takes_its_beginning(whole, kind):
    assert list(Builtin(kind=kind, limit=50).rows()) == whole[kind][:50]


def test_text_is_of_bounded_size_and_enough(whole):
    sizes = [len(row["text"]) for row in whole["text"]]
    assert sum(sizes) > 3_000_000
    assert sum(size > 2_000 for size in sizes) < 0.2 * len(sizes)


def test_fingerprint():
    chat = Builtin(kind="chat").fingerprint()
    assert chat == Builtin(kind="chat").fingerprint() != Builtin(kind="text").fingerprint()
    with pytest.raises(ValueError, match=r"kind is 'code', expected text, chat or summary"):
        Builtin(kind="code")


def test_a_python_without_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"has no sources, expected \*\.py files: install"):
        list(Builtin(kind="chat").rows())
