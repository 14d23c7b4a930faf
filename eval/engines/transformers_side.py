"""transformers' side of eval/clients.py (which says what stands in REQUEST and ANSWER):
`python transformers_side.py REQUEST ANSWER`.

`generate(assistant_model=...)` with the draft length and schedule of the drafter's own
generation_config.json, which is where users have them from; only where it is silent it is told
here. Its confidence threshold is left out: with it drafts end early, and no lengths compare.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer


class Rounds(BaseStreamer):
    """How many tokens each pass of the target brought; the prompt comes first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    if asked["method"] != "draft_model":
        sys.exit(f"transformers drafts with the method draft_model, not {asked['method']!r}")
    target, drafter = (loaded(asked[name], asked["dtype"]) for name in ("target", "drafter"))
    drafter.generation_config.update(**drafting(asked))
    target.generation_config = transformers.GenerationConfig()  # no penalties
    plain, plain_seconds, _ = answered(target, None, asked)
    ids, seconds, rounds = answered(target, drafter, asked)
    positions = range(max(max(map(max, rounds)) - 1, asked["draft_length"]))
    rows = [[len(row), *(sum(n - 1 > k for n in row) for k in positions)] for row in rounds]
    accepted = [sum(row[1 + k] for row in rows) for k in positions]
    written = {
        "engine": "transformers", "version": f"transformers {transformers.__version__}",
        "plain_ids": plain, "ids": ids, "drafts": sum(row[0] for row in rows),
        "accepted": accepted, "accepted_total": sum(accepted), "by_prompt": rows,
        "drafts_first": True, "cuts_last": True,
        "seconds": seconds, "plain_seconds": plain_seconds,
    }  # fmt: skip
    answer.write_text(json.dumps(written), encoding="utf-8")


def drafting(asked: dict[str, Any]) -> dict[str, Any]:
    """What the drafter's generation_config must say here; exits where the file says otherwise."""
    due = {
        "num_assistant_tokens": asked["draft_length"],
        "num_assistant_tokens_schedule": "constant",
    }
    file = Path(asked["drafter"]) / "generation_config.json"
    published = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for key, value in due.items():
        if published.get(key, value) not in (value, None):
            sys.exit(
                f"{file.name} says {key} {published[key]!r}, expected {value!r}, which is asked"
            )
    return due | {"assistant_confidence_threshold": 0.0}


def loaded(folder: str, dtype: str) -> Any:
    """The model; end tokens end nothing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return model


@torch.inference_mode()
def answered(
    target: Any, drafter: Any, asked: dict[str, Any]
) -> tuple[list[list[int]], float, list[list[int]]]:
    """ids, seconds, and the tokens that each pass of the target brought to each prompt."""

    def answer(prompt: list[int], length: int) -> tuple[list[int], list[int]]:
        ids_1T, rounds = torch.tensor([prompt]), Rounds()
        out_1T = target.generate(
            ids_1T, attention_mask=torch.ones_like(ids_1T), do_sample=False, pad_token_id=0,
            max_new_tokens=length, assistant_model=drafter, streamer=rounds,
        )  # fmt: skip
        return out_1T[0, len(prompt) :].tolist(), rounds.tokens[1:]

    answer(asked["prompts"][0], asked["lengths"][0])  # warm-up
    begin = time.perf_counter()
    found = [answer(*each) for each in zip(asked["prompts"], asked["lengths"], strict=True)]
    seconds = time.perf_counter() - begin
    return [ids for ids, _ in found], seconds, [rounds for _, rounds in found]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
