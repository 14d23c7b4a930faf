"""llama.cpp's side of eval/clients.py (which says what stands in REQUEST and ANSWER), run by the
Python of an environment with llama-cpp-python: `python llama_cpp_side.py REQUEST ANSWER`.

A folder with a .gguf file is taken as it is; another one is converted by llama.cpp's own converter
(llama_cpp_convert.py). The drafting loop is that of llama-cpp-python, which asks a LlamaDraftModel
for guesses; the one here is a second Llama. The first token of an answer comes from the pass over
the prompt.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from llama_cpp.llama_speculative import LlamaDraftModel

DRIVER = Path(__file__).with_name("llama_cpp_convert.py")
OUTTYPES = {"float32": "f32", "bfloat16": "bf16"}


class Drafter(LlamaDraftModel):
    """Greedy guesses of a second model; `asked` keeps them with the length of what they follow."""

    def __init__(self, model: Llama, length: int) -> None:
        self.model, self.length = model, length
        self.asked: list[tuple[int, list[int]]] = []

    def __call__(self, input_ids: Any, /, **kwargs: Any) -> Any:
        draft = greedy(self.model, input_ids.tolist(), self.length)
        self.asked.append((len(input_ids), draft))
        return np.array(draft, dtype=np.intc)


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    if asked["method"] != "draft_model":
        sys.exit(f"llama.cpp drafts with the method draft_model here, not {asked['method']!r}")
    with tempfile.TemporaryDirectory() as place:
        files = [
            converted(Path(asked[name]), Path(place) / f"{name}.gguf", asked["dtype"])
            for name in ("target", "drafter")
        ]
        plain = answered(asked, files[0], None)
        drafting = answered(asked, *files)
    rows = drafting["rows"]
    accepted = [sum(column) for column in zip(*rows, strict=True)][1:]
    written = {
        "engine": "llama_cpp", "version": f"llama-cpp-python {version('llama-cpp-python')}",
        "plain_ids": plain["ids"], "ids": drafting["ids"],
        "drafts": sum(row[0] for row in rows),
        "accepted": accepted, "accepted_total": sum(accepted), "by_prompt": rows,
        "drafts_first": False, "cuts_last": False,
        "seconds": drafting["seconds"], "plain_seconds": plain["seconds"],
    }  # fmt: skip
    answer.write_text(json.dumps(written), encoding="utf-8")


def converted(folder: Path, file: Path, dtype: str) -> Path:
    """The folder's own .gguf file, or one made of its safetensors."""
    if made := sorted(folder.glob("*.gguf")):
        return made[0]
    named = "gpt-2"  # which says how text is split, and only ids go in and out
    words = ["-", str(folder), str(file), OUTTYPES[dtype], named]
    if code := subprocess.run([sys.executable, str(DRIVER), *words]).returncode:
        sys.exit(code)  # the converter said why
    return file


def answered(asked: dict[str, Any], target: Path, drafter: Path | None) -> dict[str, Any]:
    """ids, seconds, and for each prompt its drafts and how many had their first, second, ... token
    accepted. Each answer runs on for a draft, so that the last round can be judged."""
    beyond = asked["draft_length"] + 1
    context = max(map(len, asked["prompts"])) + max(asked["lengths"]) + 2 * beyond
    draft = Drafter(loaded(drafter, context), asked["draft_length"]) if drafter else None
    model = loaded(target, context, draft)

    def answer(prompt: list[int], length: int) -> tuple[list[int], list[int]]:
        if draft:
            draft.asked.clear()
        ids = greedy(model, prompt, length + (beyond if draft else 0))
        return ids[:length], rounds(draft, prompt + ids, len(prompt) + length)

    answer(asked["prompts"][0], asked["lengths"][0])  # warm-up
    begin = time.perf_counter()
    found = [answer(*each) for each in zip(asked["prompts"], asked["lengths"], strict=True)]
    seconds = time.perf_counter() - begin
    ids, rows = zip(*found, strict=True)
    return {"ids": list(ids), "seconds": seconds, "rows": list(rows)}


def loaded(file: Path, context: int, draft: Drafter | None = None) -> Llama:
    return Llama(
        str(file), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=1,
        n_threads_batch=1, draft_model=draft, logits_all=True, verbose=False,
        type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,  # by itself 16-bit, and answers differ
    )  # fmt: skip


def greedy(model: Llama, ids: list[int], tokens: int) -> list[int]:
    model.reset()
    settings = {"temp": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
    return [int(token) for token in islice(model.generate(ids, **settings), tokens)]


def rounds(draft: Drafter | None, whole: list[int], end: int) -> list[int]:
    """[drafts, accepted at position 1, 2, ...] of the rounds that begin before the answer's end."""
    if draft is None:
        return []
    accepted = []
    for length, guesses in draft.asked:
        if length < end:
            right = [a == b for a, b in zip(guesses, whole[length:], strict=False)]
            accepted.append([*right, False].index(False))
    return [len(accepted), *(sum(n > k for n in accepted) for k in range(draft.length))]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
