"""vLLM's side of eval/clients.py (which says what stands in REQUEST and ANSWER), run by the Python
of vLLM's own environment: `python vllm_side.py REQUEST ANSWER`.

The first token of an answer comes from the pass over the prompt; each later pass checks a draft.
"""

import gc
import json
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    plain = answered(asked, None)
    drafting = answered(asked, speculative(asked))
    rounds = drafting["rounds"]
    accepted = [sum(column) for column in zip(*rounds, strict=True)][1:]
    (package,) = packages_distributions()["vllm"]
    written = {
        "engine": "vllm", "version": f"{package} {version(package)}",
        "plain_ids": plain["ids"], "ids": drafting["ids"],
        "drafts": sum(row[0] for row in rounds),
        "accepted": accepted, "accepted_total": sum(accepted), "by_prompt": rounds,
        "drafts_first": False, "cuts_last": False,
        "seconds": drafting["seconds"], "plain_seconds": plain["seconds"],
    }  # fmt: skip
    answer.write_text(json.dumps(written), encoding="utf-8")


def speculative(asked: dict[str, Any]) -> dict[str, Any]:
    """What vLLM calls speculative_config."""
    config = {"method": asked["method"], "num_speculative_tokens": asked["draft_length"]}
    if asked["method"] == "ngram":
        return config | {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    return config | {"model": asked["drafter"]}


def answered(asked: dict[str, Any], config: dict[str, Any] | None) -> dict[str, Any]:
    """ids, seconds, and for each prompt its drafts and how many had their first, second, ... token
    accepted."""
    longest = max(map(len, asked["prompts"])) + max(asked["lengths"])
    room = longest + 4 * asked["draft_length"]  # near its end vLLM drafts less
    llm = LLM(
        asked["target"], dtype=asked["dtype"], enforce_eager=True,
        max_model_len=min(room, positions(asked["target"]) or room), max_num_seqs=1, seed=0,
        disable_log_stats=False, enable_prefix_caching=False, speculative_config=config,
    )  # fmt: skip
    answer(llm, asked["prompts"][0], asked["lengths"][0])  # warm-up
    ids, rounds, begin = [], [], time.perf_counter()
    before = counted(llm, asked["draft_length"])
    for prompt, length in zip(asked["prompts"], asked["lengths"], strict=True):
        ids.append(answer(llm, prompt, length))
        now = counted(llm, asked["draft_length"])
        rounds.append([a - b for a, b in zip(now, before, strict=True)])
        before = now
    seconds = time.perf_counter() - begin
    del llm  # before the next one, whose memory it would take
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"ids": ids, "seconds": seconds, "rounds": rounds}


def positions(target: str) -> int | None:
    """How many tokens the target's own configuration allows."""
    config = json.loads(Path(target, "config.json").read_text(encoding="utf-8"))
    return config.get("max_position_embeddings")


def answer(llm: LLM, prompt: list[int], length: int) -> list[int]:
    greedy = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
    (out,) = llm.generate([{"prompt_token_ids": prompt}], greedy, use_tqdm=False)
    return list(out.outputs[0].token_ids)


def counted(llm: LLM, positions: int) -> list[int]:
    """Drafts so far, and how many of them had the token at each position accepted."""
    drafts, accepted = 0, [0] * positions
    for metric in llm.get_metrics():
        if metric.name == DRAFTS:
            drafts += int(metric.value)
        elif metric.name == ACCEPTED:
            accepted = [a + int(b) for a, b in zip(accepted, metric.values, strict=True)]
    return [drafts, *accepted]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
