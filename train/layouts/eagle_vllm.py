"""Layout `vllm` of the family eagle: EAGLE-1 as vLLM 0.32 reads it (models/llama_eagle.py).

vLLM's fc has no bias and its layer no input norm; embedding and output matrix are the target's own
where the file has none. SGLang's fc has a bias, which is written as zero.

Shapes: T tokens, D the target's width, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained
from drafters.eagle import Eagle
from drafters.files import write_json
from train.layouts import files, llama, plain
from train.layouts.given import Facts, Prompt, embedding, output_matrix, same

METHOD, ENGINES = "eagle", ("vllm", "sglang")
BORROWED = {"embed_tokens.weight": embedding, "lm_head.weight": output_matrix}


def fits(config: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is the layout of a folder with tensors of these names; its config.json looks
    like that of any Llama."""
    return {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= names and (
        "layers.0.hidden_norm.weight" not in names
    )


def write(drafter: Trained, folder: Path, facts: Facts) -> list[str]:
    """Writes projection and layer; returns notes."""
    assert isinstance(drafter, Eagle)
    tensors = facts.stored(drafter.written())
    files.save(folder, "eagle/vllm", tensors)
    dtype = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    said = llama.settings(drafter.config())
    write_json(
        folder / "config.json", {"architectures": ["LlamaForCausalLM"]} | said | {"dtype": dtype}
    )
    return ["SGLang knows this drafter as architectures: [LlamaForCausalLMEagle]"]


def read(folder: Path, shape: Shape, target: Target | None = None) -> Eagle:
    """The drafter of a folder. Raises ValueError if a tensor is missing, left over or of another
    shape, its fc has a bias, or it has an embedding or head other than the target's."""
    config, saved = files.config(folder), files.tensors(folder)
    llama.require(config, shape, folder)
    bias = saved.pop("fc.bias", None)
    if bias is not None and bool(bias.any()):
        raise ValueError(
            f"{folder} has an fc.bias other than zero, which vLLM drops and this family does not "
            "have; choose a drafter that was trained without"
        )
    only_borrowed(saved, target, folder, tuple(BORROWED))
    drafter = Eagle(shape)
    files.fill(drafter, saved, folder)
    return drafter.eval()


def only_borrowed(
    saved: dict[str, Tensor], target: Target | None, folder: Path, names: tuple[str, ...]
) -> None:
    """Takes out of `saved` those matrices of the target's that some files repeat. Raises ValueError
    if one is not the target's, or there is no target to compare it with."""
    for name in [name for name in names if name in saved]:
        if target is None:
            raise ValueError(f"{folder} holds {name}: name the target that it was copied from")
        if not same(BORROWED[name](target), saved.pop(name)):
            raise ValueError(
                f"{folder} has an {name} other than that of {target.name}, which this family "
                "borrows; choose the target that it was made for"
            )


def logits(folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """What vLLM computes to guess each token, [rows, V] for each of `depth` guesses."""
    config = files.config(folder)
    weights = {name: tensor.float() for name, tensor in files.tensors(folder).items()}
    layer = plain.Layer.of(weights, "layers.0.", config)

    def step(stream_SD: Tensor, embed_SD: Tensor) -> tuple[Tensor, Tensor]:
        x_SD = torch.cat([embed_SD, stream_SD], dim=-1) @ weights["fc.weight"].T
        out_SD = layer(x_SD, x_SD)
        return out_SD, out_SD

    lent = facts.borrowed
    embed_TD = lent.embed(prompt.ids_T)
    found = plain.guesses(prompt.states_LTD[-1], embed_TD, depth, step)
    return [rows @ lent.head_VD.T for rows in found]
