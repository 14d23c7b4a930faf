"""What sources read. Bad input has a file of its own, test_bad_input.py."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from data.language import Gate
from data.rows import Row
from data.sources import Hub, Local, Mix, heldout, prompt_key, prompt_of

SHARED = Path(os.environ.get("DRAFTSMITH_SHARED", Path(__file__).parents[3] / "shared"))
REVIEWS = [{"review": "정말 재미있는 영화", "stars": 9}, {"review": "지루했다", "stars": 2}]


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(folder: Path, name: str, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    packed = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)(raw)
    (folder / name).write_bytes(packed)
    return str(folder / name)


def texts(source: Local) -> list[str]:
    return [row["text"] for row in source.rows()]


@pytest.mark.parametrize("packing", ["", ".xz", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", jsonl(REVIEWS) + "\n"),
        ("a.json", json.dumps(REVIEWS)),
        ("a.csv", 'review,stars\n"정말 재미있는 영화",9\n\n지루했다,2\n'),
        ("a.tsv", "review\tstars\r\n정말 재미있는 영화\t9\r\n지루했다\t2\r\n"),
    ],
)
def test_formats_give_the_same_rows(tmp_path, name, content, packing):
    path = write(tmp_path, name + packing, content)
    assert texts(Local(files=[path], text="{review}")) == ["정말 재미있는 영화", "지루했다"]


@pytest.mark.parametrize("packing", ["", ".xz"])
def test_parquet(tmp_path, packing):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(REVIEWS), tmp_path / "a.parquet")
    path = write(tmp_path, "b.parquet" + packing, (tmp_path / "a.parquet").read_bytes())
    assert texts(Local(files=[path], text="{review}")) == ["정말 재미있는 영화", "지루했다"]


def test_txt_is_a_row_a_line_and_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeffone\r\n\ntwo \"2'\n")
    assert texts(Local(files=[path], text="{text}")) == ["one", "two \"2'"]
    other = write(tmp_path, "news.ko", "하나\n")
    assert texts(Local(files=[other], text="{text}", format="txt")) == ["하나"]


def test_markdown_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    paragraphs = [f"{n} " + "x" * 700 for n in range(6)] + ["y" * 3000, "end\n  indented"]
    path = write(tmp_path, "a.md.xz", "\n\n\n" + "\n \n\n".join(paragraphs))
    rows = texts(Local(files=[path], text="{text}"))
    assert "\n\n".join(rows) == "\n\n".join(paragraphs)
    assert [len(row) for row in rows] == [1406, 1406, 1406, 3000, 14]


def test_quotes_of_tsv_are_text_unless_they_are_doubled_inside(tmp_path):
    path = write(
        tmp_path, "a.tsv", '"so" he said\t1\n"so"\t2\n"그는 ""현재""라고"\t3\nit\'s "\t4\n'
    )
    source = Local(files=[path], text="{a}", columns=["a", "b"])
    assert texts(source) == ['"so" he said', '"so"', '그는 "현재"라고', "it's \""]


def test_csv_cells_may_hold_line_breaks_and_be_long(tmp_path):
    path = write(tmp_path, "a.csv", f'"one\ntwo ""2""",b\n{"x" * 200_000},b\n')
    assert texts(Local(files=[path], text="{a}", columns=["a", "b"])) == [
        'one\ntwo "2"',
        "x" * 200_000,
    ]


def test_other_encodings(tmp_path):
    path = write(tmp_path, "a.txt", "한국어\n".encode("cp949"))
    assert texts(Local(files=[path], text="{text}", encoding="cp949")) == ["한국어"]


def test_globs_are_sorted_and_a_file_is_read_once(tmp_path):
    for name in ("b", "a", "c"):
        write(tmp_path, f"{name}.txt", name)
    files = [f"{tmp_path}/c.txt", f"{tmp_path}/*.txt"]
    assert texts(Local(files=files, text="{text}")) == ["c", "a", "b"]


def test_group_joins_consecutive_rows_of_a_value_up_to_2000_characters(tmp_path):
    rows = [("1", "a"), ("1", "b"), ("2", "c"), ("1", "d"), *[("3", "z" * 900)] * 3]
    path = write(tmp_path, "a.tsv", "".join(f"{film}\t{text}\n" for film, text in rows))
    source = Local(files=[path], text="{t}", columns=["film", "t"], group="film")
    assert texts(source) == ["a\nb", "c", "d", "z" * 900 + "\n" + "z" * 900, "z" * 900]
    limited = Local(files=[path], text="{t}", columns=["film", "t"], group="film", limit=2)
    assert texts(limited) == ["a\nb", "c"]


def test_prompt_and_answer(tmp_path):
    path = write(tmp_path, "a.jsonl", jsonl([{"id": 7, "de": "Haus", "en": "house"}]))
    prompt = "Translate German to English: {de}"
    (row,) = Local(files=[path], prompt=prompt, answer="{en}").rows()
    user = {"role": "user", "content": "Translate German to English: Haus"}
    assert row == {"id": "7", "messages": [user, {"role": "assistant", "content": "house"}]}
    assert list(Local(files=[path], prompt=prompt).rows()) == [{"id": "7", "messages": [user]}]


def test_templates_only_substitute(tmp_path):
    record = {"a": "{b}", "b": "two", "empty": "", "null": None, "half": "ok \ud83d"}
    path = write(tmp_path, "a.jsonl", json.dumps(record))

    def fill(template: str) -> str:
        return texts(Local(files=[path], text=template))[0]

    assert fill("{a} {b} {}") == "{b} two {}"  # what a value holds is not a template
    assert fill("{b}\n\n{empty}") == "two"
    assert fill("Say {null}") == ""  # for the gate to drop
    assert fill("{half}") == "ok \ufffd"
    with pytest.raises(ValueError, match=r"no column 'a\.__class__'"):
        fill("{a.__class__}")


def test_messages(tmp_path):
    records = [
        {"m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"m": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]},
        {"m": ["first", "second"]},
        {"m": None},
    ]
    path = write(tmp_path, "a.jsonl", jsonl(records))
    rows = list(Local(files=[path], messages="m").rows())
    assert rows[0] == rows[1] == {"messages": records[0]["m"]}
    assert [turn["role"] for turn in rows[2]["messages"]] == ["user", "user"]
    assert [prompt_of(row) for row in rows] == ["hi", "hi", "first", ""]


def test_fingerprint_is_of_content_and_reading_not_of_names(tmp_path):
    one, same = write(tmp_path, "a.txt", "x\n"), write(tmp_path, "b.txt", "x\n")
    other = write(tmp_path, "c.txt", "y\n")

    def print_of(path: str, **settings) -> str:
        return Local(files=[path], **({"text": "{text}"} | settings)).fingerprint()

    assert print_of(one) == print_of(same)
    assert len({print_of(one), print_of(other), print_of(one, limit=1)}) == 3
    assert print_of(one) != print_of(one, text="{text}!")


class TestHub:
    @pytest.fixture
    def load(self, monkeypatch):
        import datasets
        from datasets import IterableDataset

        monkeypatch.setattr("data.hub.PAUSE", 0.0)

        def set_to(result):
            def load_dataset(path, name, **settings):
                assert settings.pop("streaming") is True
                assert set(settings) == {"split", "revision"}
                if isinstance(result, Exception):
                    raise result
                return IterableDataset.from_generator(lambda: iter(result))

            monkeypatch.setattr(datasets, "load_dataset", load_dataset)

        return set_to

    def test_rows(self, load):
        load([{"t": "a"}, {"t": "b"}])
        assert list(Hub(path="org/set", text="{t}", limit=1).rows()) == [{"text": "a"}]
        with pytest.raises(ValueError, match=r"org/set ko train, row 1: no column 'x'"):
            list(Hub(path="org/set", name="ko", text="{x}").rows())

    def test_without_network(self, load):
        import httpx2

        for cause in (ConnectionError("Couldn't reach it"), httpx2.ConnectError("no route")):
            load(cause)
            with pytest.raises(ConnectionError, match=r"org/set train cannot .*HF_ENDPOINT.*Local"):
                list(Hub(path="org/set", text="{t}").rows())

    def test_what_is_not_there(self, load):
        from datasets.exceptions import DatasetNotFoundError

        load(DatasetNotFoundError("Dataset 'org/set' doesn't exist on the Hub"))
        with pytest.raises(ValueError, match=r"doesn't exist on the Hub: correct path.*log in"):
            list(Hub(path="org/set", text="{t}").rows())
        load(ValueError("Bad split: trian. Available splits: ['train']\nmore"))
        with pytest.raises(ValueError, match=r"Available splits: \['train'\]: correct name"):
            list(Hub(path="org/set", split="trian", text="{t}").rows())
        load([])
        with pytest.raises(ValueError, match=r"org/set train is empty"):
            list(Hub(path="org/set", text="{t}").rows())

    def test_fingerprint(self):
        one = Hub(path="org/set", text="{t}", revision="a")
        assert one.fingerprint() == Hub(path="org/set", text="{t}", revision="a").fingerprint()
        assert one.fingerprint() != Hub(path="org/set", text="{t}", revision="b").fingerprint()


def test_mix_takes_turns(tmp_path):
    one = Local(files=[write(tmp_path, "a.txt", "a\nb\nc\n")], text="{text}", language="ko")
    two = Local(files=[write(tmp_path, "b.txt", "1\n")], text="{text}", language="ko")
    mix = Mix(parts={"one": one, "two": two, "off": None})
    assert [row["text"] for row in mix.rows()] == ["a", "1", "b", "c"]
    assert mix.language == "ko"
    assert mix.fingerprint() != Mix(parts={"one": one}).fingerprint()
    with pytest.raises(ValueError, match="parts is empty"):
        Mix(parts={"off": None})


def test_spellings_of_a_prompt_fall_on_one_side():
    same = ("Ｗｈａｔ  is\tKOREA? ", "what is korea?", "What is Korea?")  # full width, too
    assert len({prompt_key(prompt) for prompt in same}) == 1
    assert prompt_key("what is korea") != prompt_key(same[0])
    prompts = [f"prompt {n}" for n in range(20_000)]
    two, ten = ({p for p in prompts if heldout(p, share)} for share in (0.02, 0.1))
    assert two < ten
    assert 300 < len(two) < 500
    assert 1_850 < len(ten) < 2_150
    assert not heldout("x", 0)
    with pytest.raises(ValueError, match=r"share is 1, expected 0 or more and less than 1"):
        heldout("x", 1)


def shared(name: str) -> str:
    path = SHARED / "data" / name
    if not path.exists():
        pytest.skip(f"{path} is not here; DRAFTSMITH_SHARED names the folder")
    return str(path)


REAL: list[tuple[str, dict, str | None, int]] = [
    ("ko-dialog/ChatbotData.csv", {"prompt": "{Q}", "answer": "{A}"}, "ko", 11_823),
    ("translation/flores200/flores200.devtest.7lang.tsv.xz", {"text": "{ko}"}, "ko", 1_012),
    ("docs-hfcourse/de.md.xz", {"text": "{text}"}, "de", 114),
    ("eval-prompts/spec_bench.question.jsonl", {"messages": "turns"}, None, 480),
    ("instruct/lf.alpaca_zh_demo.json.xz", {"prompt": "{instruction}"}, "zh", 1_000),
]


@pytest.mark.parametrize(("name", "settings", "language", "count"), REAL)
def test_real_files(name, settings, language, count):
    source = Local(files=[shared(name)], **settings)
    rows: list[Row] = list(source.rows())
    assert len(rows) == count
    assert len(list(Gate(language)(rows, source.name))) > 0.95 * count
