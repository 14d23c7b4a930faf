"""OpenVINO GenAI's side of eval/clients.py (which says what stands in REQUEST and ANSWER), run by
the Python of an environment with openvino-genai and optimum-intel:
`python openvino_side.py REQUEST ANSWER`.

Both models are first converted to OpenVINO's own format, in a temporary folder, by optimum-intel;
without end tokens, since a draft ends at one even where an answer does not. The first token of an
answer comes from the pass over the prompt; each later pass checks a draft.

OpenVINO's `hidden_layers_list` has k for the output of layer k, which is transformers'
hidden_states[k + 1]. Without a list it takes 2, n // 2 and n - 3 and refuses targets of fewer than
10 layers, so here it always has one, made of the ids in the drafter's file.
"""

import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
import torch
from optimum.exporters.openvino.convert import export_from_model, export_tokenizer
from optimum.exporters.openvino.model_patcher import LlamaEagle3ForCausalLM
from optimum.intel.openvino import OVConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

HINTS = {"float32": "f32", "bfloat16": "bf16"}
IDS = "eagle_aux_hidden_state_layer_ids"
BORROWED = {"model.embed_tokens.weight", "model.d2t", "model.t2d"}  # the target's; the identity


def main(request: Path, answer: Path) -> None:
    asked = json.loads(request.read_text(encoding="utf-8"))
    if asked["method"] not in ("draft_model", "eagle3"):
        sys.exit(f"OpenVINO drafts with draft_model and eagle3 here, not {asked['method']!r}")
    with tempfile.TemporaryDirectory() as place:
        target, drafter = Path(place) / "target", Path(place) / "drafter"
        convert(plain_model(asked["target"]), target, asked["target"])
        eagle3 = asked["method"] == "eagle3"
        model = eagle3_model(asked["drafter"]) if eagle3 else plain_model(asked["drafter"])
        convert(model, drafter, asked["target"])
        if eagle3:
            name_taps(drafter, tapped(Path(asked["drafter"]), Path(asked["target"])))
        plain, drafting = answered(asked, target, None), answered(asked, target, drafter)
    rows = drafting["rows"]
    accepted = [sum(column) for column in zip(*rows, strict=True)][1:]
    written = {
        "engine": "openvino", "version": f"openvino-genai {version('openvino-genai')}",
        "plain_ids": plain["ids"], "ids": drafting["ids"],
        "drafts": sum(row[0] for row in rows),
        "accepted": accepted, "accepted_total": sum(accepted), "by_prompt": rows,
        "drafts_first": False, "cuts_last": True,
        "seconds": drafting["seconds"], "plain_seconds": plain["seconds"],
    }  # fmt: skip
    answer.write_text(json.dumps(written), encoding="utf-8")


def plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def eagle3_model(folder: str) -> LlamaEagle3ForCausalLM:
    """The drafter in optimum-intel's own module, with nothing missing and nothing left over (its
    command line would run this class as a model's own code)."""
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    if asks := [f for f in ("norm_before_residual", "norm_before_fc", "fc_norm") if config.get(f)]:
        sys.exit(f"{folder} asks for {', '.join(asks)}, which OpenVINO's EAGLE-3 does not compute")
    model, report = LlamaEagle3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    wrong = [key for keys in report.values() for key in keys if key not in BORROWED]
    if config["draft_vocab_size"] != config["vocab_size"]:  # then the identity is no map
        wrong += [key for key in report["missing_keys"] if key in ("model.d2t", "model.t2d")]
    if wrong:
        sys.exit(f"{folder} does not fit OpenVINO's EAGLE-3: {', '.join(map(str, wrong))}")
    for name in ("d2t", "t2d"):  # where the file has none, they are unset memory
        if f"model.{name}" in report["missing_keys"]:
            getattr(model.model, name).fill_(name == "t2d")
    type(model).__module__ = AutoModelForCausalLM.__module__  # tells the exporter the library
    return model


def tapped(drafter: Path, target: Path) -> list[int]:
    """The layers whose outputs are the states that the file names as hidden_states[k]."""
    config = json.loads((drafter / "config.json").read_text(encoding="utf-8"))
    layers = json.loads((target / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    taps = config.get(IDS) or [2, layers // 2, layers - 3]
    if len(taps) != 3 or min(taps) < 1:
        sys.exit(f"the drafter taps {taps}; OpenVINO takes the outputs of three layers")
    return [k - 1 for k in taps]


def convert(model: Any, folder: Path, tokenizer: str) -> None:
    model.config.eos_token_id, model.generation_config = None, GenerationConfig()
    export_from_model(
        model, folder, task="text-generation-with-past", ov_config=OVConfig(dtype="fp32")
    )
    export_tokenizer(AutoTokenizer.from_pretrained(tokenizer, local_files_only=True), folder)


def name_taps(folder: Path, layers: list[int]) -> None:
    """Notes them in the converted drafter, where OpenVINO looks (it takes no list from Python)."""
    model = openvino.Core().read_model(folder / "openvino_model.xml")
    model.set_rt_info(layers, "hidden_layers_list")
    openvino.serialize(model, folder / "named.xml")
    for kind in ("xml", "bin"):
        (folder / f"named.{kind}").replace(folder / f"openvino_model.{kind}")


def answered(asked: dict[str, Any], target: Path, drafter: Path | None) -> dict[str, Any]:
    """ids, seconds, and for each prompt its drafts and how many had their first, second, ... token
    accepted."""
    hint = HINTS[asked["dtype"]]
    exact = {"INFERENCE_PRECISION_HINT": hint, "KV_CACHE_PRECISION": hint}
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    drafting: dict[str, Any] = {}
    if drafter:
        drafting = {"draft_model": genai.draft_model(str(drafter), "CPU", **exact)}
    pipe = genai.LLMPipeline(str(target), "CPU", scheduler_config=scheduler, **exact, **drafting)
    greedy = genai.GenerationConfig()
    greedy.do_sample, greedy.apply_chat_template, greedy.ignore_eos = False, False, True
    if drafter:
        greedy.num_assistant_tokens = asked["draft_length"]

    def answer(prompt: list[int], length: int) -> Any:
        greedy.max_new_tokens = length
        ids_1T = np.array([prompt], dtype=np.int64)
        tensors = (openvino.Tensor(array) for array in (ids_1T, np.ones_like(ids_1T)))
        return pipe.generate(genai.TokenizedInputs(*tensors), greedy)

    answer(asked["prompts"][0], asked["lengths"][0])  # warm-up
    begin = time.perf_counter()
    found = [answer(*each) for each in zip(asked["prompts"], asked["lengths"], strict=True)]
    seconds = time.perf_counter() - begin
    rows = [rounds(done, asked["draft_length"]) for done in found] if drafter else []
    return {"ids": [list(done.tokens[0]) for done in found], "seconds": seconds, "rows": rows}


def rounds(done: Any, positions: int) -> list[int]:
    """[drafts, accepted at position 1, 2, ...]: a pass of the target brings what it accepts and a
    token of its own; the first one reads the prompt. OpenVINO's own sum may lack the last pass."""
    told = done.extended_perf_metrics
    accepted = [n - 1 for n in told.main_model_metrics.raw_metrics.m_batch_sizes[1:]]
    total = told.get_num_accepted_tokens()
    if total not in (sum(accepted), sum(accepted[:-1])):
        sys.exit(f"OpenVINO counts {total} accepted tokens, and its passes brought {accepted}")
    return [len(accepted), *(sum(n > k for n in accepted) for k in range(positions))]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
