"""vLLM's side of benchmarks/served.py, run by the Python of its own environment: reads what is
asked from a JSON file, and writes answers, seconds, drafts and accepted tokens beside it."""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams


def main(file: Path) -> None:
    asked = json.loads(file.read_text(encoding="utf-8"))
    drafting = asked["drafter"] and {
        "method": "draft_model",
        "model": asked["drafter"],
        "num_speculative_tokens": asked["draft_length"],
    }
    llm = LLM(
        asked["target"], dtype=asked["dtype"], enforce_eager=True, max_model_len=512,
        disable_log_stats=False, enable_prefix_caching=False, speculative_config=drafting or None,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=asked["tokens"], ignore_eos=True)

    def answer(prompt: list[int]) -> list[int]:
        (out,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
        return list(out.outputs[0].token_ids)

    answer(asked["prompts"][0])  # warm-up
    before, begin = counters(llm), time.perf_counter()
    ids = [answer(prompt) for prompt in asked["prompts"]]
    seconds = time.perf_counter() - begin
    found = {key: value - before[key] for key, value in counters(llm).items()}
    found |= {"ids": ids, "seconds": seconds}
    file.with_suffix(".found.json").write_text(json.dumps(found), encoding="utf-8")


def counters(llm: LLM) -> dict[str, float]:
    names = {"drafts": "vllm:spec_decode_num_drafts",
             "accepted": "vllm:spec_decode_num_accepted_tokens"}  # fmt: skip
    values = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return {key: values.get(name, 0) for key, name in names.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
