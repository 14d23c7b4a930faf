"""Text that every machine with Python has: the standard library and its documentation topics."""

import ast
import hashlib
import inspect
import sysconfig
import tokenize
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Literal, final

from data.lines import chunks
from data.rows import Row
from data.sources import Source, check_limit, prompt_key

# Tests, other people's packages, and code that is mostly tables or would be parsed for nothing.
SKIPPED = {
    *("test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3"),
    *("encodings", "pydoc_data", "turtledemo", "_bundled", "__pycache__", "__phello__"),
}
LONGEST_LINE = 160  # characters; longer ones are data
TABLE = ("'", '"', "(", "[", "{", *"0123456789")  # how the lines of a table begin
ANSWER = 1_500  # characters of a docstring or topic in an answer
SUMMARY = 240  # characters of a short answer
LINES = range(3, 31)  # of a function's source in an answer

Definition = ast.FunctionDef | ast.AsyncFunctionDef
Pair = tuple[str, str]  # prompt, answer


@final
class Builtin(Source):
    """The standard library of the running Python, CPython 3.10 or newer.

    kind "text": its sources and the topics of pydoc in pieces of at most 2,000 characters, cut at
    blank lines (a longer paragraph stays whole).
    kind "chat": a prompt and its answer, cut out of the same text. A function, class, module or
    topic gives one row at most, so that no answer to a held-out prompt stands in another row:
    "Write the Python function `f` of the module `m`.", "Complete this Python function ...",
    "What does `m.f` do?", "What is the Python module `m` for?", "Explain this topic of Python ...".
    Texts of kind "text" do contain those answers.
    kind "summary": only what a docstring says first, of every function, class and module that has
    one: "What does `m.f` do, in short?". Short prose that a small model can learn in minutes.

    The order is by hash, so that a `limit` takes a fair sample. Versions of Python differ in
    text, hence in rows and fingerprint.
    """

    licence = "PSF-2.0"

    def __init__(
        self, *, kind: Literal["text", "chat", "summary"], limit: int | None = None
    ) -> None:
        if kind not in ("text", "chat", "summary"):
            raise ValueError(f"kind is {kind!r}, expected text, chat or summary: correct it")
        self._kind, self._limit = kind, check_limit(limit)
        self.name = f"the standard library ({kind})"

    def rows(self) -> Iterator[Row]:
        """ValueError when this Python came without the sources of its library."""
        pairs = self._pairs if self._kind == "chat" else self._summaries
        rows = self._texts() if self._kind == "text" else _distinct(pairs())
        return islice(rows, self._limit)

    def fingerprint(self) -> str:
        """Of the sources and topics that are read, the kind and the limit."""
        digest = hashlib.sha256(repr((self._kind, self._limit)).encode())
        for name, text in (self._sources | _topics()).items():
            digest.update(hashlib.sha256(f"{name}\0{text}".encode()).digest())
        return digest.hexdigest()

    @cached_property
    def _sources(self) -> dict[str, str]:
        root = Path(sysconfig.get_path("stdlib"))
        paths = (p for p in root.rglob("*.py") if not SKIPPED & set(p.relative_to(root).parts))
        named = {_module(path.relative_to(root)): _source(path) for path in sorted(paths)}
        sources = {name: text for name, text in named.items() if text and not _is_data(text)}
        if not sources:
            raise ValueError(
                f"the standard library in {root} has no sources, expected *.py files: install "
                "them (apt install libpython3-stdlib) or use data.sources.Local"
            )
        return sources

    def _texts(self) -> Iterator[Row]:
        texts = (self._sources | _topics()).values()
        pieces = {piece for text in texts for piece in _pieces(text) if len(piece) > 100}
        for piece in sorted(pieces, key=_hash):
            yield {"text": piece}

    def _summaries(self) -> Iterator[Pair]:
        for module, source in self._sources.items():
            tree = ast.parse(source)
            yield from _summary(tree, f"the Python module `{module}`")
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    yield from _summary(node, f"the class `{module}.{node.name}`")
                elif isinstance(node, Definition):
                    yield from _summary(node, f"`{module}.{node.name}`")

    def _pairs(self) -> Iterator[Pair]:
        for topic, text in _topics().items():
            yield _explanation(topic, text)
        for module, source in self._sources.items():
            tree = ast.parse(source)
            about = ast.get_docstring(tree)
            if about and len(about) > 40:
                yield f"What is the Python module `{module}` for?", _beginning(about)
            yield from _of_body(tree.body, module, "", source.splitlines())


def _distinct(pairs: Iterator[Pair]) -> Iterator[Row]:
    """Conversations in the order of their hashes, each prompt and each answer once."""
    kept: dict[str, Pair] = {}
    answers = set[str]()  # an answer twice would stand on both sides of the held-out split
    for prompt, answer in pairs:
        if prompt_key(prompt) not in kept and answer not in answers:
            kept[prompt_key(prompt)] = prompt, answer
            answers.add(answer)
    for key in sorted(kept):
        prompt, answer = kept[key]
        turns = (("user", prompt), ("assistant", answer))
        yield {"messages": [{"role": role, "content": said} for role, said in turns]}


def _summary(node: ast.Module | ast.ClassDef | Definition, thing: str) -> Iterator[Pair]:
    """A question about what has a docstring, answered by its first sentences on one line."""
    first = (ast.get_docstring(node) or "").split("\n\n")[0]
    said = " ".join(first.split())[:SUMMARY]
    if len(first) > SUMMARY:
        said = said[: said.rfind(". ") + 1]
    if len(said) >= 20:
        yield f"What does {thing} do, in short?", said


def _explanation(topic: str, text: str) -> Pair:
    title, _, rest = text.strip().partition("\n")
    underline, _, body = rest.partition("\n")
    if not underline or underline.strip("*=-"):
        return f"Explain `{topic}` in Python.", _beginning(text)
    return f"Explain this topic of Python: {title}", _beginning(body)


def _of_body(body: list[ast.stmt], module: str, owner: str, lines: list[str]) -> Iterator[Pair]:
    for node in body:
        if isinstance(node, ast.ClassDef):
            about = ast.get_docstring(node)
            if about and len(about) > 40:
                yield f"What is the class `{module}.{owner}{node.name}` for?", _beginning(about)
            yield from _of_body(node.body, module, f"{owner}{node.name}.", lines)
        elif isinstance(node, Definition):
            pair = _of_function(node, module, owner, lines)
            if pair is not None:
                yield pair


def _of_function(node: Definition, module: str, owner: str, lines: list[str]) -> Pair | None:
    """One row about the function; which one is drawn by the hash of its name and source."""
    assert node.end_lineno is not None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    source = inspect.cleandoc("\n" + "\n".join(lines[first - 1 : node.end_lineno]))
    about = ast.get_docstring(node) or ""
    draw = int(_hash(module + owner + source)[:8], 16) % 6
    if draw < 2 and len(about) > 40:
        return f"What does `{module}.{owner}{node.name}` do?", _beginning(about)
    if source.count("\n") + 1 not in LINES:
        return None
    if draw == 5 and source.count("\n") >= 5:
        return _completion(source, module)
    kind = "method" if owner else "function"
    return f"Write the Python {kind} `{owner}{node.name}` of the module `{module}`.", source


def _completion(source: str, module: str) -> Pair:
    lines = source.splitlines()
    cut = (len(lines) + 1) // 2
    given, rest = "\n".join(lines[:cut]), "\n".join(lines[cut:])
    # the indentation of the answer stays, since it goes on where the prompt ends
    return f"Complete this Python function of the module `{module}`:\n\n{given}", rest.strip("\n")


def _beginning(text: str) -> str:
    """The first paragraphs of a docstring or topic, at most ANSWER characters or one paragraph."""
    kept, size = list[str](), 0
    for paragraph in text.strip().split("\n\n"):
        if kept and size + len(paragraph) > ANSWER:
            break
        kept.append(paragraph)
        size += len(paragraph) + 2
    return "\n\n".join(kept)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out; the sources are enough
        return {}
    return dict(sorted(topics.items()))


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def _source(path: Path) -> str:
    """The source, "" if it is not text in the encoding it declares."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _is_data(source: str) -> bool:
    """Whether the file is a table or generated: very long lines, or mostly bare literals."""
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    tabular = sum(line.startswith(TABLE) for line in lines)
    return max(map(len, lines), default=0) > LONGEST_LINE or tabular > 0.3 * len(lines)


def _pieces(text: str) -> Iterator[str]:
    return (piece for _, piece in chunks(enumerate(text.splitlines(), start=1)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
