"""Layout `gguf` of the family lm: made by llama.cpp's own converter from the layout `transformers`.

GGUF is read by llama.cpp alone, which also has the tokenizer in it: the vocabulary, the merges and
the name of one of llama.cpp's own pre-tokenizers. The target must be converted by the same
converter, with the same pre-tokenizer.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from eval.controls import Failed
from train.layouts import files

DRIVER = Path(__file__).parents[2] / "eval" / "engines" / "llama_cpp_convert.py"
FILE = "model.gguf"
MAGIC = b"GGUF"
OUTTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LONGEST = 1800.0  # seconds that a conversion may take
BYTE_LEVEL = {"type": "ByteLevel", "use_regex": True}  # GPT-2's rules


def write(
    folder: Path,
    out: Path,
    converter: str | Path | None,
    python: str | Path | None = None,
    pre_tokenizer: str | None = None,
) -> list[str]:
    """Converts the Hugging Face folder to out/model.gguf, in its weights' dtype; returns notes.

    converter: llama.cpp's convert_hf_to_gguf.py; python: one with torch, transformers and gguf
    (null: this one). pre_tokenizer: llama.cpp's name for it; null: gpt-2 where the tokenizer splits
    as GPT-2's does, else the converter's own guess. Raises ValueError for a converter that is not
    there or a pre-tokenizer that it does not know, Failed for a conversion that fails.
    """
    script = Path(converter or "")
    if not script.is_file() or not (script.parent / "conversion" / "base.py").is_file():
        raise ValueError(
            f"stages.export.gguf_converter is {converter}; expected convert_hf_to_gguf.py of a "
            "llama.cpp of 2026, beside its folder conversion/ (vendor/llama.cpp in the sdist of "
            "llama-cpp-python has both)"
        )
    dtype = files.config(folder).get("dtype") or "float32"
    name = pre_tokenizer or known(folder) or "-"
    out.mkdir(parents=True, exist_ok=True)
    words = [python or sys.executable, DRIVER, script, folder, out / FILE, OUTTYPES[dtype], name]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LONGEST, env=offline)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"llama.cpp's converter did not end within {LONGEST:g} seconds") from error
    except OSError as error:
        raise ValueError(
            f"stages.export.gguf_python is {python}, which does not run ({error.strerror}); give "
            "the path of bin/python in an environment with torch, transformers and gguf"
        ) from error
    _require(done, out / FILE, folder)
    named = "llama.cpp's own guess" if name == "-" else name
    return [
        f"pre-tokenizer: {named}; convert the target with the same one",
        "llama.cpp rounds what it multiplies with 16-bit weights, so guesses may differ at ties",
    ]


def known(folder: Path) -> str | None:
    """llama.cpp's name for a pre-tokenizer that is certain to be one of its own; null: none is."""
    file = folder / "tokenizer.json"
    told: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rules = told.get("pre_tokenizer") or {}
    plain = told.get("normalizer") is None and not rules.get("add_prefix_space", False)
    return "gpt-2" if plain and rules.items() >= BYTE_LEVEL.items() else None


def _require(done: subprocess.CompletedProcess[str], file: Path, folder: Path) -> None:
    """Raises unless the converter ended well and left a GGUF file."""
    if "pre-tokenizer was not recognized" in done.stderr:
        raise ValueError(
            f"llama.cpp does not know how the tokenizer of {folder} splits text: name the nearest "
            "of its own ways by stages.export.gguf_pre_tokenizer (llama-bpe, qwen2, gpt-2, ...); "
            "text is then split that way, and not as the target's tokenizer does"
        )
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != 0:
        last = said[-1][:300] if said else "it printed nothing"
        raise Failed(f"llama.cpp's converter did not convert {folder}: {last}")
    with file.open("rb") as stream:
        if stream.read(4) != MAGIC:
            raise Failed(f"llama.cpp's converter left no GGUF file in {file}")
