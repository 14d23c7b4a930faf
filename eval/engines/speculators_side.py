"""speculators' side of eval/clients.py (which says what stands in REQUEST and ANSWER), run by the
Python of its own environment: `python speculators_side.py REQUEST ANSWER`. Its Eagle3DraftModel
reads a drafter in speculators' format and is asked for each guess along the target's own greedy
answers.

speculators trains drafters and serves none, so there is no engine whose answers could differ: `ids`
are the drafter's accepted guesses and the target's own tokens between them. What this shows is the
format: that the library loads every tensor of the file, takes the taps that the file names, and
guesses what our loop's drafter guesses.

Shapes: T tokens, P pairs (x_{t+1}, taps of t), D target width.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

OF_THE_TARGET = {"verifier_norm.weight", "verifier_lm_head.weight"}  # never in a file


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    if asked["method"] != "eagle3":
        sys.exit(f"speculators loads the method eagle3 here, not {asked['method']!r}")
    target = AutoModelForCausalLM.from_pretrained(
        asked["target"], dtype=getattr(torch, asked["dtype"]), local_files_only=True
    ).eval()
    drafter = drafter_of(Path(asked["drafter"]), asked["target"]).to(target.dtype)
    begin = time.perf_counter()
    depth, pairs = asked["draft_length"], zip(asked["prompts"], asked["lengths"], strict=True)
    found = [walk(target, drafter, prompt, wanted, depth) for prompt, wanted in pairs]
    seconds = time.perf_counter() - begin
    places = range(depth)
    rows = [[len(c), *(sum(n > k for n in c) for k in places)] for _, _, c in found]
    accepted = [sum(column) for column in zip(*rows, strict=True)][1:]
    written = {
        "engine": "speculators", "version": f"speculators {version('speculators')}",
        "plain_ids": [plain for plain, _, _ in found], "ids": [ids for _, ids, _ in found],
        "drafts": sum(row[0] for row in rows),
        "accepted": accepted, "accepted_total": sum(accepted), "by_prompt": rows,
        "drafts_first": True, "cuts_last": False, "seconds": seconds,
    }  # fmt: skip
    answer.write_text(json.dumps(written), encoding="utf-8")


def drafter_of(folder: Path, target: str) -> Eagle3DraftModel:
    """The drafter, strictly: from_pretrained itself passes over names that it does not know and
    leaves unread what it misses (NaN, or the target's)."""
    config = Eagle3SpeculatorConfig.from_pretrained(folder, local_files_only=True)
    config.speculators_config.verifier.name_or_path = target  # the copy that lies here
    config.transformer_layer_config._attn_implementation = "eager"  # flex_attention compiles
    drafter = Eagle3DraftModel.from_pretrained(folder, config=config, local_files_only=True)
    saved = {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}
    read = {k: v for k, v in drafter.state_dict().items() if k not in OF_THE_TARGET}
    if wrong := sorted(saved.keys() ^ read.keys()):
        sys.exit(f"{folder}: speculators and the file do not have the same tensors: {wrong}")
    changed = [k for k, v in saved.items() if not torch.equal(v.to(read[k].dtype), read[k])]
    if changed:
        sys.exit(f"{folder}: speculators holds other values than the file in {sorted(changed)}")
    return drafter.eval()


@torch.inference_mode()
def walk(
    target: Any, drafter: Eagle3DraftModel, prompt: list[int], wanted: int, depth: int
) -> tuple[list[int], list[int], list[int]]:
    """The target's greedy answer, the same put together from rounds of drafting, and the tokens
    that each round accepted. The first round starts at the prompt's last token, and the last one
    is judged by what the target would say beyond the answer's end."""
    whole = greedy(target, prompt, wanted + depth)
    guesses = guessed(target, drafter, whole, depth)
    plain, at = whole[len(prompt) :][:wanted], len(prompt) - 1
    ids: list[int] = []
    counts: list[int] = []
    while len(ids) < wanted:
        run = 0
        while run < depth and guesses[run][at - 1] == whole[at + 1 + run]:
            run += 1
        ids += [guesses[k][at - 1] for k in range(run)] + [whole[at + 1 + run]]
        counts.append(run)
        at += run + 1
    return plain, ids[:wanted], counts


def greedy(target: Any, prompt: list[int], tokens: int) -> list[int]:
    ids_1T = target.generate(
        torch.tensor([prompt]), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
        eos_token_id=None,
    )  # fmt: skip
    return ids_1T[0].tolist()


def guessed(target: Any, drafter: Eagle3DraftModel, ids: list[int], depth: int) -> list[list[int]]:
    """[depth][P] tokens: guess k of pair t is for the token t + 2 + k, if the k guesses before it
    were right. (Its steps read the true tokens and its own states, which is drafting as long as
    the guesses are accepted.)"""
    states = target(torch.tensor([ids]), output_hidden_states=True).hidden_states
    taps_1PE = torch.cat([states[k] for k in drafter.target_layer_ids], dim=-1)[:, :-1]
    steps: list[Tensor] = drafter(
        hidden_states=taps_1PE,
        input_ids=torch.tensor([ids[1:]]),
        document_ids=torch.zeros(1, len(ids) - 1, dtype=torch.long),
        ttt_steps=depth,
    )
    if drafter.d2t is not None:
        steps = [step + drafter.d2t[step] for step in steps]
    return [step[0].tolist() for step in steps]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
