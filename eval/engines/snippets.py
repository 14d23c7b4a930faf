"""The code that a card shows for each engine; the stage `serve` runs it first. Target and drafter
stand in it as TARGET and DRAFTER, in whose place `named` puts folders or names on the Hub."""

import json
import re

from eval.engines import openvino_snippet

METHODS = {"lm": "draft_model", "medusa": "medusa", "eagle": "eagle", "eagle3": "eagle3"}  # vLLM's
SGLANG = {"lm": "STANDALONE", "eagle": "EAGLE", "eagle3": "EAGLE3"}
PART = re.compile(r"([\w.-]+/[\w.-]+)/([\w.-]+)")  # owner/name/folder: a folder of a repository
QUESTION = '[{"role": "user", "content": "Hello! How are you?"}]'


def snippet(engine: str, layout: str, draft_length: int) -> str:
    """Python that needs nothing but the engine, asks a question and prints the answer (of
    speculators, which answers nothing: that loads the drafter and prints it).

    layout: FAMILY/FORMAT as in export.json: lm/transformers, medusa/vllm, eagle3/speculators, ...
    Raises ValueError for an engine that cannot use the layout.
    """
    family, _, form = layout.partition("/")
    made = {
        "transformers": _transformers, "vllm": _vllm, "sglang": _sglang, "openvino": _openvino,
        "llama_cpp": _llama_cpp, "speculators": _speculators,
    }.get(engine)  # fmt: skip
    fits = {
        "transformers": layout == "lm/transformers",
        "vllm": family in METHODS and form in ("transformers", "vllm", "original", "speculators"),
        "sglang": family in SGLANG and form in ("transformers", "vllm"),
        "openvino": layout in ("lm/transformers", "eagle3/vllm"),
        "llama_cpp": layout == "lm/gguf",
        "speculators": layout == "eagle3/speculators",
    }
    if made is None or not fits[engine]:
        raise ValueError(
            f"there is no snippet for {engine} with a drafter in the layout {layout!r}"
        )
    return made(family, draft_length)


def named(code: str, target: str, drafter: str) -> str:
    """A snippet for this target and drafter: Hub ids or folders; owner/name/folder is a folder of a
    Hub repository, which is then fetched."""
    fetched = ""
    for word, place in (("TARGET", target), ("DRAFTER", drafter)):
        said = json.dumps(place)
        if f'"{word}"' in code and (part := PART.fullmatch(place)):
            said = f"{word.lower()}_folder"
            inside = f'snapshot_download("{part[1]}", allow_patterns="{part[2]}/*") + "/{part[2]}"'
            fetched += f"{said} = {inside}\n"
        code = code.replace(f'"{word}"', said)
    if not fetched:
        return code
    return f"from huggingface_hub import snapshot_download\n{code}".replace(
        "\n\n", f"\n\n{fetched}\n", 1
    )


def _transformers(family: str, draft_length: int) -> str:
    """Assisted generation; the draft length stands in the drafter's generation_config.json."""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DRAFTER")
target = AutoModelForCausalLM.from_pretrained("TARGET", dtype="auto")
drafter = AutoModelForCausalLM.from_pretrained("DRAFTER", dtype="auto")
inputs = tokenizer.apply_chat_template(
    {QUESTION},
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
done = target.generate(**inputs, assistant_model=drafter, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(done[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _vllm(family: str, draft_length: int) -> str:
    return f"""from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        "TARGET",
        speculative_config={{
            "method": "{METHODS[family]}",
            "model": "DRAFTER",
            "num_speculative_tokens": {draft_length},
        }},
    )
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (done,) = llm.chat({QUESTION}, greedy)
    print(done.outputs[0].text)
"""


def _openvino(family: str, draft_length: int) -> str:
    return openvino_snippet.code(family, draft_length, "Hello! How are you?")


def _llama_cpp(family: str, draft_length: int) -> str:
    """With llama-cpp-python's own loop, whose drafter is any function of the tokens so far."""
    return f"""import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaDraftModel


class Drafter(LlamaDraftModel):
    def __init__(self, file):
        self.model = Llama(file, n_ctx=2048, verbose=False)

    def __call__(self, input_ids, /, **kwargs):
        guesses = self.model.generate(input_ids.tolist(), temp=0.0)
        return np.array([next(guesses) for _ in range({draft_length})], dtype=np.intc)


# target.gguf: the target, made by llama.cpp's convert_hf_to_gguf.py
drafter = Drafter("DRAFTER" + "/model.gguf")
target = Llama("target.gguf", draft_model=drafter, n_ctx=2048, logits_all=True, verbose=False)
done = target.create_chat_completion(
    {QUESTION},
    temperature=0.0,
    max_tokens=64,
)
print(done["choices"][0]["message"]["content"])
"""


def _speculators(family: str, draft_length: int) -> str:
    """It trains such drafters and serves none."""
    return """from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig

config = Eagle3SpeculatorConfig.from_pretrained("DRAFTER")
config.speculators_config.verifier.name_or_path = "TARGET"
drafter = Eagle3DraftModel.from_pretrained("DRAFTER", config=config)
print(drafter)
"""


def _sglang(family: str, draft_length: int) -> str:
    """A chain: one token a step, and the target's own besides."""
    return f"""from sglang import Engine
from transformers import AutoTokenizer

if __name__ == "__main__":
    engine = Engine(
        model_path="TARGET",
        speculative_algorithm="{SGLANG[family]}",
        speculative_draft_model_path="DRAFTER",
        speculative_num_steps={draft_length},
        speculative_eagle_topk=1,
        speculative_num_draft_tokens={draft_length + 1},
    )
    tokenizer = AutoTokenizer.from_pretrained("TARGET")
    question = tokenizer.apply_chat_template(
        {QUESTION},
        add_generation_prompt=True,
        tokenize=False,
    )
    done = engine.generate(question, {{"temperature": 0, "max_new_tokens": 64}})
    print(done["text"])
"""
