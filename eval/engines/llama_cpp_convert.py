"""Runs llama.cpp's own convert_hf_to_gguf.py with a named pre-tokenizer, by the Python of an
environment with torch, transformers and gguf:
`python llama_cpp_convert.py CONVERTER FOLDER FILE.gguf OUTTYPE NAME`. CONVERTER `-` is the one in
llama.cpp/ beside the environment's bin/ (docs/engines.md); NAME `-` is the converter's own guess.

The converter knows pre-tokenizers by a hash of the ids of one text, so it knows none of a tokenizer
that was learnt here, whatever its rules are.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

HERE = Path(sys.prefix) / "llama.cpp" / "convert_hf_to_gguf.py"


def main(named_converter: str, folder: str, file: str, outtype: str, name: str) -> None:
    converter = HERE if named_converter == "-" else Path(named_converter)
    if not converter.is_file():
        sys.exit(
            f"a GGUF file of {folder} is needed and {converter} is not there; link the folder "
            "vendor/llama.cpp of llama-cpp-python's sdist to llama.cpp in the environment"
        )
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    if name != "-":
        from conversion.base import TextModel

        def named(self: Any, tokenizer: Any) -> str:
            return name

        TextModel.get_vocab_base_pre = named
    sys.argv = [str(converter), folder, "--outfile", file, "--outtype", outtype]
    runpy.run_path(str(converter), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
