"""Layout `transformers` of the family lm: a plain Hugging Face causal LM.

Read by transformers (`assistant_model`), vLLM (method draft_model), SGLang (STANDALONE), optimum
(for OpenVINO) and llama.cpp's converter. vLLM wants exactly the target's `vocab_size`; transformers
reads the draft length from the drafter's own generation_config.json.

Shapes: T tokens, V vocabulary.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained, cast
from drafters.lm import LM
from train.layouts import files
from train.layouts.given import PATHS, Facts, Prompt

METHOD, ENGINES = "draft_model", ("transformers", "vllm", "openvino", "sglang")


def fits(config: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is the layout of a folder with this config.json and tensors of these names."""
    causal = any(str(a).endswith("ForCausalLM") for a in config.get("architectures") or [])
    return causal and "fc.weight" not in names and "draft_vocab_size" not in config


def write(drafter: Trained, folder: Path, facts: Facts) -> list[str]:
    """Writes the model with the target's special tokens and the draft length that was measured.
    Returns notes. Raises ValueError if the vocabularies differ."""
    from transformers import GenerationConfig

    assert isinstance(drafter, LM)
    model = copy.deepcopy(drafter.model)
    if model.config.vocab_size != facts.shape.vocab_size:
        raise ValueError(
            f"the drafter has {model.config.vocab_size} tokens and the target "
            f"{facts.shape.vocab_size}: engines want them equal; train the drafter for this target"
        )
    if facts.dtype is not None:
        model.config.dtype = cast(model, facts.dtype).dtype
    model.config.update(facts.token_ids)
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_assistant_tokens=facts.draft_length,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=facts.stop_below,
        **facts.token_ids,
    )
    model.save_pretrained(folder)
    return [
        PATHS,
        "vLLM takes the draft length from num_speculative_tokens and has no stop below a "
        "probability; transformers reads both from generation_config.json",
    ]


def read(folder: Path, shape: Shape, target: Target | None = None) -> LM:
    """The LM of a folder. Raises ValueError if a tensor is missing, left over or of another shape,
    the weights are no safetensors, or the vocabulary is not the target's."""
    files.names(folder)  # raises where transformers would go on to open a pickle
    drafter = LM(shape, checkpoint=str(folder))
    drafter.read(folder)
    return drafter.eval()


def logits(folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """What transformers' own model gives to guess each next token, [T - 1, V]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    with torch.no_grad():
        return [model(prompt.ids_T[None]).logits[0, :-1]]
