"""A Hub of models on localhost that can be written to: what huggingface_hub asks when it publishes
and fetches. Its paths are those of the Hub's own interface; its state is the tests' to look at.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote

from tests.local_server import answering

LARGE = (".safetensors", ".gguf", ".png")  # what goes to the storage of large files
ATTRIBUTES = {".gitattributes": b"*.safetensors filter=lfs\n"}
WAYS = ("error", "drop", "lost", "cut", "busy")
"""How a request fails: 503, without JSON; no answer; carried out and no answer; an answer cut in
the middle; 429 with Retry-After."""
RETRY_AFTER = 7

Files = dict[str, bytes]
Answer = tuple[int, Any]


@dataclass
class Repository:
    private: bool = True
    gated: bool | str = False
    writable: bool = True
    commits: dict[str, Files] = field(default_factory=dict)  # oldest first; main names the last
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add(dict(ATTRIBUTES))

    @property
    def main(self) -> str:
        return list(self.commits)[-1]

    def add(self, files: Files) -> str:
        made = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[made] = files
        return made

    def files(self, revision: str) -> Files | None:
        named = self.main if revision in ("", "main") else self.tags.get(revision, revision)
        return self.commits.get(named)


@dataclass
class Hub:
    """The state, and which requests fail: `times` from the number `first`, counted from `arm`."""

    token: str
    me: dict[str, Any] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    data_sets: set[str] = field(default_factory=set)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by their sha256
    sent: list[str] = field(default_factory=list)  # the large files that were received
    served: Files = field(default_factory=dict)  # by path: what is sent instead of the file
    asked: list[str] = field(default_factory=list)  # since arm
    failed: int = 0  # since arm
    together: threading.Barrier | None = None  # where commits wait for each other
    address: str = ""

    def __post_init__(self) -> None:
        self._lock, self.writing = threading.Lock(), threading.Lock()
        self.arm()

    def arm(self, first: int = 0, times: int = 0, how: str = "error") -> None:
        self._first, self._times, self._how = first, times, how
        self.asked, self.failed = [], 0

    def next(self, request: str) -> str | None:
        """How this request fails, or None."""
        with self._lock:
            number = len(self.asked)
            self.asked.append(request)
            fails = self._first <= number < self._first + self._times
            self.failed += fails
        return self._how if fails else None


class Asked(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: in two, each answer would take 40 ms
    hub: Hub

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0]).strip("/")
        how = self.hub.next(f"{self.command} {path}")
        if how == "error":
            self._answer(503, b"")
        elif how == "busy":
            said = json.dumps({"error": "slower, please"}).encode()
            self._answer(429, said, {"Retry-After": str(RETRY_AFTER)})
        elif how == "drop":
            self.close_connection = True
        else:
            self._answer(*self._act(path, body), cut=how == "cut", lost=how == "lost")

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a test's output stays its own."""

    def _act(self, path: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        for pattern, name in ROUTES:
            if found := re.fullmatch(pattern, path):
                status, said = getattr(self, name)(body, known, *found.groups())
                headers = {}
                if name == "_resolve" and status == 200:
                    headers = self._about(found[1], found[2])
                elif status == 404:
                    headers, said = {"X-Error-Code": said}, {"error": said}
                whole = said if isinstance(said, bytes) else json.dumps(said).encode()
                return status, whole, headers
        return 404, b"", {"X-Error-Code": "EntryNotFound"}

    def _about(self, name: str, revision: str) -> dict[str, str]:
        """The headers of a file: what a client knows of it beforehand."""
        repository = self.hub.repositories[name]
        mark = hashlib.sha1(self.path.encode()).hexdigest()
        commit = revision if revision in repository.commits else repository.main
        return {"ETag": f'"{mark}"', "X-Repo-Commit": commit}

    def _answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: bool = False,
        lost: bool = False,
    ) -> None:
        if lost:
            self.close_connection = True
            return
        size, ranged = len(body), self.headers.get("Range", "")
        with suppress(BrokenPipeError, ConnectionResetError):
            if status == 200 and ranged:
                first = int(ranged.removeprefix("bytes=").split("-")[0])
                status, body = 206, body[first:]
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {size - len(body)}-{size - 1}/{size}")
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body) + (9 if cut and not body else 0)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut

    # What is asked, each with (body, whether the token is known, parts of the path).

    def _whoami(self, body: bytes, known: bool) -> Answer:
        return (200, self.hub.me) if known else (401, {"error": "Invalid username or password."})

    def _create(self, body: bytes, known: bool) -> Answer:
        if not known:
            return 401, {"error": "Unauthorized"}
        asked = json.loads(body)
        name = f"{asked['organization'] or self.hub.me['name']}/{asked['name']}"
        there = name in self.hub.repositories
        if not there:
            private = asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=private)
        return 409 if there else 200, {"url": f"{self.hub.address}/{name}"}

    def _data_set(self, body: bytes, known: bool, name: str) -> Answer:
        return (200, {"id": name}) if name in self.hub.data_sets else (404, "RepoNotFound")

    def _info(self, body: bytes, known: bool, name: str, revision: str | None) -> Answer:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            return 404, "RepoNotFound"
        files = repository.files(revision or "")
        if files is None:
            return 404, "RevisionNotFound"
        commit = next(c for c, f in reversed(repository.commits.items()) if f is files)
        return 200, {
            "id": name,
            "sha": commit,
            "private": repository.private,
            "gated": repository.gated,
            "siblings": [{"rfilename": path} for path in files],
        }

    def _may_write(self, body: bytes, known: bool, name: str) -> Answer:
        return (200 if known and self.hub.repositories[name].writable else 403), {}

    def _yaml(self, body: bytes, known: bool) -> Answer:
        return 200, {"errors": [], "warnings": []}

    def _modes(self, body: bytes, known: bool, name: str) -> Answer:
        there = self.hub.repositories[name].files("main") or {}
        return 200, {
            "files": [
                {
                    "path": (path := each["path"]),
                    "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": _entry(path, there[path])["mark"] if path in there else None,
                }
                for each in json.loads(body)["files"]
            ]
        }

    def _batch(self, body: bytes, known: bool, name: str) -> Answer:
        objects = json.loads(body)["objects"]
        for each in objects:
            if each["oid"] not in self.hub.stored:
                link = {"href": f"{self.hub.address}/large/{each['oid']}"}
                each["actions"] = {"upload": link, "verify": {"href": f"{link['href']}/verify"}}
        return 200, {"transfer": "basic", "objects": objects}

    def _store(self, body: bytes, known: bool, mark: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != mark:
            return 400, {"error": "the content has another hash"}
        self.hub.sent.append(mark)
        self.hub.stored[mark] = body
        return 200, {}

    def _verify(self, body: bytes, known: bool, mark: str) -> Answer:
        return (200 if mark in self.hub.stored else 400), {}

    def _commit(self, body: bytes, known: bool, name: str) -> Answer:
        if not (known and self.hub.repositories[name].writable):
            return 403, {"error": "no write access"}
        if self.hub.together:
            self.hub.together.wait(20)
        repository = self.hub.repositories[name]
        lines = [json.loads(line) for line in body.splitlines()]
        with self.hub.writing:
            if lines[0]["value"].get("parentCommit", repository.main) != repository.main:
                return 412, {"error": "A commit has happened since. Please refresh and try again."}
            files = dict(repository.files("main") or {})
            for line in lines[1:]:
                path = line["value"]["path"]
                if line["key"] == "deletedFile":
                    del files[path]
                elif line["key"] == "lfsFile":
                    files[path] = self.hub.stored[line["value"]["oid"]]
                else:
                    files[path] = base64.b64decode(line["value"]["content"])
            made = repository.add(files)
        return 200, {"commitOid": made, "commitUrl": f"{self.hub.address}/{name}/commit/{made}"}

    def _tree(self, body: bytes, known: bool, name: str, revision: str) -> Answer:
        repository = self.hub.repositories.get(name)
        files = repository.files(revision) if repository else None
        if files is None:
            return 404, "RevisionNotFound"
        return 200, [_entry(path, content)["entry"] for path, content in files.items()]

    def _refs(self, body: bytes, known: bool, name: str) -> Answer:
        repository = self.hub.repositories[name]

        def ref(kind: str, label: str, commit: str) -> dict[str, str]:
            return {"name": label, "ref": f"refs/{kind}/{label}", "targetCommit": commit}

        tags = [ref("tags", label, commit) for label, commit in repository.tags.items()]
        main = [ref("heads", "main", repository.main)]
        return 200, {"branches": main, "converts": [], "tags": tags}

    def _tag(self, body: bytes, known: bool, name: str, commit: str) -> Answer:
        tags, label = self.hub.repositories[name].tags, json.loads(body)["tag"]
        if label in tags:
            return 409, {"error": "Tag reference exists already"}
        tags[label] = commit
        return 200, {}

    def _resolve(self, body: bytes, known: bool, name: str, revision: str, path: str) -> Answer:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not known):
            return 404, "RepoNotFound"
        files = repository.files(revision) or {}
        if path not in files:
            return 404, "EntryNotFound"
        return 200, self.hub.served.get(path, files[path])


NAME = r"([^/]+/[^/]+)"
ROUTES = (
    (r"api/whoami-v2", "_whoami"),
    (r"api/repos/create", "_create"),
    (r"api/validate-yaml", "_yaml"),
    (rf"api/datasets/{NAME}", "_data_set"),
    (rf"api/models/{NAME}(?:/revision/([^/]+))?", "_info"),
    (rf"api/models/{NAME}/auth-check/write", "_may_write"),
    (rf"api/models/{NAME}/preupload/main", "_modes"),
    (rf"api/models/{NAME}/commit/main", "_commit"),
    (rf"api/models/{NAME}/tree/([^/]+)", "_tree"),
    (rf"api/models/{NAME}/refs", "_refs"),
    (rf"api/models/{NAME}/tag/([^/]+)", "_tag"),
    (rf"{NAME}\.git/info/lfs/objects/batch", "_batch"),
    (r"large/([0-9a-f]{64})", "_store"),
    (r"large/([0-9a-f]{64})/verify", "_verify"),
    (rf"{NAME}/resolve/([^/]+)/(.+)", "_resolve"),
)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """A file as a listing has it, and the mark that tells whether it is the same."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if not path.endswith(LARGE):
        return {"entry": entry, "mark": blob}
    large = hashlib.sha256(content).hexdigest()
    return {
        "entry": entry | {"lfs": {"oid": large, "size": len(content), "pointerSize": 130}},
        "mark": large,
    }


@contextmanager
def publishing(token: str, name: str) -> Iterator[Hub]:
    """A Hub where the account `name` has a token that may write."""
    me = {"name": name, "orgs": [], "auth": {"accessToken": {"role": "write"}}}
    hub = Hub(token=token, me=me)
    with answering(type("Handler", (Asked,), {"hub": hub})) as address:
        hub.address = address
        yield hub
