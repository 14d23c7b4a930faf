"""Every kind of bad input gets its sentence: what is, what was expected, what to do."""

import gzip
import json
import lzma
import os
from pathlib import Path

import pytest

from data.sources import Local


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(folder: Path, name: str, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    packed = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)(raw)
    (folder / name).write_bytes(packed)
    return str(folder / name)


GOOD = '{"text": "good"}\n'
BAD_FILES = {
    "missing": ("a.jsonl", None, r"a\.jsonl does not exist; near it in .*: aa\.jsonl: correct"),
    "empty": ("a.jsonl", "", r"a\.jsonl is empty, expected rows: leave it out"),
    "blank": ("a.txt", "\n \n", r"a\.txt is empty"),
    "only header": ("a.csv", "text,b\n", r"a\.csv is empty, expected rows after the header"),
    "empty json": ("a.json", "[]", r"a\.json is empty"),
    "empty parquet": ("a.parquet", "", r"a\.parquet is empty"),
    "broken line": ("a.jsonl", GOOD + '{"text": \n', r"a\.jsonl, line 2: broken JSON, Expecting"),
    "broken json": ("a.json", '[{"text": "a"},\n {"te', r"a\.json, line 2: broken JSON"),
    "json object": ("a.json", '{"text": "a"}', r"holds a dict, expected a list of objects"),
    "not an object": ("a.jsonl", GOOD + "[1]\n", r"line 2: a list, expected an object"),
    "column": ("a.jsonl", '{"b": "x", "c": 1}\n', r"line 1: no column 'text'.* are b, c: name"),
    "number": ("a.jsonl", GOOD + '{"text": 3}\n', r"line 2: column 'text' holds 3 \(int\)"),
    "list": ("a.jsonl", '{"text": ["a"]}\n', r"holds \['a'\] \(list\), .*, or give it as messages"),
    "EUC-KR": (
        "a.txt",
        b"ok\n" + "한국어 문장입니다.\n".encode("euc-kr"),
        r"is not UTF-8 at line 2; it reads as cp949/EUC-KR: set encoding: cp949 or convert",
    ),
    "EUC-KR packed": ("a.jsonl.xz", '{"text": "안녕"}'.encode("euc-kr"), r"it reads as cp949"),
    "Shift JIS": ("a.txt", "これは日本語の文です".encode("cp932"), r"it reads as Shift JIS"),
    "EUC-JP": ("a.txt", "これは日本語の文です".encode("euc_jp"), r"it reads as EUC-JP"),
    "GB18030": ("a.txt", "这是一个中文句子，很短。".encode("gb18030"), r"it reads as GB18030"),
    "UTF-16": ("a.txt", "한국어".encode("utf-16"), r"it reads as UTF-16: convert it, iconv"),
    "latin": ("a.txt", "Ein hübsches Ärgernis".encode("latin-1"), r"line 1; set encoding to what"),
    "latin word": ("a.txt", "Ärger".encode("latin-1"), r"line 1; set encoding to what it is"),
    "extension": ("a.docx", "x", r"has the extension \.docx, expected one of jsonl, json, parq"),
    "no extension": ("a", "x", r"has the extension none, expected one of .*: rename it"),
    "not parquet": ("a.parquet", "x" * 99, r"a\.parquet is not parquet"),
    "csv quotes": ("a.csv", 'text\nfine\n"open\nrest\n', r"a\.csv, line 3: broken csv"),
    "csv columns": ("a.csv", "text,b\n1,2\n3\n", r"line 3: 1 columns, expected 2 \(text, b\)"),
    "tsv columns": ("a.tsv", "text\tb\n1\t2\t3\n", r"line 2: 3 columns, expected 2"),
    "twice": ("a.csv", "text,text\n1,2\n", r"column names occur twice in text, text: rename"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    name, content, message = BAD_FILES[case]
    write(tmp_path, "aa.jsonl", GOOD)
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message):
        list(Local(files=[str(tmp_path / name)], text="{text}").rows())


@pytest.mark.parametrize(("suffix", "packed"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_packed_file_cut_short(tmp_path, suffix, packed):
    whole = packed(os.urandom(1000).hex().encode())
    for content in (whole[:-40], b"no archive at all"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.txt{suffix} is not a whole {suffix} file"):
            list(Local(files=[str(path)], text="{text}").rows())


def test_bad_names(tmp_path):
    write(tmp_path, "a.txt", "x")

    def message(name: str) -> str:
        with pytest.raises(ValueError, match=r".") as error:
            Local(files=[name], text="{text}").fingerprint()
        return str(error.value)

    assert f"no file matches {tmp_path}/*.csv; {tmp_path} holds a.txt" in message(
        f"{tmp_path}/*.csv"
    )
    assert f"{tmp_path} is a folder, expected a file" in message(str(tmp_path))
    near = message(str(tmp_path.parent / (tmp_path.name + "x") / "a.txt"))
    assert f"near it in {tmp_path.parent}: " in near
    assert tmp_path.name in near


BAD_SETTINGS = {
    "nothing": ({}, r"none of text, prompt and messages given, expected exactly one"),
    "two": ({"text": "{a}", "messages": "m"}, r"text and messages given, expected exactly one"),
    "answer": ({"text": "{a}", "answer": "{b}"}, r"answer is given without prompt"),
    "no column": ({"text": "review"}, r"text is 'review' and names no column.*'{review}'"),
    "group": ({"prompt": "{a}", "group": "b"}, r"group is given without text"),
    "limit": ({"text": "{a}", "limit": 0}, r"limit is 0, expected 1 or more rows"),
    "encoding": ({"text": "{a}", "encoding": "eucc"}, r"'eucc', which Python does not know"),
    "utf-16": ({"text": "{a}", "encoding": "utf-16"}, r"cannot be read line by line.*iconv"),
    "format": ({"text": "{a}", "format": "doc"}, r"format is 'doc', expected one of jsonl"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting(case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(ValueError, match=message):
        Local(files=["a.jsonl"], **settings)


def test_bad_file_lists_and_columns(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD)
    for settings, message in (
        ({"files": path}, r"files is the text .*, expected a list: write \["),
        ({"files": []}, r"files is empty"),
        ({"files": [path], "columns": ["text"]}, r"columns is given for .*only csv and tsv"),
    ):
        with pytest.raises(ValueError, match=message):
            list(Local(text="{text}", **settings).rows())


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ("text", r"line 1: column 'm' holds 'text' \(str\), expected a list of messages"),
        ([3], r"holds a list of 3 \(int\), expected \{role, content\}"),
        ([{"role": "tool", "content": "x"}], r"the role 'tool', expected one of system, user"),
        ([{"role": "user", "content": 3}], r"the content of a message .* is 3 \(int\)"),
    ],
)
def test_bad_messages(tmp_path, turns, message):
    path = write(tmp_path, "a.jsonl", jsonl([{"m": turns}]))
    with pytest.raises(ValueError, match=message):
        list(Local(files=[path], messages="m").rows())
