"""The code that a card shows for each engine; the stage `serve` runs the same text, with folders in
the place of names."""

import re

from eval.engines import openvino_snippet

METHODS = {"lm": "draft_model", "medusa": "medusa", "eagle": "eagle", "eagle3": "eagle3"}  # vLLM's
SGLANG = {"lm": "STANDALONE", "eagle": "EAGLE", "eagle3": "EAGLE3"}
PART = re.compile(r"([\w.-]+/[\w.-]+)/([\w.-]+)")  # owner/name/folder: a folder of a repository
QUESTION = '[{"role": "user", "content": "Hello! How are you?"}]'


def snippet(engine: str, layout: str, target: str, drafter: str, draft_length: int) -> str:
    """Python that needs nothing but the engine, asks a question and prints the answer.

    layout: FAMILY/FORMAT as in export.json: lm/transformers, medusa/vllm, eagle3/speculators, ...
    target, drafter: Hub ids or folders; owner/name/folder is a folder of a Hub repository. Raises
    ValueError for an engine that cannot serve the layout.
    """
    family, _, form = layout.partition("/")
    made = {
        "transformers": _transformers, "vllm": _vllm, "sglang": _sglang, "openvino": _openvino,
    }.get(engine)  # fmt: skip
    fits = {
        "transformers": layout == "lm/transformers",
        "vllm": family in METHODS and form in ("transformers", "vllm", "original", "speculators"),
        "sglang": family in SGLANG and form in ("transformers", "vllm"),
        "openvino": layout in ("lm/transformers", "eagle3/vllm"),
    }
    if made is None or not fits[engine]:
        raise ValueError(
            f"there is no snippet for {engine} with a drafter in the layout {layout!r}"
        )
    part = PART.fullmatch(drafter)
    if part is None:
        return made(family, f'"{target}"', f'"{drafter}"', draft_length)
    inside = f'snapshot_download("{part[1]}", allow_patterns="{part[2]}/*") + "/{part[2]}"'
    code = made(family, f'"{target}"', "folder", draft_length)
    return f"from huggingface_hub import snapshot_download\n{code}".replace(
        "\n\n", f"\n\nfolder = {inside}\n\n", 1
    )


def _transformers(family: str, target: str, drafter: str, draft_length: int) -> str:
    """Assisted generation; the draft length stands in the drafter's generation_config.json."""
    return f"""from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({drafter})
target = AutoModelForCausalLM.from_pretrained({target}, dtype="auto")
drafter = AutoModelForCausalLM.from_pretrained({drafter}, dtype="auto")
inputs = tokenizer.apply_chat_template(
    {QUESTION},
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
done = target.generate(**inputs, assistant_model=drafter, do_sample=False, max_new_tokens=64)
print(tokenizer.decode(done[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def _vllm(family: str, target: str, drafter: str, draft_length: int) -> str:
    return f"""from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(
        {target},
        speculative_config={{
            "method": "{METHODS[family]}",
            "model": {drafter},
            "num_speculative_tokens": {draft_length},
        }},
    )
    greedy = SamplingParams(temperature=0, max_tokens=64)
    (done,) = llm.chat({QUESTION}, greedy)
    print(done.outputs[0].text)
"""


def _openvino(family: str, target: str, drafter: str, draft_length: int) -> str:
    return openvino_snippet.code(family, target, drafter, draft_length, "Hello! How are you?")


def _sglang(family: str, target: str, drafter: str, draft_length: int) -> str:
    """A chain: one token a step, and the target's own besides."""
    return f"""from sglang import Engine
from transformers import AutoTokenizer

if __name__ == "__main__":
    engine = Engine(
        model_path={target},
        speculative_algorithm="{SGLANG[family]}",
        speculative_draft_model_path={drafter},
        speculative_num_steps={draft_length},
        speculative_eagle_topk=1,
        speculative_num_draft_tokens={draft_length + 1},
    )
    tokenizer = AutoTokenizer.from_pretrained({target})
    question = tokenizer.apply_chat_template(
        {QUESTION},
        add_generation_prompt=True,
        tokenize=False,
    )
    done = engine.generate(question, {{"temperature": 0, "max_new_tokens": 64}})
    print(done["text"])
"""
