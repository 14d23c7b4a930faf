"""Is our decode loop as fast as transformers' own, on the same models, prompts and draft length?

    .venv/bin/python -m benchmarks.decode_engine --target FOLDER --drafter FOLDER --data ko_nli

Plain: our loop without a drafter against `generate`. Speculative: our loop against
`generate(assistant_model=...)` with a constant draft length and no confidence stop, at temperature
0. The four are run in turn on every prompt; times per token, with paired intervals over prompts.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.arms import interval, ratio, source, told
from decoding.loop import decode
from decoding.pretrained import DTYPES, Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import cast, load, write_json
from eval.prompts import collect
from train.compose import resolvers
from train.processes.worker import environment

Arm = Callable[[list[int]], list[int]]


def main() -> None:
    asked = arguments()
    resolvers()
    spec = Pretrained(path=asked.target, dtype=asked.dtype)
    target, tokenizer = spec.load(), spec.tokenizer()
    prompts, _ = collect(
        {asked.data: source(asked.data)}, tokenizer, limit=asked.prompts, most_tokens=256,
        heldout_only=False, trained_on=None,
    )  # fmt: skip
    arms = engines(asked, target)
    seconds = {name: np.zeros(len(prompts)) for name in arms}
    tokens = {name: np.zeros(len(prompts)) for name in arms}
    for arm in arms.values():  # warm-up
        arm(prompts[0].ids)
    answers = {name: [] for name in arms}
    for i, prompt in enumerate(tqdm(prompts, mininterval=5)):
        for repeat in range(asked.repeats):
            for name, arm in arms.items():
                begin = time.perf_counter()
                answer = arm(prompt.ids)
                seconds[name][i] += time.perf_counter() - begin
                tokens[name][i] += len(answer)
                if repeat == 0:
                    answers[name].append(answer)
    report = summarise(seconds, tokens) | {
        "prompts whose answer is transformers' plain one": {
            name: sum(map(list.__eq__, mine, answers["transformers, plain"])) / len(prompts)
            for name, mine in answers.items()
        },
        "conditions": told(asked),
        "note": "every answer is run to the full length: end tokens are ignored on both sides",
    }
    print(json.dumps(report, indent=1))
    write_json(Path(f"{asked.out}.json"), report | {"environment": environment()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", required=True, type=Path)
    parser.add_argument("--data", default="ko_nli", help="a name in conf/data")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/decode_engine")
    return parser.parse_args()


def assisted(
    target: Target, drafter: Path, dtype: str, draft_length: int, tokens: int
) -> Callable[[list[int], bool], list[int]]:
    """transformers' `generate` (ids, with the drafter or without): greedy, a constant draft length,
    no confidence stop, and nothing ends an answer."""
    theirs = AutoModelForCausalLM.from_pretrained(drafter, dtype=DTYPES[dtype])
    theirs.generation_config.num_assistant_tokens = draft_length
    theirs.generation_config.num_assistant_tokens_schedule = "constant"
    theirs.generation_config.assistant_confidence_threshold = 0.0
    for model in (target.model, theirs):  # as in our loop: equal texts
        model.config.eos_token_id = model.generation_config.eos_token_id = None

    def generate(ids: list[int], drafting: bool) -> list[int]:
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            out = target.model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0,
                max_new_tokens=tokens, assistant_model=theirs if drafting else None,
            )  # fmt: skip
        return out[0, len(ids) :].tolist()

    return generate


def engines(asked: argparse.Namespace, target: Target) -> dict[str, Arm]:
    """The four arms: each answers a prompt and returns the new tokens."""
    ours = cast(load(asked.drafter, target.shape), target.dtype)
    ours.draft_length = asked.draft_length
    generate = assisted(target, asked.drafter, asked.dtype, asked.draft_length, asked.tokens)

    def loop(ids: list[int], drafter: object) -> list[int]:
        return decode(
            target, drafter, [ids], sampling=Sampling(), max_new_tokens=asked.tokens,
            end_ids=frozenset(),
        ).answers[0].ids  # fmt: skip

    return {
        "ours, plain": lambda ids: loop(ids, None),
        "transformers, plain": lambda ids: generate(ids, False),
        "ours, speculative": lambda ids: loop(ids, ours),
        "transformers, speculative": lambda ids: generate(ids, True),
    }


def summarise(seconds: dict[str, np.ndarray], tokens: dict[str, np.ndarray]) -> dict:
    """Milliseconds a token of each arm and the two ratios, bootstrapped over prompts."""
    n = len(next(iter(seconds.values())))
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=10_000)
    cost = {name: ratio(seconds[name], tokens[name], weights) for name in seconds}
    report: dict = {"milliseconds_per_token": {k: interval(v * 1000) for k, v in cost.items()}}
    for how in ("plain", "speculative"):
        times = cost[f"transformers, {how}"] / cost[f"ours, {how}"]
        report[f"{how}: transformers' time / ours"] = interval(times)
    return report


if __name__ == "__main__":
    main()
