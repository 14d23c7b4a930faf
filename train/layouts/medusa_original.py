"""Layout `original` of the family medusa: FasterDecoding/Medusa's, version 2, as safetensors.

`{head}.{block}.linear.weight` and `.bias`, and `{head}.{blocks}.weight` for the output matrix; its
trainer writes them so to medusa_lm_head.safetensors, its loader opens medusa_lm_head.pt, a pickle,
which is not written here. vLLM reads the old names too, with the sizes and `medusa_fc_bias` that
are written here beside the four settings of the original.

Shapes: T tokens, D the target's width, V vocabulary.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from decoding.target import Shape, Target
from drafters.base import Trained
from drafters.files import write_json
from drafters.medusa import Medusa
from train.layouts import files
from train.layouts.given import Facts, Prompt, output_matrix, same
from train.layouts.medusa_vllm import adapter

METHOD, ENGINES = "medusa", ("vllm",)
FILE, VERSION = "medusa_lm_head.safetensors", "2"


def fits(config: Mapping[str, Any], names: set[str]) -> bool:
    """Whether this is the layout of a folder with this config.json."""
    return "medusa_num_heads" in config


def write(drafter: Trained, folder: Path, facts: Facts) -> list[str]:
    """Writes the heads, each with a matrix of its own; returns notes."""
    assert isinstance(drafter, Medusa)
    count, layers = len(drafter.blocks), len(drafter.blocks[0].layers)
    own = facts.stored(drafter.state_dict())
    tensors = {}
    for i in range(count):
        for j in range(layers):
            for kind in ("weight", "bias"):
                tensors[f"{i}.{j}.linear.{kind}"] = own[f"blocks.{i}.layers.{j}.{kind}"]
        mine = own.get(f"lm_heads.{i}.weight")
        matrix = output_matrix(facts.borrowed.target) if mine is None else mine
        tensors[f"{i}.{layers}.weight"] = matrix
    files.save(folder, f"medusa/original {VERSION}", tensors, FILE)
    write_json(folder / "config.json", {
        "medusa_num_heads": count,
        "medusa_num_layers": layers,
        "base_model_name_or_path": facts.base_model,
        "version": VERSION,
        "layout": "FasterDecoding/Medusa",
        "hidden_size": drafter.shape.hidden_size,
        "vocab_size": drafter.shape.vocab_size,
        "medusa_fc_bias": True,
        "dtype": str(tensors["0.0.linear.weight"].dtype).removeprefix("torch."),
    })  # fmt: skip
    notes = [
        'vLLM must be told "method": "medusa" of this layout',
        "Medusa's own loader opens medusa_lm_head.pt, a pickle, which is not written",
    ]
    if layers > 1:
        notes.append("Medusa's own code has one block for all layers of a head: it cannot run this")
    if not facts.base_model:
        notes.append("base_model_name_or_path is null: name the target there")
    return notes + adapter(drafter, folder)


def read(folder: Path, shape: Shape, target: Target | None = None) -> Medusa:
    """The heads of a folder; with a target, matrices that are all the target's own are shared
    again. Raises ValueError if a tensor is missing, left over or of another shape."""
    config, saved = files.config(folder), files.tensors(folder)
    count, layers = config.get("medusa_num_heads"), config.get("medusa_num_layers", 1)
    if not (isinstance(count, int) and isinstance(layers, int) and min(count, layers) > 0):
        raise ValueError(
            f"{folder / 'config.json'} has medusa_num_heads {count!r} and medusa_num_layers "
            f"{layers!r}; expected how many heads there are and how many blocks each has"
        )
    mine = {_ours(name, layers): tensor for name, tensor in saved.items()}
    heads = [mine.get(f"lm_heads.{i}.weight") for i in range(count)]
    if target is not None and all(h is not None for h in heads):
        matrix = output_matrix(target)
        if all(same(matrix, head) for head in heads if head is not None):
            mine = {k: v for k, v in mine.items() if not k.startswith("lm_heads.")}
    own = any(name.startswith("lm_heads.") for name in mine)
    drafter = Medusa(shape, heads=count, layers=layers, head="own" if own else "shared")
    files.fill(drafter, mine, folder)
    return drafter.eval()


def _ours(name: str, layers: int) -> str:
    """Our name of one of their tensors; an unknown one stays what it is."""
    if block := re.fullmatch(r"(?:medusa_head\.)?(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        return "blocks.{}.layers.{}.{}".format(*block.groups())
    head = re.fullmatch(r"(?:medusa_head\.)?(\d+)\.(\d+)\.weight", name)
    return f"lm_heads.{head[1]}.weight" if head and int(head[2]) == layers else name


def logits(folder: Path, prompt: Prompt, facts: Facts, depth: int) -> list[Tensor]:
    """What the original's heads give of the target's last states, [T, V] each."""
    config = files.config(folder)
    weights = {name: tensor.float() for name, tensor in files.tensors(folder).items()}
    layers, found = config["medusa_num_layers"], []
    for i in range(config["medusa_num_heads"]):
        x_TD = prompt.states_LTD[-1]
        for j in range(layers):
            block = f"{i}.{j}.linear"
            x_TD = x_TD + F.silu(
                F.linear(x_TD, weights[f"{block}.weight"], weights[f"{block}.bias"])
            )
        found.append(x_TD @ weights[f"{i}.{layers}.weight"].T)
    return found
