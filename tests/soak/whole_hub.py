"""A whole Hub on localhost: models and data sets to read, and an account that publishes.

The two servers of the other tests, one of data sets and one of models, behind one address.
"""

import http.client
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.data.hub_server import Sets, serving
from tests.local_server import answering
from tests.train.upload_server import Hub, Repository, publishing

DATA_SETS = ("/api/datasets/", "/datasets/")
MAY_READ = "/auth-check"  # asked of models and data sets alike; what can be read has its page
OWN = ("server", "date", "connection")  # headers that each server writes itself


class Front(BaseHTTPRequestHandler):
    """Passes each request on to the server that it is for, and its answer back."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    models: str  # host and port
    data_sets: str

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind = self.data_sets if self.path.startswith(DATA_SETS) else self.models
        asked = http.client.HTTPConnection(behind)
        path = self.path.removesuffix(MAY_READ)
        asked.request(self.command, path, body or None, dict(self.headers))
        answer = asked.getresponse()
        content = answer.read()
        asked.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in OWN:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)  # nothing, where only the head was asked for

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: a test's output stays its own."""


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@contextmanager
def whole(token: str, name: str, models: dict[str, Path], sets: Sets) -> Iterator[Hub]:
    """A Hub with these public models (id -> folder) and data sets, and the account `name`, whose
    token may write."""
    with publishing(token, name) as hub, serving(sets, set()) as (data_sets, _):
        for model, folder in models.items():
            hub.repositories[model] = Repository(private=False)
            hub.repositories[model].add(contents(folder))
        behind = {"models": hub.address, "data_sets": data_sets}
        places = {kind: place.removeprefix("http://") for kind, place in behind.items()}
        with answering(type("Handler", (Front,), places)) as address:
            hub.address = address
            yield hub
