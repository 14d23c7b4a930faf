"""Runs llama.cpp's own convert_hf_to_gguf.py with a named pre-tokenizer, by the Python of an
environment with torch, transformers and gguf:
`python llama_cpp_convert.py CONVERTER FOLDER FILE.gguf OUTTYPE NAME` (`-`: the converter's own).

The converter knows pre-tokenizers by a hash of the ids of one text, so it knows none of a tokenizer
that was learnt here, whatever its rules are.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main(converter: Path, folder: str, file: str, outtype: str, name: str) -> None:
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    if name != "-":
        from conversion.base import TextModel

        def named(self: Any, tokenizer: Any) -> str:
            return name

        TextModel.get_vocab_base_pre = named
    sys.argv = [str(converter), folder, "--outfile", file, "--outtype", outtype]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
