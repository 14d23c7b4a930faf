"""Languages are told, and gates drop, count and stop as they say."""

import itertools

import pytest

from data.language import MISTAKEN, SCRIPT_OF, Gate, Gated, language_of
from data.quality import is_mojibake
from data.rows import Row
from data.sources import Local

EN = "The weather was beautiful yesterday, and we walked along the river."
KO = "어제는 날씨가 좋아서 강을 따라 걸었습니다."
DE = "Gestern war das Wetter schön, und wir gingen am Fluss entlang."
FR = "Hier il faisait beau et nous nous sommes promenés le long de la rivière."


def rows(*texts: str) -> list[Row]:
    return [{"text": text} for text in texts]


def many(text: str, count: int) -> list[str]:
    """The text, no two alike."""
    return [f"{n}. {text}" for n in range(count)]


def chat(prompt: str, answer: str) -> Row:
    turns = (("system", EN), ("user", prompt), ("assistant", answer))
    return {"messages": [{"role": role, "content": said} for role, said in turns]}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (KO, "ko"),
        ("ㅋㅋㅋㅋ!!", "ko"),
        ("Transformer 모델을 fine-tuning하는 방법을 알아봅시다", "ko"),  # 16 syllables, 21 letters
        ("昨日は天気が良かったので、川沿いを歩きました。", "ja"),
        ("東京都知事選挙の結果", "ja"),
        ("昨天天气很好，我们沿着河边散步。", "zh"),
        ("Hugging Face 是一个人工智能社区", "zh"),
        ("Вчера была хорошая погода, и мы гуляли вдоль реки.", "ru"),
        ("Учора була гарна погода, і ми гуляли вздовж річки.", "uk"),
        (EN, "en"),
        (DE, "de"),
        (FR, "fr"),
        (EN + " 한국", "en"),
        ("كان الطقس جميلا أمس ومشينا على طول النهر", "ar"),
        ("12345 !!! \U0001f600", "und"),
        ("", "und"),
    ],
)
def test_language_of(text, language):
    assert language_of(text) == language


def test_every_known_language_is_known_to_py3langid():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    assert set(SCRIPT_OF) <= set(LanguageIdentifier.from_model_file(MODEL_FILE).labels)
    assert all(len(code) == 2 for code in SCRIPT_OF)
    assert set(MISTAKEN.values()) <= set(SCRIPT_OF)
    assert not set(MISTAKEN) & set(SCRIPT_OF)


def test_a_gate_drops_and_counts():
    gate = Gate("ko", min_share=0.2, min_chars=5, max_chars=100)
    given = rows(KO, "", " \n", "네", "가" * 300, EN, DE, "12345678", KO + "!")
    assert [row["text"] for row in gate(given)] == [KO, KO + "!"]
    assert gate.kept == 2
    assert gate.dropped == {
        "empty": 2,
        "too short": 1,
        "too long": 1,
        "other language: en": 1,
        "other language: de": 1,
        "other language: und": 1,
    }
    assert gate.summary() == (
        "kept 2 of 9 rows: 3 other language (en 1, de 1, und 1), 2 empty, "
        "1 too short (median 1 characters), 1 too long (median 300 characters)"
    )
    assert [row["text"] for row in gate(rows(KO))] == [KO]  # counts start anew
    assert gate.summary() == "kept 1 of 1 rows"


def test_without_a_language_all_languages_pass():
    gate = Gate(None)
    assert len(list(gate(rows(KO, EN, "123", "")))) == 3
    assert gate.dropped == {"empty": 1}


def test_wrong_language_stops_with_what_was_found():
    given = rows(*many(KO, 3), *many(EN, 96), "1")
    with pytest.raises(ValueError, match=r"asked for") as error:
        list(Gate("ko")(given, "data/x.tsv"))
    assert str(error.value) == (
        "asked for ko, found 3 % ko, 96 % en, 1 % und in 100 rows of data/x.tsv: wrong file, "
        "column or filter; set language to what it is, or min_share lower"
    )
    gate = Gate("ko", min_share=0.03)
    assert len(list(gate(given))) == 3
    assert gate.dropped == {"other language: en": 96, "other language: und": 1}


def test_no_row_leaves_before_2000_rows_are_seen_and_none_waits_longer():
    read = itertools.count()

    def endless(*texts: str):
        for text in itertools.cycle(texts):
            yield {"text": f"{next(read)} {text}"}

    with pytest.raises(ValueError, match=r"found 50 % ko, 50 % en in 2,000 rows of the source"):
        next(Gate("ko")(endless(KO, EN)))
    assert next(read) == 2_000
    passing = Gate("ko")(endless(KO))
    passed = [row["text"] for row in itertools.islice(passing, 3_000)]
    assert passed == [f"{n} {KO}" for n in range(2_001, 5_001)]
    assert next(read) == 2_001 + 3_000


def test_later_rows_of_another_language_are_dropped_not_fatal():
    gate = Gate("ko")
    assert len(list(gate(rows(*many(KO, 2_000), *many(EN, 9_000))))) == 2_000
    assert gate.dropped == {"other language: en": 9_000}


def test_few_letters_are_no_verdict_among_languages_of_a_script():
    gate = Gate("de")
    given = rows(DE, "Na gut.", "Alles klar?", "완전히 다른 글자", "そうですね")
    with pytest.raises(ValueError, match=r"found 33 % de, 33 % ko, 33 % ja in 3 rows"):
        list(gate(given))
    gate = Gate("de", min_share=0.3)
    assert [row["text"] for row in gate(given)] == [DE, "Na gut.", "Alles klar?"]
    assert gate.unsure == 2
    assert gate.summary().endswith("; 2 kept with too few letters to tell")


def test_few_letters_of_another_script_are_another_language():
    gate = Gate("ko", min_share=0.5)
    assert [row["text"] for row in gate(rows(KO, "네", "OK then"))] == [KO, "네"]
    gate = Gate("ru", min_share=0)
    assert [row["text"] for row in gate(rows("Да, конечно", "Yes", "네"))] == ["Да, конечно"]


def test_every_row_filtered_says_why():
    with pytest.raises(ValueError, match=r"every row") as error:
        list(Gate(None, max_chars=10)(rows("a" * 11, "b" * 21, "c" * 2001, ""), "x.csv"))
    assert str(error.value) == (
        "every row filtered: 0 of 4 rows of x.csv left: 3 too long (median 21 characters), "
        "1 empty: widen min_chars, max_chars or language, or name another column"
    )
    with pytest.raises(ValueError, match=r"every row filtered: 0 of 2 .* 2 other language \(en 2"):
        list(Gate("ko", min_share=0)(rows(EN, EN + "!")))
    with pytest.raises(ValueError, match=r"x\.csv has no rows"):
        list(Gate("ko")([], "x.csv"))


@pytest.mark.parametrize(("of", "kept"), [("prompt", 2), ("answer", 1), ("all", 1)])
def test_what_of_a_conversation_is_judged(of, kept):
    gate = Gate("ko", min_share=0, of=of)
    passed = list(gate([chat(KO, KO * 5), chat(KO, EN * 3), chat(EN, EN)]))
    assert len(passed) == kept


def test_a_blank_turn_makes_a_conversation_empty():
    gate = Gate(None)
    assert list(gate([chat(KO, " "), {"messages": []}, chat(KO, EN)])) == [chat(KO, EN)]
    assert gate.dropped == {"empty": 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"language": "kr"}, r"language is 'kr', .*: did you mean ko\?"),
        ({"language": "korean"}, r"did you mean ko\?"),
        ({"language": "zh-CN"}, r"did you mean zh\?"),
        ({"language": "qq"}, r"known: ko ja zh"),
        ({"language": "ko", "min_share": 80}, r"min_share is 80, expected 0 to 1"),
        ({"language": "ko", "min_chars": 9, "max_chars": 3}, r"min_chars is 9 and max_chars 3"),
        ({"language": "ko", "of": "answers"}, r"of is 'answers', expected prompt, answer or all"),
    ],
)
def test_bad_setting(settings, message):
    with pytest.raises(ValueError, match=message):
        Gate(**settings)


def local(folder, texts: list[str], **settings) -> Local:
    (folder / "a.txt").write_bytes("".join(f"{text}\n" for text in texts).encode())
    return Local(files=[str(folder / "a.txt")], text="{text}", **settings)


def test_a_file_of_another_language_is_refused_by_what_is_in_it(tmp_path):
    source = local(tmp_path, many(EN, 300), language="ko")
    with pytest.raises(
        ValueError, match=r"asked for ko, found 0 % ko, 100 % en in 300 rows of .*a"
    ):
        list(Gated(source, of="all"))


@pytest.mark.parametrize(("share", "passes"), [(5, True), (15, True), (30, False), (60, False)])
def test_contamination(tmp_path, share, passes):
    """A few foreign rows are left out; where they are many the file is wrong."""
    korean = many(KO, 20 * (100 - share))
    mixed = [*korean, *many(EN, 20 * share)]
    gated = Gated(local(tmp_path, mixed[::3] + mixed[1::3] + mixed[2::3], language="ko"), of="all")
    if passes:
        assert sorted(row["text"] for row in gated) == sorted(korean)
        assert f"{20 * share:,} other language (en {20 * share:,})" in gated.summary()
    else:
        with pytest.raises(ValueError, match=rf"found {100 - share} % ko, {share} % en in 2,000 "):
            list(gated)


def garbled(text: str, encoding: str) -> str:
    """UTF-8 read as a one-byte encoding, as browsers do."""
    return "".join(
        bytes([byte]).decode(encoding if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "latin-1")
        for byte in text.encode()
    )


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", [DE, FR, KO, "Привет", "日本語の文", "naïve café"])
def test_mojibake_is_told_from_foreign_letters(text, encoding):
    assert is_mojibake(garbled(text, encoding))
    assert not is_mojibake(text)


def test_mojibake_is_counted_and_much_of_it_refused(tmp_path):
    """Whether a language was asked for or not: German stays German to a judge of languages."""
    good = many(DE, 90)
    broken = [garbled(text, "cp1252") for text in many(DE + " Öl", 10)]
    gate = Gate(None)
    assert [row["text"] for row in gate(rows(*good, *broken))] == good
    assert gate.dropped == {"in broken characters": 10}
    for language in (None, "de"):
        with pytest.raises(ValueError, match=r"10 of 30 rows of x are in broken characters, exp"):
            list(Gate(language)(rows(*good[:20], *broken), "x"))
    lost = rows(*good, *(text.replace("t", "\ufffd") for text in many(EN, 5)))
    assert len(list(gate(lost))) == 90
    assert not is_mojibake("one cut emoji \ufffd")
