"""A Hub of a few data sets on localhost: what `datasets` and huggingface_hub ask when they stream.

Its paths are those of the Hub's own interface; the rows are the tests'.
"""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.local_server import answering

Sets = dict[str, dict[str, dict[str, list[dict[str, Any]]]]]  # id -> name -> split -> rows
HEAD = "5bd0f46" + "0" * 33  # the commit that main names


def files_of(configs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, bytes]:
    """A repository's files: parquet for each configuration and split, and the card naming them."""
    files, card = {}, ["---", "configs:"]
    for name, splits in configs.items():
        card += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            out = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
            files[f"{name}/{split}-00000-of-00001.parquet"] = out.getvalue()
            card += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    return files | {"README.md": "\n".join([*card, "---", ""]).encode()}


class Faults:
    """Which requests fail, counted from `arm`, and how: error (503), drop (no answer), cut."""

    def __init__(self) -> None:
        self.count, self._from, self._times, self._how = 0, 0, 0, ""
        self._lock = threading.Lock()

    def arm(self, first: int, times: int, how: str) -> None:
        self.count, self._from, self._times, self._how = 0, first, times, how

    def next(self) -> str | None:
        with self._lock:
            number, self.count = self.count, self.count + 1
        return self._how if self._from <= number < self._from + self._times else None


class Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    sets: dict[str, dict[str, bytes]]
    commits: set[str]
    revisions: set[tuple[str, str]]  # (data set, revision) of every request
    faults: Faults

    def do_GET(self) -> None:
        if not self._fails():
            self._answer(*self._find())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, files, _ = self._look()
        if self._fails():
            return None
        if kind != "paths-info" or files is None:
            return self._answer(404, b"")
        wanted = json.loads(body)["paths"]
        self._answer(200, _json([_entry(p, files[p]) for p in wanted if p in files]))

    def _fails(self) -> bool:
        """Answers wrongly, if this request is one of those that shall fail."""
        how = self.faults.next()
        if how == "error":
            self._answer(503, b"")
        elif how == "drop":
            self.close_connection = True
        elif how == "cut":
            status, body = self._find()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body) + 9))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        return how is not None

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a test's output stays its own."""

    def _look(self) -> tuple[str, dict[str, bytes] | None, str]:
        """(kind of request, the files of the data set at that revision, the rest of the path)"""
        parts = self.path.partition("?")[0].strip("/").replace("%2F", "/").split("/")
        parts = parts[1:] if parts[0] == "api" else parts
        name, kind, revision = "/".join(parts[1:3]), *[*parts[3:5], "", ""][:2]
        known = name in self.sets and revision in {"", "main", *self.commits}  # "": main's, too
        if name in self.sets:
            self.revisions.add((name, revision))
        return kind, self.sets[name] if known else None, "/".join(parts[5:])

    def _find(self) -> tuple[int, bytes]:
        kind, files, rest = self._look()
        if files is None:
            return 404, b""
        if kind in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return 200, _json({"id": "a/b", "sha": self._commit(), "siblings": siblings})
        if kind == "tree":
            entries = list(_listing(files, rest.strip("/")))
            return (200, _json(entries)) if entries else (404, b"")
        return (200, files[rest]) if kind == "resolve" and rest in files else (404, b"")

    def _answer(self, status: int, body: bytes) -> None:
        wanted = self.headers.get("Range", "")
        size = len(body)
        if status == 200 and wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            status, body = 206, body[int(first) : int(last or size) + 1]
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(body) - 1}/{size}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + "e" * 40 + '"')
        self.send_header("X-Repo-Commit", self._commit())
        if status == 404:
            self.send_header("X-Error-Code", self._missing())
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _commit(self) -> str:
        return next((commit for commit in self.commits if commit in self.path), HEAD)

    def _missing(self) -> str:
        if not any(name in self.path for name in self.sets):
            return "RepoNotFound"
        return "RevisionNotFound" if self._look()[1] is None else "EntryNotFound"


def _listing(files: dict[str, bytes], folder: str) -> Iterator[dict[str, Any]]:
    """The files and folders directly in a folder."""
    begin = f"{folder}/" if folder else ""
    folders = set()
    for path, raw in files.items():
        inner, slash, _ = path.removeprefix(begin).partition("/")
        if path.startswith(begin) and not slash:
            yield _entry(path, raw)
        elif path.startswith(begin) and inner not in folders:
            folders.add(inner)
            yield {"type": "directory", "path": begin + inner, "oid": "e" * 40}


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _entry(path: str, raw: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(raw), "oid": "e" * 40}


@contextmanager
def serving(
    sets: Sets, commits: set[str], faults: Faults | None = None
) -> Iterator[tuple[str, set[tuple[str, str]]]]:
    """(address, the revisions that were asked for); main and `commits` are the revisions there."""
    revisions: set[tuple[str, str]] = set()
    known = {"sets": {name: files_of(configs) for name, configs in sets.items()}}
    handler = type(
        "Handler",
        (Asked,),
        known | {"commits": commits | {HEAD}, "revisions": revisions, "faults": faults or Faults()},
    )
    with answering(handler) as address:
        yield address, revisions
