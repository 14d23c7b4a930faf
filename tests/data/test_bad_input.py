"""Every kind of bad input gets its sentence: what is, what was expected, what to do."""

import bz2
import copy
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data import files, lines
from data.builtin import Builtin
from data.language import HUGE, Gate
from data.sources import LOOKED_AT, Local
from tests.train.composing import ROOT, compose
from train.run import run_recipe


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write(folder: Path, name: str, content: str | bytes) -> str:
    raw = content.encode() if isinstance(content, str) else content
    packed = {".xz": lzma.compress, ".gz": gzip.compress}.get(Path(name).suffix, bytes)(raw)
    (folder / name).write_bytes(packed)
    return str(folder / name)


def parquet(records: list[dict], **options: Any) -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), out, **options)
    return out.getvalue()


TALES = [{"text": f"{n} " + os.urandom(200).hex()} for n in range(3_000)]
FLIPPED = bytearray(parquet(TALES, compression="gzip"))
FLIPPED[len(FLIPPED) // 2] ^= 0xFF
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
    "not parquet": ("a.parquet", "x" * 99, r"a\.parquet is not whole parquet \(Parquet magic"),
    "csv quotes": ("a.csv", 'text\nfine\n"open\nrest\n', r"a\.csv, line 3: broken csv"),
    "csv columns": ("a.csv", "text,b\n1,2\n3\n", r"line 3: 1 columns, expected 2 \(text, b\)"),
    "tsv columns": ("a.tsv", "text\tb\n1\t2\t3\n", r"line 2: 3 columns, expected 2"),
    "NUL": ("a.txt", "fine\nhalf a line\0\0\0\n", r"a\.txt, line 2: a NUL byte, so it is no text"),
    "UTF-16 without a mark": (
        "a.txt",
        "plain\n".encode("utf-16-le"),
        r"line 1: a NUL byte.*UTF-16",
    ),
    "NUL in csv": ("a.csv", "text,b\nx,\0\n", r"a\.csv, line 2: a NUL byte"),
    "gzip without its name": ("a.jsonl", gzip.compress(b"{}"), r"is a gzip file .*: add \.gz to"),
    "xz without its name": ("a.txt", lzma.compress(b"x"), r"is a xz file .*: add \.xz to its name"),
    "bzip2": ("a.txt", bz2.compress(b"x"), r"is a bzip2 file .*: unpack it \(bunzip2\)"),
    "zip": ("a.csv", b"PK\x03\x04rest", r"is a zip file by its first bytes: unpack it"),
    "parquet as jsonl": (
        "a.jsonl",
        parquet([{"text": "x"}]),
        r"is a parquet file .*name it \.parq",
    ),
    "jsonl as txt": ("a.txt", GOOD, r"line 1: a JSON object, expected plain text: name the file"),
    "array as jsonl": (
        "a.jsonl",
        "[" + GOOD.strip() + "]",
        r"line 1: .*array of objects is called \.json\)",
    ),
    "objects as json": ("a.json", GOOD * 2, r"line 2: broken JSON, Extra data .* called \.jsonl"),
    "nested deeply": ("a.jsonl", '{"text": ' + "[" * 99_999, r"broken JSON, nested too deeply"),
    "a number": ("a.jsonl", GOOD + '{"n": ' + "9" * 5_000 + "}", r"line 2: .*a number is too long"),
    "mixed types": ("a.jsonl", GOOD * 3 + '{"text": {"a": 1}}\n', r"line 4: .*\{'a': 1\} \(dict\)"),
    "parquet cut short": ("a.parquet", parquet(TALES)[:-9], r"a\.parquet is not whole parquet"),
    "parquet flipped": ("a.parquet", bytes(FLIPPED), r"a\.parquet is not whole parquet"),
    "parquet's other columns": (
        "a.parquet",
        parquet([{"b": "x"}]),
        r"row 1: no column 'text'.*: na",
    ),
    "parquet's bytes": ("a.parquet", parquet([{"text": b"x"}]), r"row 1: .* b'x' \(bytes\)"),
    "ragged csv": ("a.csv", "text,b\n1,2\n1,2,3\n", r"a\.csv, line 3: 3 columns, expected 2"),
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


@pytest.fixture(scope="module")
def quickstart() -> dict[str, Any]:
    return compose("recipe=quickstart")


@pytest.mark.parametrize("case", [c for c in BAD_FILES if not c.endswith(("short", "flipped"))])
def test_the_plan_finds_it_and_nothing_was_started(case, quickstart, tmp_path, capsys, monkeypatch):
    """Exit code 2 and no file, as far as the first rows show it; what a later row shows, the stage
    finds before it loads a model (tests/train/test_hostile.py)."""
    monkeypatch.setattr(Builtin, "fingerprint", lambda self: "0")
    name, content, _ = BAD_FILES[case]
    place = write(tmp_path, name, content) if content is not None else str(tmp_path / name)
    config = copy.deepcopy(quickstart) | {"output_dir": str(tmp_path / "out")}
    local = {"_target_": "data.sources.Local", "files": [place], "text": "{text}"}
    config["stages"]["pretrain"]["data"] = local
    assert run_recipe("quickstart", config) == (2, {})
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert place in shown
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_the_first_thousand_rows(tmp_path):
    rows = [GOOD] * LOOKED_AT + ["{\n"]
    late = Local(files=[write(tmp_path, "late.jsonl", "".join(rows))], text="{text}")
    late.fingerprint()
    with pytest.raises(ValueError, match=f"line {LOOKED_AT + 1}: broken JSON"):
        list(late.rows())
    soon = Local(files=[write(tmp_path, "soon.jsonl", "".join(rows[1:]))], text="{text}")
    with pytest.raises(ValueError, match=f"line {LOOKED_AT}: broken JSON"):
        soon.fingerprint()


@pytest.mark.parametrize(("suffix", "packed"), [(".xz", lzma.compress), (".gz", gzip.compress)])
def test_a_packed_file_cut_short(tmp_path, suffix, packed):
    whole = packed(os.urandom(1000).hex().encode())
    for content in (whole[:-40], b"no archive at all"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.txt{suffix} is not a whole {suffix} file"):
            list(Local(files=[str(path)], text="{text}").rows())


@pytest.mark.parametrize("suffix", [".xz", ".gz", ".GZ"])
def test_a_packed_file_with_a_flipped_byte(tmp_path, suffix):
    packed = bytearray(
        (lzma if suffix == ".xz" else gzip).compress(os.urandom(9_000).hex().encode())
    )
    for at in range(200, len(packed) - 20, 2_000):
        broken = bytearray(packed)
        broken[at] ^= 0x10
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(bytes(broken))
        with pytest.raises(
            ValueError, match=rf"not a whole \{suffix.lower()} file .*: fetch or comp"
        ):
            list(Local(files=[str(path)], text="{text}").rows())


def test_a_line_that_would_fill_the_memory(tmp_path, monkeypatch):
    """64 MiB is the limit, and nothing behind it is read; an array of objects may be one line."""
    assert lines.LONGEST == files.LONGEST == 64 << 20
    monkeypatch.setattr(lines, "LONGEST", 1_000)
    monkeypatch.setattr(files, "LONGEST", 1_000)
    long = json.dumps({"text": "x" * 2_000})
    for name in ("a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"):
        path = write(tmp_path, name, "text\n" * (name == "a.csv") + GOOD + long + "\n")
        line = 3 if name == "a.csv" else 2
        with pytest.raises(
            ValueError, match=rf"line {line}: longer than 0 MiB, expected a row a l"
        ):
            list(Local(files=[path], text="{text}", format=path.split(".")[1]).rows())
    path = write(tmp_path, "a.json", f"[{long}]")
    assert len(list(Local(files=[path], text="{text}").rows())) == 1


@pytest.mark.soak
def test_a_line_of_100_mb_takes_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as out:
        out.write(b'{"text": "')
        for _ in range(100):
            out.write(b"x" * 1_000_000)
        out.write(b'"}\n')
    code = (
        "import sys\nfrom data.sources import Local\nfrom train.machine import peak_memory\n"
        "before = peak_memory()\n"
        "try: list(Local(files=[sys.argv[1]], text='{text}').rows())\n"
        "except ValueError as e: print(e)\n"
        "print(int(peak_memory() - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    said, grown = done.stdout.splitlines()
    assert "a.jsonl, line 1: longer than 64 MiB" in said
    assert int(grown) < 3 * 64 + 32


def test_huge_conversations_are_counted_and_left_out():
    """A million characters fit into no context; a document of any length is cut when tokenised."""
    gate = Gate(None)
    talk = {"messages": [{"role": "user", "content": "x" * (HUGE + 1)}]}
    assert list(gate([talk, {"text": "y" * 10 * HUGE}])) == [{"text": "y" * 10 * HUGE}]
    assert gate.dropped == {"too long": 1}


def test_repeated_rows_are_counted_and_many_are_refused():
    some = [{"text": f"row {n}"} for n in range(60)]
    gate = Gate(None)
    assert list(gate(some + some[:40])) == some
    assert gate.dropped == {"repeated": 40}
    assert list(Gate(None)(some * 3)) == some, "as the premises of NLI sets are"
    with pytest.raises(ValueError, match=r"300 of 360 rows of x are repeated, expected .* 80%"):
        list(gate(some * 6, "x"))
    talks = [
        [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", b))] for b in "bc"
    ]
    answers = [{"messages": talk} for talk in talks]
    assert list(gate(answers)) == answers, "one question and two answers are two rows"


def test_files_that_may_not_be_read(tmp_path):
    """As another user, if these tests are root's."""
    closed = tmp_path / "closed"
    closed.mkdir()
    write(tmp_path, "a.jsonl", GOOD)
    write(closed, "b.jsonl", GOOD)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o011)
    (tmp_path / "a.jsonl").chmod(0)
    closed.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        for name in ("a.jsonl", "closed/b.jsonl"):
            with pytest.raises(ValueError, match=r"l cannot be opened \(Permission denied\): give"):
                list(Local(files=[str(tmp_path / name)], text="{text}").rows())
    finally:
        if root:
            os.seteuid(0)
        closed.chmod(0o700)


def test_names_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    for name, message in (
        ("pipe.txt", r"pipe\.txt is a pipe or a device, expected a file"),
        ("loop.txt", r"loop\.txt (does not exist|cannot be opened)"),
        ("gone.txt", r"gone\.txt does not exist"),
        ("x" * 300 + ".txt", r"x\.\.\. cannot be opened \(File name too long\): correct the name"),
    ):
        with pytest.raises(ValueError, match=message):
            Local(files=[str(tmp_path / name)], text="{text}").fingerprint()


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_korean_names_and_contents_under_any_locale(tmp_path, locale):
    write(tmp_path, "한국어.jsonl", jsonl([{"글": "안녕하세요"}]))
    code = (
        "import sys\nfrom data.sources import Local\n"
        "source = Local(files=[sys.argv[1] + '/한*.jsonl'], text='{글}')\n"
        "print(list(source.rows())[0]['text'], source.fingerprint())\n"
        "try: list(Local(files=source._files, text='{없음}').rows())\n"
        "except ValueError as e: print(e)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "LC_ALL": locale, "LANG": locale},
        capture_output=True,
        check=True,
    )
    mark = Local(files=[f"{tmp_path}/한국어.jsonl"], text="{글}").fingerprint()
    first, second = done.stdout.decode().splitlines()
    assert first == f"안녕하세요 {mark}"
    assert "한국어.jsonl, line 1: no column '없음'; the columns there are 글" in second


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
        ([{"role": ["user"], "content": "x"}], r"the role \['user'\], expected one of"),
        ([{"from": ["human"], "value": "x"}], r"the role \['human'\], expected one of"),
        ([{"from": "bing", "value": "x"}], r"the role 'bing', expected one of system, user"),
        ([[{"role": "user", "content": "x"}]], r"holds a list of \[\{'role'"),
        ([{"content": "x"}], r"the role None, expected one of"),
        ([{"role": "user", "content": 3}], r"the content of a message .* is 3 \(int\)"),
    ],
)
def test_bad_messages(tmp_path, turns, message):
    path = write(tmp_path, "a.jsonl", jsonl([{"m": turns}]))
    with pytest.raises(ValueError, match=message):
        list(Local(files=[path], messages="m").rows())
